"""Quality of each cache policy on the real model, in the static setting and for several chunk sizes.

    python benchmarks/kv_quality.py            # writes benchmarks/results/kv_quality.{json,md}

Static: all layers, every token but four sinks is compressed before any query sees it. Accumulated: as the text would be
generated, with the default windows, read in chunks of different sizes: a chunk is exact to itself, so larger chunks hide
part of the loss, and dense caches do not care. 1,024 tokens of Moby-Dick, SmolLM2-135M, KL divergence to no compression.
"""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

import memjax as mj
from memjax.data import NOVEL
from memjax.evaluate.compare import Row, Setup, compare
from memjax.evaluate.markdown import markdown
from memjax.evaluate.report import save_json

RESULTS = Path(__file__).parent / "results"
TOKENS = 1024
PLAIN = "centre=none,balance=off"  # without the front end
PLAINS = (f"int8({PLAIN})", f"fp8({PLAIN})", f"int4({PLAIN})", f"int4(rotate=true,{PLAIN})")
CODECS = (*PLAINS, "int8", "fp8", "int4", "int4(rotate=true)")
ACCUMULATED = ("dense", "int8", "int4", "int4(rotate=true)", "streaming(4,252)")
CHUNKS = (32, 256)


def measure(console: Console) -> dict[str, list[Row]]:
    """Rows of every setting, by its title."""
    model = mj.load("smollm2-135m")
    tokens = model.tokenizer.encode(NOVEL.read())[:TOKENS]
    static = [mj.policy(f"{codec}+protect(4,0)") for codec in CODECS]
    found = {"Static setting": compare(model, tokens, static, Setup(chunk=256, decode_tokens=0, static=True))}
    policies = [mj.policy(text) for text in ACCUMULATED]
    for chunk in CHUNKS:
        console.print(f"chunks of {chunk}")
        rows = compare(model, tokens, policies, Setup(chunk=chunk, decode_tokens=0))
        found[f"Accumulated setting, chunks of {chunk} tokens"] = rows
    return found


def main() -> None:
    console = Console()
    found = measure(console)
    RESULTS.mkdir(exist_ok=True)
    save_json([row for rows in found.values() for row in rows], RESULTS / "kv_quality.json")
    first = next(iter(found.values()))[0]
    lines = [
        f"# Quality of cache policies, {first['model']}, {TOKENS} tokens of Moby-Dick",
        "",
        f"Device {first['device']}, JAX {first['jax']}, weights float32, dense parts {first['cache_dtype']}. "
        "Written by `benchmarks/kv_quality.py`.",
    ]
    for title, rows in found.items():
        lines += ["", f"## {title}", "", markdown(rows)]
    (RESULTS / "kv_quality.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    console.print(f"wrote {RESULTS / 'kv_quality.md'}")


if __name__ == "__main__":
    main()

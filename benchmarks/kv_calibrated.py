"""TurboQuant with a calibration file and without, in the static setting: balance by covariances of other text, or by channels.

    python benchmarks/kv_calibrated.py

The file is measured on later parts of the two packaged texts than those that are evaluated; means are each prompt's own either
way. Writes results/kv_calibrated.{json,md}.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import memjax as mj
from memjax.data import CODE, NOVEL
from memjax.evaluate.calibrate import calibrate
from memjax.evaluate.markdown import evaluation_markdown
from memjax.evaluate.report import save_json
from memjax.evaluate.suite import Evaluation, evaluate

RESULTS = Path(__file__).parent / "results"
PARTS = ((NOVEL, 8000, 11_000), (CODE, 4000, 7000))  # tokens from, and to


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    arguments = parser.parse_args()
    model = mj.load(arguments.model)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/calibration.safetensors"
        calibrate(model, [model.tokenizer.encode(text.read())[begin:end] for text, begin, end in PARTS], file)
        policies = [f"turboquant({b},{b}{more})" for b in arguments.bits for more in ("", f",calibration={file}")]
        asked = Evaluation("kv", tuple(policies), arguments.tokens, "static", retrieval_tokens=0, chunk=256)
        result = evaluate(model, asked, lambda done: print(done, flush=True))
        result["calibrated_on"] = [{"text": text.name, "from": begin, "to": end} for text, begin, end in PARTS]
        report = evaluation_markdown(result)
    for row in [*result["rows"], *result["pairs"]]:
        row |= {name: _bare(text, file) for name, text in row.items() if isinstance(text, str)}
    save_json(result, RESULTS / "kv_calibrated.json")
    (RESULTS / "kv_calibrated.md").write_text(_bare(report, file), encoding="utf-8")


def _bare(text: str, file: str) -> str:
    """Without the name of a folder that is gone."""
    return text.replace(file, Path(file).name)


if __name__ == "__main__":
    main()

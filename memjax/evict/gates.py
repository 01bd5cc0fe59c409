"""Gates files: how much each kv head of a model retrieves, in [0, 1], for ``memjax.evict.duo``.

Only their order matters. ``memjax gates`` measures an estimate (``memjax.evaluate.gates``); gates that were trained, as those
that DuoAttention's authors publish as a table of layers x kv heads, are written into the same file by hand:

    {"memjax": "gates", "version": 1, "fingerprint": "", "how": "trained, from ...", "layers": [[0.91, 0.07, 0.33], ...]}

``layers`` has a list for each layer of the model with a number for each of its kv heads (none for a layer without attention).
``fingerprint`` is the model's (``LanguageModel.fingerprint``); "": it is not checked, and the numbers of layers and heads have
to do. ``how`` says where the gates come from, for people.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from memjax import measured

_MEASURE = "measure this model with `memjax gates --model MODEL --out FILE` and say file=FILE"
KIND = measured.Kind("gates", 1, "gates_smollm2_135m.json", _MEASURE)


@dataclass(frozen=True)
class Gates:
    """What a file says.

    Attributes:
      fingerprint: of the model; "": not known.
      how: they were found.
      layers: the gates of each layer's kv heads.

    Raises:
      ValueError: no gates, or one outside 0..1.
    """

    fingerprint: str
    how: str
    layers: tuple[tuple[float, ...], ...]

    def __post_init__(self):
        if not any(self.layers):
            raise ValueError("layers must be a list of gates for each layer, got none")
        for layer, row in enumerate(self.layers):
            for head, gate in enumerate(row):
                if isinstance(gate, bool) or not isinstance(gate, int | float) or not 0 <= gate <= 1:
                    raise ValueError(f"layers must hold gates between 0 and 1, got {gate!r} for head {head} of layer {layer}")


def save_gates(path: str | Path, gates: Gates) -> None:
    """Writes a gates file, four significant digits of each gate."""
    record = KIND.head() | {"fingerprint": gates.fingerprint, "how": gates.how}
    layers = [[float(f"{gate:.4g}") for gate in row] for row in gates.layers]
    lines = ",\n".join(f"  {json.dumps(row)}" for row in layers)
    head = json.dumps(record, indent=1).removesuffix("\n}")
    Path(path).write_text(f'{head},\n "layers": [\n{lines}\n ]\n}}\n', encoding="utf-8")


def load_gates(path: str | Path = "") -> Gates:
    """Reads a gates file; "": the one of smollm2-135m that memjax brings along.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that is too large, damaged, of another kind or version, or with gates outside 0..1.
    """
    return measured.load(KIND, path, _parse)


def _parse(record: dict) -> Gates:
    return Gates(str(record["fingerprint"]), str(record["how"]), tuple(map(tuple, record["layers"])))


def check_gates(path: str, layers: int, fingerprint: str | None = None) -> Gates:
    """The gates of ``path``, which have to be those of this model.

    Args:
      layers: how many the model has.
      fingerprint: the model's; None: not known.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file that cannot be read, or of another model.
    """
    gates = load_gates(path)
    known = fingerprint if gates.fingerprint else None
    measured.check_model(KIND, path, (gates.fingerprint, len(gates.layers)), layers, known)
    return gates

"""A run on disk: weights, optimizer state and step through Orbax; what is trained, and the losses, as JSON beside them.

    folder/run.json      configuration, plan and the corpus's digest: what a resumed run has to share
    folder/curve.json    losses of all steps up to the newest state
    folder/states/N/     Orbax: the state after N steps, of the newest two
    folder/model/        the finished model, see ``memjax.models.checkpoint``
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from memjax.models.checkpoint import is_saved_model, save_model
from memjax.models.config import ModelConfig
from memjax.models.safetensors import read_json
from memjax.train.data import Corpus, byte_tokenizer
from memjax.train.loop import Curve, Plan, TrainState

_RUN, _CURVE, _STATES, _MODEL = "run.json", "curve.json", "states", "model"
_FORMAT, _KEPT = 1, 2


class RunFolder:
    """The folder of one run.

    Args:
      resume: go on from what is there; False: the folder has to be new or empty.

    Raises:
      ValueError: the folder is not empty and ``resume`` is False, holds no run, or one of another configuration, plan or
        corpus, named.
    """

    def __init__(self, folder: str | Path, config: ModelConfig, plan: Plan, corpus: Corpus, *, resume: bool = False):
        self.path = Path(folder).absolute()
        described = {"format": _FORMAT, "config": config.to_json(), "plan": dataclasses.asdict(plan), "text": corpus.digest}
        described = json.loads(json.dumps(described))
        if self.path.exists() and (not self.path.is_dir() or any(self.path.iterdir())):
            if not resume:
                raise ValueError(f"{self.path} is not empty: resume the run in it, or give a new folder")
            _check_same(self.path, described)
            return
        self.path.mkdir(parents=True, exist_ok=True)
        (self.path / _RUN).write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")

    @property
    def model(self) -> Path:
        """Where the finished model is."""
        return self.path / _MODEL

    def steps(self) -> list[int]:
        """Of the states that are there, ascending. Orbax names a folder so only when it is complete."""
        names = [each.name for each in (self.path / _STATES).glob("*") if each.is_dir()]
        return sorted(int(name) for name in names if name.isdecimal())

    def save(self, state: TrainState, curve: Curve) -> None:
        """Writes the losses, then the state, then removes states that are older than the newest two."""
        step = int(state.step)
        _replace(self.path / _CURVE, json.dumps(dataclasses.asdict(curve)) + "\n")
        if step not in self.steps():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self.path / _STATES / str(step), _by_name(state))
        for old in self.steps()[:-_KEPT]:
            shutil.rmtree(self.path / _STATES / str(old))

    def restore(self, state: TrainState, curve: Curve) -> tuple[TrainState, Curve]:
        """The newest state and its losses, or what is passed in where there is none yet.

        Raises:
          ValueError: a state that is damaged.
        """
        steps = self.steps()
        if not steps:
            return state, curve
        named = _by_name(state)
        target = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for name, leaf in named.items()}
        try:
            with ocp.StandardCheckpointer() as checkpointer:
                found = checkpointer.restore(self.path / _STATES / str(steps[-1]), target)
        except (ValueError, KeyError, FileNotFoundError) as error:
            raise ValueError(f"the state after {steps[-1]} steps in {self.path} is damaged: {error}") from error
        restored = jax.tree.unflatten(jax.tree.structure(state), [found[name] for name in named])
        return restored, _read_curve(self.path / _CURVE, steps[-1])

    def finish(self, state: TrainState) -> Path:
        """Saves the model, with a tokenizer of bytes, unless it is there."""
        if not is_saved_model(self.model):
            shutil.rmtree(self.model, ignore_errors=True)  # what an interrupted save has left
            save_model(self.model, state.decoder, byte_tokenizer())
        return self.model


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _check_same(folder: Path, described: dict[str, Any]) -> None:
    if not (folder / _RUN).is_file():
        raise ValueError(f"{folder} is not empty and holds no run of memjax train (no {_RUN}): give another folder")
    found, wanted = _flat(read_json(folder / _RUN)), _flat(described)
    for name in [*wanted, *found]:
        if found.get(name) != wanted.get(name):
            raise ValueError(
                f"{folder} holds another run: its {name} is {found.get(name)!r}, this one's is {wanted.get(name)!r}; "
                "give the same options, or a new folder"
            )


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict | list):
        return {name: tree}
    items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return {key: value for part, each in items for key, value in _flat(each, f"{name}.{part}".strip(".")).items()}


def _read_curve(path: Path, step: int) -> Curve:
    """The losses of the first ``step`` steps: those of a state that was never finished are left out."""
    try:
        found = read_json(path)
        curve = Curve(found["train"][:step], [(n, loss) for n, loss in found["validation"] if n <= step], found["seconds"])
    except (KeyError, TypeError, FileNotFoundError) as error:
        raise ValueError(f"{path} does not hold the losses of a run: {error}") from error
    if len(curve.train) != step:
        raise ValueError(f"{path} holds {len(curve.train)} losses, but the newest state is that of {step} steps")
    return curve


def _replace(path: Path, text: str) -> None:
    """Writes a file so that an interruption leaves the old one or the new one."""
    beside = path.with_suffix(".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)

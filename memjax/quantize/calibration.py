"""Calibration files: the better form of the front end's balance, by covariances, measured once per model on texts.

With S_k = E[y y^T] of the centred keys and S_q = E[q q^T] of the queries that meet them, both shrunk towards their diagonals,
the basis A in which both are the same diagonal,

    A^T S_k A = A^-1 S_q A^-T = D:    S_k = L L^T,  L^T S_q L = U W U^T,  D = W^1/2,  A = L^-T U D^1/2

(balanced truncation). Keys are coded as y A, queries are q A^-T; values likewise, with the Gram matrix of the output
projection in place of S_q. Means are a prompt's own, from its first tokens: those of other texts cost more than they spare
(SmolLM2-135M, ``turboquant(3,3)``, static: KL .048 with own means, .057 with the file's). A file is a safetensors file with
the model's fingerprint in its metadata.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from memjax.cache.spec import CacheSpec
from memjax.quantize.front import Basis, FrontEnd, empty_basis

SHRINK = 0.05
_NAMES = ("k_balance", "k_inverse", "v_balance", "v_inverse")


def balanced_basis(spread: np.ndarray, weight: np.ndarray, shrink: float = SHRINK) -> tuple[np.ndarray, np.ndarray]:
    """A and its inverse, float64 [H, H], for S_k ``spread`` and S_q ``weight``.

    Raises:
      ValueError: a matrix that is not finite.

    >>> a, inverse = balanced_basis(np.diag([4.0, 1.0]), np.eye(2), shrink=0.0)
    >>> bool(np.allclose(a.T @ np.diag([4.0, 1.0]) @ a, inverse @ inverse.T))
    True
    """
    if not (np.isfinite(spread).all() and np.isfinite(weight).all()):
        raise ValueError("second moments that are not finite cannot be balanced: look for NaN in the model's activations")
    spread, weight = (_shrunk(x, shrink) for x in (spread, weight))
    lower = np.linalg.cholesky(spread)
    values, vectors = np.linalg.eigh(lower.T @ weight @ lower)
    root = np.maximum(values, 0.0) ** 0.25 + 1e-12
    basis = np.linalg.solve(lower.T, vectors) * root
    return basis, (vectors / root).T @ lower.T


def _shrunk(x: np.ndarray, shrink: float) -> np.ndarray:
    diagonal = np.maximum(np.diag(x), 1e-6 * np.trace(x) / len(x) + 1e-30)
    return (1 - shrink) * x + np.diag(diagonal - (1 - shrink) * np.diag(x))


def save_calibration(path: str | Path, layers: list[dict[str, np.ndarray]], facts: dict[str, object]) -> None:
    """Writes the matrices [K, H, H] of every layer, and what they come from."""
    tensors = {f"{i}.{name}": np.float32(layer[name]) for i, layer in enumerate(layers) for name in _NAMES}
    save_file(tensors, str(path), metadata={"memjax": json.dumps({"layers": len(layers), **facts})})


def read_facts(path: str | Path) -> dict[str, object]:
    """What a calibration file says of itself: fingerprint, layers, tokens, shrink.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of another kind, or damaged.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no calibration file {path}: write one with `memjax calibrate`")
    try:
        with safe_open(str(path), framework="numpy") as file:
            text = (file.metadata() or {}).get("memjax")
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a calibration file: {error}") from error
    if text is None:
        raise ValueError(f"{path} is a safetensors file, but none that `memjax calibrate` wrote")
    return json.loads(text)


def check_fingerprint(path: str | Path, fingerprint: str) -> None:
    """Raises ValueError if a calibration file was measured on another model."""
    found = read_facts(path)["fingerprint"]
    if found != fingerprint:
        raise ValueError(
            f"{path} was calibrated on another model (fingerprint {found}, this one is {fingerprint}): write one for this "
            "model with `memjax calibrate`"
        )


def load_basis(path: str, spec: CacheSpec, layer: int) -> Basis:
    """The basis of one layer: matrices that are the same for every row, means still to be measured.

    Raises:
      FileNotFoundError: no such file.
      ValueError: a file of another kind, of a model with fewer layers or other shapes, or numbers that are not finite.
    """
    arrays = _read(path, Path(path).stat().st_mtime_ns if Path(path).is_file() else 0, layer)
    expected = (spec.kv_heads, spec.coded_dim, spec.coded_dim)
    for name, array in arrays.items():
        if array.shape != expected:
            raise ValueError(f"{path} has {name} {list(array.shape)} for layer {layer}, this layer needs {list(expected)}")
    matrices = {name: jnp.asarray(array)[None] for name, array in arrays.items()}
    return dataclasses.replace(empty_basis(FrontEnd(balance="off"), spec), **matrices)


@functools.lru_cache(maxsize=1024)
def _read(path: str, changed: int, layer: int) -> dict[str, np.ndarray]:
    del changed  # part of the key: a file that was written anew is read anew
    facts = read_facts(path)
    if layer >= facts["layers"]:
        raise ValueError(f"{path} holds {facts['layers']} layers, this model has a layer {layer}")
    with safe_open(path, framework="numpy") as file:
        found = {name: file.get_tensor(f"{layer}.{name}") for name in _NAMES}
    bad = [name for name, array in found.items() if not np.isfinite(array).all()]
    if bad:
        raise ValueError(f"{path} has numbers in {', '.join(bad)} of layer {layer} that are not finite")
    return found

"""Rotary embeddings as Hugging Face's config.json describes them, in the spellings of transformers 4 and 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from memjax.attention.rope import ROPE_KINDS, Rope
from memjax.models.fields import need

_OPTIONAL = ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor")
_OPTIONAL += ("mscale", "mscale_all_dim", "truncate")


def hf_rope(config: Mapping[str, Any], family: str, dim: int, longest: int, *, interleaved: bool = False) -> Rope:
    """One rope from either spelling: rope_parameters (transformers 5) or rope_theta + rope_scaling (4).

    Raises:
      ValueError: an unknown type, a missing key, or an option that is not supported.
    """
    new = config.get("rope_parameters")
    given = new if new is not None else config.get("rope_scaling") or {}
    if not isinstance(given, Mapping):
        raise ValueError(f"rope_parameters and rope_scaling must be objects, got {given!r}")
    kind = given.get("rope_type") or given.get("type") or "default"
    if kind not in ROPE_KINDS:
        raise ValueError(f"rope type {kind!r} is not supported; the supported ones are {', '.join(ROPE_KINDS)}")
    theta = given.get("rope_theta", config.get("rope_theta"))
    if theta is None:
        # Llama 1 and 2 were published before the key existed; anywhere else a guess would be silent garbage.
        if family != "llama" or new is not None:
            raise ValueError(f"the configuration of a {family} model lacks 'rope_theta'")
        theta = 10000.0
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ValueError("partial_rotary_factor other than 1 is not supported")
    original = longest
    if kind in ("llama3", "yarn", "longrope"):
        original = config.get("original_max_position_embeddings") or given.get(
            "original_max_position_embeddings", longest
        )
    factor = given.get("factor")
    if factor is None:
        if kind in ("linear", "dynamic", "llama3"):
            raise ValueError(f"rope type {kind!r} needs 'factor'")
        factor = longest / original
    chosen = {key: given[key] for key in _OPTIONAL if given.get(key) is not None}
    if kind == "longrope":
        chosen |= {key: tuple(map(float, need(given, key))) for key in ("short_factor", "long_factor")}
    return Rope(
        dim=dim,
        theta=float(theta),
        kind=kind,
        factor=float(factor),
        original_max_position=original,
        interleaved=interleaved,
        **chosen,
    )

"""Decode of multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): all query heads read one stream, once."""

from __future__ import annotations

from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.choose import Choice
from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode import choice as _choice
from memjax.pallas_kernels.decode import decode
from memjax.pallas_kernels.mla_decode.reference import mla_decode_reference
from memjax.pallas_kernels.slots import Positions

__all__ = ["choice", "mla_decode", "mla_decode_reference"]


def mla_decode(
    q_latent: Float[Array, "B M C"],
    q_rope: Float[Array, "B M E"],
    latent: Codes,
    rope: Codes,
    *,
    q_pos: Int[Array, "B M"],
    k_pos: Positions,
    scale: float,
    table: Int[Array, "B n"] | None = None,
    page: int | None = None,
    softcap: float | None = None,
    window: int | None = None,
    mass: bool = False,
    implementation: str | None = None,
    interpret: object = False,
):
    """Attention of absorbed queries over a latent cache.

    The up-projection of the keys is folded into the queries (q_latent = q_nope W_UK), that of the values into the output
    projection, so the cache is read as it is: ``decode`` with one kv head, the latent as keys *and* values and the rotary
    part as extra keys. The latent may be coded (rotated by the codec, with the queries rotated alike); the rotary part is
    dense, because quantizing it breaks models.

    Args:
      q_latent, q_rope: M rows, N query heads times the new tokens, head-major (row n T + t).
      latent: codes [B, 1, C, S] (with ``table``: pages [pages, 1, C, page]).
      rope: dense [B, 1, E, S].
      The others, results and errors as in ``decode``, without the axis of kv heads.
    """
    if rope.fmt != "dense":
        raise ValueError(f"mla_decode keeps the rotary part dense, got format {rope.fmt}")
    out, lse, *probabilities = decode(
        q_latent[:, None],
        latent,
        None,
        q_pos=q_pos,
        k_pos=k_pos,
        scale=scale,
        q_extra=q_rope[:, None],
        k_extra=rope,
        table=table,
        page=page,
        softcap=softcap,
        window=window,
        mass=mass,
        implementation=implementation,
        interpret=interpret,
    )
    return out[:, 0], lse[:, 0], *(p[:, 0] for p in probabilities)


def choice(q_latent, q_rope, latent: Codes, rope: Codes, *, implementation: str | None = None, **arrays) -> Choice:
    """What ``mla_decode`` would run for these arguments, and why."""
    del q_rope
    return _choice(q_latent, latent, None, implementation=implementation, k_extra=rope, **arrays)

"""Flash prefill: a chunk of new tokens per sequence against slots, dense or packed codes, mergeable by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import jax
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.choose import Choice, Target, choose
from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode import Centre, check_codes
from memjax.pallas_kernels.decode.xla import decode_xla
from memjax.pallas_kernels.merge import add_sink
from memjax.pallas_kernels.prefill import gpu, tpu
from memjax.pallas_kernels.prefill.reference import prefill_reference, row_positions
from memjax.pallas_kernels.sharding import over_mesh
from memjax.pallas_kernels.slots import Positions

__all__ = ["choice", "prefill", "prefill_reference"]


def prefill(
    q: Float[Array, "B K M H"],
    k: Codes,
    v: Codes | None,
    *,
    q_start: Int[Array, "B"],
    k_pos: Positions,
    groups: int,
    scale: float,
    q_extra: Float[Array, "B K M E"] | None = None,
    k_extra: Codes | None = None,
    centre: Centre | None = None,
    table: Int[Array, "B n"] | None = None,
    page: int | None = None,
    sink_logits: Float[Array, "K M"] | None = None,
    softcap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
    implementation: str | None = None,
    interpret: object = False,
) -> tuple[Float[Array, "B K M Hv"], Float[Array, "B K M"]]:
    """Causal attention of T new tokens against slots: themselves, their past, or a part of it.

    ``groups`` is G = N / K; row g T + t of a kv head is query head g of it, at position ``q_start + t``. Slots in the future
    of a query are invisible to it, so that a chunk against itself is causal and a chunk against its history sees all of it.
    Rows of padding at the end of a ragged chunk give what nobody should read.

    The other arguments, the results and the errors are ``decode``'s. Derivatives with respect to queries, dense keys and
    values and scales are those of the XLA path, recomputed, whatever runs forward.

    Source: FlashAttention-2 (arXiv 2307.08691).

    Raises:
      ValueError: shapes that do not fit, or a named implementation that cannot serve the case, with the reason.
    """
    if q.shape[2] % groups or q_start.shape != q.shape[:1]:
        raise ValueError(
            f"prefill needs rows in multiples of groups={groups} and q_start [{q.shape[0]}], got {q.shape[2]} rows and "
            f"q_start {list(q_start.shape)}"
        )
    check_codes("prefill", q, k, v, k_pos, q_extra, k_extra, None, table, page)
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "q_start": q_start,
        "k_pos": k_pos,
        "q_extra": q_extra,
        "k_extra": k_extra,
        "centre_weights": None if centre is None else centre.weights,
        "table": table,
    }
    frequencies = None if centre is None else centre.inv_freq
    static = {"scale": scale, "page": page, "softcap": softcap, "window": window, "recent": recent, "sinks": sinks}
    chosen = choose("prefill", implementation, _refusals(arrays | {"page": page}), bool(interpret)).implementation

    def with_centre(arrays: dict) -> dict:
        rest = {name: value for name, value in arrays.items() if name != "centre_weights"}
        weights = arrays["centre_weights"]
        return rest | {"centre": None if weights is None else Centre(weights, frequencies)}

    def plain(arrays: dict):
        rest = with_centre(arrays)
        q_pos = row_positions(rest.pop("q_start"), q.shape[2], groups)
        return decode_xla(**rest, q_pos=q_pos, **static)[:2]

    if chosen == "xla":
        run = plain
    elif chosen == "reference":
        run = lambda arrays: prefill_reference(**with_centre(arrays), groups=groups, **static)  # noqa: E731
    else:
        kernel = tpu.prefill_tpu if chosen == "tpu" else gpu.prefill_gpu

        def forward(arrays: dict):
            return kernel(**with_centre(arrays), groups=groups, interpret=interpret, **static)

        run = _differentiable(over_mesh(forward, arrays, _roles(table is not None), "bk"), plain)
    out, lse = run(arrays)
    return (out, lse) if sink_logits is None else add_sink((out, lse), sink_logits)


def choice(q, k: Codes, v: Codes | None, *, implementation: str | None = None, interpret: bool = False, **arguments) -> Choice:
    """What ``prefill`` would run for these arguments (arrays or ``jax.ShapeDtypeStruct``), and why."""
    return choose("prefill", implementation, _refusals({"q": q, "k": k, "v": v, **arguments}), interpret)


def _refusals(arguments: dict) -> dict[str, Callable[[Target], str | None]]:
    return {
        "reference": lambda on: None,
        "xla": lambda on: None,
        "tpu": lambda on: tpu.why_not(on, arguments),
        "gpu": lambda on: gpu.why_not(on, arguments),
    }


def _roles(paged: bool) -> dict[str, str]:
    codes = "-k" if paged else "bk"
    roles = {"q": "bk", "q_extra": "bk", "q_start": "b", "k_pos": "bk", "table": "b"}
    return roles | {"centre_weights": "bk", "k": codes, "v": codes, "k_extra": codes}


def _differentiable(forward: Callable, plain: Callable) -> Callable:
    """``forward`` with the derivative of ``plain``, which computes the same."""

    @jax.custom_vjp
    def call(arrays):
        return forward(arrays)

    def backward(arrays, cotangent):
        return jax.vjp(plain, arrays)[1](cotangent)

    call.defvjp(lambda arrays: (call(arrays), arrays), backward)
    return call

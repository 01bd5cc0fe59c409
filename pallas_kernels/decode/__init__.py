"""Flash decode: one or a few new queries per sequence against slots of packed codes, mergeable by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.pallas_kernels.choose import Choice, Target, choose
from memjax.pallas_kernels.codes import Codes
from memjax.pallas_kernels.decode import gpu, tpu
from memjax.pallas_kernels.decode.reference import Centre, decode_reference, gather_pages
from memjax.pallas_kernels.decode.xla import decode_xla
from memjax.pallas_kernels.merge import add_sink, merge, probability_mass
from memjax.pallas_kernels.sharding import over_mesh
from memjax.pallas_kernels.slots import Positions, Span

__all__ = [
    "Centre",
    "check_codes",
    "choice",
    "decode",
    "decode_reference",
    "decode_xla",
    "gather_pages",
    "merge",
    "probability_mass",
]


def decode(
    q: Float[Array, "B K M H"],
    k: Codes,
    v: Codes | None,
    *,
    q_pos: Int[Array, "B M"],
    k_pos: Positions,
    scale: float,
    q_extra: Float[Array, "B K M E"] | None = None,
    k_extra: Codes | None = None,
    bias: Float[Array, "B 1|K S"] | None = None,
    centre: Centre | None = None,
    table: Int[Array, "B n"] | None = None,
    page: int | None = None,
    sink_logits: Float[Array, "K M"] | None = None,
    softcap: float | None = None,
    window: int | None = None,
    recent: int | None = None,
    sinks: int = 0,
    mass: bool = False,
    logits: bool = False,
    implementation: str | None = None,
    interpret: object = False,
):
    """Softmax attention of M query rows per kv head over S slots of a cache, read as codes.

        logit = cap(scale (q . k + q_extra . k_extra + centre)) + bias,   cap(x) = softcap tanh(x / softcap)

    The M rows of a kv head are the G = N / K query heads that share it, times the new tokens: they share one read.

    Args:
      q: queries in the basis of the codes.
      k, v: codes [B, K, C, S] (with ``table``: pages [pages, K, C, page]). Keys and values may have different formats.
        ``v`` None: the values are the keys (the latent stream of multi-head latent attention).
      q_pos: position in the text of each query row. A row with a negative position sees nothing.
      k_pos: position of the token in each slot (negative: free), or a ``Span`` of consecutive ones.
      q_extra, k_extra: a second, dense part of query and key.
      bias: added to the logits of a slot, float32.
      centre: what the constant part of the keys adds, see ``Centre``.
      table: page numbers of each row, in order; S = n * page. Entries behind the row's last token are not read.
      page: slots of a page, if a block of the pool holds several: page n is part n % (block / page) of block
        n // (block / page), and ``k`` is [blocks, K, C, block]. For a TPU, whose rows of 128 lanes are what memory moves in,
        pages of 8 to 64 slots have to be stored so; each then costs the reading of 128 slots.
      sink_logits: a learned logit per row in the softmax's denominator (attention sinks of gpt-oss).
      window: sliding window of the model: a query sees the slots at a distance below it.
      recent, sinks: an evictor's window: what is at a distance >= recent is gone, but for positions below ``sinks``.
      mass: also return how much probability the rows of a kv head give to each slot, float32 [B, K, S].
      logits: also return the logits themselves, float32 [B, K, M, S], -1e30 or less where a row sees nothing: what mass takes
        where these slots are one part of several (``probability_mass`` with the log-sum-exp of all).
      implementation: None, ``pallas`` (the target's own kernel), ``reference``, ``xla``, ``tpu`` or ``gpu``.
      interpret: run a kernel in interpret mode: True, or what ``pallas_call`` takes as ``interpret``.

    Returns:
      Output float32 [B, K, M, Hv], log-sum-exp float32 [B, K, M], and what ``mass`` or ``logits`` asked for. A row that sees
      nothing gives zeros and -inf.

    Raises:
      ValueError: shapes that do not fit, or a named implementation that cannot serve the case, with the reason.
      NotImplementedError: a kernel is differentiated; ``reference`` and ``xla`` can be.

    Source: FlashAttention (arXiv 2205.14135), Flash-Decoding; scales on scores and probabilities as in KIVI's kernels.
    """
    arrays = {
        "q": q,
        "k": k,
        "v": v,
        "q_pos": q_pos,
        "k_pos": k_pos,
        "q_extra": q_extra,
        "k_extra": k_extra,
        "bias": bias,
        "centre_weights": None if centre is None else centre.weights,
        "table": table,
    }
    static = {"scale": scale, "page": page, "softcap": softcap, "window": window, "recent": recent, "sinks": sinks}
    frequencies = None if centre is None else centre.inv_freq
    if q_pos.shape != (q.shape[0], q.shape[2]):
        raise ValueError(f"decode needs q_pos [{q.shape[0]}, {q.shape[2]}], got {list(q_pos.shape)}")
    check_codes("decode", q, k, v, k_pos, q_extra, k_extra, bias, table, page)
    if mass and sink_logits is not None:
        raise ValueError("decode cannot return mass with sink_logits: the sink's share differs from row to row")
    if mass and logits:
        raise ValueError("decode returns mass or logits, not both: mass is probability_mass(logits, log_sum_exp)")
    chosen = choose("decode", implementation, _refusals(arrays | {"page": page}), bool(interpret)).implementation

    def run(arrays: dict):
        weights = arrays["centre_weights"]
        rest = {name: value for name, value in arrays.items() if name != "centre_weights"}
        term = None if weights is None else Centre(weights, frequencies)
        if chosen == "reference":
            out, lse, found = decode_reference(**rest, centre=term, logits=logits, **static)
            return out, lse, found if mass or logits else None
        if chosen == "xla":
            return decode_xla(**rest, centre=term, mass=mass, logits=logits, **static)
        kernel = tpu.decode_tpu if chosen == "tpu" else gpu.decode_gpu
        return kernel(**rest, centre=term, mass=mass, logits=logits, interpret=interpret, **static)

    if chosen in ("tpu", "gpu"):
        run = not_differentiable("decode", over_mesh(run, arrays, _roles(table is not None), "bk"))
    out, lse, found = run(arrays)
    if sink_logits is not None:
        out, lse = add_sink((out, lse), sink_logits)
    return (out, lse, found) if mass or logits else (out, lse)


def choice(q, k: Codes, v: Codes | None, *, implementation: str | None = None, interpret: bool = False, **arguments) -> Choice:
    """What ``decode`` would run for these arguments (arrays or ``jax.ShapeDtypeStruct``), and why."""
    return choose("decode", implementation, _refusals({"q": q, "k": k, "v": v, **arguments}), interpret)


def _refusals(arguments: dict) -> dict[str, Callable[[Target], str | None]]:
    def never(on: Target) -> None:
        return None

    return {
        "reference": never,
        "xla": never,
        "tpu": lambda on: tpu.why_not(on, arguments),
        "gpu": lambda on: gpu.why_not(on, arguments),
    }


def _roles(paged: bool) -> dict[str, str]:
    codes = "-k" if paged else "bk"
    return {
        "q": "bk",
        "k": codes,
        "v": codes,
        "k_extra": codes,
        "q_pos": "b",
        "k_pos": "bk",
        "q_extra": "bk",
        "bias": "bk",
        "centre_weights": "bk",
        "table": "b",
    }


def not_differentiable(op: str, function: Callable) -> Callable:
    """``function`` of one pytree, refusing derivatives with a sentence."""

    @jax.custom_jvp
    def call(arrays):
        return function(arrays)

    @call.defjvp
    def refuse(primals, tangents):
        raise NotImplementedError(f"the {op} kernel has no derivative: use implementation='xla' (or prefill, which has one)")

    return call


def check_codes(op: str, q, k: Codes, v: Codes | None, k_pos: Positions, q_extra, k_extra, bias, table, page) -> None:
    """Raises ValueError where shapes of queries, codes, positions, bias and page table do not fit."""
    batch, heads, rows, dim = q.shape
    if page is not None:
        _check_page(op, page, table, [codes for codes in (k, v, k_extra) if codes is not None])
    slots = k.slots if table is None else (page or k.slots) * table.shape[1]
    lead = (batch, heads) if table is None else (k.data.shape[0], heads)
    for name, codes in (("k", k), ("v", v), ("k_extra", k_extra)):
        if codes is not None and (codes.data.shape[:2] != lead or codes.slots != k.slots):
            raise ValueError(
                f"{op} needs {name} codes [{lead[0]}, {heads}, C, {k.slots}] for queries {list(q.shape)}, got "
                f"{list(codes.data.shape)}"
            )
    if k.dim != dim:
        raise ValueError(f"{op} got queries of {dim} channels for keys of {k.dim}")
    if (q_extra is None) != (k_extra is None):
        raise ValueError(f"{op} needs q_extra and k_extra together")
    if q_extra is not None and q_extra.shape != (batch, heads, rows, k_extra.dim):
        raise ValueError(f"{op} needs q_extra [{batch}, {heads}, {rows}, {k_extra.dim}], got {list(q_extra.shape)}")
    if table is not None and (table.ndim != 2 or table.shape[0] != batch):
        raise ValueError(f"{op} needs a page table [{batch}, pages per row], got {list(table.shape)}")
    if isinstance(k_pos, Span):
        if any(x.shape != (batch,) for x in k_pos):
            raise ValueError(f"{op} needs a Span of arrays [{batch}], got {[list(x.shape) for x in k_pos]}")
    elif not jnp.issubdtype(k_pos.dtype, jnp.integer):
        raise ValueError(f"{op} needs integer positions, got {k_pos.dtype}")
    for name, value in (("k_pos", None if isinstance(k_pos, Span) else k_pos), ("bias", bias)):
        if value is not None and value.shape not in ((batch, 1, slots), (batch, heads, slots)):
            raise ValueError(f"{op} needs {name} [{batch}, 1 or {heads}, {slots}], got {list(value.shape)}")


def _check_page(op: str, page: int, table, streams: list[Codes]) -> None:
    if table is None:
        raise ValueError(f"{op} got page={page} without a page table")
    for codes in streams:
        for leaf in jax.tree.leaves(codes):
            run = codes.slots // leaf.shape[-1]
            if page < 1 or codes.slots % page or page % run:
                tiles = f" and of the {run} slots that share a scale" if run > 1 else ""
                raise ValueError(f"{op} needs a page that divides the pool's blocks of {codes.slots} slots, got {page}{tiles}")

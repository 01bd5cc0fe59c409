"""Progressive reads: two bits of everything, three of the pages that may matter (codes: ``memjax.quantize.progressive``).

A decode step reads the coarse plane of all keys and values, page by page. That leaves the output and the log-sum-exp L_t of
every page t, for every query row: its attention, were the coarse plane all there is, and the evidence of how much it matters.
With D the coarse plane's mean squared error and Z the log-sum-exp over all that the row sees, sinks and recent tokens too,

    sigma_t = scale |q| max |k| sqrt(D / H)          standard deviation of a score's error, at most, on page t
    share_t <= exp(L_t + margin sigma_t - Z)         if no score is off by more, in the sum that Z is taken for exact

and page t is *wanted* if this bound exceeds ``share`` for any query row of the kv head. Of the wanted pages the ``refine``
fraction of all pages with the highest bound is read once more, with all bits, and takes the place of its coarse part in the
merge, which is exact. Each kv head chooses for itself: a choice for all heads of a row would have to serve the union of what
they want, and a kernel reads a page of one head as fast as a page of all per byte. A bound from the largest score of a page
alone would need no sum, but a page of many middling scores can hold as much.

Refining repairs scores and values of a page at once. Chunks of more than ``DECODE_TOKENS`` tokens read everything fine: their
rows want different pages, and reading codes is not what a prefill's time goes to.

Bytes of a step per slot and kv head, H = 64, M query rows, pages of 128 (plain 3 bits: 52):

    coarse keys and values                                2 (2 H / 8 + 2) = 36
    the refined fraction r, all of it                     2 (3 H / 8 + 2) r = 52 r
    parts of pages, float32, written and read             2 * 4 M (H + 1) / 128 = 4 M

So it pays while r < 31 % - M * 8 %: 8 % at M = 3. A coarse pass over the keys to choose and a second one to attend would
read 54 before anything is refined. A kernel that kept a page on the chip, judged it there and fetched its third bits alone
would read 36 + 16 r and write no parts, never more than plain 3 bits. Kernels of today also copy the coarse plane out of
the codes, since their operands are whole arrays, which costs another 64.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float

from memjax.attention.select import Pages, attend_pages, best_pages, page_count
from memjax.pallas_kernels.merge import Part, merge, merge_stacked
from memjax.pallas_kernels.slots import Positions
from memjax.quantize.progressive import Progressive


def progressive_attention(
    attend: Callable[..., Part],
    q: Float[Array, "B K M H"],
    segment,
    k_pos: Positions,
    codec: Progressive,
    *,
    scale: float,
    others: Float[Array, "B K M"],
    blocks: bool,
    **queries,
) -> tuple[Part, Float[Array, "B 2"]]:
    """Attention over a history of nested codes.

    Args:
      attend: see ``memjax.attention.select.attend_pages``.
      segment: the history, a dataclass with codes ``k`` and ``v`` (None: the keys are the values).
      scale: of the scores.
      others: log-sum-exp over what the queries see besides.
      blocks, queries: as for ``attend_pages``: ``q_pos`` and ``centre``.

    Returns:
      Output and log-sum-exp; and how many pages were refined and how many there were with something in them, over kv heads.
    """
    batch = q.shape[0]
    coarse = dataclasses.replace(segment, k=segment.k.coarse(), v=None if segment.v is None else segment.v.coarse())
    count = page_count(segment.slots, codec.page, codec.refine)
    pages = segment.slots // codec.page
    every = jnp.broadcast_to(jnp.arange(pages, dtype=jnp.int32), (batch, 1, pages))
    first = attend_pages(attend, q, coarse, k_pos, every, codec.page, blocks=blocks, **queries)
    filled = jnp.sum(jnp.any(first.lse > -jnp.inf, axis=-1), axis=(1, 2))
    if count == 0:
        return merge_stacked(*first), _counts(jnp.zeros_like(filled), filled)
    sigma = error_of_pages(q[..., : segment.k.dim], segment.k.scale, codec, scale)
    least = math.log(codec.share) if codec.share > 0 else -math.inf
    chosen = best_pages(bound_of_pages(first, codec.margin * sigma, others), count, least)
    fine = attend_pages(
        attend, q, segment, k_pos, chosen.pages, codec.page, wanted=chosen.wanted, blocks=blocks, **queries
    )
    kept = jnp.where(chosen.mask(pages)[..., None], -jnp.inf, first.lse)
    refined = jnp.sum(chosen.wanted, axis=(1, 2))
    return merge([merge_stacked(first.out, kept), merge_stacked(*fine)]), _counts(refined, filled)


def error_of_pages(
    q: Float[Array, "B K M H"], key_scale: Float[Array, "B K S"], codec: Progressive, scale: float
) -> Float[Array, "B K n M"]:
    """Standard deviation of the error of coarse scores, for the longest key of each page."""
    longest = jnp.max(key_scale.reshape(*key_scale.shape[:2], -1, codec.page).astype(jnp.float32), axis=-1)
    length = jnp.linalg.norm(q.astype(jnp.float32), axis=-1)
    error = codec.keys.coarse_error(q.shape[-1])
    return jnp.float32(scale * error) * longest[..., None] * length[:, :, None]


def bound_of_pages(pages: Pages, margin: Float[Array, "B K n M"], others: Float[Array, "B K M"]) -> Float[Array, "B K n"]:
    """Logarithm of the share of a query row's attention that each page could hold, the largest over the rows."""
    peak = jnp.maximum(jnp.max(pages.lse, axis=2), others)
    safe = jnp.where(jnp.isfinite(peak), peak, 0.0)
    total = safe + jnp.log(jnp.sum(jnp.exp(pages.lse - safe[:, :, None]), axis=2) + jnp.exp(others - safe))
    bound = jnp.where(pages.lse > -jnp.inf, pages.lse + margin - total[:, :, None], -jnp.inf)
    return jnp.max(bound, axis=-1)


def _counts(refined: Array, filled: Array) -> Float[Array, "B 2"]:
    return jnp.stack([refined, filled], axis=-1).astype(jnp.float32)

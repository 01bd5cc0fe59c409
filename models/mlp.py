"""What works on each token alone: gated MLPs, and mixtures of experts that are gated MLPs."""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from memjax.models.config import MlpConfig, MoeConfig

_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "silu": jax.nn.silu,
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}
_SCORES: dict[str, Callable[[Array], Array]] = {
    "softmax": jax.nn.softmax,
    "sigmoid": jax.nn.sigmoid,
    "softmax_of_chosen": lambda logits: logits,
}
_FEWEST_ROWS, _MOST_ROWS = 16, 256  # of a block: fewer rows cost the weights' bytes all the same, more only add padding
_TINY = 1e-20  # DeepSeek-V3's: scores may all round to 0


class MLP(nnx.Module):
    """A gated MLP (arXiv 2002.05202): down(activation(gate(x)) * up(x)), x [B, T, D]."""

    def __init__(self, config: MlpConfig, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        def linear(inputs: int, outputs: int) -> nnx.Linear:
            return nnx.Linear(inputs, outputs, use_bias=config.bias, dtype=dtype, param_dtype=dtype, rngs=rngs)

        self.activation = config.activation
        self.gate = linear(width, config.width)
        self.up = linear(width, config.width)
        self.down = linear(config.width, width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        return self.down(_ACTIVATIONS[self.activation](self.gate(x)) * self.up(x))


def route(
    config: MoeConfig, logits: Float[Array, "... E"], score_bias: Float[Array, "E"] | None = None
) -> tuple[Float[Array, "... k"], Int[Array, "... k"]]:
    """Which experts a token goes to, and with which weights.

    s = softmax(logits), sigmoid(logits), or the logits themselves ("softmax_of_chosen"). The k largest s + score_bias of
    the kept groups are chosen; experts of the others count as -inf, as in DeepSeek's inference/model.py (older transformers
    and mlx-lm fill in 0, which is another choice where s + score_bias < 0). The weights of the chosen are w = s, without
    the bias, or the softmax of their logits; then w / (sum w + 1e-20) if ``config.normalise``; then w * ``config.scale``.

    Sources: DeepSeek-V2 (arXiv 2405.04434), section 2.2; DeepSeek-V3 (arXiv 2412.19437), section 2.1.2; Qwen3-MoE and
    Granite as in transformers. Implementations of V2 differ where norm_topk_prob is true, which no published V2 is: the
    remote code then normalises and leaves the scale out, transformers' deepseek_v2 scales and does not normalise. The remote
    code of V2 and V3 does not normalise a single chosen expert. What a file means is for its reader to say, with
    ``normalise`` and ``scale``.

    Args:
      logits: float32.
      score_bias: float32; None: there is none.

    Returns:
      Weights, float32, and the chosen experts, int32, all different; by falling s + score_bias, equal ones by number.
    """
    scores = _SCORES[config.scoring](logits)
    ranked = jax.lax.stop_gradient(scores if score_bias is None else scores + score_bias)
    if config.kept_groups < config.groups:
        kept = _kept_experts(config, ranked, best=1 if score_bias is None else 2)
        ranked = jnp.where(kept, ranked, -jnp.inf)
    chosen = jax.lax.top_k(ranked, config.chosen)[1]
    weights = jnp.take_along_axis(scores, chosen, axis=-1)
    if config.scoring == "softmax_of_chosen":
        weights = jax.nn.softmax(weights)
    if config.normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + _TINY)
    return weights * config.scale, chosen


def _kept_experts(config: MoeConfig, ranked: Float[Array, "... E"], best: int) -> Bool[Array, "... E"]:
    """Those in the groups with the largest sums of their ``best`` experts."""
    size = config.experts // config.groups
    grouped = ranked.reshape(*ranked.shape[:-1], config.groups, size)
    score = jnp.sum(jax.lax.top_k(grouped, min(best, size))[0], axis=-1)
    groups = jax.lax.top_k(score, config.kept_groups)[1]
    kept = jnp.any(groups[..., None] == jnp.arange(config.groups, dtype=groups.dtype), axis=-2)
    return jnp.repeat(kept, size, axis=-1)


class MoE(nnx.Module):
    """A mixture of experts (arXiv 1701.06538): sum of w * expert(x) over the chosen experts, + shared(x); x [B, T, D].

    An expert is down(activation(gate x) * up x), without biases; ``route`` gives w, from logits in float32. No token is
    dropped, and shapes do not depend on the choice: pairs (token, expert) are sorted by expert and computed in blocks, each of
    one expert. Temporaries are one block, where a backend copies it the weights of its expert, and a float32 sum of the
    outputs. Up to 16 tokens read each chosen expert's weights once, and no others. (``jax.lax.ragged_dot`` is dense on CPU
    and CUDA: every row times every expert, with as many copies of the rows as there are experts.)

    A row that holds NaN leaves the others as they are.
    """

    def __init__(self, config: MoeConfig, width: int, dtype: DTypeLike, rngs: nnx.Rngs):
        def param(inputs: int, outputs: int, *experts: int) -> nnx.Param:
            init = nnx.initializers.lecun_normal(batch_axis=tuple(range(len(experts))))
            return nnx.Param(init(rngs.params(), (*experts, inputs, outputs), dtype))

        self.config = config
        self.router = param(width, config.experts)
        self.score_bias = nnx.Param(jnp.zeros((config.experts,), jnp.float32)) if config.score_bias else None
        self.gate = param(width, config.width, config.experts)
        self.up = param(width, config.width, config.experts)
        self.down = param(config.width, width, config.experts)
        shared = config.shared_width and MlpConfig(width=config.shared_width, activation=config.activation)
        self.shared = MLP(shared, width, dtype, rngs) if shared else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        rows = x.reshape(-1, x.shape[-1])
        highest = jax.lax.Precision.HIGHEST  # scores that are nearly equal must not swap
        logits = jnp.matmul(rows.astype(jnp.float32), self.router[...].astype(jnp.float32), precision=highest)
        weights, chosen = route(self.config, logits, None if self.score_bias is None else self.score_bias[...])
        kernels = self.gate[...], self.up[...], self.down[...]
        out = _by_expert(rows, weights, chosen, kernels, _ACTIVATIONS[self.config.activation]).reshape(x.shape)
        if self.shared is not None:
            out = out + self.shared(x).astype(jnp.float32)
        return out.astype(x.dtype)


def _by_expert(
    x: Float[Array, "T D"],
    weights: Float[Array, "T k"],
    chosen: Int[Array, "T k"],
    kernels: tuple[Float[Array, "E D F"], Float[Array, "E D F"], Float[Array, "E F D"]],
    activation: Callable[[Array], Array],
) -> Float[Array, "T D"]:
    """Sum of w * expert(x) over the chosen experts, float32."""
    tokens, k = chosen.shape
    size = _block_rows(tokens, k, kernels[0].shape[0])
    order = jnp.argsort(chosen.reshape(-1), stable=True).astype(jnp.int32)

    @jax.checkpoint  # or a gradient would keep every block's weights
    def block(x, weights, kernels, expert, token, row):
        gate, up, down = (kernel[expert] for kernel in kernels)
        inputs = x.at[token].get(mode="fill", fill_value=0)
        hidden = activation(inputs @ gate) * (inputs @ up)
        out = jnp.matmul(hidden, down, preferred_element_type=jnp.float32)
        return out * weights.reshape(-1).at[row].get(mode="fill", fill_value=0)[:, None]

    def add(total, expert, first, end):
        place = first + jnp.arange(size, dtype=jnp.int32)
        row = order.at[jnp.where(place < end, place, tokens * k)].get(mode="fill", fill_value=tokens * k)
        return total.at[row // k].add(block(x, weights, kernels, expert, row // k, row), mode="drop")

    def step(total, block_of):
        expert, first, end = block_of
        if size == 1:  # no block is empty
            return add(total, expert, first, end), None
        return jax.lax.cond(first < end, add, lambda total, *_: total, total, expert, first, end), None

    blocks = _blocks(chosen.reshape(-1), kernels[0].shape[0], size)
    return jax.lax.scan(step, jnp.zeros(x.shape, jnp.float32), blocks)[0]


def _block_rows(tokens: int, chosen: int, experts: int) -> int:
    """Rows of a block: about those of an expert, a power of two, and never more than there can be."""
    mean = max(tokens * chosen // experts, 1)
    return min(tokens, _MOST_ROWS, max(_FEWEST_ROWS, 1 << (mean.bit_length() - 1)))


def _blocks(chosen: Int[Array, "M"], experts: int, size: int) -> tuple[Int[Array, "N"], Int[Array, "N"], Int[Array, "N"]]:
    """Each block's expert, first sorted row, and the end of its expert's; as many as any choice needs, the last ones empty."""
    rows = chosen.shape[0]
    most = (rows + min(experts, rows) * (size - 1)) // size
    sizes = jnp.bincount(chosen, length=experts).astype(jnp.int32)
    row_ends = jnp.cumsum(sizes, dtype=jnp.int32)
    needed = (sizes + size - 1) // size
    block_ends = jnp.cumsum(needed, dtype=jnp.int32)
    number = jnp.arange(most, dtype=jnp.int32)
    expert = jnp.searchsorted(block_ends, number, side="right").astype(jnp.int32)
    within = number - (block_ends - needed).at[expert].get(mode="fill", fill_value=0)
    end = row_ends.at[expert].get(mode="fill", fill_value=0)
    first = (row_ends - sizes).at[expert].get(mode="fill", fill_value=rows) + within * size
    return jnp.minimum(expert, experts - 1), first, end

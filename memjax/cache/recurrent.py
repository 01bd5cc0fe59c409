"""The state of a recurrent layer (Mamba-2, arXiv 2405.21060): no slots, nothing to evict or to quantize."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from memjax.cache.spec import RecurrentSpec


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["conv", "state", "length"], meta_fields=["spec"]
)
@dataclass(frozen=True)
class RecurrentCache:
    """Fixed-size state, float32: policies leave it alone and ledgers count it.

    Attributes:
      conv: the last conv_width - 1 inputs of the causal convolution, [B, conv_width - 1, conv_dim].
      state: the SSM state, [B, heads, head_dim, state_dim].
      length: int32 [B], tokens seen.
    """

    conv: Array
    state: Array
    length: Array
    spec: RecurrentSpec

    def advance(
        self, conv: Float[Array, "B W C"], state: Float[Array, "B h p n"], count: Int[Array, "B"] | int
    ) -> RecurrentCache:
        """The cache after ``count`` more tokens per row.

        Raises:
          ValueError: a state of another shape or dtype.
        """
        for name, old, new in (("conv", self.conv, conv), ("state", self.state, state)):
            if new.shape != old.shape or new.dtype != old.dtype:
                raise ValueError(
                    f"recurrent {name} must stay {old.dtype}{list(old.shape)}, got {new.dtype}{list(new.shape)}"
                )
        return dataclasses.replace(self, conv=conv, state=state, length=self.length + count)


def init_recurrent(spec: RecurrentSpec) -> RecurrentCache:
    """The zero state."""
    return RecurrentCache(
        conv=jnp.zeros((spec.batch, spec.conv_width - 1, spec.conv_dim), jnp.float32),
        state=jnp.zeros((spec.batch, spec.heads, spec.head_dim, spec.state_dim), jnp.float32),
        length=jnp.zeros((spec.batch,), jnp.int32),
        spec=spec,
    )

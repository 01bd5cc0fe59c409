"""The training loop: a pure jitted step, losses in nats per byte, everything float32."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from memjax.models.config import ModelConfig, checked_size
from memjax.models.decoder import Decoder
from memjax.train.data import Corpus, check_corpus, training_batch, validation_batches

if TYPE_CHECKING:
    from memjax.train.checkpoints import RunFolder

_LOOK = 10  # steps between looks at the losses: an accelerator is not kept waiting for each
_LAST_RATE = 0.1  # what is left of the rate at the end


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How a decoder is trained.

    Attributes:
      steps, batch, context: optimizer steps, sequences of each, bytes of a sequence.
      rate: the highest learning rate, reached after ``warmup`` steps and followed by a cosine down to a tenth.
      warmup: None: a twentieth of the steps.
      decay: weight decay of matrices; vectors have none.
      clip: largest global norm of a gradient.
      seed: of the first weights and of the batches.
      every: steps between validations, after each of which the state is saved.

    Raises:
      ValueError: a number that is not positive.
    """

    steps: int
    batch: int
    context: int
    rate: float
    warmup: int | None = None
    decay: float = 0.1
    clip: float = 1.0
    seed: int = 0
    every: int = 100

    def __post_init__(self):
        for name in ("steps", "batch", "context", "every"):
            checked_size(f"training's {name}", getattr(self, name))
        if not (self.rate > 0 and self.clip > 0 and self.decay >= 0 and (self.warmup is None or self.warmup >= 0)):
            raise ValueError(f"training needs a positive rate and clip and no negative decay or warmup, got {self}")
        if not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"training needs a seed >= 0, got {self.seed!r}")

    @property
    def tokens(self) -> int:
        """Bytes that are predicted in all steps."""
        return self.steps * self.batch * self.context


class TrainState(NamedTuple):
    """What a step takes and gives: a pytree.

    Attributes:
      step: int32 [], how many are done.
      decoder: the weights.
      optimizer: the state of ``make_optimizer``.
    """

    step: Int[Array, ""]
    decoder: Decoder
    optimizer: optax.OptState


@dataclass
class Curve:
    """Losses in nats per byte.

    Attributes:
      train: of each step's batch, before the step.
      validation: pairs of the number of steps done and the mean over everything that is held out.
      seconds: that training took, compilation and validation included.
    """

    train: list[float] = field(default_factory=list)
    validation: list[tuple[int, float]] = field(default_factory=list)
    seconds: float = 0.0


def make_optimizer(plan: Plan) -> optax.GradientTransformation:
    """AdamW (arXiv 1711.05101) behind clipping of the global norm."""
    warmup = max(1, plan.steps // 20) if plan.warmup is None else plan.warmup
    rate = optax.warmup_cosine_decay_schedule(
        0.0, plan.rate, warmup, max(plan.steps, warmup + 1), end_value=_LAST_RATE * plan.rate
    )

    def matrices(decoder: Decoder) -> Decoder:
        return jax.tree.map(lambda leaf: leaf.ndim > 1, decoder)

    adamw = optax.adamw(rate, b2=0.95, weight_decay=plan.decay, mask=matrices)
    return optax.chain(optax.clip_by_global_norm(plan.clip), adamw)


@functools.partial(jax.jit, static_argnums=(0, 1))
def init_state(config: ModelConfig, plan: Plan) -> TrainState:
    """Random weights, from the plan's seed."""
    decoder = Decoder(config, dtype=jnp.float32, rngs=nnx.Rngs(plan.seed))
    return TrainState(jnp.zeros((), jnp.int32), decoder, make_optimizer(plan).init(decoder))


def byte_losses(decoder: Decoder, tokens: Int[Array, "B T+1"]) -> Float[Array, "B T"]:
    """Nats that each byte but the first of a row costs, given those before it."""
    hidden, _ = decoder(tokens[:, :-1])
    return optax.softmax_cross_entropy_with_integer_labels(decoder.logits(hidden), tokens[:, 1:])


def mean_loss(decoder: Decoder, tokens: Int[Array, "B T+1"]) -> Float[Array, ""]:
    """Mean of ``byte_losses``."""
    return jnp.mean(byte_losses(decoder, tokens))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def train_step(plan: Plan, state: TrainState, tokens: Int[Array, "B T+1"]) -> tuple[TrainState, Float[Array, ""]]:
    """One step of the optimizer, and the loss before it. The state that is passed in is given up."""
    loss, gradient = jax.value_and_grad(mean_loss)(state.decoder, tokens)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to the power of int32 counts
        change, optimizer = make_optimizer(plan).update(gradient, state.optimizer, state.decoder)
        decoder = optax.apply_updates(state.decoder, change)
    return TrainState(state.step + 1, decoder, optimizer), loss


@jax.jit
def _row_losses(decoder: Decoder, tokens: Int[Array, "B T+1"]) -> Float[Array, "B"]:
    return jnp.mean(byte_losses(decoder, tokens), axis=1)


def validation_loss(decoder: Decoder, batches: Sequence[tuple[np.ndarray, np.ndarray]]) -> float:
    """Mean nats per byte of ``validation_batches``.

    Raises:
      FloatingPointError: it is not finite.
    """
    rows = [(np.asarray(_row_losses(decoder, tokens), np.float64), weights) for tokens, weights in batches]
    total = sum(float(np.sum(weights)) for _, weights in rows)
    loss = sum(float(np.sum(np.where(weights > 0, losses, 0.0))) for losses, weights in rows) / total
    if not math.isfinite(loss):
        raise FloatingPointError(f"the validation loss is {loss}: try a smaller learning rate")
    return loss


def train(
    config: ModelConfig,
    plan: Plan,
    corpus: Corpus,
    *,
    folder: RunFolder | None = None,
    until: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> tuple[TrainState, Curve]:
    """Trains a decoder from its first weights, or from what its folder holds.

    Args:
      folder: where the state is saved, and from where it goes on; None: nowhere.
      until: stop after so many steps, as an interruption would, and save; None: all of the plan's.
      progress: called every few steps with the steps done and the last loss.

    Raises:
      ValueError: the corpus is shorter than a batch.
      FloatingPointError: a loss is not finite; nothing is saved of what gave it.
    """
    check_corpus(corpus, plan.batch, plan.context)
    held_out = validation_batches(corpus, plan.batch, plan.context)
    state, curve = init_state(config, plan), Curve()
    if folder is not None:
        state, curve = folder.restore(state, curve)
    before, start = curve.seconds, time.perf_counter()
    waiting: list[Array] = []
    for step in range(int(state.step), plan.steps if until is None else min(until, plan.steps)):
        state, loss = train_step(plan, state, training_batch(corpus, plan.seed, step, plan.batch, plan.context))
        waiting.append(loss)
        done = step + 1
        validate, stop = done % plan.every == 0 or done == plan.steps, done == until
        if not (validate or stop or done % _LOOK == 0):
            continue
        curve.train += _finite(waiting, first=done - len(waiting))
        waiting = []
        if progress is not None:
            progress(done, curve.train[-1])
        if validate:
            curve.validation.append((done, validation_loss(state.decoder, held_out)))
        if folder is not None and (validate or stop):
            curve.seconds = before + time.perf_counter() - start
            folder.save(state, curve)
    curve.seconds = before + time.perf_counter() - start
    return state, curve


def _finite(losses: Sequence[Array], first: int) -> list[float]:
    found = [float(loss) for loss in losses]
    for i, loss in enumerate(found):
        if not math.isfinite(loss):
            raise FloatingPointError(f"the loss of step {first + i} is {loss}: try a smaller learning rate")
    return found

"""Healing: a converted model learns to say what the original says, by distillation of its next-token distributions.

    loss = mean over tokens of KL(p_original || p_converted)

with AdamW (arXiv 1711.05101) and a warm-up followed by a cosine decay. TransMLA (arXiv 2502.07864) heals with the language
model's own loss on billions of tokens; distillation from the model that one has is what a few thousand tokens can pay for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jaxtyping import Array, Float, Int

from memjax.convert.model import windows
from memjax.evaluate.compare import kl_divergence
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

TRAINED = ("attention", "all")
BLOCK = 256  # positions whose logits are held at once, when a divergence is measured


@dataclass(frozen=True)
class Healing:
    """How to heal.

    Attributes:
      steps: optimiser steps.
      batch, length: rows of a step and tokens of each.
      learning_rate: at its peak; for SmolLM2-135M 5e-4 made the divergence several times larger within ten steps.
      warmup: share of the steps in which it rises.
      weight_decay: AdamW's; small, since the start is close to what is wanted.
      clip: gradients are scaled down to this norm.
      trained: "attention": the attention layers' parameters; "all": every parameter.
      seed: of the order of the rows.

    Raises:
      ValueError: a number out of range.
    """

    steps: int = 100
    batch: int = 2
    length: int = 256
    learning_rate: float = 5e-5
    warmup: float = 0.1
    weight_decay: float = 0.0
    clip: float = 1.0
    trained: str = "attention"
    seed: int = 0

    def __post_init__(self):
        if min(self.steps, self.batch) < 1 or self.length < 2 or self.learning_rate <= 0:
            raise ValueError(f"healing needs steps and batch >= 1, length >= 2 and a positive learning rate, got {self}")
        if self.trained not in TRAINED or not 0 <= self.warmup <= 1:
            raise ValueError(f"trained must be one of {', '.join(TRAINED)} and warmup lie in 0 .. 1, got {self}")


@dataclass(frozen=True)
class Healed:
    """What came of it.

    Attributes:
      model: the healed model.
      losses: the loss of each step, nats per token, on that step's rows before its update.
      held_out: (steps done, mean divergence on the held-out text), nats per token; empty without one.
      tokens: tokens read in training, repetitions included.
    """

    model: LanguageModel
    losses: tuple[float, ...]
    held_out: tuple[tuple[int, float], ...] = field(default=())
    tokens: int = 0


def heal(
    model: LanguageModel,
    teacher: LanguageModel,
    texts: Sequence[Sequence[int]],
    healing: Healing | None = None,
    held_out: Sequence[int] = (),
    measure_every: int = 0,
    progress: Callable[[int, float], None] | None = None,
) -> Healed:
    """Trains ``model`` towards ``teacher``'s next-token distributions.

    Parameters are trained in the dtype that they have; the optimiser holds two more copies of what is trained, and the logits
    of a step take 4 x batch x length x vocabulary bytes several times.

    Args:
      model: the one to heal; it is left as it is.
      texts: token ids to read, cut into rows of ``healing.length``, which are drawn without replacement until all were read.
      held_out: ids of a text that is only measured: before, after and every ``measure_every`` steps (0: never in between).
      progress: called with (steps done, loss).

    Raises:
      ValueError: models of different vocabularies, or too little text for a single step.
      FloatingPointError: a loss is not finite.
    """
    healing = healing or Healing()
    if model.config.vocab != teacher.config.vocab:
        raise ValueError(f"vocabularies differ: {model.config.vocab} and {teacher.config.vocab}")
    rows = _rows(texts, healing)
    graphdef, trained, fixed = nnx.split(model.decoder, _is_trained(healing), ...)
    trained = jax.tree.map(jnp.copy, trained)  # the step donates them
    optimiser = _optimiser(healing)
    state, losses, measured = optimiser.init(trained), [], []

    def measure(step: int) -> None:
        if len(held_out):
            decoder = nnx.merge(graphdef, trained, fixed)
            measured.append((step, float(np.mean(divergences(decoder, teacher.decoder, held_out)))))

    step = _make_step(graphdef, optimiser)
    measure(0)
    for i, chosen in enumerate(_order(len(rows), healing)):
        trained, state, loss = step(trained, state, fixed, teacher.decoder, rows[chosen])
        losses.append(float(loss))
        if not np.isfinite(losses[-1]):
            raise FloatingPointError(f"the loss of step {i + 1} is {losses[-1]}; try a smaller learning rate")
        if progress is not None:
            progress(i + 1, losses[-1])
        if i + 1 == healing.steps or (measure_every and (i + 1) % measure_every == 0):
            measure(i + 1)
    healed = dataclasses.replace(model, decoder=nnx.merge(graphdef, trained, fixed))
    return Healed(healed, tuple(losses), tuple(measured), healing.steps * healing.batch * rows.shape[1])


def divergences(decoder: Decoder, teacher: Decoder, ids: Sequence[int]) -> Float[np.ndarray, "T"]:
    """KL(p_teacher || p) of the next token at every position of a text that both read uncached, nats, float32."""
    tokens = jnp.asarray(np.asarray(ids, np.int32)[None])
    own, theirs = (_hidden(each, tokens)[0] for each in (decoder, teacher))
    starts = range(0, tokens.shape[1], BLOCK)
    return np.concatenate(
        [np.asarray(_block(decoder, teacher, own[i : i + BLOCK], theirs[i : i + BLOCK])) for i in starts]
    )


@jax.jit
def _hidden(decoder: Decoder, tokens: Array) -> Array:
    return decoder(tokens)[0]


@jax.jit
def _block(decoder: Decoder, teacher: Decoder, own: Array, theirs: Array) -> Array:
    return kl_divergence(teacher.logits(theirs), decoder.logits(own))


def _make_step(graphdef: nnx.GraphDef, optimiser: optax.GradientTransformation) -> Callable:
    def step(trained, state, fixed, teacher: Decoder, tokens: Int[Array, "B T"]):
        wanted = jax.lax.stop_gradient(teacher.logits(teacher(tokens)[0]))

        def loss(trained):
            decoder = nnx.merge(graphdef, trained, fixed)
            return jnp.mean(kl_divergence(wanted, decoder.logits(decoder(tokens)[0])))

        value, gradient = jax.value_and_grad(loss)(trained)
        with jax.numpy_dtype_promotion("standard"):  # optax mixes integers and floats
            updates, state = optimiser.update(gradient, state, trained)
        return optax.apply_updates(trained, updates), state, value

    return jax.jit(step, donate_argnums=(0, 1))


def _is_trained(healing: Healing) -> Callable:
    if healing.trained == "all":
        return nnx.Param
    return lambda path, _: "mixer" in path


def _optimiser(healing: Healing) -> optax.GradientTransformation:
    rising = round(healing.warmup * healing.steps)
    rate = optax.warmup_cosine_decay_schedule(
        healing.learning_rate / max(rising, 1), healing.learning_rate, rising, max(healing.steps, rising + 1), 0.0
    )
    return optax.chain(optax.clip_by_global_norm(healing.clip), optax.adamw(rate, weight_decay=healing.weight_decay))


def _rows(texts: Sequence[Sequence[int]], healing: Healing) -> Int[np.ndarray, "R T"]:
    rows = [windows(text, healing.length) for text in texts if len(text) >= healing.length]
    if (count := sum(map(len, rows))) < healing.batch:
        raise ValueError(f"healing needs texts with {healing.batch} rows of {healing.length} tokens, got {count}")
    return np.concatenate(rows)


def _order(rows: int, healing: Healing) -> list[np.ndarray]:
    """The rows of every step: one shuffled pass over all of them after the other."""
    rng, wanted = np.random.default_rng(healing.seed), healing.steps * healing.batch
    passes = [rng.permutation(rows) for _ in range(-(-wanted // rows))]
    return np.split(np.concatenate(passes)[:wanted], healing.steps)

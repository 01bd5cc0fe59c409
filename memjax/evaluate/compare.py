"""What policies cost in quality and in bytes, measured on a text that is read as it would be generated.

Every policy and an uncompressed reference read the text side by side, chunk by chunk, each through its own cache: what
was compressed stays compressed, so errors accumulate as they do in use. In the *static* setting of quantization papers
new tokens are compressed before they are read, which no user does and which is harsher on the codec.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.cache.layer import layer_caches
from memjax.cache.ledger import dense_nbytes_per_token, nbytes
from memjax.cache.policy import CachePolicy, ModelCache, Policy
from memjax.evaluate.layerwise import read_layers
from memjax.evaluate.passkey import Passkey
from memjax.generate.loop import LoopState, decode_block
from memjax.generate.reread import rereading
from memjax.generate.sampling import Sampler
from memjax.models.decoder import Decoder
from memjax.models.load import LanguageModel

GREEDY = Sampler()
Row = dict[str, object]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Setup:
    """How a comparison is run.

    Args:
      chunk: tokens read at a time.
      cache_dtype: dtype of what a policy does not quantize; the reference keeps the dtype of the weights.
      decode_tokens: tokens generated after the text, for the speed of decoding; 0: none.
      static: compress tokens before they are read.

    Raises:
      ValueError: a number out of range.
    """

    chunk: int = 128
    cache_dtype: str = "bfloat16"
    decode_tokens: int = 16
    static: bool = False

    def __post_init__(self):
        if self.chunk < 1 or self.decode_tokens < 0:
            raise ValueError(f"compare needs chunk >= 1 and decode_tokens >= 0, got {self.chunk}, {self.decode_tokens}")


def compare(
    model: LanguageModel,
    tokens: Sequence[int],
    policies: Sequence[Policy],
    setup: Setup | None = None,
    passkey: Passkey | None = None,
    progress: Progress | None = None,
) -> list[Row]:
    """One row of measurements per policy, in the order given.

    Args:
      tokens: ids of the text; at least two.
      passkey: the key that was hidden in the text, to be asked for after it.
      progress: called after each step with what was done.

    Returns:
      Rows with the keys policy, tokens, bytes_device, bytes_host, bytes_disk, bits_per_value (of the coded history, scales
      and padding included), compression (bytes of a 16-bit cache of the same capacity over all bytes of this one),
      kld_mean, kld_p95 (nats per token, reference to policy), top1, ppl, prefill_tokens_per_s, decode_tokens_per_s,
      simulated; bytes_windows, bits_total, refined (see ``refined_fraction``) and how the run was set up besides.

    Raises:
      ValueError: no policies, a text too short, or a policy that cannot serve the model; before anything is computed.
      FloatingPointError: a policy gave NaN.
    """
    setup = setup or Setup()
    if not policies:
        raise ValueError("compare needs at least one policy")
    question = passkey.question_tokens(model.tokenizer) if passkey else [int(token) for token in tokens[-1:]]
    new = max(setup.decode_tokens, passkey.answer_length(model.tokenizer) if passkey else 0)
    reader = Reader(model, len(tokens) + len(question) + new, setup)
    rows = []
    for reading in reader.read_text(tokens, [Job(policy, setup.static) for policy in policies], progress):
        row = reader.row(reading)
        if new:
            answer = reader.decode(reading, question, new)
            row["prefill_tokens_per_s"] = reading.read_rate
            row["decode_tokens_per_s"] = _number(reading.decode_rate)
            row |= passkey.judge(model.tokenizer, answer) if passkey else {}
        rows.append(row)
        if progress is not None:
            progress(f"{reading.job.policy} done")
    return rows


@dataclass(frozen=True)
class Job:
    """A policy in one of the two settings."""

    policy: Policy
    static: bool = False


REFERENCE = Job(CachePolicy())


class Reading:
    """One policy on its way through a text, and what was measured per token.

    Attributes:
      kld: nats to the reference, one piece per chunk.
      agree: whether the most probable token is the reference's.
      nll: negative log-likelihood of the token that follows; of the last token there is none.
    """

    def __init__(self, job: Job, cache: ModelCache, step):
        self.job, self.cache, self.step = job, cache, step
        self.kld: list[np.ndarray] = []
        self.agree: list[np.ndarray] = []
        self.nll: list[np.ndarray] = []
        self.read_tokens, self.read_seconds, self.decode_rate = 0, 0.0, math.nan

    @property
    def read_rate(self) -> float:
        """Tokens read per second."""
        return self.read_tokens / self.read_seconds

    def kld_per_token(self) -> Float[np.ndarray, "T"]:
        """KL divergence of every token of the text."""
        return np.concatenate(self.kld)

    def measure(self, wanted: Array, found: Array, following: Array) -> None:
        kld, agree, nll = (np.asarray(x) for x in token_metrics(wanted, found, following))
        if not np.isfinite(kld).all():
            token = sum(map(len, self.kld)) + int(np.argmin(np.isfinite(kld)))
            raise FloatingPointError(f"{self.job.policy} gave NaN at token {token}; try another policy or cache dtype")
        self.kld.append(kld)
        self.agree.append(agree)
        self.nll.append(nll)


class Reader:
    """Compiled steps of one model for one capacity: a job is compiled once, however many texts it reads."""

    def __init__(self, model: LanguageModel, capacity: int, setup: Setup):
        self.model, self.capacity, self.setup = model, capacity, setup
        self._logits = jax.jit(lambda decoder, hidden: decoder.logits(hidden))
        self._steps: dict[tuple[Job, str | None], Callable] = {}

    def read_text(self, tokens: Sequence[int], jobs: Sequence[Job], progress: Progress | None = None) -> list[Reading]:
        """All jobs and the reference through one text, side by side.

        Raises:
          ValueError: a text too short or a policy that cannot serve the model. FloatingPointError: a policy gave NaN.
        """
        if len(tokens) < 2:
            raise ValueError(f"compare needs a text of at least 2 tokens, got {len(tokens)}")
        runs = [self.start(job, self.setup.cache_dtype) for job in jobs]
        reference = self.start(REFERENCE, None)
        ids, chunk = jnp.asarray(tokens, jnp.int32), self.setup.chunk
        for start in range(0, len(tokens), chunk):
            piece, following = ids[start : start + chunk], ids[start + 1 : start + 1 + chunk]
            wanted = self.logits(self.read(reference, piece), len(piece))
            for run in runs:
                run.measure(wanted, self.logits(self.read(run, piece), len(piece)), following)
            if progress is not None:
                progress(f"{min(start + chunk, len(tokens))} of {len(tokens)} tokens")
        return runs

    def start(self, job: Job, dtype: str | None) -> Reading:
        """An empty cache and the compiled step that fills it.

        Raises:
          ValueError: the policy cannot serve the model, or not in the static setting.
        """
        cache = self.model.init_cache(job.policy, 1, self.capacity, dtype)
        if job.static and self.setup.chunk > 1 and any(one.layout.ring for one in layer_caches(cache)):
            raise ValueError(
                f"{job.policy} forgets tokens, by eviction or in layers with a sliding window: compressed before it is read, "
                "a chunk would push out what its first tokens see. Use the accumulated setting or chunks of one token"
            )
        if (method := rereading(cache)) is not None:
            raise ValueError(
                f"{job.policy} compresses once, when {method.name} has read the whole text again, so that reading it loses "
                "nothing: measure it with memjax eval --suite evict"
            )
        if (job, dtype) not in self._steps:
            self._steps[job, dtype] = self._compile(job, cache)
        return Reading(job, cache, self._steps[job, dtype])

    def _compile(self, job: Job, cache: ModelCache) -> Callable:
        if not self.setup.decode_tokens:  # nobody asks for speed: layers that look alike share a program
            return functools.partial(read_layers, compress_first=job.static)

        def step(decoder: Decoder, cache: ModelCache, tokens: Array, lengths: Array):
            return decoder(tokens, cache, lengths, compress_first=job.static)

        tokens = jnp.zeros((1, self.setup.chunk), jnp.int32)
        lowered = jax.jit(step, donate_argnums=1).lower(self.model.decoder, cache, tokens, jnp.ones((1,), jnp.int32))
        return lowered.compile()

    def read(self, run: Reading, piece: Int[Array, "T"]) -> Float[Array, "1 C D"]:
        padded = jnp.pad(piece, (0, self.setup.chunk - len(piece)))[None]
        begin = time.perf_counter()
        hidden, run.cache = run.step(self.model.decoder, run.cache, padded, jnp.asarray([len(piece)], jnp.int32))
        hidden.block_until_ready()
        run.read_seconds += time.perf_counter() - begin
        run.read_tokens += len(piece)
        return hidden

    def logits(self, hidden: Float[Array, "1 C D"], count: int) -> Float[Array, "T V"]:
        return self._logits(self.model.decoder, hidden)[0, :count]

    def decode(self, run: Reading, question: list[int], new: int) -> list[int]:
        """Reads the question, generates ``new`` tokens greedily, and times the generation."""
        model, ids = self.model, jnp.asarray(question, jnp.int32)
        for start in range(0, len(question), self.setup.chunk):
            piece = ids[start : start + self.setup.chunk]
            logits = self.logits(self.read(run, piece), len(piece))[-1:]
        state = LoopState(
            run.cache, logits, jax.random.key(0)[None], None, jnp.asarray([new], jnp.int32), jnp.zeros((0,), jnp.int32)
        )
        compiled = decode_block.lower(model.decoder, state, sampler=GREEDY, block=new).compile()
        jax.block_until_ready(state)
        begin = time.perf_counter()
        state, out = compiled(model.decoder, state)
        sampled = np.asarray(out)[0]
        run.decode_rate = new / (time.perf_counter() - begin)
        return [int(token) for token in sampled]

    def row(self, run: Reading) -> Row:
        """What ``compare`` promises, of a text that has been read."""
        model, setup, capacity = self.model, self.setup, self.capacity
        kld, agree, nll = (np.concatenate(x) for x in (run.kld, run.agree, run.nll))
        held, specs = nbytes(run.cache), model.decoder.cache_specs(1, capacity)
        sixteen_bit = capacity * dense_nbytes_per_token(specs)
        values = capacity * sum(spec.values_per_token for spec in specs)
        return {
            "policy": str(run.job.policy),
            "tokens": len(kld),
            "bytes_device": held.device,
            "bytes_host": held.host,
            "bytes_disk": held.disk,
            "bits_per_value": _number(held.bits_per_value),
            "compression": sixteen_bit / held.total,
            "kld_mean": float(kld.mean(dtype=np.float64)),
            "kld_p95": float(np.percentile(kld, 95)),
            "top1": float(agree.mean()),
            "ppl": float(np.exp(nll.mean(dtype=np.float64))),
            "prefill_tokens_per_s": run.read_rate if setup.decode_tokens else None,
            "decode_tokens_per_s": _number(run.decode_rate),
            "simulated": run.job.policy.simulated(),
            "bytes_windows": held.windows,
            "refined": refined_fraction(run.cache),
            "bits_total": 8 * held.total / values,
            "capacity": capacity,
            "chunk": setup.chunk,
            "cache_dtype": setup.cache_dtype,
            "setting": "static" if run.job.static else "accumulated",
            "model": model.name,
            "device": jax.devices()[0].device_kind,
            "jax": jax.__version__,
        }


def kl_divergence(wanted: Float[Array, "... V"], found: Float[Array, "... V"]) -> Float[Array, "..."]:
    """KL(softmax(wanted) || softmax(found)) of logits, nats."""
    log_p, log_q = jax.nn.log_softmax(wanted), jax.nn.log_softmax(found)
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


@jax.jit
def token_metrics(wanted: Float[Array, "T V"], found: Float[Array, "T V"], following: Int[Array, "F"]):
    """KL divergence and top-1 agreement per position; negative log-likelihood where a next token is known."""
    kld, policy = kl_divergence(wanted, found), jax.nn.log_softmax(found)
    agree = jnp.argmax(wanted, axis=-1) == jnp.argmax(found, axis=-1)
    nll = -jnp.take_along_axis(policy[: following.shape[0]], following[:, None], axis=-1)[:, 0]
    return kld, agree, nll


def refined_fraction(cache: ModelCache) -> float | None:
    """Of the pages that decode steps have read, how many they have read in full; None where no layer counts them."""
    counted = [one.refined for one in layer_caches(cache) if one.refined is not None]
    refined, read = np.sum([np.asarray(each, np.float64).sum(axis=0) for each in counted], axis=0) if counted else (0, 0)
    return float(refined / read) if read else None


def _number(value: float) -> float | None:
    """JSON has no NaN."""
    return None if math.isnan(value) else value

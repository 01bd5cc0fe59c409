"""``memjax eval --suite evict``: what evictors lose, against the part of a text's tokens that they keep.

A text is read in chunks, each followed by eviction. Then, from the cache that is left,

    continuation  the text goes on: KL divergence per token to the uncompressed model
    pass key      a number that was hidden in the text is asked for; in the multi-key task one of four numbers

with the question *hidden* while compressing, or *shown*: it stands, as a whole sentence, at the end of every chunk, so that
each eviction follows it (as in Finch, arXiv 2408.00167; a text of one chunk is kvpress' ``query_aware``). Either way it is
asked, as a sentence to complete, after the text. A key counts as found if each of its tokens is the most probable one after
the question and the tokens before it, which is when greedy decoding gives it.

All of this is one batch with a row per text and task: a policy is compiled once and reads once. With ``kvzip`` and
``kvcompose`` the rows share the numbers of slots of their layers, so each is judged with what suits all of them on average.
"""

from __future__ import annotations

import itertools
import math
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from memjax.cache.ledger import dense_nbytes_per_token, nbytes
from memjax.cache.parse import policy as parse_policy
from memjax.cache.policy import CachePolicy, abstract
from memjax.cache.spec import CacheSpec
from memjax.data import NOVEL
from memjax.evaluate.bootstrap import mean_interval
from memjax.evaluate.compare import Progress, Row, token_metrics
from memjax.evaluate.generated import UNCOMPRESSED
from memjax.evaluate.layerwise import read_layers
from memjax.evaluate.passkey import Multikey, Passkey
from memjax.evaluate.suite import Result, circumstances
from memjax.evict import Duo
from memjax.generate.reread import compress, rereading
from memjax.models.load import LanguageModel

METHODS = (
    "streaming(4,{window})",
    "h2o({budget})",
    "h2o({budget})+protect(4,{half})",
    "tova({budget})",
    "snapkv({budget})",
    "snapkv({budget})+massfold",
    "pyramidkv({budget})",
    "adakv({budget})",
    "dropkv({budget})",
    "expected_attention({budget})",
    "knorm({budget})",
    "keydiff({budget})",
    "kvzip({budget})",
    "kvzip({budget},across=head)",
    "kvcompose({budget})",
    "duo({share})",
    "streaming(4,{window})+int8",
    "h2o({budget})+int4(rotate=true)",
    "snapkv({budget})+turboquant(4,4)",
)
FRACTIONS = (1.0, 0.5, 0.25, 0.125)
_OPEN = r"\{(budget|window|half|share)\}"
SINKS = 4  # what {window} leaves of the budget to streaming's sinks
TASKS = {"passkey": Passkey, "multikey": Multikey}


@dataclass(frozen=True)
class Method:
    """An evictor whose budget is left open in a policy's string form.

    ``{budget}`` stands for the tokens that stay, ``{window}`` for four less, ``{half}`` for half of them, ``{share}`` for the
    part of the heads that keep every token, if the others keep what ``duo`` leaves them and all the budget on average.

    Raises:
      ValueError: no such place in the text, or a budget below what every head keeps.

    >>> Method("snapkv({budget},pool=max)+int8").name, str(Method("streaming(4,{window})").policy(64, 256))
    ('snapkv(pool=max)+int8', 'streaming(4,60)')
    >>> str(Method("duo({share})").policy(1024, 3136))
    'duo(share=0.25)'
    """

    template: str

    def __post_init__(self):
        if not re.search(_OPEN, self.template) or "{" in re.sub(_OPEN, "", self.template):
            raise ValueError(
                f"a method of the suite evict leaves its budget open, such as 'snapkv({{budget}})', got {self.template!r}"
            )

    @property
    def name(self) -> str:
        """The template without the budget."""
        return re.sub(r"\{\w+\},?|,\{\w+\}", "", self.template).replace("()", "")

    def policy(self, budget: int, tokens: int) -> CachePolicy:
        """The policy that keeps ``budget`` of ``tokens`` tokens."""
        numbers = {"budget": budget, "window": budget - SINKS, "half": budget // 2}
        text = re.sub(_OPEN, lambda match: str(numbers.get(match[1], match[0])), self.template)
        if "{share}" in text:
            least = Duo.sinks + Duo.window
            if budget < least:
                raise ValueError(f"{self.name} keeps {least} tokens in every head, got a budget of {budget} of {tokens}")
            text = text.replace("{share}", f"{(budget - least) / (tokens - least):.6g}" if tokens > budget else "1.0")
        return parse_policy(text)


@dataclass(frozen=True)
class EvictionEvaluation:
    """What to run, checked as far as that needs no model.

    Args:
      methods: see ``Method``; empty: ``METHODS``.
      fractions: the parts of ``tokens`` that stay.
      tokens: length of the text, keys included.
      continuation: tokens over which KL divergence is measured.
      depths: where keys are hidden, 0 the text's beginning, 1 its end.
      chunk: tokens read at a time.
      cache_dtype: dtype of what is not quantized; the reference keeps the dtype of the weights.

    Raises:
      ValueError: a bad or repeated method, a policy that cannot be built, a number out of range.
    """

    methods: tuple[str, ...] = ()
    fractions: tuple[float, ...] = FRACTIONS
    tokens: int = 4096
    continuation: int = 256
    depths: tuple[float, ...] = (0.1, 0.5, 0.9)
    chunk: int = 256
    cache_dtype: str = "bfloat16"

    def __post_init__(self):
        if not self.fractions or not all(0.0 < fraction <= 1.0 for fraction in self.fractions):
            raise ValueError(f"kept fractions lie in (0, 1], got {list(self.fractions)}")
        if min(self.tokens, self.chunk) < 1 or self.continuation < 2:
            raise ValueError(
                f"eviction needs tokens, chunk >= 1 and a continuation >= 2, got {self.tokens}, {self.chunk}, "
                f"{self.continuation}"
            )
        for name, given in (("fraction", self.fractions), ("depth", self.depths), ("method", self.jobs())):
            if twice := [each for i, each in enumerate(given) if each in given[:i]]:
                raise ValueError(f"{name} {twice[0]} is given twice")
        for depth in self.depths:
            Passkey(depth=depth)
        CacheSpec(1, 1, 1, 1, self.cache_dtype)
        self._check_length(len(NOVEL.read().encode()), "bytes")

    def jobs(self) -> list[tuple[str, float, CachePolicy]]:
        """Name, kept fraction and policy of everything that is measured."""
        named = [Method(text) for text in self.methods or METHODS]
        return [(m.name, fraction, m.policy(self.budget(fraction), self.tokens)) for m in named for fraction in self.fractions]

    def budget(self, fraction: float) -> int:
        """Tokens that a fraction of the text is."""
        return math.ceil(fraction * self.tokens)

    def steps(self) -> int:
        """How often ``evaluate_eviction`` reports progress."""
        return 1 + len(self.jobs())

    def tasks(self) -> list[Task]:
        """Rows of the batch behind the first, which is the plain text."""
        kinds = itertools.product(TASKS, (False, True), self.depths)
        return [Task(kind, shown, TASKS[kind](depth=depth)) for kind, shown, depth in kinds]

    def _check_length(self, length: int, unit: str) -> None:
        if self.tokens + self.continuation > length:
            raise ValueError(
                f"tokens and continuation must not exceed the {length} {unit} of the text {NOVEL.name!r}, got "
                f"{self.tokens} + {self.continuation}"
            )

    def batch(self, model: LanguageModel) -> Batch:
        """The token ids of all rows.

        Raises:
          ValueError: no tokenizer, a text too short, a chunk that cannot hold a question.
        """
        if model.tokenizer is None:
            raise ValueError(f"model {model.name} has no tokenizer: eval reads texts")
        ids, tasks = model.tokenizer.encode(NOVEL.read()), self.tasks()
        self._check_length(len(ids), "tokens")
        text = ids[: self.tokens]
        reads, asks = [text], [ids[self.tokens : self.tokens + self.continuation]]
        answers = [task.key.answer_tokens(model.tokenizer) for task in tasks]
        for task, answer in zip(tasks, answers, strict=True):
            hidden, question = task.key.hide(model.tokenizer, text), task.key.question_tokens(model.tokenizer)
            reminder = task.key.reminder_tokens(model.tokenizer)
            needed = max(len(question) + len(answer), len(reminder) + 1)
            if needed > self.chunk:
                raise ValueError(f"a chunk must hold a question and its answer, {needed} tokens, got {self.chunk}")
            reads.append(interleave(hidden, reminder, self.chunk) if task.shown else hidden)
            asks.append([*question, *answer[:-1]])
        return Batch(reads, asks, tasks, answers)


@dataclass(frozen=True)
class Task:
    """A key to be found.

    Attributes:
      kind: a name in ``TASKS``.
      shown: whether the question is there while the cache is compressed.
    """

    kind: str
    shown: bool
    key: Passkey


@dataclass(frozen=True)
class Batch:
    """Token ids of every row, the plain text first: what is read and compressed, then what is read from what is left."""

    reads: list[list[int]]
    asks: list[list[int]]
    tasks: list[Task]
    answers: list[list[int]]

    @property
    def capacity(self) -> int:
        """Tokens of the longest row."""
        return max(len(read) + len(ask) for read, ask in zip(self.reads, self.asks, strict=True))


def interleave(text: Sequence[int], question: Sequence[int], chunk: int) -> list[int]:
    """The text with the question at the end of every chunk.

    >>> interleave([1, 2, 3, 4, 5], [0], 3)
    [1, 2, 0, 3, 4, 0, 5, 0]
    """
    step = chunk - len(question)
    return [token for start in range(0, len(text), step) for token in (*text[start : start + step], *question)]


def evaluate_eviction(
    model: LanguageModel,
    evaluation: EvictionEvaluation,
    progress: Progress | None = None,
    known: Result | None = None,
    keep: Callable[[Result], None] | None = None,
) -> Result:
    """Runs the suite.

    Args:
      progress: is told what is done.
      known: a result of the same texts, model, versions and so on: what it has is not measured again.
      keep: is given the result as far as it has come, after every method.

    Returns:
      What JSON can hold: suite, model, device, versions, tokens, continuation, depths, chunk, cache_dtype, bootstrap, seconds,
      and rows, the uncompressed model's first, with the keys name, policy, fraction, budget, bytes_device (of one sequence),
      compression (bytes of a 16-bit cache of the same capacity over this one's), kld_mean, kld_low, kld_high, kld_p95, top1,
      ppl (of the continuation), prefill_tokens_per_s (all rows, eviction included) and per task and setting, such as
      multikey_hidden, the part of the keys that was found; answers has each of them.

    Raises:
      ValueError: a text too short, a policy that cannot serve the model, or a known result of something else, before anything
        is computed.
      FloatingPointError: a policy gave NaN.
    """
    begin, tell = time.perf_counter(), progress or (lambda done: None)
    head = {"suite": "evict", "text": NOVEL.name, "tokens": evaluation.tokens, "chunk": evaluation.chunk}
    head |= {"continuation": evaluation.continuation, "depths": list(evaluation.depths)}
    head |= circumstances(model, evaluation.cache_dtype, evaluation.continuation)
    measured = {} if known is None else _measured(known, head)
    begin -= 0.0 if known is None else known.get("seconds", 0.0)
    batch = evaluation.batch(model)
    specs = model.decoder.cache_specs(len(batch.reads), batch.capacity, evaluation.cache_dtype)
    for _, _, policy in evaluation.jobs():
        abstract(policy, specs)
    reader = _Reader(model, batch, evaluation.chunk)
    wanted = reader.run(CachePolicy(), None)
    rows = [{"name": UNCOMPRESSED, "fraction": 1.0, "budget": evaluation.tokens} | _row(wanted, wanted, batch, specs)]
    tell(UNCOMPRESSED)
    for name, fraction, policy in evaluation.jobs():
        row = measured.pop((name, fraction, str(policy)), None)
        if row is None:
            row = {"name": name, "fraction": fraction, "budget": evaluation.budget(fraction)}
            row |= _row(wanted, reader.run(policy, evaluation.cache_dtype), batch, specs)
        rows.append(row)
        result = head | {"rows": rows + list(measured.values()), "seconds": time.perf_counter() - begin}
        if keep is not None:
            keep(result)
        tell(f"{name}, {fraction:g} kept")
    return result


def _measured(known: Result, head: Result) -> dict[tuple[str, float, str], Row]:
    """Rows of a result, but for the uncompressed model's, by name, fraction and policy."""
    if not isinstance(known, Mapping) or "rows" not in known:
        raise ValueError("the known result is none of this suite: it has no rows")
    for key, value in head.items():
        if known.get(key) != value:
            raise ValueError(f"the known result has {key} {known.get(key)!r}, not {value!r}; write to another file")
    return {(row["name"], row["fraction"], row["policy"]): row for row in known["rows"] if row["name"] != UNCOMPRESSED}


@dataclass(frozen=True)
class _Found:
    """What one policy gave: logits after each token of the continuation, and per task those that predict the answer."""

    policy: CachePolicy
    continuation: Float[Array, "T V"]
    answers: list[Float[np.ndarray, "A V"]]
    following: Int[Array, "F"]
    bytes_device: int
    rate: float


class _Reader:
    def __init__(self, model: LanguageModel, batch: Batch, chunk: int):
        self.model, self.batch, self.chunk = model, batch, chunk
        self._logits = jax.jit(lambda decoder, hidden: decoder.logits(hidden))

    def run(self, policy: CachePolicy, dtype: str | None) -> _Found:
        """Reads, compresses and asks."""
        model, batch = self.model, self.batch
        cache = model.init_cache(policy, len(batch.reads), batch.capacity, dtype)
        begin = time.perf_counter()
        for tokens, lengths in pieces(batch.reads, self.chunk):
            hidden, cache = read_layers(model.decoder, cache, tokens, lengths)
        if rereading(cache) is not None:
            cache = compress(model, cache, batch.reads, room=max(map(len, batch.asks)))
        jax.block_until_ready((hidden, cache))
        held = nbytes(cache).device // len(batch.reads)
        rate = sum(map(len, batch.reads)) / (time.perf_counter() - begin)
        continued, answers = [], []
        for i, (tokens, lengths) in enumerate(pieces(batch.asks, self.chunk)):
            hidden, cache = read_layers(model.decoder, cache, tokens, lengths)
            continued.append(self._logits(model.decoder, hidden[0])[: lengths[0]])
            for row, answer in enumerate(batch.answers if i == 0 else [], 1):
                last = hidden[row, len(batch.asks[row]) - len(answer) :][: len(answer)]
                answers.append(np.asarray(self._logits(model.decoder, last)))
        continuation = jnp.concatenate(continued)
        if not all(np.isfinite(each).all() for each in (np.asarray(continuation), *answers)):
            raise FloatingPointError(f"{policy} gave NaN; try another policy or cache dtype")
        return _Found(policy, continuation, answers, jnp.asarray(batch.asks[0][1:], jnp.int32), held, rate)


def pieces(rows: Sequence[Sequence[int]], chunk: int) -> list[tuple[Int[np.ndarray, "B C"], Int[np.ndarray, "B"]]]:
    """Rows of different lengths chunk by chunk: padded tokens, and how many of each row are real.

    >>> [(tokens.tolist(), counts.tolist()) for tokens, counts in pieces([[1, 2, 3], [4]], 2)]
    [([[1, 2], [4, 0]], [2, 1]), ([[3, 0], [0, 0]], [1, 0])]
    """
    lengths = np.asarray([len(row) for row in rows])
    padded = np.zeros((len(rows), -(-max(lengths) // chunk) * chunk), np.int32)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = ids
    starts = range(0, padded.shape[1], chunk)
    return [(padded[:, i : i + chunk], np.clip(lengths - i, 0, chunk).astype(np.int32)) for i in starts]


def _row(wanted: _Found, found: _Found, batch: Batch, specs: Sequence[CacheSpec]) -> Row:
    """Measurements of one policy against the uncompressed model."""
    kld, agree, nll = (np.asarray(x) for x in token_metrics(wanted.continuation, found.continuation, found.following))
    interval = mean_interval(kld)
    row = {
        "policy": str(found.policy),
        "bytes_device": found.bytes_device,
        "compression": batch.capacity * dense_nbytes_per_token(specs) / found.bytes_device,
        "kld_mean": interval.mean,
        "kld_low": interval.low,
        "kld_high": interval.high,
        "kld_p95": float(np.percentile(kld, 95)),
        "top1": float(agree.mean()),
        "ppl": float(np.exp(nll.mean(dtype=np.float64))),
        "prefill_tokens_per_s": found.rate,
    }
    answers = [judge(*each) for each in zip(batch.tasks, found.answers, batch.answers, strict=True)]
    for kind, shown in itertools.product(TASKS, (False, True)):
        own = [each["found"] for each in answers if (each["task"], each["shown"]) == (kind, shown)]
        if own:
            row[f"{kind}_{'shown' if shown else 'hidden'}"] = sum(own) / len(own)
    return row | {"answers": answers}


def judge(task: Task, logits: Float[np.ndarray, "A V"], answer: Sequence[int]) -> Row:
    """Whether greedy decoding would give the answer, how many of its tokens it would, and their mean surprise in nats."""
    best = logits.argmax(axis=-1) == np.asarray(answer)
    surprise = -np.asarray(jax.nn.log_softmax(logits))[np.arange(len(answer)), answer]
    row = {"task": task.kind, "shown": task.shown, "depth": task.key.depth, "found": bool(best.all())}
    return row | {"right_tokens": float(best.mean()), "nll": float(surprise.mean(dtype=np.float64))}

"""``memjax eval``: cache policies over several texts, in both settings, with intervals, pass keys and generated samples.

The policies and the texts of a suite stand in the constants below and nowhere else.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import itertools
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from memjax.cache.parse import policy as parse_policy
from memjax.cache.policy import CachePolicy, Windows, abstract
from memjax.cache.spec import CacheSpec
from memjax.data import CODE, NOVEL, Text
from memjax.evaluate.bootstrap import BLOCK, LEVEL, SAMPLES, block_length, mean_interval, paired_difference
from memjax.evaluate.compare import Job, Reader, Reading, Row, Setup
from memjax.evaluate.generated import UNCOMPRESSED, Cache, generate_samples, retrieve
from memjax.evaluate.passkey import Passkey
from memjax.models.load import LanguageModel

SETTINGS = ("static", "accumulated")
STATIC_WINDOWS = Windows(4, 0)  # of lossy policies that do not say themselves what they protect
KV_POLICIES = (
    "int8",
    "int8(centre=none,balance=off)",
    "int4(rotate=true)",
    "int4(rotate=true,centre=none,balance=off)",
    "turboquant(4,4)",
    "turboquant(3,3)",
    "turboquant(2.5,2.5)",
    "turboquant(2,2)",
    "auto(bits=3.25)",
    "auto(bits=2.75)",
    "turboquant(4,4,scale=norm,centre=none,balance=off)",
    "turboquant(2,2,scale=norm,centre=none,balance=off)",
    "kivi(4)",
    "kivi(2)",
    "kvarn(4,2)",
    "zipcache(4,2)",
    "gear(kivi(2),4)",
    "fp8",
    "nf4",
    "nvfp4",
)
Result = dict[str, object]
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Suite:
    """What is measured.

    Attributes:
      texts: read by every policy.
      policies: their string forms; what an evaluation takes unless it names its own.
      haystack: the text that pass keys are hidden in.
      depths: where, 0 its beginning, 1 its end.
    """

    name: str
    texts: tuple[Text, ...]
    policies: tuple[str, ...]
    haystack: Text
    depths: tuple[float, ...]


SUITES = {"kv": Suite("kv", (NOVEL, CODE), KV_POLICIES, NOVEL, (0.1, 0.5, 0.9))}


@dataclass(frozen=True)
class Evaluation:
    """What to run of a suite, checked as far as that needs no model.

    Args:
      suite: a name in ``SUITES``.
      policies: string forms; empty: the suite's.
      tokens: read from the beginning of each text.
      setting: "static", "accumulated" or "both".
      retrieval_tokens: length of the text that hides a pass key; 0: no retrieval.
      sample: tokens generated after each text; 0: none.
      chunk: tokens read at a time.
      cache_dtype: dtype of what is not quantized.

    Raises:
      ValueError: an unknown suite, policy or setting, a policy given twice, a number out of range.
    """

    suite: str = "kv"
    policies: tuple[str, ...] = ()
    tokens: int = 1024
    setting: str = "both"
    retrieval_tokens: int = 4000
    sample: int = 0
    chunk: int = 128
    cache_dtype: str = "bfloat16"

    def __post_init__(self):
        if self.suite not in SUITES:
            raise ValueError(f"unknown suite {self.suite!r}; the known ones are {', '.join(SUITES)}, evict")
        if self.setting not in (*SETTINGS, "both"):
            raise ValueError(f"unknown setting {self.setting!r}; it is one of {', '.join(SETTINGS)}, both")
        parsed = [policy for _, policy in self.parsed()]
        if twice := sorted({str(policy) for policy in parsed if parsed.count(policy) > 1}):
            raise ValueError(f"policy {twice[0]} is given twice")
        if self.retrieval_tokens < 0 or self.sample < 0:
            raise ValueError(f"retrieval tokens and sample must be >= 0, got {self.retrieval_tokens}, {self.sample}")
        if self.setup().chunk >= self.tokens and self.setting != "static":
            raise ValueError(
                f"tokens must be more than a chunk in the accumulated setting, got {self.tokens} and {self.chunk}: "
                "a chunk is exact to itself, nothing compressed would be read"
            )
        CacheSpec(1, 1, 1, 1, self.cache_dtype)
        self._check_lengths({text: len(text.read().encode()) for text in self.all_texts()}, "bytes")

    def definition(self) -> Suite:
        """The suite itself."""
        return SUITES[self.suite]

    def setup(self) -> Setup:
        """How texts are read."""
        return Setup(chunk=self.chunk, cache_dtype=self.cache_dtype, decode_tokens=0)

    def parsed(self) -> list[tuple[str, CachePolicy]]:
        """Policies by the names they were given."""
        return [(text, parse_policy(text)) for text in self.policies or self.definition().policies]

    def jobs(self) -> list[tuple[str, Job]]:
        """Every policy in every setting; lossy ones protect four sinks and no more in the static one."""
        wanted = SETTINGS if self.setting == "both" else (self.setting,)
        return [
            (name, Job(static_policy(policy), True) if setting == "static" else Job(policy))
            for setting in wanted
            for name, policy in self.parsed()
        ]

    def all_texts(self) -> tuple[Text, ...]:
        """Every text that is needed."""
        suite = self.definition()
        return (*suite.texts, suite.haystack) if self.retrieval_tokens else suite.texts

    def encode(self, model: LanguageModel) -> dict[Text, list[int]]:
        """Ids of every text that is needed, whole.

        Raises:
          ValueError: no tokenizer, a text shorter than what is to be read of it, a policy that cannot serve the model.
        """
        if model.tokenizer is None:
            raise ValueError(f"model {model.name} has no tokenizer: eval reads texts")
        ids = {text: model.tokenizer.encode(text.read()) for text in self.all_texts()}
        self._check_lengths({text: len(found) for text, found in ids.items()}, "tokens")
        if self.retrieval_tokens:
            Passkey().hide(model.tokenizer, ids[self.definition().haystack][: self.retrieval_tokens])
        for _, job in self.jobs():
            abstract(job.policy, model.decoder.cache_specs(1, self.tokens, self.cache_dtype))
        return ids

    def _check_lengths(self, lengths: dict[Text, int], unit: str) -> None:
        """A token is at least a byte of the text, so that texts too short by far are found without a tokenizer."""
        shortest = min(self.definition().texts, key=lengths.__getitem__)
        if not 2 <= self.tokens <= lengths[shortest]:
            limit = f"the {lengths[shortest]} {unit} of the text {shortest.name!r}"
            raise ValueError(f"tokens must lie between 2 and {limit}, got {self.tokens}")
        haystack = self.definition().haystack
        if self.retrieval_tokens > lengths.get(haystack, 0):
            limit = f"the {lengths[haystack]} {unit} of the text {haystack.name!r}"
            raise ValueError(f"retrieval tokens must not exceed {limit}, got {self.retrieval_tokens}")

    def steps(self) -> int:
        """How often ``evaluate`` reports progress."""
        suite, policies = self.definition(), len(self.parsed())
        reads = len(suite.texts) * -(-self.tokens // self.chunk)
        return len(self.jobs()) + reads + (policies + 1) * ((self.retrieval_tokens > 0) + (self.sample > 0))


def static_policy(policy: CachePolicy) -> CachePolicy:
    """The policy of the static setting: a lossy one that does not choose its windows keeps four sinks dense."""
    if not policy.codec.lossy or policy.windows is not None:
        return policy
    return dataclasses.replace(policy, windows=STATIC_WINDOWS)


def evaluate(model: LanguageModel, evaluation: Evaluation, progress: Progress | None = None) -> Result:
    """Runs an evaluation.

    Returns:
      What JSON can hold: suite, model, device, versions, tokens, settings, chunk, cache_dtype, bootstrap, seconds, and
      rows: as ``compare`` returns them, with name (the policy as it was given), text, kld_low, kld_high;
      pairs: neighbours in order of mean KL divergence, see ``neighbours``;
      ranking: per text the rank correlation of the settings, see ``compare_settings``;
      retrieval: per policy and for the uncompressed cache, see ``retrieve``;
      samples: per text and policy, see ``generate_samples``.

    Raises:
      ValueError: a text too short or a policy that cannot serve the model, before anything is computed.
      FloatingPointError: a policy gave NaN.
    """
    begin, tell = time.perf_counter(), progress or (lambda done: None)
    ids = evaluation.encode(model)
    result = {"suite": evaluation.suite, "tokens": evaluation.tokens, "chunk": evaluation.chunk}
    result |= {"retrieval_tokens": evaluation.retrieval_tokens, "sample": evaluation.sample}
    result |= circumstances(model, evaluation.cache_dtype, evaluation.tokens)
    rows, pairs = _measure(model, evaluation, ids, tell)
    settings = list(dict.fromkeys(row["setting"] for row in rows))
    result |= {"settings": settings, "rows": rows, "pairs": pairs}
    result["ranking"] = [{"text": text, "spearman": rho} for text, rho in compare_settings(rows).items()]
    return result | _generated(model, evaluation, ids, tell) | {"seconds": time.perf_counter() - begin}


def _generated(model: LanguageModel, evaluation: Evaluation, ids: dict[Text, list[int]], tell: Progress) -> Result:
    """What the caches answer and how they continue."""
    suite, policies, chunk = evaluation.definition(), evaluation.parsed(), evaluation.chunk
    caches = [Cache(UNCOMPRESSED, CachePolicy(), None)]
    caches += [Cache(name, policy, evaluation.cache_dtype) for name, policy in policies]
    result: Result = {"retrieval": [], "samples": []}
    if evaluation.retrieval_tokens:
        haystack = ids[suite.haystack][: evaluation.retrieval_tokens]
        result["retrieval"] = retrieve(model, caches, haystack, suite.depths, chunk, tell)
    if evaluation.sample:
        prompts = {text.name: ids[text][: evaluation.tokens] for text in suite.texts}
        result["samples"] = generate_samples(model, caches, prompts, evaluation.sample, chunk, tell)
    return result


def circumstances(model: LanguageModel, cache_dtype: str, measured: int) -> Result:
    """What a result depends on besides what was asked for; ``measured``: tokens that intervals are about."""
    packages = ("memjax", "jax", "jaxlib", "flax", "numpy")
    return {
        "model": model.name,
        "weights": str(jnp.dtype(model.decoder.embedding.dtype)),
        "device": jax.devices()[0].device_kind,
        "versions": {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages},
        "cache_dtype": cache_dtype,
        "bootstrap": {"block": block_length(measured, BLOCK), "samples": SAMPLES, "level": LEVEL},
    }


def _measure(model, evaluation: Evaluation, ids: dict[Text, list[int]], tell: Progress) -> tuple[list[Row], list[Row]]:
    """Rows of every text, setting and policy, and the comparison of neighbours."""
    reader, jobs = Reader(model, evaluation.tokens, evaluation.setup()), evaluation.jobs()
    for name, job in jobs:
        reader.start(job, evaluation.cache_dtype)
        tell(f"compiled {name}")
    rows, pairs = [], []
    for text in evaluation.definition().texts:
        label = f"{text.name}: "
        readings = reader.read_text(
            ids[text][: evaluation.tokens], [job for _, job in jobs], lambda done, label=label: tell(label + done)
        )
        named = [(name, reading) for (name, _), reading in zip(jobs, readings, strict=True)]
        rows += [_with_interval(reader.row(reading), reading) | {"name": name, "text": text.name} for name, reading in named]
        for static in sorted({job.static for _, job in jobs}, reverse=True):
            curves = {name: reading.kld_per_token() for name, reading in named if reading.job.static == static}
            place = {"text": text.name, "setting": "static" if static else "accumulated"}
            pairs += [place | pair for pair in neighbours(curves)]
    return rows, pairs


def _with_interval(row: Row, reading: Reading) -> Row:
    interval = mean_interval(reading.kld_per_token())
    return row | {"kld_low": interval.low, "kld_high": interval.high}


def neighbours(curves: dict[str, np.ndarray]) -> list[Row]:
    """Policies in order of their mean KL divergence, each compared with the next, token by token.

    Returns:
      Rows with the keys better, worse, difference, low, high (of worse - better) and apart: whether the interval excludes 0.
    """
    order = sorted(curves, key=lambda name: curves[name].mean(dtype=np.float64))
    rows = []
    for better, worse in itertools.pairwise(order):
        found = paired_difference(curves[worse], curves[better])
        row = {"better": better, "worse": worse, "difference": found.mean, "low": found.low, "high": found.high}
        rows.append(row | {"apart": found.excludes_zero})
    return rows


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Rank correlation, equal values sharing the mean of their ranks; None where one of them is constant.

    Raises:
      ValueError: different lengths.
    """
    if len(a) != len(b):
        raise ValueError(f"a rank correlation needs as many values twice, got {len(a)} and {len(b)}")
    first, second = (_ranks(values) for values in (a, b))
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return float(np.corrcoef(first, second)[0, 1])


def _ranks(values: Sequence[float]) -> np.ndarray:
    _, index, counts = np.unique(np.asarray(values, np.float64), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[index]


def compare_settings(rows: Sequence[Row]) -> dict[str, float | None]:
    """Per text, whether the settings rank the policies alike: Spearman's correlation of their mean KL divergences.

    Args:
      rows: with the keys text, setting, name and kld_mean; policies that lack a setting are left out.

    Returns:
      1: the same order, -1: the reverse one, None: fewer than two policies or no order among them.
    """
    found: dict[str, float | None] = {}
    for text in dict.fromkeys(str(row["text"]) for row in rows):
        by_setting = {
            setting: {row["name"]: row["kld_mean"] for row in rows if (row["text"], row["setting"]) == (text, setting)}
            for setting in SETTINGS
        }
        static, accumulated = (by_setting[setting] for setting in SETTINGS)
        shared = [name for name in static if name in accumulated]
        found[text] = spearman([static[name] for name in shared], [accumulated[name] for name in shared])
    return found

"""What a model generates from compressed caches: pass keys found again, and where samples part from the uncompressed run."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from memjax.cache.policy import Policy
from memjax.evaluate.compare import Row
from memjax.evaluate.layerwise import answer
from memjax.evaluate.passkey import Passkey
from memjax.generate.loop import generate
from memjax.models.load import LanguageModel

UNCOMPRESSED = "uncompressed"  # the name of the cache that the others are held against
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Cache:
    """A kind of cache: its name in rows, its policy and the dtype of what is not quantized (None: that of the weights)."""

    name: str
    policy: Policy
    dtype: str | None


def retrieve(
    model: LanguageModel,
    caches: Sequence[Cache],
    haystack: Sequence[int],
    depths: Sequence[float],
    chunk: int,
    progress: Progress,
    key: Passkey | None = None,
) -> list[Row]:
    """Asks for a pass key hidden at several depths; the text is compressed while it is read, before the question is known.

    The depths are rows of one batch, so that a cache is compiled once.

    Args:
      caches: the uncompressed one first: what it does not find, no policy has lost.
      haystack: ids of the text, as long as it shall be with the key in it.

    Returns:
      Rows with the keys name, policy, tokens, depths, distances (tokens between key and question: what lies within a chunk
      and the policy's recent window has not been compressed yet), found, answers, fraction.

    Raises:
      ValueError: the text is no longer than the key.
    """
    tokenizer = model.tokenizer
    keys = [dataclasses.replace(key or Passkey(), depth=depth) for depth in depths]
    question, length = keys[0].question_tokens(tokenizer), keys[0].answer_length(tokenizer)
    prompts = [[*each.hide(tokenizer, haystack), *question] for each in keys]
    room = len(haystack) - len(tokenizer.encode(keys[0].statement, add_bos=False))
    rows = []
    for cache in caches:
        empty = model.init_cache(cache.policy, len(prompts), len(prompts[0]) + length, cache.dtype)
        answers = answer(model, empty, np.asarray(prompts, np.int32), chunk, length)
        judged = [each.judge(tokenizer, said.tolist()) for each, said in zip(keys, answers, strict=True)]
        found = [bool(each["passkey_found"]) for each in judged]
        row = {"name": cache.name, "policy": str(cache.policy), "tokens": len(haystack), "depths": list(depths)}
        row |= {"distances": [room - round(depth * room) for depth in depths], "found": found}
        row |= {"answers": [each["passkey_answer"] for each in judged], "fraction": sum(found) / len(found)}
        rows.append(row)
        progress(f"pass keys: {cache.name}")
    return rows


def generate_samples(
    model: LanguageModel,
    caches: Sequence[Cache],
    prompts: Mapping[str, list[int]],
    new: int,
    chunk: int,
    progress: Progress,
) -> list[Row]:
    """Continues every prompt greedily from each cache; the prompts are rows of one batch.

    Args:
      caches: the uncompressed one first.
      prompts: ids, by the name of their text.
      new: tokens to generate.

    Returns:
      Rows with the keys text, name, policy, prompt_tokens, new_tokens, first_difference (the first generated token that is not
      the uncompressed cache's, counted from 0; None: none differs), uncompressed and generated (the two texts).
    """
    rows, references = [], None
    for cache in caches:
        options = {"policy": cache.policy, "cache_dtype": cache.dtype, "chunk": chunk}
        samples = generate(model, list(prompts.values()), max_new_tokens=new, **options)
        progress(f"sample: {cache.name}")
        if references is None:
            references = samples
            continue
        for (text, prompt), reference, sample in zip(prompts.items(), references, samples, strict=True):
            row = {"text": text, "name": cache.name, "policy": str(cache.policy), "prompt_tokens": len(prompt)}
            row |= {"new_tokens": new, "first_difference": first_difference(reference.tokens, sample.tokens)}
            rows.append(row | {"uncompressed": reference.text, "generated": sample.text})
    return rows


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Where two sequences part; the shorter one's length if it begins the longer one, None if they are equal.

    >>> first_difference([5, 6, 7], [5, 9]), first_difference([5], [5, 6]), first_difference([5], [5])
    (1, 1, None)
    """
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return None if len(a) == len(b) else min(len(a), len(b))

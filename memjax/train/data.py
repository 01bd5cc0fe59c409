"""Text as bytes: a vocabulary of 256, so that a novel and some code are all that training needs."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from jaxtyping import Int, UInt8
from tokenizers import decoders, models, pre_tokenizers

from memjax.data import CODE, NOVEL
from memjax.models.tokenizer import Tokenizer

VOCAB = 256
HELD_OUT = 10  # the last tenth of each text is for validation


@dataclass(frozen=True, eq=False)
class Corpus:
    """Bytes to train on and bytes to validate on; no byte is in both.

    Attributes:
      train, validation: uint8, texts one after the other.
    """

    train: UInt8[np.ndarray, "n"]
    validation: UInt8[np.ndarray, "m"]

    @property
    def digest(self) -> str:
        """Tells corpora apart: a SHA-256 of both parts."""
        found = hashlib.sha256(len(self.train).to_bytes(8))
        for part in (self.train, self.validation):
            found.update(part.tobytes())
        return found.hexdigest()


def packaged_texts() -> list[bytes]:
    """The excerpt of a novel and the file of code that memjax brings along, 90 KB together."""
    return [text.read().encode() for text in (NOVEL, CODE)]


def read_texts(paths: Sequence[str | Path]) -> list[bytes]:
    """Further texts.

    Raises:
      FileNotFoundError: no such file.
    """
    for path in map(Path, paths):
        if not path.is_file():
            raise FileNotFoundError(f"no text file at {path}")
    return [Path(path).read_bytes() for path in paths]


def make_corpus(texts: Sequence[bytes]) -> Corpus:
    """Holds out the last tenth of each text for validation.

    >>> corpus = make_corpus([bytes(range(20)), bytes(10)])
    >>> len(corpus.train), corpus.validation.tolist()
    (27, [18, 19, 0])
    """
    train, held_out = bytearray(), bytearray()
    for text in texts:
        cut = len(text) - len(text) // HELD_OUT
        train += text[:cut]
        held_out += text[cut:]
    return Corpus(np.frombuffer(bytes(train), np.uint8), np.frombuffer(bytes(held_out), np.uint8))


def check_corpus(corpus: Corpus, batch: int, context: int) -> None:
    """Raises ValueError if a text is shorter than one batch, or what is held out of it than one sequence."""
    needed, held_out = batch * (context + 1), context + 1
    if len(corpus.train) < needed or len(corpus.validation) < held_out:
        raise ValueError(
            f"the text is too short: {len(corpus.train):,} bytes to train on and {len(corpus.validation):,} to validate on, "
            f"but a batch of {batch} sequences takes {needed:,} and validation {held_out:,}; give more text or smaller sizes"
        )


def training_batch(corpus: Corpus, seed: int, step: int, batch: int, context: int) -> Int[np.ndarray, "B T+1"]:
    """Sequences from random places. They depend on the seed and the step alone: the same for every twin and after a resume."""
    rng = np.random.default_rng([seed, step])
    starts = rng.integers(0, len(corpus.train) - context, batch)
    return corpus.train[starts[:, None] + np.arange(context + 1)].astype(np.int32)


def validation_batches(corpus: Corpus, batch: int, context: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is held out, cut into sequences that share their ends: every byte but the first is predicted at most once.

    Returns:
      Pairs of tokens int32 [batch, context + 1] and weights float32 [batch], 0 for rows that only fill the last batch.
    """
    count = (len(corpus.validation) - 1) // context
    starts = np.arange(count)[:, None] * context
    rows = corpus.validation[starts + np.arange(context + 1)].astype(np.int32)
    filled = np.concatenate([rows, np.zeros((-count % batch, context + 1), np.int32)])
    weights = (np.arange(len(filled)) < count).astype(np.float32)
    return [(filled[i : i + batch], weights[i : i + batch]) for i in range(0, len(filled), batch)]


def unigram_entropy(text: UInt8[np.ndarray, "n"]) -> float:
    """What a model loses per byte, in nats, that knows how frequent each byte of the text is, and nothing else.

    >>> round(unigram_entropy(np.frombuffer(b"abab", np.uint8)), 6)
    0.693147
    """
    counts = np.bincount(text, minlength=VOCAB)
    shares = counts[counts > 0] / len(text)
    return float(-np.sum(shares * np.log(shares)))


def byte_tokenizer() -> Tokenizer:
    """A tokenizer whose ids are the bytes of UTF-8, so that commands that take text can use a trained model.

    >>> byte_tokenizer().encode("é!")
    [195, 169, 33]
    """
    # The package spells each byte as a character: itself where it can be printed, else one behind Latin-1, in order.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printed = {letter: ord(letter) for letter in letters if ord(letter) < VOCAB}
    others = sorted(set(range(VOCAB)) - set(printed.values()))
    vocab = printed | dict(zip(letters[len(printed) :], others, strict=True))
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return Tokenizer(backend)

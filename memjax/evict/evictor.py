"""What an evictor is: a rule for which tokens stay, with static numbers of slots."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, NamedTuple, Self

from jaxtyping import Array, Float, Int

from memjax.cache.spec import CacheSpec, check_integers
from memjax.evict.observer import Observer


class Candidates(NamedTuple):
    """Tokens among which some stay: those of the history, then those that would enter it.

    Attributes:
      score: what observation or ``Budgeted.first_score`` has given them; None for evictors that keep none.
      pos: their positions in the text; negative: no token.
      end: tokens of the text so far.
      keys: gives the cached keys, rotated, float32: those of the history as its codes remember them.
      expected: gives the expected logits of queries at so many positions to come, for evictors that study queries.
    """

    score: Float[Array, "B K S"] | None
    pos: Int[Array, "B K S"]
    end: Int[Array, "B"]
    keys: Callable[[], Float[Array, "B K H S"]]
    expected: Callable[[int], Float[Array, "B K G S"]] | None = None


@dataclass(frozen=True)
class Evictor:
    """Decides which tokens of a layer stay."""

    name: ClassVar[str] = "evictor"
    joint: ClassVar[bool] = False  # whether a layer's heads decide together
    instead: ClassVar[str] = ""  # what to do where heads cannot share slots

    @property
    def shares_slots(self) -> bool:
        """Whether the heads of a layer share its slots, since each keeps as many tokens as it likes."""
        return False

    def validate(self, spec: CacheSpec) -> None:
        """Raises ValueError if the evictor cannot serve ``spec``, with the reason."""

    def check_recurrent(self) -> None:
        """Raises ValueError if no layer of a model may have a recurrent state, which is otherwise left alone."""

    def check_model(self, layers: int, fingerprint: str) -> None:
        """Raises ValueError if the evictor holds figures of another model than that of ``fingerprint``."""

    def for_layer(self, index: int, layers: int, protected: int) -> Self:
        """The evictor of layer ``index`` of ``layers``, in each of which so many tokens are protected."""
        del index, layers, protected
        return self


@dataclass(frozen=True)
class Limited(Evictor):
    """Keeps some of the tokens: ``budget`` of them per kv head, the protected first and newest ones among them.

    Args:
      budget: tokens per kv head; of methods whose layers differ, on average.
      fraction: instead of a budget, the part of the tokens that stays, in (0, 1].
      bytes: instead of a budget, what a model's whole cache may take on the device: the largest budget within it is taken
        when the specs of all layers are known (``memjax.cache.allocate``).

    Raises:
      ValueError: none or several of them, or out of range.
    """

    budget: int = dataclasses.field(default=0, metadata={"unset": 0})
    fraction: float = 0.0
    bytes: int = dataclasses.field(default=0, kw_only=True)

    def __post_init__(self):
        check_integers(self.name, 0, budget=self.budget, bytes=self.bytes)
        if (self.budget > 0) + (self.fraction != 0.0) + (self.bytes > 0) != 1:
            raise ValueError(
                f"{self.name} needs a budget in tokens, a fraction of the tokens or a number of bytes, one of them, got "
                f"budget={self.budget}, fraction={self.fraction}, bytes={self.bytes}"
            )
        if not 0.0 <= self.fraction <= 1.0:
            raise ValueError(f"{self.name} keeps a fraction in (0, 1] of the tokens, got {self.fraction}")

    def tokens(self, length: int) -> int:
        """Tokens that stay of a text of ``length``."""
        if self.bytes:
            raise ValueError(
                f"{self.name}(bytes={self.bytes}) is a limit for a model's whole cache: it needs the specs of all layers "
                "(policy.init([spec, ...]))"
            )
        return min(self.budget or math.ceil(self.fraction * length), length)

    def with_budget(self, budget: int) -> Self:
        """The same with so many tokens."""
        return dataclasses.replace(self, budget=budget, fraction=0.0, bytes=0)


@dataclass(frozen=True)
class Budgeted(Limited):
    """Keeps the protected tokens, and of the others the best; ``fraction`` is one of the cache's capacity.

    A token becomes a candidate when it leaves the protected tail; what has gone never comes back. While a prompt is read,
    eviction follows every chunk, so memory is bounded by the budget and one chunk; a new token of a decode step takes the
    place of the worst. Positions stay as they are in the text.
    """

    scored: ClassVar[bool] = True  # whether a score is kept per slot
    studies_queries: ClassVar[bool] = False  # whether moments of the queries are kept, see ``memjax.evict.expected_attention``

    @property
    def observer(self) -> Observer | None:
        """Whose attention scores the tokens; None: nobody's."""
        return None

    def first_score(self, k: Float[Array, "B K H T"], v: Float[Array, "B K H T"] | None) -> Float[Array, "B K T"] | None:
        """Scores of tokens that become candidates, from their exact keys and values; None: those of the observer."""
        del k, v
        return None

    def rank(self, tokens: Candidates) -> Float[Array, "B K S"]:
        """The higher, the longer a token stays."""
        return tokens.score

    def mass(self, tokens: Candidates) -> Float[Array, "B K S"] | None:
        """The attention that tokens get, up to a factor per head, for ``memjax.evict.massfold``; None: it is not known."""
        return tokens.score if self.observer is not None else None

"""Pass-key retrieval: a number hidden in a long text, asked for at its end (the task of arXiv 2305.16300).

With several keys in the text and one of them asked for (RULER's multi-key task, arXiv 2404.06654), a cache cannot keep what
looks important: it is the question that tells which key matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from memjax.models.tokenizer import Tokenizer


@dataclass(frozen=True)
class Passkey:
    """A key and where it is hidden.

    Args:
      key: digits.
      depth: where in the text, 0 its beginning, 1 its end.

    Raises:
      ValueError: a key that is no number, or a depth outside [0, 1].
    """

    key: str = "74219"
    depth: float = 0.5

    def __post_init__(self):
        if not self.key.isdigit():
            raise ValueError(f"a pass key is a string of digits, got {self.key!r}")
        if not 0.0 <= self.depth <= 1.0:
            raise ValueError(f"a pass key's depth lies in [0, 1], got {self.depth}")

    @property
    def statement(self) -> str:
        """What is hidden in the text."""
        return f"\n\nThe secret pass key is {self.key}. Remember it. {self.key} is the secret pass key.\n\n"

    @property
    def question(self) -> str:
        """What is asked after it: a sentence to complete, which even small base models understand."""
        return "\n\nThe secret pass key is"

    @property
    def reminder(self) -> str:
        """The question as it stands within a text: a whole sentence, lest the model learns to break off."""
        return "\n\nWhat is the secret pass key?\n\n"

    def statements(self) -> list[tuple[float, str]]:
        """Everything that is hidden, each with its depth."""
        return [(self.depth, self.statement)]

    def hide(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
        """``tokens`` with the statements in them, cut to the same length.

        Raises:
          ValueError: the text is no longer than what is to be hidden.
        """
        hidden = sorted((depth, tokenizer.encode(text, add_bos=False)) for depth, text in self.statements())
        taken = sum(len(statement) for _, statement in hidden)
        room = len(tokens) - taken
        if room < 1:
            raise ValueError(f"a text of {len(tokens)} tokens cannot hide a pass key of {taken} tokens")
        found, start = [], 0
        for depth, statement in hidden:
            at = round(depth * room)
            found += [*tokens[start:at], *statement]
            start = at
        return [*found, *tokens[start:room]]

    def question_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the question."""
        return tokenizer.encode(self.question, add_bos=False)

    def reminder_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the reminder."""
        return tokenizer.encode(self.reminder, add_bos=False)

    def answer_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the right answer."""
        return tokenizer.encode(f" {self.key}", add_bos=False)

    def answer_length(self, tokenizer: Tokenizer) -> int:
        """Tokens that the right answer takes."""
        return len(self.answer_tokens(tokenizer))

    def judge(self, tokenizer: Tokenizer, answer: Sequence[int]) -> dict[str, object]:
        """The row's keys passkey, passkey_depth, passkey_answer, passkey_found (all digits right)."""
        text = tokenizer.decode(answer[: self.answer_length(tokenizer)]).strip()
        return {
            "passkey": self.key,
            "passkey_depth": self.depth,
            "passkey_answer": text,
            "passkey_found": text == self.key,
        }


@dataclass(frozen=True)
class Multikey(Passkey):
    """One key of several, each of a city: London's, at ``depth``; the others lie evenly around it.

    >>> [round(depth, 2) for depth, _ in Multikey(depth=0.5).statements()]
    [0.5, 0.75, 0.0, 0.25]
    """

    city: str = "London"
    others: tuple[tuple[str, str], ...] = (("Paris", "18530"), ("Tokyo", "96047"), ("Rome", "35162"))

    @property
    def statement(self) -> str:
        """What is hidden of the key that is asked for; the shortest form is the one that small models tell apart best."""
        return _equation(self.city, self.key)

    @property
    def question(self) -> str:
        """It names the city."""
        return f"\n\n{self.city} ="

    @property
    def reminder(self) -> str:
        """It names the city."""
        return f"\n\nWhich number is {self.city}?\n\n"

    def statements(self) -> list[tuple[float, str]]:
        """The wanted key's and the others'."""
        step = 1 / (len(self.others) + 1)
        others = [((self.depth + i * step) % 1, _equation(*other)) for i, other in enumerate(self.others, 1)]
        return [*super().statements(), *others]


def _equation(city: str, key: str) -> str:
    return f"\n\n{city} = {key}. Remember it: {city} = {key}.\n\n"

"""Pass-key retrieval: a number hidden in a long text, asked for at its end (the task of arXiv 2305.16300)."""

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

    def hide(self, tokenizer: Tokenizer, tokens: Sequence[int]) -> list[int]:
        """``tokens`` with the statement in them, cut to the same length.

        Raises:
          ValueError: the text is no longer than the statement.
        """
        statement = tokenizer.encode(self.statement, add_bos=False)
        room = len(tokens) - len(statement)
        if room < 1:
            raise ValueError(f"a text of {len(tokens)} tokens cannot hide a pass key of {len(statement)} tokens")
        at = round(self.depth * room)
        return [*tokens[:at], *statement, *tokens[at:room]]

    def question_tokens(self, tokenizer: Tokenizer) -> list[int]:
        """Ids of the question."""
        return tokenizer.encode(self.question, add_bos=False)

    def answer_length(self, tokenizer: Tokenizer) -> int:
        """Tokens that the right answer takes."""
        return len(tokenizer.encode(f" {self.key}", add_bos=False))

    def judge(self, tokenizer: Tokenizer, answer: Sequence[int]) -> dict[str, object]:
        """The row's keys passkey, passkey_depth, passkey_answer, passkey_found (all digits right)."""
        text = tokenizer.decode(answer[: self.answer_length(tokenizer)]).strip()
        return {
            "passkey": self.key,
            "passkey_depth": self.depth,
            "passkey_answer": text,
            "passkey_found": text == self.key,
        }

"""Stop strings, found in text that comes in pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a generation. They are not part of what is shown.

    Raises:
      ValueError: an empty string, or something that is no string.
    """

    strings: tuple[str, ...]

    def __post_init__(self):
        if isinstance(self.strings, str):
            raise ValueError(f"stop strings come as a sequence of strings, got the single string {self.strings!r}")
        object.__setattr__(self, "strings", tuple(self.strings))
        for text in self.strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"a stop string must be a non-empty string, got {text!r}")

    def matcher(self) -> StopMatcher:
        """A matcher for one text."""
        return StopMatcher(self.strings)


class StopMatcher:
    """Takes a text in pieces; gives back what cannot be part of a stop string any more.

    >>> matcher = StopStrings(("END",)).matcher()
    >>> matcher.feed("one E"), matcher.feed("ND two")
    (('one ', False), ('', True))
    """

    def __init__(self, strings: tuple[str, ...]):
        self._strings, self._held, self._stopped = strings, "", False

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has been found (the earliest one wins)."""
        if self._stopped:
            return "", True
        text = self._held + piece
        found = [at for at in (text.find(s) for s in self._strings) if at >= 0]
        held = self._possible_start(text)
        if found and min(found) <= held:
            self._held, self._stopped = "", True
            return text[: min(found)], True
        self._held = text[held:]
        return text[:held], False

    def flush(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._held = self._held, ""
        return rest

    def _possible_start(self, text: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string."""
        longest = max((len(s) for s in self._strings), default=1) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            if any(len(s) > len(text) - at and s.startswith(text[at:]) for s in self._strings):
                return at
        return len(text)

"""Stop strings, found in text that comes in pieces."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class StopStrings:
    """Texts that end a generation. They are not part of what is shown.

    Args:
      strings: non-empty; any other sequence of strings becomes a tuple. None of them: nothing stops.

    Raises:
      ValueError: an empty string, something that is no string, or one string in place of a sequence.
    """

    strings: tuple[str, ...]

    def __post_init__(self):
        if isinstance(self.strings, str | bytes):
            raise ValueError(f"stop strings come as a sequence of strings, got {self.strings!r}: wrap it in a tuple")
        try:
            object.__setattr__(self, "strings", tuple(self.strings))
        except TypeError:
            raise ValueError(f"stop strings come as a sequence of strings, got {self.strings!r}") from None
        for text in self.strings:
            if not isinstance(text, str) or not text:
                raise ValueError(f"a stop string must be a non-empty string, got {text!r}: leave it out")

    def matcher(self) -> StopMatcher:
        """A matcher for one text."""
        return StopMatcher(self.strings)


class StopMatcher:
    """Takes a text in pieces and gives back what can no longer be part of a stop string.

    However the text is cut, what comes out in all is the text up to the earliest place where a stop string begins. Of
    two that begin there the longer one counts; since neither is shown, that is settled without waiting for its end.

    >>> matcher = StopStrings(("END",)).matcher()
    >>> matcher.feed("one E"), matcher.feed("ND two")
    (('one ', False), ('', True))
    """

    def __init__(self, strings: tuple[str, ...]):
        self._strings, self._held, self._stopped = strings, "", False

    @property
    def stopped(self) -> bool:
        """Whether a stop string has been found."""
        return self._stopped

    def feed(self, piece: str) -> tuple[str, bool]:
        """The text that is safe to show, and whether a stop string has been found; after that nothing more comes."""
        if self._stopped:
            return "", True
        text = self._held + piece
        held = self._possible_start(text)
        found = self._first_match(text)
        # A match that begins after `held` waits: a longer stop string may yet begin before it.
        if found is not None and found <= held:
            self._held, self._stopped = "", True
            return text[:found], True
        self._held = text[held:]
        return text[:held], False

    def flush(self) -> str:
        """What was held back, once no more text comes; sets ``stopped`` if a shorter stop string was in it after all."""
        found = self._first_match(self._held)
        rest, self._held = self._held[:found], ""
        self._stopped = self._stopped or found is not None
        return rest

    def _first_match(self, text: str) -> int | None:
        return min((at for at in map(text.find, self._strings) if at >= 0), default=None)

    def _possible_start(self, text: str) -> int:
        """Where the longest suffix begins that is a proper prefix of a stop string."""
        longest = max(map(len, self._strings), default=1) - 1
        for at in range(max(0, len(text) - longest), len(text)):
            if any(len(s) > len(text) - at and s.startswith(text[at:]) for s in self._strings):
                return at
        return len(text)

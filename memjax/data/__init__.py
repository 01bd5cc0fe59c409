"""Files that memjax brings along: two texts to measure on, measured tables of the default model, known configurations."""

from __future__ import annotations

import importlib.resources
from dataclasses import dataclass


@dataclass(frozen=True)
class Text:
    """A packaged text: its name in tables, and its file."""

    name: str
    file: str

    def read(self) -> str:
        """The whole text."""
        return (importlib.resources.files(__name__) / self.file).read_text(encoding="utf-8")


NOVEL = Text("novel", "moby_dick_excerpt.txt")
CODE = Text("code", "code_sample.py.txt")

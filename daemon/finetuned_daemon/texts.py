"""Sentences in both languages that users read: English and Chinese."""

from __future__ import annotations

from typing import Literal, NamedTuple

Language = Literal["en", "zh"]


class Text(NamedTuple):
    """A text in both languages."""

    en: str
    zh: str

    def within(self, language: Language) -> str:
        """The text in one language."""
        return self.zh if language == "zh" else self.en


NOTHING = Text("", "")


def choose_language(accept_language: str) -> Language:
    """The language that an `accept-language` header (RFC 9110, section 12.5.4) prefers.

    English where it names neither, or can't be read.
    """
    best: tuple[float, Language] = (0.0, "en")
    for item in accept_language.split(","):
        tag, _, weight = item.strip().partition(";")
        primary = tag.strip().lower().partition("-")[0]
        try:
            quality = float(weight.strip().removeprefix("q=")) if weight else 1.0
        except ValueError:
            continue
        if primary == "zh" and quality > best[0]:
            best = (quality, "zh")
        elif primary in ("en", "*") and quality > best[0]:
            best = (quality, "en")
    return best[1]

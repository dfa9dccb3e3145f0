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
        return printable(self.zh if language == "zh" else self.en)


NOTHING = Text("", "")


def printable(text: str) -> str:
    """The text without what would steer a terminal, or can't be written down.

    Names of files and what stands in them get into sentences; a line feed stays.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in " \n\t\u3000\xa0" else _shown(c) for c in text)


def _shown(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


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

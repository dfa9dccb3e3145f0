"""Cuts long documents where tokenizers part them too, so that none is encoded in one go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from finetuned_daemon.dataset.formats import Document

_PIECE_CHARACTERS = 1 << 18
"""An encoding takes more than 100 bytes a token until its tokens are copied out."""


@dataclass(frozen=True)
class Piece:
    """A document, or a piece of a long one."""

    document: Document
    text: str
    ends: bool
    """The document ends with this piece, and the end-of-text token follows."""


def pieces_of(document: Document) -> Iterator[Piece]:
    """A document in pieces."""
    text, start = document.text, 0
    while len(text) - start > _PIECE_CHARACTERS:
        end = _piece_end(text, start)
        yield Piece(document, text[start:end], ends=False)
        start = end
    yield Piece(document, text[start:], ends=True)


def _piece_end(text: str, start: int) -> int:
    """Where a text can be cut: behind a line, else before a blank."""
    middle, end = start + _PIECE_CHARACTERS // 2, start + _PIECE_CHARACTERS
    at = text.rfind("\n", middle, end)
    while at != -1 and text[at + 1].isspace():
        at = text.rfind("\n", middle, at)
    if at != -1:
        return at + 1
    at = text.rfind(" ", middle, end)
    while at != -1 and text[at - 1].isspace():
        at = text.rfind(" ", middle, at)
    return end if at == -1 else at

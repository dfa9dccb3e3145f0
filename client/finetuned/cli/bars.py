"""Bars of text, in plain ASCII where the output's encoding has nothing better."""

from __future__ import annotations

import sys

from rich.text import Text

_EIGHTHS = " ▏▎▍▌▋▊▉"
_FULL, _TRACK = "█", "░"


def bar(share: float, width: int, style: str = "", *, track: bool = False) -> Text:
    """A bar for a share of 0 to 1, padded to `width` cells; a share above 0 always shows."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    eighths = max(eighths, 1) if share > 0 else 0
    if is_encodable(_FULL + _TRACK + _EIGHTHS):
        filled = _FULL * (eighths // 8) + (_EIGHTHS[eighths % 8] if eighths % 8 else "")
        rest = _TRACK if track else " "
    else:
        filled = "#" * -(-eighths // 8)
        rest = "." if track else " "
    return Text(filled, style=style).append(rest * (width - len(filled)), style="dim")


def is_encodable(text: str) -> bool:
    """Whether stdout's encoding has these characters."""
    try:
        text.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True

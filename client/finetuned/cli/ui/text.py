"""Pieces of text that several widgets draw: cells of a fixed width, bars, figures."""

from __future__ import annotations

import math
from collections.abc import Iterable

from rich.cells import cell_len, chop_cells, set_cell_size
from rich.text import Text

from finetuned.cli.settings import visible

_FULL, _HALF, _TRACK = "━", "╸", "─"


def one_line(text: str) -> str:
    """The text in one line, without what would steer the terminal."""
    return visible(" ".join(text.split()) if "\n" in text or "\t" in text else text)


def cell(text: str, width: int, *, right: bool = False) -> str:
    """The text in exactly so many cells; what is too long ends in an ellipsis."""
    size = cell_len(text)
    if size > width:
        return set_cell_size(text, max(width - 1, 0)) + "…" if width else ""
    blank = " " * (width - size)
    return blank + text if right else text + blank


def folded(text: str, width: int) -> list[str]:
    """The text in lines of at most so many cells, broken at a blank where there is one."""
    lines: list[str] = []
    while len(text) * 2 > width and cell_len(text) > width:
        part = chop_cells(text, width)[0]
        blank = part.rfind(" ", len(part) // 2)
        if blank > 0 and text[len(part)] != " ":
            part = part[:blank]
        lines.append(part)
        text = text[len(part) :].lstrip(" ")
    return [*lines, text]


def bar(share: float, width: int, style: str) -> Text:
    """A bar for a share of 0 to 1; without colours it is told by its heavy line."""
    halves = round(min(max(share, 0.0), 1.0) * width * 2)
    halves = max(halves, 1) if share > 0 else 0
    filled = _FULL * (halves // 2) + _HALF * (halves % 2)
    return Text.assemble((filled, style), (_TRACK * (width - len(filled)), "dim"))


def lines_of(lines: Iterable[Text]) -> Text:
    """Lines below each other, each cut where the room ends."""
    return Text("\n", no_wrap=True, overflow="ellipsis").join(lines)


def figure(value: float) -> str:
    """A measured value, such as `1.234`, `2e-05` or `1,250`."""
    if not math.isfinite(value):
        return str(value)
    if value and (abs(value) < 0.001 or abs(value) >= 1e6):
        return f"{value:.3g}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"

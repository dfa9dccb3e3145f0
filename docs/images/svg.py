"""Terminal pictures that stand for themselves: no font is fetched, and lines are drawn as lines.

Rich and Textual write SVG with text in a font from the web. Here the font is whatever the reader
has, and dots, bars and borders are shapes, which meet whatever the font.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator

# Rich's own measures: a cell, and where its text stands in it.
WIDTH, HEIGHT, BASELINE = 12.2, 24.4, 18.5
_FONTS = 'ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace'

# Left, right, up, down: 1 for a light line, 2 for a heavy one.
_LINES = {
    "─": (1, 1, 0, 0),
    "━": (2, 2, 0, 0),
    "╸": (2, 0, 0, 0),
    "╺": (0, 2, 0, 0),
    "│": (0, 0, 1, 1),
    "┤": (1, 0, 1, 1),
    "├": (0, 1, 1, 1),
    "└": (0, 1, 1, 0),
    "╰": (0, 1, 1, 0),
    "╭": (0, 1, 0, 1),
    "┌": (0, 1, 0, 1),
    "╮": (1, 0, 0, 1),
    "┐": (1, 0, 0, 1),
    "╯": (1, 0, 1, 0),
    "┘": (1, 0, 1, 0),
}
# Left, top, right, bottom as shares of the cell.
_BLOCKS = {
    "█": (0.0, 0.0, 1.0, 1.0),
    "▌": (0.0, 0.0, 0.5, 1.0),
    "▐": (0.5, 0.0, 1.0, 1.0),
    "▀": (0.0, 0.0, 1.0, 0.5),
    "▄": (0.0, 0.5, 1.0, 1.0),
    "▔": (0.0, 0.0, 1.0, 0.125),
    "▁": (0.0, 0.875, 1.0, 1.0),
    **{c: (0.0, 0.0, n / 8, 1.0) for n, c in enumerate("▏▎▍▌▋▊▉", 1)},
}
# Column and row of each bit of a braille cell.
_DOTS = ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3))

_TEXT = re.compile(
    r'<text class="(?P<kind>[^"]+)" x="(?P<x>[\d.]+)" y="(?P<y>[\d.]+)" '
    r'textLength="[\d.]+" clip-path="(?P<clip>[^"]+)">(?P<text>[^<]*)</text>'
)


def standalone(svg: str) -> str:
    """The picture without fonts from elsewhere, its lines and dots drawn."""
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)
    svg = re.sub(r"font-family: [^;]+;", f"font-family: {_FONTS};", svg)
    svg = re.sub(r"<!--.*?-->\s*", "", svg)
    svg = _TEXT.sub(_redrawn, svg)
    return "\n".join(line.rstrip() for line in svg.splitlines()) + "\n"


def _redrawn(match: re.Match[str]) -> str:
    x, y = float(match["x"]), float(match["y"])
    text = html.unescape(match["text"])
    return "".join(
        f'<path class="{match["kind"]}" d="{_path(part, x + at * WIDTH, y - BASELINE)}"/>'
        if is_shape
        else f'<text class="{match["kind"]}" x="{x + at * WIDTH:g}" y="{y:g}" '
        f'textLength="{len(part) * WIDTH:g}" clip-path="{match["clip"]}">'
        f"{html.escape(part, quote=False).replace(chr(160), '&#160;')}</text>"
        for at, part, is_shape in _parts(text)
        if part.strip("\xa0 ")
    )


def _parts(text: str) -> Iterator[tuple[int, str, bool]]:
    """Stretches of characters that are all drawn, or all text, and where each begins."""
    start = 0
    for at in range(1, len(text) + 1):
        if at == len(text) or _is_shape(text[at]) != _is_shape(text[start]):
            yield start, text[start:at], _is_shape(text[start])
            start = at


def _is_shape(character: str) -> bool:
    is_dots = "\u2801" <= character <= "\u28ff"
    return is_dots or character in _LINES or character in _BLOCKS


def _path(text: str, x: float, top: float) -> str:
    return "".join(
        _rectangle(left + x + at * WIDTH, upper + top, width, height)
        for at, character in enumerate(text)
        for left, upper, width, height in _shapes(character)
    )


def _shapes(character: str) -> Iterator[tuple[float, float, float, float]]:
    """Left, top, width and height of what a character is made of."""
    if character in _BLOCKS:
        left, top, right, bottom = _BLOCKS[character]
        yield left * WIDTH, top * HEIGHT, (right - left) * WIDTH, (bottom - top) * HEIGHT
    elif character in _LINES:
        left, right, up, down = _LINES[character]
        half_x, half_y = WIDTH / 2, HEIGHT / 2
        for weight, start in ((left, 0.0), (right, half_x)):
            if weight:
                yield start, half_y - weight * 0.75, half_x, weight * 1.5
        for weight, start in ((up, 0.0), (down, half_y)):
            if weight:
                yield half_x - weight * 0.75, start, weight * 1.5, half_y
    else:
        bits = ord(character) - 0x2800
        for bit, (column, row) in enumerate(_DOTS):
            if bits >> bit & 1:
                yield column * WIDTH / 2 + 1.1, row * HEIGHT / 4 + 1.1, 4, 4


def _rectangle(left: float, top: float, width: float, height: float) -> str:
    return f"M{left:.1f} {top:.1f}h{width:.3g}v{height:.3g}h-{width:.3g}z"

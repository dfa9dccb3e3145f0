"""The curves of a run: what is known of them, and how they are drawn. No widget."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence

from rich.text import Text

from finetuned.cli.curve import BITS, connected
from finetuned.cli.ui.text import figure

Points = Sequence[tuple[float, float]]

MOST_POINTS = 4000
"""Of one curve; beyond it, it is thinned out."""
SMOOTHINGS = (0.0, 0.6, 0.9)
"""Weights of the past in a smoothed curve; 0: as measured."""

# Drawn into one plot, as they are compared.
_TOGETHER = {"loss": ("loss", "eval_loss")}
_FIRST = ("loss", "learning_rate", "tokens_per_second", "grad_norm")
_STYLES = ("cyan", "yellow", "magenta")
_AXIS = "dim"


class Curves:
    """Every value that a run has measured, by name, in order of steps."""

    def __init__(self) -> None:
        self.run = 0
        self._points: dict[str, list[tuple[int, float]]] = {}

    def clear(self, run: int = 0) -> None:
        """Another run: nothing is known of it yet."""
        self.run = run
        self._points.clear()

    def fill(self, name: str, steps: Sequence[int], values: Sequence[float]) -> None:
        """A whole curve, as the daemon has it."""
        self._points[name] = list(zip(steps, values, strict=True))

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """New values; of a step that is taken again, they replace those from it on."""
        for name, value in values.items():
            points = self._points.setdefault(name, [])
            if points and points[-1][0] >= step:
                del points[bisect_left(points, step, key=lambda point: point[0]) :]
            points.append((step, value))
            if len(points) > MOST_POINTS:
                self._points[name] = thinned(points)

    def points(self, name: str) -> list[tuple[int, float]]:
        """One curve; empty where there is none."""
        return self._points.get(name, [])

    @property
    def last_step(self) -> int:
        """The newest step of any curve."""
        return max((points[-1][0] for points in self._points.values() if points), default=0)

    @property
    def names(self) -> list[str]:
        """What can be shown, each with what is drawn along with it: loss first."""
        along = {name for group in _TOGETHER.values() for name in group[1:]}
        found = [name for name, points in self._points.items() if points]
        shown = [name for name in found if name not in along]
        if not shown and found:
            shown = found[:1]
        return sorted(shown, key=lambda n: (_FIRST.index(n) if n in _FIRST else len(_FIRST), n))

    def group(self, name: str) -> dict[str, list[tuple[int, float]]]:
        """The curve and those that are drawn along with it."""
        return {n: self._points[n] for n in _TOGETHER.get(name, (name,)) if self._points.get(n)}


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """About half as many: of four in a row the lowest and the highest, so that peaks stay."""
    kept: list[tuple[int, float]] = []
    for at in range(0, len(points), 4):
        four = points[at : at + 4]
        kept += sorted({min(four, key=_height), max(four, key=_height)})
    if kept[-1] != points[-1]:
        kept.append(points[-1])
    return kept


def smoothed(points: Points, weight: float) -> list[tuple[float, float]]:
    """An exponential moving average, corrected for its start; gaps stay out of it."""
    average, total = 0.0, 0.0
    result: list[tuple[float, float]] = []
    for step, value in points:
        if not math.isfinite(value):
            continue
        average = weight * average + (1 - weight) * value
        total = weight * total + (1 - weight)
        result.append((step, average / total))
    return result


def draw(
    curves: Mapping[str, Points],
    width: int,
    height: int,
    *,
    smoothing: float = 0.0,
    log_scale: bool = False,
) -> list[Text]:
    """The curves in braille dots over axes, as lines of text.

    Args:
        curves: By name; the last in the front where they meet.
        width: Columns in all.
        height: Lines in all, with axis and steps.
        smoothing: Weight of the past, 0 for none.
        log_scale: By the logarithm of the value; values of 0 and less are left out.

    Returns:
        Lines; empty where there is nothing to draw or no room.
    """
    rows = height - 2
    lines = {
        name: _heights(smoothed(points, smoothing), log_scale) for name, points in curves.items()
    }
    lines = {name: points for name, points in lines.items() if points}
    every = [point for points in lines.values() for point in points]
    if not every or rows < 2:
        return []
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    if high - low <= abs(high) * 1e-9:
        low, high = low - (abs(low) * 0.1 or 0.5), high + (abs(high) * 0.1 or 0.5)
    labels = _labels(low, high, rows, log_scale)
    margin = max(len(label) for label in labels.values())
    columns = width - margin - 2
    if columns < 8:
        return []
    cells = [[0] * columns for _ in range(rows)]
    styles = [[""] * columns for _ in range(rows)]
    for name, style in zip(curves, _styles_of(curves), strict=True):
        points = lines.get(name, [])
        dots = [
            (
                (x - first) / ((last - first) or 1) * (columns * 2 - 1),
                (high - y) / (high - low) * (rows * 4 - 1),
            )
            for x, y in points
        ]
        # A single point is connected with itself.
        for x, y in connected(dots if len(dots) != 1 else dots * 2):
            row, column = y // 4, x // 2
            if styles[row][column] != style:  # a cell has one colour: the dots behind would take it
                cells[row][column], styles[row][column] = 0, style
            cells[row][column] |= BITS[x % 2][y % 4]
    drawn: list[Text] = []
    for row in range(rows):
        line = Text(f"{labels.get(row, ''):>{margin}} ", style=_AXIS, no_wrap=True)
        line.append("┤" if row in labels else "│", style=_AXIS)
        for bits, style in zip(cells[row], styles[row], strict=True):
            line.append(chr(0x2800 + bits) if bits else " ", style=style)
        drawn.append(line)
    drawn.append(Text(f"{'':>{margin}} └{'─' * columns}", style=_AXIS, no_wrap=True))
    left, right = f"{first:g}", f"step {last:g}"
    drawn.append(
        Text(f"{'':>{margin}}  {left}{right:>{columns - len(left)}}", style=_AXIS, no_wrap=True)
    )
    return drawn


def legend(curves: Mapping[str, Points]) -> Text:
    """Names and newest values, each in the colour of its curve."""
    text = Text(no_wrap=True, overflow="ellipsis")
    for (name, points), style in zip(curves.items(), _styles_of(curves), strict=False):
        if text:
            text.append("   ")
        text.append("━━ ", style=style).append(f"{name} ")
        text.append(figure(points[-1][1]), style="bold")
    return text


def _styles_of(curves: Mapping[str, Points]) -> list[str]:
    """A colour each; evaluations have theirs also where they are alone."""
    if list(curves) == ["eval_loss"]:
        return [_STYLES[1]]
    return [_STYLES[at % len(_STYLES)] for at in range(len(curves))]


def _heights(points: Points, log_scale: bool) -> list[tuple[float, float]]:
    if not log_scale:
        return list(points)
    return [(x, math.log10(y)) for x, y in points if y > 0]


def _labels(low: float, high: float, rows: int, log_scale: bool) -> dict[int, str]:
    def label(row: int) -> str:
        height = high - (high - low) * row / (rows - 1)
        return figure(10**height if log_scale else height)

    return {row: label(row) for row in {0, rows // 2, rows - 1}}


def _height(point: tuple[int, float]) -> float:
    return point[1] if math.isfinite(point[1]) else math.inf

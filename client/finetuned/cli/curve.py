"""A curve as text: braille dots, axes labelled."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

# Bit of a braille cell for column 0 or 1 and row 0 to 3 from the top.
BITS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))


def curve(
    points: Sequence[tuple[int, float]], *, width: int = 72, height: int = 10, ascii_only: bool
) -> str:
    """The points as a curve, steps to the right and loss upward.

    Args:
        points: Step and loss. What is not finite is left out.
        width: Columns in all, labels included.
        height: Rows of the plot, without title and steps.
        ascii_only: For terminals that have no braille.

    Returns:
        Lines without a trailing newline; empty with fewer than two points to draw.
    """
    finite = sorted((step, loss) for step, loss in points if math.isfinite(loss))
    if len(finite) < 2 or finite[0][0] == finite[-1][0]:
        return ""
    first, last = finite[0][0], finite[-1][0]
    low, high = min(loss for _, loss in finite), max(loss for _, loss in finite)
    if high == low:
        low, high = low - 0.5, high + 0.5
    labels = {row: f"{high - (high - low) * row / (height - 1):.4g}" for row in range(height)}
    labels = {row: labels[row] for row in (0, height // 2, height - 1)}
    margin = max(len(label) for label in labels.values())
    columns = max(width - margin - 2, 8)
    cells = [[0] * columns for _ in range(height)]
    dots = [
        (
            (step - first) / (last - first) * (columns * 2 - 1),
            (high - loss) / (high - low) * (height * 4 - 1),
        )
        for step, loss in finite
    ]
    for x, y in connected(dots):
        cells[y // 4][x // 2] |= BITS[x % 2][y % 4]
    lines = ["loss".rjust(margin)]
    for row, cell_row in enumerate(cells):
        drawn = "".join(_cell(bits, ascii_only) for bits in cell_row).rstrip()
        axis = "|" if ascii_only else ("┤" if row in labels else "│")
        lines.append(f"{labels.get(row, ''):>{margin}} {axis}{drawn}")
    left, right = str(first), f"step {last}"
    axis = "+" + "-" * columns if ascii_only else "└" + "─" * columns
    lines.append(f"{'':>{margin}} {axis}")
    lines.append(f"{'':>{margin}}  {left}{right:>{columns - len(left)}}")
    return "\n".join(lines)


def connected(dots: Sequence[tuple[float, float]]) -> Iterator[tuple[int, int]]:
    """Every dot on the lines between neighbours."""
    for (x0, y0), (x1, y1) in itertools.pairwise(dots):
        steps = max(round(abs(x1 - x0)), round(abs(y1 - y0)), 1)
        for i in range(steps + 1):
            part = i / steps
            yield round(x0 + (x1 - x0) * part), round(y0 + (y1 - y0) * part)


def _cell(bits: int, ascii_only: bool) -> str:
    if not bits:
        return " "
    return "*" if ascii_only else chr(0x2800 + bits)

"""The loss curve as text."""

from __future__ import annotations

import math

import pytest

from finetuned.cli.curve import curve

FALLING = [(step, 10 / step) for step in range(1, 101)]


@pytest.mark.parametrize("ascii_only", [False, True])
@pytest.mark.parametrize("width", [30, 72])
def test_no_line_is_wider_than_asked(width: int, ascii_only: bool) -> None:
    lines = curve(FALLING, width=width, ascii_only=ascii_only).splitlines()
    assert len(lines) == 1 + 10 + 2
    assert max(map(len, lines)) <= width


def test_axes_have_the_first_and_last_step_and_the_range_of_the_loss() -> None:
    lines = curve(FALLING, ascii_only=False).splitlines()
    assert lines[0].strip() == "loss"
    assert lines[1].split()[0] == "10"
    assert lines[10].split()[0] == "0.1"
    assert lines[-1].split() == ["1", "step", "100"]


def test_a_falling_loss_falls() -> None:
    rows = curve(FALLING, ascii_only=True).splitlines()[1:11]
    starts = [row.index("*") for row in rows]
    assert starts == sorted(starts)
    assert rows[9].rstrip().endswith("*")


def test_without_braille_it_is_ascii() -> None:
    assert curve(FALLING, ascii_only=True).isascii()


def test_a_constant_loss_is_a_line() -> None:
    rows = curve([(1, 2.0), (50, 2.0)], ascii_only=True).splitlines()[1:11]
    assert [row.count("*") > 40 for row in rows].count(True) == 1


@pytest.mark.parametrize(
    "points", [[], [(1, 1.0)], [(1, 1.0), (1, 2.0)], [(1, math.nan), (2, math.inf), (3, 1.0)]]
)
def test_too_few_points_draw_nothing(points: list[tuple[int, float]]) -> None:
    assert curve(points, ascii_only=False) == ""


def test_what_is_not_finite_is_left_out() -> None:
    drawn = curve([(1, 2.0), (2, math.nan), (3, 1.0), (4, math.inf)], ascii_only=False)
    assert drawn.splitlines()[-1].split() == ["1", "step", "3"]

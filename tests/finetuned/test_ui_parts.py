"""What `finetunectl ui` is made of, without a terminal: curves, lines, the watched task."""

from __future__ import annotations

import math

import pytest
from textual.app import App, ComposeResult
from textual.containers import Container

from finetuned.cli.ui.app import FinetunedApp
from finetuned.cli.ui.curves import MOST_POINTS, Curves, draw, legend, smoothed, thinned
from finetuned.cli.ui.devices import Devices
from finetuned.cli.ui.style import CSS
from finetuned.cli.ui.table import TaskTable
from finetuned.cli.ui.text import bar, cell, figure, folded
from finetuned.cli.ui.watched import Watched
from finetuned.v1.event_pb2 import Event, LogLine, Metrics, StateChange
from finetuned.v1.system_service_pb2 import Device
from finetuned.v1.task_pb2 import Task, TaskState
from finetuned.v1.task_service_pb2 import Snapshot


def test_a_step_that_is_taken_again_counts_once() -> None:
    """After a kill a run goes on from its checkpoint: what came after it is replaced."""
    curves = Curves()
    for step in range(1, 8):
        curves.add(step, {"loss": float(step)})
    curves.add(5, {"loss": 50.0})
    assert curves.points("loss") == [(1, 1), (2, 2), (3, 3), (4, 4), (5, 50)]
    assert curves.last_step == 5


def test_a_long_curve_is_thinned_out_and_keeps_its_peaks() -> None:
    """However long a run is, memory is bounded; the highest and the lowest value stay."""
    curves = Curves()
    for step in range(1, 10 * MOST_POINTS):
        curves.add(step, {"loss": {7001: 99.0, 20_000: -99.0}.get(step, 1.0)})
    points = curves.points("loss")
    assert len(points) <= MOST_POINTS
    assert (7001, 99.0) in points
    assert (20_000, -99.0) in points
    assert points[-1][0] == 10 * MOST_POINTS - 1
    assert [step for step, _ in points] == sorted({step for step, _ in points})
    assert thinned([(1, math.nan), (2, 3.0)]) == [(1, pytest.approx(math.nan, nan_ok=True)), (2, 3)]


def test_evaluation_loss_is_drawn_along_with_the_loss() -> None:
    """They are compared; every other value has a plot of its own, loss first."""
    curves = Curves()
    curves.add(1, {"grad_norm": 1.0, "loss": 2.0, "eval_loss": 3.0, "alpha": 1.0})
    assert curves.names == ["loss", "grad_norm", "alpha"]
    assert list(curves.group("loss")) == ["loss", "eval_loss"]
    assert legend(curves.group("loss")).plain.split() == ["━━", "loss", "2", "━━", "eval_loss", "3"]


def test_smoothing_starts_at_the_first_value_and_skips_gaps() -> None:
    """A constant stays constant from its first point on; what is no number is left out."""
    assert smoothed([(1, 2.0), (2, math.nan), (3, 2.0)], 0.9) == [
        (1, pytest.approx(2)),
        (3, pytest.approx(2)),
    ]


@pytest.mark.parametrize(("width", "height"), [(40, 8), (78, 10), (118, 20)])
def test_a_plot_fills_its_room_exactly(width: int, height: int) -> None:
    """No line is longer than the room, and the extremes are at top and bottom."""
    points = {"loss": [(step, 10.0 / step) for step in range(1, 101)]}
    lines = draw(points, width, height)
    assert len(lines) == height
    assert all(line.cell_len <= width for line in lines)
    assert lines[0].plain.split()[0] == "10"
    assert lines[-3].plain.split()[0] == "0.1"
    assert lines[-1].plain.split() == ["1", "step", "100"]


def test_a_plot_by_the_logarithm_leaves_out_what_has_none() -> None:
    """Values of 0 and less; the middle of the axis is the geometric mean."""
    lines = draw({"lr": [(1, 1.0), (2, 0.0), (3, 100.0)]}, 40, 13, log_scale=True)
    assert [lines[row].plain.split()[0] for row in (0, 5, 10)] == ["100", "10", "1"]
    assert draw({"lr": [(1, 0.0)]}, 40, 13, log_scale=True) == []


def test_one_point_and_no_room_are_no_trouble() -> None:
    """A first value is a dot; where there is no room, nothing is drawn."""
    assert any(
        "\u2801" <= c <= "\u28ff" for line in draw({"a": [(1, 1.0)]}, 40, 8) for c in line.plain
    )
    assert draw({"a": [(1, 1.0)]}, 5, 8) == []
    assert draw({"a": [(1, 1.0)]}, 40, 3) == []
    assert draw({}, 40, 8) == []


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("short", "short   "),
        ("much too long", "much to…"),
        ("数据数据数据", "数据数 …"),
        ("", " " * 8),
    ],
)
def test_a_cell_has_its_width(text: str, shown: str) -> None:
    """In cells of the terminal, of which a Chinese character takes two."""
    assert cell(text, 8) == shown


def test_lines_are_folded_at_blanks_and_lose_nothing() -> None:
    """A path that has none is broken where the room ends."""
    assert folded("one two three four", 9) == ["one two", "three", "four"]
    assert folded("/a/very/long/path", 6) == ["/a/ver", "y/long", "/path"]
    assert "".join(folded("数据" * 20, 7)) == "数据" * 20


def test_a_bar_shows_a_little_and_never_too_much() -> None:
    """The first of a thousand steps is seen; beyond the end it is full."""
    assert bar(0.001, 4, "").plain == "╸───"
    assert bar(7.0, 4, "").plain == "━━━━"
    assert bar(0.0, 4, "").plain == "────"


@pytest.mark.parametrize(
    ("value", "shown"),
    [(1.23456, "1.235"), (2e-5, "2e-05"), (12345.6, "12,346"), (0.0, "0"), (math.nan, "nan")],
)
def test_figures_are_short(value: float, shown: str) -> None:
    assert figure(value) == shown


def test_what_is_in_the_curves_already_is_not_taken_again() -> None:
    """The watch replays events from before the curves were asked for: they would cut them off."""
    watched = Watched(Task(name="tasks/a", run=1, last_seq=9))
    watched.curves.clear(1)
    watched.curves.fill("loss", [1, 2, 3], [3.0, 2.0, 1.0])
    watched.curves_seq = 9
    watched.apply(Snapshot(task=watched.task))
    watched.apply(Event(seq=5, run=1, metrics=Metrics(step=1, values={"loss": 3.0})))
    assert watched.curves.last_step == 3
    watched.apply(Event(seq=10, run=1, metrics=Metrics(step=4, values={"loss": 0.5})))
    assert watched.curves.points("loss")[-1] == (4, 0.5)


def test_another_run_begins_with_empty_curves() -> None:
    """Its steps are counted from one again; lines of the log say which level they have."""
    watched = Watched(Task(name="tasks/a", run=1, state=TaskState.TASK_STATE_RUNNING))
    watched.apply(Event(seq=1, run=1, metrics=Metrics(step=7, values={"loss": 1.0})))
    change = StateChange(new_state=TaskState.TASK_STATE_QUEUED)
    watched.apply(Event(seq=2, run=2, state_change=change))
    assert watched.curves.names == []
    assert watched.curves.run == 2
    line = LogLine(level="error", text="a\nb")
    watched.apply(Event(seq=3, run=2, log_line=line))
    assert [(one.level, one.text) for one in watched.log] == [("error", "a"), ("error", "b")]
    assert watched.runs_changed


class OnlyDevices(App[None]):
    """The devices in a screen of their own."""

    CSS = CSS
    HORIZONTAL_BREAKPOINTS = FinetunedApp.HORIZONTAL_BREAKPOINTS
    VERTICAL_BREAKPOINTS = FinetunedApp.VERTICAL_BREAKPOINTS

    def compose(self) -> ComposeResult:
        with Container(id="upper"):
            yield TaskTable()
            yield Devices()


@pytest.mark.parametrize("size", [(80, 24), (120, 40)])
@pytest.mark.parametrize("count", [1, 2, 8])
async def test_every_gpu_is_in_sight(size: tuple[int, int], count: int) -> None:
    """However many there are and however small the terminal, with memory and utilization."""
    gpus = [
        Device(
            id=f"cuda:{at}",
            product_name="GPU",
            memory_total_bytes=80 << 30,
            memory_free_bytes=(80 - at) << 30,
            utilization=at / 10,
            temperature_celsius=60 + at,
            power_watts=300,
            running_task="tasks/a" if at == 1 else "",
        )
        for at in range(count)
    ]
    async with OnlyDevices().run_test(size=size) as pilot:
        devices = pilot.app.query_one(Devices)
        devices.take(gpus, {"tasks/a": Task(name="tasks/a", display_name="the task")})
        devices.redraw()
        await pilot.pause()
        devices.redraw()
        await pilot.pause()
        lines = [
            "".join(part.text for part in strip)
            for strip in pilot.app.screen._compositor.render_strips()
        ]
        text = "\n".join(lines)
        for at in range(count):
            assert f"cuda:{at}" in text
            assert f"{at}.0/80.0 GiB" in text
            assert f"{at * 10}%" in text
        if count == 2:
            assert "the task" in text
            assert size != (120, 40) or "61 °C  300 W" in text

"""The live display in notebooks, in a real IPython shell and against a real daemon."""

from __future__ import annotations

import math
import sys
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from IPython.core.displaypub import CapturingDisplayPublisher
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from daemon_process import Daemon
from finetuned import Client, Metrics, Series, Task
from finetuned._html import card, curve_svg
from finetuned._show import Lines, Panel, display
from finetuned._tracker import Tracker
from finetuned._words import STATE_COLORS, state_word
from finetuned.v1.event_pb2 import Event, LogLine, Result
from finetuned.v1.event_pb2 import Metrics as Measured
from finetuned.v1.task_pb2 import TaskState
from finetuned.v1.task_service_pb2 import Snapshot

if TYPE_CHECKING:
    from conftest import Scene

NASTY = "</pre><script>alert('x')</script>&\"'"


class Notebook(InteractiveShell):
    """A shell as the process behind a notebook has it: with a kernel, and outputs for a page."""

    kernel: Any = object()


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A shell that keeps what is published."""
    config = Config()
    config.HistoryManager.enabled = False
    shell = Notebook.instance(config=config)
    shell.display_pub = CapturingDisplayPublisher(parent=shell)
    yield shell
    shell.history_manager.end_session()
    Notebook.clear_instance()


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("notebook")).start()
    yield daemon
    daemon.close()


def run(shell: Any, cell: str) -> None:
    result = shell.run_cell(cell)
    result.raise_error()


def published(shell: Any) -> list[tuple[str, str, bool]]:
    """HTML, display id, and whether it took the place of one before."""
    return [
        (out["data"]["text/html"], out["transient"]["display_id"], out["update"])
        for out in shell.display_pub.outputs
    ]


def check(html: str) -> ET.Element:
    """The element that a panel is; it is well-formed and has no script in it."""
    element = ET.fromstring(html.replace("&nbsp;", "&#160;").replace("&middot;", "&#183;"))
    tags = {one.tag for one in element.iter()}
    assert tags <= {
        *("div", "b", "span", "pre", "code", "svg", "path", "text", "polyline", "circle", "title")
    }
    assert not any(name.startswith("on") for one in element.iter() for name in one.attrib)
    return element


def test_a_run_is_shown_in_one_panel_that_changes(shell: Any, daemon: Daemon, scene: Scene) -> None:
    """In its cell, from the start to the end; and the cell after it sees the end."""
    shell.push({"parameters": scene.play(steps=30), "address": daemon.address})
    run(shell, "import finetuned; client = finetuned.Client(address)")
    run(shell, "task = client.train('sft', parameters, device='cpu', display_name='<i>A</i> & B')")
    run(shell, "task.show()")
    shown = published(shell)
    assert len({display_id for _, display_id, _ in shown}) == 1
    assert [update for _, _, update in shown] == [False, *[True] * (len(shown) - 1)]
    last = check(shown[-1][0])
    text = "".join(last.itertext())
    assert "<i>A</i> & B" in text
    assert "completed" in text
    assert "finished" in text
    assert "30/30 steps (100%)" in text
    assert "fake: ends: FINISHED" in text
    assert str(scene.output) in text
    (line,) = (one for one in last.iter("polyline"))
    assert len(line.attrib["points"].split()) == 30
    (bar,) = (one for one in last.iter() if one.attrib.get("role") == "progressbar")
    assert bar.attrib["aria-valuenow"] == "30"
    run(shell, "assert task.state_name == 'completed'")
    shell.display_pub.outputs.clear()
    run(shell, "task.show(); client.close()")
    assert "completed" in published(shell)[-1][0], "one that is over is shown at once"
    assert all("running" not in html for html, _, _ in published(shell))


def test_the_last_expression_of_a_cell_is_shown_as_a_panel(
    shell: Any, daemon: Daemon, scene: Scene
) -> None:
    with Client(daemon.address) as client:
        task = client.task(client.create_task("sft", scene.play(), display_name=NASTY[:60]))
        data, _ = shell.display_formatter.format(task)
        text = "".join(check(data["text/html"]).itertext())
        assert NASTY[:60] in text
        assert "pending" in text
        assert data["text/plain"] == repr(task)
        client.delete_task(task.name)


def test_curves_are_drawn_where_a_cell_ends_with_them(shell: Any) -> None:
    losses = Series("loss", [1, 2], [3.0, 2.0], [0.1, 0.2], [1.0, 2.0])
    rates = Series(NASTY, [1, 2], [3.0, 2.0], [0.1, 0.2], [1.0, 2.0])
    for series in ({"loss": losses, "rate": rates}, {NASTY: rates}):
        data, _ = shell.display_formatter.format(Metrics(1, series))
        assert len(list(check(data["text/html"]).iter("polyline"))) == 1
    data, _ = shell.display_formatter.format(Metrics(0))
    assert "svg" not in data["text/html"]


def test_a_long_curve_is_thinned_but_keeps_its_spikes() -> None:
    count = 20_000
    values = [1.0] * count
    values[777] = 99.0
    steps = list(range(count))
    html = Metrics(1, {"loss": Series("loss", steps, values)})._repr_html_()
    (line,) = check(html).iter("polyline")
    assert len(line.attrib["points"].split()) <= 600
    assert "values 1 to 99" in html


def test_labels_of_a_curve_lie_within_its_drawing() -> None:
    name = "a_rather_long_name_of_a_metric" * 5
    points = {100_000: -1.235e-05, 200_000: 0.01667}
    element = check(f"<div>{curve_svg({name: points})}</div>")
    labels = list(element.iter("text"))
    assert {label.text for label in labels} >= {"-1.235e-05", "0.01667"}
    for label in labels:
        width, x = 6 * len(label.text or ""), float(label.attrib["x"])
        left = {"end": x - width, "middle": x - width / 2}.get(
            label.attrib.get("text-anchor", ""), x
        )
        assert left >= 0, label.text
        assert left + width <= 640, label.text


def test_a_frame_has_the_same_columns_whatever_is_in_it() -> None:
    empty = Metrics(1).to_pandas()
    named = {name: Series(name, [1], [7.0], [0.5], [1.0]) for name in ("epoch", "loss", "time")}
    full = Metrics(1, named).to_pandas()
    assert list(full.columns) == ["epoch", "time", "epoch_value", "loss", "time_value"]
    assert (full["epoch"][1], full["epoch_value"][1]) == (0.5, 7.0)
    for column in ("epoch", "time"):
        assert empty[column].dtype == full[column].dtype


def test_the_colours_are_those_of_the_daemons_form(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        labels = client.parameter_schema("sft").task_states
    assert {state_word(label.state): label.color for label in labels} == STATE_COLORS


def test_every_text_is_escaped() -> None:
    task = Task(name=NASTY, display_name=NASTY, run=1, state=TaskState.TASK_STATE_FAILED)
    tracker = Tracker(task)
    tracker.result = Result(message=NASTY, output_path=NASTY)
    html = card(tracker, {NASTY: {1: 1.0, 2: 2.0}, "b": {1: 1.0}}, [NASTY], NASTY)
    element = check(html)
    assert "".join(element.itertext()).count(NASTY) == 8
    tracker.result, task.end_message = None, NASTY
    check(card(tracker))


@pytest.mark.parametrize("values", [{}, {1: 1.0}, {1: math.nan, 2: math.inf}, {5: 1.0}])
def test_fewer_than_two_points_are_no_curve(values: dict[int, float]) -> None:
    assert curve_svg({"loss": values}) == ""


def test_what_is_no_number_is_left_out_of_a_curve() -> None:
    svg = curve_svg({"loss": {1: 1.0, 2: math.nan, 3: 1.0, 4: math.inf}})
    assert "nan" not in svg
    assert "inf" not in svg
    assert len(ET.fromstring(svg).find("polyline").attrib["points"].split()) == 2  # type: ignore[union-attr]


def test_a_panel_is_not_drawn_for_each_of_many_steps(shell: Any) -> None:
    """A page that gets hundreds of them a second is no use to anybody."""
    task = Task(name="tasks/a", run=1, state=TaskState.TASK_STATE_RUNNING)
    panel = Panel(task)
    with panel:
        panel.begin(Metrics(1, {"loss": Series("loss", [1], [3.0], [0.1], [1.0])}))
        panel.show(Snapshot(task=task))
        for step in range(2, 2000):
            values = {"loss": 3 / step}
            panel.show(Event(seq=step, run=1, metrics=Measured(step=step, values=values)))
    assert len(shell.display_pub.outputs) < 100
    assert panel.curves["loss"][1999] == 3 / 1999
    assert len(panel.curves["loss"]) <= 2 * panel.POINTS


def test_another_run_begins_with_an_empty_panel() -> None:
    task = Task(name="tasks/a", run=1, state=TaskState.TASK_STATE_RUNNING)
    shown = Lines(task)
    shown.begin(Metrics(1, {"loss": Series("loss", [1], [3.0], [0.1], [1.0])}))
    shown.show(Snapshot(task=task))
    shown.show(Event(seq=1, run=1, log_line=LogLine(level="info", text="old")))
    assert (len(shown.lines), len(shown.curves["loss"])) == (1, 1)
    shown.show(Event(seq=2, run=2, metrics=Measured(step=1, values={"loss": 2.0})))
    assert (len(shown.lines), shown.curves["loss"]) == (0, {1: 2.0})


def test_only_a_notebook_has_a_panel(shell: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """IPython in a terminal shows no HTML, and without IPython there is nobody to ask."""
    assert isinstance(display(Task(), None), Panel)
    assert isinstance(display(Task(), False), Lines)
    monkeypatch.setattr(Notebook, "kernel", None)
    assert isinstance(display(Task(), None), Lines)
    assert isinstance(display(Task(), True), Panel)
    monkeypatch.delitem(sys.modules, "IPython")
    assert isinstance(display(Task(), None), Lines)


def test_without_ipython_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "IPython.display", raising=False)
    monkeypatch.setitem(sys.modules, "IPython", None)
    with pytest.raises(ImportError, match=r"pip install 'finetuned\[notebook\]'"):
        display(Task(), True)


def test_text_of_a_run_does_nothing_to_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    task = Task(name="tasks/a", run=1, state=TaskState.TASK_STATE_RUNNING)
    shown = Lines(task)
    shown.show(Event(seq=1, run=1, log_line=LogLine(level="error", text="\x1b[2Ja\rb")))
    out = capsys.readouterr().out
    assert "error: " in out
    assert not {"\x1b", "\r"} & set(out)

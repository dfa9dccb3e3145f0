"""Tables on terminals: names are no markup, and the state stays, however narrow it is."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from daemon_process import Daemon
from finetuned import _words
from finetuned.cli.output import state_text, table_of, type_word
from finetuned.cli.rows import QUEUE_COLUMNS, TASK_COLUMNS, place_of, queue_row, task_row
from finetuned.v1 import task_pb2
from inside import Inside, create, environment_of, shared_daemon
from terminal import Terminal

ODD = "a [/] [red]b :smile: [/INST] " + "long " * 8 + "end"
WORDS = "a [/] [red]b :smile: [/INST]"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a task whose name would be markup, which has run."""
    from conftest import Scene

    root = tmp_path_factory.mktemp("tables")
    scene = Scene(root / "scene")
    with shared_daemon(root) as daemon:
        done = create(daemon, scene.play(steps=2, save_steps=2), "odd-1", ODD, start=True)
        daemon.wait(done.name, "COMPLETED")
        gate = create(daemon, scene.play(gated=True), "gated", "gated " * 12 + "x", start=True)
        daemon.wait(gate.name, "RUNNING")
        yield daemon
    scene.close()


@pytest.fixture
def environment(served: Daemon) -> dict[str, str]:
    result = environment_of(served)
    del result["COLUMNS"]
    return result


@pytest.fixture
def ctl(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Inside:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return Inside(monkeypatch, capsys)


def test_names_and_data_are_no_markup(ctl: Inside, tmp_path: Path) -> None:
    assert ODD in ctl("task", "list").out
    assert ODD in ctl("task", "show", ODD).out
    ctl("template", "save", ODD, "--set", "training.batch_size=4")
    assert ODD in ctl("template", "list").out
    assert ctl("task", "checkpoints", ODD).status == 0
    data = tmp_path / "[red]data.jsonl"
    data.write_text(f"{WORDS}\n" + json.dumps({"messages": []}) + "\n")
    answer = ctl("dataset", "inspect", str(data))
    assert WORDS in answer.out
    assert ctl("dataset", "inspect", str(tmp_path / "[/]none")).status in (1, 2)


@pytest.mark.parametrize("columns", [40, 60, 80])
@pytest.mark.parametrize(
    "command",
    [("task", "list"), ("task", "list", "-w"), ("queue",), ("queue", "-w")],
    ids=" ".join,
)
def test_a_long_name_leaves_room_for_the_state(
    environment: dict[str, str],
    on_terminal: Callable[..., Terminal],
    command: tuple[str, ...],
    columns: int,
) -> None:
    environment["COLUMNS"], environment["LINES"] = str(columns), "24"
    terminal = on_terminal(*command)
    terminal.read_until("running")
    if "-w" in command:
        terminal.type(b"\x03")
    terminal.end()
    lines = terminal.plain.replace("^C", "").replace("\r", "\n").splitlines()
    assert not [line for line in lines if len(line.rstrip()) > columns]
    line = next(line for line in lines if "running" in line)
    assert re.search(r"gated.*…  (sft +)?running", line), line


def test_the_name_gives_way_first_then_the_time_and_never_the_state(
    capsys: pytest.CaptureFixture[str],
) -> None:
    row = ("n" * 50, "pretrain", "paused (disk full)", "45/120 (38%)", "1.2345", "2026-11-28 07:46")
    shown = {}
    for width in (110, 80, 70, 30):
        Console(width=width).print(table_of(TASK_COLUMNS, [row]))
        shown[width] = capsys.readouterr().out
    assert re.search(r"n{30,}…  pretrain .*07:46", shown[110])
    assert re.search(r"n{11,}…  pretrain  paused \(disk full\) .* 2026-11-28\n", shown[80])
    assert "CREATED" not in shown[70]
    assert re.search(r"n…  paused \(disk full\)\n", shown[30])


def test_what_a_newer_daemon_says_is_shown_by_its_number() -> None:
    """A state, phase, reason or type that this client does not know is no reason to fail."""
    task = task_pb2.Task(name="tasks/a", display_name="a")
    for field in ("state", "training_type"):
        number = task.DESCRIPTOR.fields_by_name[field].number
        task.MergeFromString(bytes([number << 3, 99]))
    assert state_text(task.state).plain == "99"
    assert type_word(task.training_type) == "99"
    assert _words.phase_word(99) == _words.reason_word(99) == "99"  # type: ignore[arg-type]
    assert place_of("cpu", task, ["cpu"]) > place_of(
        "cpu", task_pb2.Task(state=task_pb2.TASK_STATE_PAUSED), ["cpu"]
    )
    assert len(task_row(task)) == len(TASK_COLUMNS)
    assert len(queue_row("cpu", task)) == len(QUEUE_COLUMNS)

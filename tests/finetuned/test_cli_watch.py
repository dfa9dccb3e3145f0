"""`--watch` on lists: a table in place, lines in a pipe, JSON; over a restart of the daemon."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import Daemon
from finetuned.v1 import task_service_pb2
from inside import create, environment_of, shared_daemon
from terminal import CTL, Terminal

if TYPE_CHECKING:
    from conftest import Scene

Begin = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with shared_daemon(tmp_path_factory.mktemp("watch")) as daemon:
        yield daemon


@pytest.fixture
def environment(served: Daemon) -> dict[str, str]:
    return environment_of(served)


@pytest.fixture
def begin(environment: dict[str, str], tmp_path: Path) -> Iterator[Begin]:
    """Begins a command with a pipe behind it."""
    begun: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        begun.append(
            subprocess.Popen(
                [CTL, *arguments],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                env=environment,
                cwd=tmp_path,
            )
        )
        return begun[-1]

    yield start
    for process in begun:
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], fits: Callable[[str], bool]) -> list[str]:
    """Lines of stdout up to one that fits."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if fits(line):
            return lines
    raise AssertionError(f"not in {lines}: {process.stderr and process.stderr.read()}")


def interrupt(process: subprocess.Popen[str]) -> str:
    """Ctrl-C; what is on stderr."""
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    return err


def test_the_table_of_tasks_stays_in_place_and_changes(
    on_terminal: Callable[..., Terminal], served: Daemon, scene: Scene
) -> None:
    create(served, scene.play(), "there", "is there")
    terminal = on_terminal("task", "list", "-w")
    terminal.read_until("is there")
    gated = scene.play(gated=True, steps=2)
    task = create(served, gated, "comes", "comes later", start=True)
    terminal.read_until("comes later")
    terminal.read_until("running")
    scene.let_pass(2)
    served.wait(task.name, "COMPLETED")
    terminal.read_until("2/2 (100%)")
    terminal.read_until("completed")
    terminal.type(b"\x03")
    assert terminal.end() == 130
    assert terminal.has_cursor
    assert "Traceback" not in terminal.written
    # What was last seen stays on the terminal.
    last = terminal.plain.rpartition("NAME")[2]
    assert "comes later" in last
    assert "is there" in last


def test_a_watched_list_that_is_ended_gives_the_cursor_back(
    on_terminal: Callable[..., Terminal],
) -> None:
    terminal = on_terminal("device", "list", "--watch")
    terminal.read_until("cpu")
    os.kill(terminal.pid, signal.SIGTERM)
    assert terminal.end() == 143
    assert terminal.has_cursor


def test_json_is_a_line_for_each_change(begin: Begin, served: Daemon, scene: Scene) -> None:
    task = served.create(scene.play(steps=1), task_id="json-1")
    process = begin("task", "list", "--watch", "--json", "--state", "pending")
    synced = [json.loads(line) for line in read_until(process, lambda line: "synced" in line)]
    assert {"name": task.name}.items() <= synced[-2]["task"].items() or any(
        item.get("task", {}).get("name") == task.name for item in synced
    )
    assert synced[-1] == {"synced": {"task_count": len(synced) - 1}}
    served.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    gone = read_until(process, lambda line: "deleted" in line)
    assert json.loads(gone[-1]) == {"deleted": task.name}
    assert interrupt(process) == ""


def test_in_a_pipe_each_change_is_a_line(begin: Begin, served: Daemon, scene: Scene) -> None:
    process = begin("queue", "--watch")
    assert read_until(process, lambda line: True)[0].split("\t")[0] == "DEVICE"
    parameters = scene.play(gated=True, steps=1)
    task = create(served, parameters, "piped", "piped", start=True)
    line = read_until(process, lambda line: "\trunning\t" in line)[-1]
    assert line.startswith("cpu\t")
    assert "\tpiped\t" in line
    scene.let_pass(1)
    assert read_until(process, lambda line: "gone" in line)[-1] == f"{task.name} gone\n"
    assert interrupt(process) == ""


def test_devices_are_watched(begin: Begin) -> None:
    process = begin("device", "list", "-w", "--json")
    (line,) = read_until(process, lambda line: True)
    content: dict[str, Any] = json.loads(line)
    assert set(content) == {"devices", "time"}
    assert content["devices"][-1]["id"] == "cpu"
    interrupt(process)


def test_a_watched_list_goes_on_over_a_killed_daemon(
    begin: Begin, served: Daemon, scene: Scene
) -> None:
    kept = served.create(scene.play(), task_id="kept")
    process = begin("task", "list", "-w", "--json")
    read_until(process, lambda line: "synced" in line)
    served.kill()
    (lost,) = read_until(process, lambda line: "connection_lost" in line)
    assert set(json.loads(lost)["connection_lost"]) == {"message"}
    served.start()
    again = read_until(process, lambda line: "synced" in line)
    assert any(kept.name in line for line in again)
    interrupt(process)


def test_a_watch_without_a_name_takes_the_task_that_runs(
    begin: Begin, served: Daemon, scene: Scene
) -> None:
    parameters = scene.play(gated=True, steps=1)
    create(served, parameters, "runs", "runs", start=True)
    served.wait("tasks/runs", "RUNNING")
    create(served, scene.play(gated=True, steps=1), "newer", "newer")
    process = begin("task", "watch", "--json")
    first = json.loads(read_until(process, lambda line: True)[0])
    assert first["snapshot"]["task"]["display_name"] == "runs"
    scene.let_pass(1)
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("words", "variables", "is_colored"),
    [
        ([], {}, False),
        ([], {"FORCE_COLOR": "1"}, True),
        (["--color", "always"], {}, True),
        (["--color", "never"], {"FORCE_COLOR": "1"}, False),
        (["--color=always"], {"NO_COLOR": "1"}, True),
    ],
)
def test_colours_go_into_a_pipe_only_where_they_are_wanted(
    environment: dict[str, str],
    served: Daemon,
    scene: Scene,
    words: list[str],
    variables: dict[str, str],
    is_colored: bool,
) -> None:
    served.create(scene.play())
    answer = subprocess.run(
        [CTL, *words, "task", "list", "--state", "pending"],
        capture_output=True,
        text=True,
        env={**environment, "TERM": "xterm-256color", **variables},
    )
    assert answer.returncode == 0, answer.stderr
    assert bool(re.search(r"\x1b\[34mpending\x1b\[0m", answer.stdout)) == is_colored
    assert ("\x1b" in answer.stdout) == is_colored


def test_states_have_the_colours_of_the_contract() -> None:
    from finetuned.cli.output import STATE_STYLES
    from finetuned.v1.task_pb2 import TaskState

    words = {name.removeprefix("TASK_STATE_").lower() for name, _ in TaskState.items()}
    assert words - {"unspecified"} == set(STATE_STYLES)
    five = {"pending": "blue", "running": "green", "completed": "green", "failed": "red"}
    assert five.items() <= STATE_STYLES.items()
    assert STATE_STYLES["stopped"] == "dark_orange"

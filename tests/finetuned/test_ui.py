"""`finetunectl ui`: what it shows, what its keys do, and how it lives through the daemon's end."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from textual.pilot import Pilot
from textual.widgets import Input, OptionList

from conftest import REPOSITORY, Scene
from daemon_process import Daemon
from finetuned.cli.settings import Settings
from finetuned.cli.ui.app import FinetunedApp
from finetuned.cli.ui.dialogs import Ask, Choice, Help
from finetuned.cli.ui.keys import GROUPS
from finetuned.cli.ui.panes import LinesPane
from finetuned.v1 import task_pb2, task_service_pb2
from terminal import Terminal

SECONDS = 60.0
"""Until a state of the view must have come, also where others load the machine."""
_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests of this file that do not end it."""
    daemon = Daemon(tmp_path_factory.mktemp("ui")).start()
    yield daemon
    daemon.close()


@pytest.fixture
def shared(served: Daemon) -> Iterator[Daemon]:
    """That daemon; what the test leaves is stopped and deleted."""
    yield served
    for task in served.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks:
        if task.state in (2, 3, 7):
            served.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name, discard=True))
            served.wait(task.name, "STOPPED", "COMPLETED", "FAILED")
        served.tasks.DeleteTask(
            task_service_pb2.DeleteTaskRequest(name=task.name, allow_missing=True)
        )


class Shown:
    """The view, with hands and eyes."""

    def __init__(self, app: FinetunedApp, pilot: Pilot[int]) -> None:
        self.app = app
        self.pilot = pilot

    async def until(self, look: Callable[[], object], what: str) -> None:
        """Waits for a state of the view."""
        deadline = time.monotonic() + SECONDS
        while not look():
            assert time.monotonic() < deadline, f"not seen: {what}\n{self.text}"
            await self.pilot.pause(0.02)

    async def press(self, *keys: str) -> None:
        await self.pilot.press(*keys)

    async def choose(self, name: str) -> None:
        """Puts the cursor on a task, once it and what is known of it are there."""
        await self.until(lambda: name in self.app.table.tasks, f"{name} in the table")
        await self.until(lambda: any(t.name == name for t in self.app.table.rows), "a row")
        self.app.table.choose(name)
        await self.until(
            lambda: self.app.watched is not None and self.app.watched.task.name == name, "its watch"
        )

    async def answer(self, name: str) -> None:
        """Answers the question that is asked."""
        await self.until(lambda: isinstance(self.app.screen, Choice), "a question")
        answers = self.app.screen.query_one(OptionList)
        await self.until(lambda: answers.has_focus, "answers")
        while answers.highlighted != answers.get_option_index(name):
            await self.press("down")
        await self.press("enter")
        await self.until(lambda: not isinstance(self.app.screen, Choice), "no question any more")

    def state(self, name: str) -> str:
        task = self.app.table.tasks.get(name)
        return (
            "" if task is None else task_pb2.TaskState.Name(task.state).removeprefix("TASK_STATE_")
        )

    async def until_state(self, name: str, state: str) -> None:
        await self.until(lambda: self.state(name) == state, f"{name} {state}")

    @property
    def lines(self) -> list[str]:
        """The screen, as text."""
        width, height = self.app.size
        update = self.app.screen._compositor.render_strips()
        del width
        return ["".join(segment.text for segment in strip) for strip in update][:height]

    @property
    def text(self) -> str:
        return "\n".join(self.lines)

    @property
    def told(self) -> str:
        """Every notification so far."""
        return "\n".join(notice.message for notice in self.app._notifications)

    def pane(self, name: str) -> LinesPane:
        return self.app.query_one(f"#{name}", LinesPane)


@asynccontextmanager
async def shown(address: str, size: tuple[int, int] = (120, 40)) -> AsyncIterator[Shown]:
    app = FinetunedApp(Settings(address=address))
    async with app.run_test(size=size, notifications=True) as pilot:
        yield Shown(app, pilot)


def named(daemon: Daemon, scene: Scene, *, start: bool = True, **scenario: object) -> task_pb2.Task:
    """A task with a name of its own."""
    task = task_pb2.Task(
        display_name=f"run {next(_numbers)}",
        training_type=task_pb2.TRAINING_TYPE_SFT,
        parameters=scene.play(**scenario),
        device="cpu",
    )
    return daemon.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task, start=start)).task


async def test_progress_and_curves_come_live(shared: Daemon, scene: Scene) -> None:
    """What a run does while the view is open is seen without a key; so is its end."""
    task = named(shared, scene, steps=6, gated=True)
    async with shown(shared.address) as view:
        await view.choose(task.name)
        scene.let_pass(3)
        await view.until(
            lambda: view.app.watched and view.app.watched.curves.last_step == 3, "three steps"
        )
        await view.until(lambda: "50%" in view.text and "3/6" in view.text, "half of the steps")
        scene.let_pass(3)
        await view.until_state(task.name, "COMPLETED")
        await view.until(lambda: "100%" in view.text and "completed" in view.text, "the end")
        assert view.app.curves.curves.points("loss")[-1] == (6, pytest.approx(1 / 6))
        await view.press("3")
        await view.until(lambda: "finished" in view.text, "the end among the events")


async def test_what_was_before_is_shown(shared: Daemon, scene: Scene) -> None:
    """Curves, log, events, checkpoints, runs and parameters of a run that is long over."""
    task = named(shared, scene, steps=6, save_steps=3, eval_losses={"3": 0.5, "6": 0.25})
    shared.wait(task.name, "COMPLETED")
    async with shown(shared.address) as view:
        await view.choose(task.name)
        await view.until(lambda: view.app.watched and view.app.watched.curves.names, "curves")
        assert len(view.app.watched.curves.points("loss")) == 6  # type: ignore[union-attr]
        await view.press("2")
        await view.until(lambda: "ends: FINISHED" in view.text, "the log")
        await view.press("4")
        await view.until(lambda: "newest best" in view.text, "the checkpoints")
        await view.press("5")
        await view.until(lambda: "6/6" in view.text, "the run")
        await view.press("6")
        await view.until(lambda: "training.batch_size" in view.text, "the parameters")
        assert [one.step for one in view.app.checkpoints.checkpoints] == [6, 3]


async def test_an_earlier_run_shows_its_curves(shared: Daemon, scene: Scene) -> None:
    """Enter on a run shows what it measured; Esc leads back to the newest."""
    task = named(shared, scene, steps=4)
    shared.wait(task.name, "COMPLETED")
    scene.play(steps=2)
    shared.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    shared.watch(task.name, shared.get(task.name).last_seq - 1)
    shared.wait(task.name, "COMPLETED")
    async with shown(shared.address) as view:
        await view.choose(task.name)
        curves = view.app.curves
        await view.until(lambda: curves.curves.last_step == 2, "the newest run")
        await view.until(lambda: len(view.app.runs.runs) == 2, "both runs")
        await view.press("5", "enter", "down", "enter")
        await view.until(lambda: curves.curves.last_step == 4, "the first run")
        assert curves.curves.run == 1
        await view.press("escape", "escape")
        await view.until(lambda: curves.curves.run == 2, "the newest run again")


async def test_the_log_is_filtered(shared: Daemon, scene: Scene) -> None:
    """By level and by words; control characters and markup of a line are shown, not obeyed."""
    text = "[bold red]no markup[/] \x1b[31mno colour\nsecond line"
    task = named(shared, scene, log=text)
    shared.wait(task.name, "COMPLETED")
    async with shown(shared.address) as view:
        await view.choose(task.name)
        await view.press("2")
        await view.until(lambda: "second line" in view.text, "the log")
        assert "[bold red]no markup[/] \\x1b[31mno colour" in view.text
        await view.press("enter", "slash", *"second")
        log = view.app.log_lines
        await view.until(lambda: [line for _, line, _ in log.shown] == ["second line"], "one line")
        await view.press("escape")
        await view.until(lambda: len(log.shown) == 2, "both lines")
        await view.press("l", "l")
        await view.until(lambda: log.level == "warning" and not log.shown, "no warnings")


async def test_a_run_is_started_paused_and_stopped_by_keys(shared: Daemon, scene: Scene) -> None:
    """Each key does it at the daemon, and a stop asks first."""
    task = named(shared, scene, start=False, steps=9, gated=True)
    async with shown(shared.address) as view:
        await view.choose(task.name)
        await view.press("s")
        await view.until_state(task.name, "RUNNING")
        scene.let_pass(2)
        await view.until(lambda: "2/9" in view.text, "two steps")
        await view.press("p")
        await view.until_state(task.name, "PAUSED")
        await view.press("p")
        await view.until_state(task.name, "RUNNING")
        await view.press("x")
        await view.answer("cancel")
        assert shared.get(task.name).state == task_pb2.TASK_STATE_RUNNING
        await view.press("x")
        await view.answer("stop")
        await view.until_state(task.name, "STOPPED")
        await view.press("s")
        await view.answer("newest")
        await view.until_state(task.name, "RUNNING")
        await view.press("X")
        await view.answer("stop")
        await view.until_state(task.name, "STOPPED")
        await view.until(lambda: f"{task.display_name} is stopping" in view.told, "what was done")


async def test_a_key_that_makes_no_sense_does_nothing(shared: Daemon, scene: Scene) -> None:
    """A task that does not run is not stopped, and the footer does not offer it."""
    task = named(shared, scene, start=False)
    async with shown(shared.address, (80, 24)) as view:
        await view.choose(task.name)
        await view.until(lambda: "Start" in view.lines[-1], "start in the footer")
        assert "Stop" not in view.lines[-1]
        await view.press("x")
        assert not isinstance(view.app.screen, Choice)


async def test_the_queue_is_reordered(shared: Daemon, scene: Scene) -> None:
    """`K` moves a queued task up, `J` down."""
    first = named(shared, scene, gated=True, steps=9)
    shared.wait(first.name, "RUNNING")
    second, third = (named(shared, scene, gated=True, steps=9) for _ in range(2))
    async with shown(shared.address) as view:
        await view.choose(third.name)
        place = lambda: view.app.table.tasks[third.name].queue_position  # noqa: E731
        await view.until(lambda: place() == 2, "the second place")
        await view.press("K")
        await view.until(lambda: place() == 1, "the first place")
        assert view.app.table.tasks[second.name].queue_position == 2
        assert [task.name for task in view.app.table.rows][:3] == [
            first.name,
            third.name,
            second.name,
        ]
        await view.press("J")
        await view.until(lambda: place() == 2, "the second place again")


async def test_every_wrong_field_is_told(shared: Daemon, scene: Scene) -> None:
    """A start that the daemon refuses names all that is in its way."""
    task = named(shared, scene, start=False)
    scene.data.unlink()
    (scene.model / "config.json").unlink()
    async with shown(shared.address) as view:
        await view.choose(task.name)
        await view.press("s")
        await view.until(lambda: "data.train_file" in view.told, "the data")
        assert "data.model_path" in view.told


async def test_a_failed_run_is_mended(shared: Daemon, scene: Scene) -> None:
    """`f` shows what would be changed and why; it is changed and started once that is chosen."""
    fail = {"step": 1, "reason": "DEVICE_OUT_OF_MEMORY", "above": 1}
    task = named(shared, scene, fail=fail)
    shared.wait(task.name, "FAILED")
    async with shown(shared.address) as view:
        await view.choose(task.name)
        await view.press("f")
        await view.until(lambda: "training.batch_size" in view.text, "the change")
        await view.answer("start")
        await view.until_state(task.name, "COMPLETED")
    assert shared.get(task.name).parameters.training.batch_size == 1


async def test_a_task_is_deleted_and_created(shared: Daemon, scene: Scene, tmp_path: Path) -> None:
    """A deletion asks; a task is made from a file, and bad files say what is wrong."""
    task = named(shared, scene, start=False)
    parameters = scene.parameters().data
    wish = {
        "display_name": "from a file",
        "device": "cpu",
        "data": {
            "train_file": parameters.train_file,
            "model_path": parameters.model_path,
            "output_dir": parameters.output_dir,
        },
    }
    file = tmp_path / "wish.yaml"
    file.write_text(json.dumps(wish))
    (tmp_path / "bad.yaml").write_text("training: {batch_size: many, colour: red}")
    async with shown(shared.address) as view:
        await view.choose(task.name)
        await view.press("d")
        await view.answer("keep")
        await view.until(lambda: task.name not in view.app.table.tasks, "it is gone")
        for name in ("bad.yaml", "wish.yaml"):
            await view.press("n")
            await view.until(lambda: isinstance(view.app.screen, Ask), "a line to type")
            view.app.screen.query_one(Input).value = str(tmp_path / name)
            await view.press("enter")
            if name == "bad.yaml":
                await view.until(lambda: "training.colour" in view.told, "the unknown field")
                assert "training.batch_size" in view.told
        await view.until(
            lambda: view.app.table.current and view.app.table.current.display_name == "from a file",
            "the new task under the cursor",
        )


async def test_tasks_are_filtered_and_sorted(shared: Daemon, scene: Scene) -> None:
    """The filter takes words of name, state, device and type; a heading sorts when clicked."""
    tasks = [named(shared, scene, start=False) for _ in range(3)]
    names = [task.display_name for task in tasks]
    async with shown(shared.address, (80, 24)) as view:
        table = view.app.table
        shown_names = lambda: [task.display_name for task in table.rows]  # noqa: E731
        await view.until(lambda: shown_names() == names[::-1], "the newest first")
        await view.pilot.click(table, offset=(3, 0))
        await view.until(lambda: shown_names() == sorted(names), "by name")
        await view.press("O")
        await view.until(lambda: shown_names() == sorted(names, reverse=True), "the other way")
        await view.press("slash", *names[0].split()[1], "space", *"pend")
        await view.until(lambda: shown_names() == names[:1], "one task")
        await view.press("enter")
        assert view.app.focused is table
        await view.press("escape")
        await view.until(lambda: len(table.rows) == 3, "all again")
        await view.pilot.click(table, offset=(3, 3))
        assert table.current is table.rows[2]


async def test_all_is_there_in_80_by_24(shared: Daemon, scene: Scene) -> None:
    """Tasks, device, the task, its curve and the keys have room, and no line is broken."""
    task = named(shared, scene, steps=6, gated=True)
    async with shown(shared.address, (80, 24)) as view:
        await view.choose(task.name)
        scene.let_pass(4)
        await view.until(lambda: "step 4" in view.text, "the curve")
        await view.until(lambda: "GiB" in view.text, "the device")
        lines = view.lines
        assert len(lines) == 24
        assert lines[0].split()[:2] == ["finetuned", "1"]
        assert "NAME" in lines[1]
        assert "DEVICE" in lines[1]
        assert lines[2].startswith(f"▌{task.display_name}")
        assert "GiB" in lines[8] or "GiB" in lines[7]
        assert "6 Parameters" in view.text
        assert "Quit" in lines[-1]
        assert any("⠤" <= c <= "⣿" for c in view.text), "dots of the curve"
        await view.press("question_mark")
        await view.until(lambda: isinstance(view.app.screen, Help), "help")
        await view.press("escape", "z")
        await view.until(lambda: not view.app.query_one("#details").display, "tasks alone")


async def test_a_daemon_that_is_killed_and_comes_back(daemon: Daemon, scene: Scene) -> None:
    """The view says so, and goes on by itself: the run has gone on meanwhile, nothing is missed."""
    task = named(daemon, scene, steps=9, gated=True)
    async with shown(daemon.address) as view:
        await view.choose(task.name)
        scene.let_pass(2)
        await view.until(lambda: "2/9" in view.text, "two steps")
        daemon.kill()
        banner = view.app.banner
        await view.until(lambda: banner.display, "the banner")
        assert "no daemon answers" in view.text
        assert not isinstance(view.app.screen, Choice), "it was there, and is expected back"
        scene.let_pass(5)
        await asyncio.to_thread(daemon.start)
        await view.until(lambda: not banner.display, "no banner")
        await view.until(lambda: "7/9" in view.text, "what happened meanwhile")
        await view.until(lambda: view.app.curves.curves.last_step == 7, "the curve")
        curve = view.app.curves.curves.points("loss")
        assert [step for step, _ in curve] == [1, 2, 3, 4, 5, 6, 7]


async def test_no_daemon_is_offered_to_be_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody serves: it asks, starts the daemon, and shows its (empty) list."""
    place = Daemon(tmp_path)
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(place.paths.state_dir))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(place.paths.runtime_dir))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    app = FinetunedApp(Settings())
    async with app.run_test(size=(80, 24), notifications=True) as pilot:
        view = Shown(app, pilot)
        try:
            await view.answer("start")
            await view.until(lambda: app.is_synced and not app.lost, "the daemon")
            await view.until(lambda: "0 tasks" in view.text, "its empty list")
        finally:
            with contextlib.suppress(Exception):
                await app.client.shutdown()


def test_quitting_says_that_runs_go_on(shared: Daemon, scene: Scene, tmp_path: Path) -> None:
    """`q`, Ctrl-C and SIGTERM end the view, not the run, and leave the terminal in order."""
    task = named(shared, scene, steps=9, gated=True)
    shared.wait(task.name, "RUNNING")
    environment = {**os.environ, "FINETUNED_ADDRESS": shared.address, "NO_COLOR": "1"}
    for keys in (b"q", b"\x03", b""):
        terminal = Terminal(environment, tmp_path, ["ui"])
        terminal.read_until(task.display_name)
        if keys:
            terminal.type(keys)
        else:
            os.kill(terminal.pid, signal.SIGTERM)
        assert terminal.end() == (0 if keys else 143), terminal.plain
        assert "1 run goes on" in terminal.plain
        assert terminal.has_cursor
    assert shared.get(task.name).state == task_pb2.TASK_STATE_RUNNING


def test_without_a_terminal_it_says_what_else_there_is(shared: Daemon) -> None:
    """A pipe gets no control characters but a command that is made for pipes."""
    done = subprocess.run(
        [Path(sys.executable).parent / "finetunectl", "ui"],
        capture_output=True,
        text=True,
        env={**os.environ, "FINETUNED_ADDRESS": shared.address},
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert "finetunectl task list --json" in done.stderr


def test_without_textual_it_says_what_to_install() -> None:
    """It is an extra: the rest of the command line works without."""
    code = "import sys; sys.modules['textual'] = None; from finetuned.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, "ui"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert done.stderr == (
        "error: finetunectl ui needs textual\nnext: pip install 'finetuned[ui]'\n"
    )


def test_every_key_is_documented() -> None:
    """docs/ui.md has a row for each key, with the sentence of the help."""
    page = (REPOSITORY / "docs/ui.md").read_text()
    missing = [
        key.shown
        for _, keys in GROUPS
        for key in keys
        if f"| `{key.shown}` | {key.help} |" not in page
    ]
    assert missing == []

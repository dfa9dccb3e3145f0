"""`finetunectl` as a user has it: a process, a terminal or a pipe, a real daemon."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import Daemon
from terminal import CTL, Terminal

if TYPE_CHECKING:
    from conftest import Scene

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def begin(
    environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Begins a command; what is left of it is ended."""
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


def options(scene: Scene, **scenario: Any) -> list[str]:
    """Options of a task that the fake runner plays."""
    scene.play(**scenario)
    files = ["--model", str(scene.model), "--data", str(scene.data)]
    # What the CPU can't do would be a notice before every run.
    return [*files, "--device", "cpu", "--set", "optimization.fp16=false"]


def read_until(process: subprocess.Popen[str], text: str) -> list[str]:
    """Lines of stdout up to the one with the text."""
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return lines
    raise AssertionError(f"no {text!r} in {lines}, {process.stderr and process.stderr.read()}")


def test_train_watches_a_run_to_its_end(ctl: Run, scene: Scene, tmp_path: Path) -> None:
    answer = ctl("train", *options(scene, steps=4), "--name", "first")
    assert answer.returncode == 0, answer.stderr
    for text in ("queued", "running", "loading model", "step 4", "completed (finished)", "loss"):
        assert text in answer.stdout
    output = str(tmp_path / "finetuned-output" / "first")
    assert re.search(rf"^output +{output}", answer.stdout, re.M)
    assert "AutoPeftModelForCausalLM.from_pretrained('" + output in answer.stderr


def test_all_that_is_wrong_comes_in_one_answer_and_nothing_is_written(
    ctl: Run, scene: Scene
) -> None:
    wrong = ("training.batchsize=4", "training.batch_size=0", "lora.lora_r=x", "nonsense")
    sets = [word for assignment in wrong for word in ("--set", assignment)]
    answer = ctl("train", "--model", str(scene.model), "--data", "no.jsonl", *sets)
    assert answer.returncode == 2
    assert answer.stdout == ""
    for line in (
        r"training\.batchsize +is no parameter; did you mean training\.batch_size\?",
        r"training\.batch_size +must be .*1.*128",
        r"lora\.lora_r +must be a whole number, not 'x'",
        r"data\.train_file +.*no\.jsonl",
        r"--set +wants section\.field=value, not 'nonsense'",
    ):
        assert re.search(rf"^  {line}", answer.stderr, re.M), answer.stderr
    assert json.loads(ctl("task", "list", "--json").stdout) == []


def test_what_the_daemon_finds_wrong_is_listed_by_field(ctl: Run, scene: Scene) -> None:
    answer = ctl("train", *options(scene), "--set", "training.batch_size=0")
    assert answer.returncode == 2
    assert re.search(r"^  training\.batch_size  must be ", answer.stderr, re.M)
    as_json = ctl("train", *options(scene), "--set", "training.batch_size=0", "--json")
    (violation,) = json.loads(as_json.stderr)["error"]["violations"]
    assert violation["field"].endswith("training.batch_size")
    assert as_json.stdout == ""


def test_parameters_come_from_a_file_options_and_set(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    (tmp_path / "p.yaml").write_text(
        f"name: filed\ndevice: cpu\ndata:\n  model_path: {scene.model}\n"
        "training:\n  learning_rate: 3e-5\n  batch_size: 4\n  eval_strategy: no\n"
    )
    answer = ctl(
        *("task", "create", "-f", "p.yaml", "--json"),
        *("--data", "scene/chats.jsonl", "--set", "training.batch_size=8"),
    )
    task = json.loads(answer.stdout)
    assert task["display_name"] == "filed"
    assert task["state"] == "TASK_STATE_PENDING"
    assert task["parameters"]["training"]["learning_rate"] == 3e-5
    assert task["parameters"]["training"]["batch_size"] == 8
    assert task["parameters"]["training"]["eval_strategy"] == "no"
    assert task["parameters"]["data"]["train_file"] == str(scene.data)


def test_a_task_from_creation_to_deletion(ctl: Run, scene: Scene) -> None:
    created = ctl("task", "create", *options(scene, steps=1), "--name", "a task")
    assert (created.returncode, created.stdout) == (0, "a task\n")
    assert "finetunectl task start 'a task'" in created.stderr
    started = ctl("task", "start", "a task", "--watch")
    assert started.returncode == 0, started.stderr
    assert "completed" in started.stdout
    assert ctl("task", "watch", "a task").returncode == 0
    shown = ctl("task", "show", "a task")
    assert re.search(r"^state +completed$", shown.stdout, re.M)
    assert re.search(r"^  training\.batch_size +2$", shown.stdout, re.M)
    (listed,) = json.loads(ctl("task", "list", "--state", "completed", "--json").stdout)
    assert listed["display_name"] == "a task"
    assert listed["progress"]["step"] == 1
    assert "a task" in ctl("task", "list").stdout
    refused = ctl("task", "delete", "a task")
    assert refused.returncode == 2
    assert "--yes" in refused.stderr
    assert ctl("task", "delete", "a task", "--yes").returncode == 0
    gone = ctl("task", "show", "a task")
    assert gone.returncode == 1
    assert "finetunectl task list" in gone.stderr


def test_a_run_that_fails_is_status_1(ctl: Run, scene: Scene) -> None:
    answer = ctl("train", *options(scene, steps=9, exit=[2, 7]), "--name", "bad")
    assert answer.returncode == 1
    assert "failed (runner crashed)" in answer.stdout
    assert "finetunectl task logs bad" in answer.stderr
    assert ctl("task", "watch", "bad", "--json").returncode == 1


def test_a_run_that_is_stopped_is_status_4(
    ctl: Run, scene: Scene, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    process = begin("train", *options(scene, gated=True), "--name", "halt")
    read_until(process, "training")
    stopped = ctl("task", "stop", "halt", "--wait")
    assert (stopped.returncode, stopped.stdout) == (0, "halt stopped\n")
    out, err = process.communicate(timeout=60)
    assert process.returncode == 4
    assert "stopped (stopped by user)" in out
    assert "finetunectl task start halt --watch" in err
    again = ctl("task", "stop", "halt")
    assert again.returncode == 1
    assert "error:" in again.stderr


def test_a_stopped_run_goes_on_from_its_checkpoint_in_a_like_task(
    ctl: Run, scene: Scene, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    process = begin("train", *options(scene, gated=True), "--name", "halt")
    scene.let_pass(1)
    read_until(process, "step 1")
    ctl("task", "stop", "halt", "--wait")
    _, err = process.communicate(timeout=60)
    assert "finetunectl task start halt --resume newest" in err
    stopped = json.loads(ctl("task", "show", "halt", "--json").stdout)
    hint = f"data.resume_from_checkpoint={stopped['last_checkpoint']}"
    scene.play(steps=1)
    created = ctl("task", "create", "--like", "halt", "--set", hint, "--name", "more", "--json")
    assert created.returncode == 0, created.stderr
    data = json.loads(created.stdout)["parameters"]["data"]
    assert data["resume_from_checkpoint"].endswith("checkpoint-1")
    assert data["train_file"] == str(scene.data)


def test_ctrl_c_leaves_the_run_going(
    ctl: Run, scene: Scene, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    process = begin("train", *options(scene, gated=True, steps=2), "--name", "long")
    read_until(process, "training")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "finetunectl task watch long" in err
    assert "finetunectl task stop long" in err
    assert json.loads(ctl("task", "show", "long", "--json").stdout)["state"].endswith("RUNNING")
    scene.let_pass(2)
    assert ctl("task", "watch", "long").returncode == 0


def test_a_watch_goes_on_over_a_killed_daemon(
    daemon: Daemon, scene: Scene, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    process = begin("train", *options(scene, gated=True, steps=3), "--name", "tough")
    scene.let_pass(1)
    read_until(process, "step 1")
    daemon.kill()
    assert process.stderr is not None
    assert "connection lost" in process.stderr.readline()
    scene.let_pass(2)
    daemon.start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "step 3" in out
    assert "connection is back" in err


def test_json_streams_are_lines_with_numbers_as_numbers(ctl: Run, scene: Scene) -> None:
    answer = ctl("train", *options(scene, steps=2), "--json")
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert set(lines[0]) == {"snapshot"}
    events = [line["event"] for line in lines[1:]]
    assert [event["seq"] for event in events] == list(range(1, len(events) + 1))
    assert events[-1]["state_change"]["new_state"] == "TASK_STATE_COMPLETED"
    assert any("metrics" in event and "loss" in event["metrics"]["values"] for event in events)
    assert re.fullmatch(r"\d{4}-.*Z", events[0]["time"])


def test_detached_it_returns_with_the_name_on_stdout(ctl: Run, scene: Scene) -> None:
    answer = ctl("train", *options(scene, steps=1), "--name", "away", "-d")
    assert (answer.returncode, answer.stdout) == (0, "away\n")
    assert "finetunectl task watch away" in answer.stderr
    as_json = ctl("train", *options(scene, steps=1), "--detach", "--json")
    assert json.loads(as_json.stdout)["run"] == 1


def test_logs_are_shown_by_level_and_followed(ctl: Run, scene: Scene) -> None:
    ctl("train", *options(scene, steps=1), "--name", "talks")
    assert re.search(r"INFO +fake: ends", ctl("task", "logs", "talks").stdout)
    assert ctl("task", "logs", "talks", "--level", "error").stdout == ""
    followed = ctl("task", "logs", "talks", "-f", "--json")
    assert json.loads(followed.stdout.splitlines()[-1])["event"]["log_line"]["logger"] == "fake"
    assert ctl("task", "logs", "talks", "--level", "loud").returncode == 2


def test_the_daemon_can_be_asked_stopped_and_asked_again(ctl: Run, daemon: Daemon) -> None:
    status = json.loads(ctl("daemon", "status", "--json").stdout)
    assert daemon.process is not None
    assert status["pid"] == daemon.process.pid
    assert str(status["pid"]) in ctl("daemon", "status").stdout
    running = ctl("daemon", "start")
    assert running.returncode == 0
    assert "runs already" in running.stderr
    assert json.loads(ctl("device", "list", "--json").stdout)[-1]["id"] == "cpu"
    assert "cpu" in ctl("device", "list").stdout
    assert ctl("daemon", "stop").returncode == 0
    assert daemon.process.wait(20) == 0
    for command in (["daemon", "status"], ["task", "list"], ["daemon", "stop"]):
        answer = ctl(*command)
        assert answer.returncode == 3
        assert answer.stdout == ""
        assert "finetunectl daemon start" in answer.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        ["nonsense"],
        ["task", "nonsense"],
        ["train", "--nonsense"],
        ["--address", "x", "task", "list"],
    ],
    ids=" ".join,
)
def test_bad_usage_is_status_2(ctl: Run, arguments: list[str]) -> None:
    answer = ctl(*arguments)
    assert answer.returncode == 2
    assert answer.stdout == ""


def test_on_a_terminal_a_bar_moves_and_leaves_the_end_behind(
    on_terminal: Callable[..., Terminal], scene: Scene
) -> None:
    terminal = on_terminal("train", *options(scene, steps=5), "--name", "live")
    assert terminal.end() == 0, terminal.written
    assert terminal.has_cursor
    assert "━" in terminal.written
    assert "5/5 steps" in terminal.plain
    assert re.search(r"completed +finished", terminal.plain)


def state_of(ctl: Run, name: str) -> str:
    state: str = json.loads(ctl("task", "show", "--json", "--", name).stdout)["state"]
    return state.removeprefix("TASK_STATE_").lower()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_live_view_that_is_ended_gives_the_cursor_back(
    ctl: Run, on_terminal: Callable[..., Terminal], scene: Scene, number: signal.Signals
) -> None:
    terminal = on_terminal("train", *options(scene, gated=True), "--name", "live")
    terminal.read_until("training")
    os.kill(terminal.pid, number)
    assert terminal.end() == 128 + number
    assert terminal.has_cursor
    assert "Traceback" not in terminal.written
    assert state_of(ctl, "live") == "running"


def test_a_terminal_that_is_gone_ends_the_view_and_not_the_run(
    ctl: Run, on_terminal: Callable[..., Terminal], scene: Scene
) -> None:
    terminal = on_terminal("train", *options(scene, gated=True), "--name", "live")
    terminal.read_until("training")
    terminal.hang_up()
    assert terminal.status() == 129
    assert state_of(ctl, "live") == "running"


def test_a_task_that_was_not_started_is_watched_with_a_hint_and_no_talk_of_a_run(
    ctl: Run, on_terminal: Callable[..., Terminal], scene: Scene
) -> None:
    ctl("task", "create", *options(scene), "--name", "-idle")
    terminal = on_terminal("task", "watch", "--", "-idle")
    terminal.read_until("-idle  pending  start it: finetunectl task start -- -idle")
    terminal.type(b"\x03")
    assert terminal.end() == 130
    assert terminal.has_cursor
    assert "goes on" not in terminal.plain
    assert "not started; start it: finetunectl task start -- -idle" in terminal.plain


@pytest.mark.parametrize(
    ("keys", "status", "is_left"),
    [(b"\x03", 130, True), (b"\x04", 1, True), (b"n\r", 1, True), (b"y\r", 0, False)],
    ids=["Ctrl-C", "Ctrl-D", "no", "yes"],
)
def test_deleting_asks_on_a_terminal(
    ctl: Run,
    on_terminal: Callable[..., Terminal],
    scene: Scene,
    keys: bytes,
    status: int,
    is_left: bool,
) -> None:
    ctl("task", "create", *options(scene), "--name", "dear")
    terminal = on_terminal("task", "delete", "dear")
    terminal.read_until("Delete task dear? [y/N]: ")
    terminal.type(keys)
    # A signal that comes just before Python waits for a key is seen at the next one only.
    assert terminal.end(keys) == status
    assert len(json.loads(ctl("task", "list", "--json").stdout)) == is_left


def test_a_reader_that_has_enough_leaves_the_run_going(
    ctl: Run, scene: Scene, begin: Callable[..., subprocess.Popen[str]]
) -> None:
    process = begin("train", *options(scene, gated=True, steps=2), "--name", "long", "--json")
    assert process.stdout is not None
    assert "snapshot" in process.stdout.readline()
    process.stdout.close()
    scene.let_pass(1)
    assert process.wait(60) == 141
    assert process.stderr is not None
    assert process.stderr.read() == ""
    assert state_of(ctl, "long") == "running"


def test_waiting_for_a_stop_that_is_no_longer_needed_is_no_failure(ctl: Run, scene: Scene) -> None:
    ctl("train", *options(scene, steps=1), "--name", "done")
    stopped = ctl("task", "stop", "done", "--wait")
    assert (stopped.returncode, stopped.stdout) == (0, "done completed\n")
    assert ctl("task", "stop", "done").returncode == 1
    ctl("task", "create", *options(scene), "--name", "idle")
    idle = ctl("task", "stop", "idle", "--wait")
    assert idle.returncode == 1
    assert "nothing to stop" in idle.stderr


def test_hints_about_a_name_with_a_dash_work(ctl: Run, scene: Scene) -> None:
    created = ctl("task", "create", *options(scene, exit=[1, 7]), "--name=-a b")
    (hint,) = re.findall(r"start it: finetunectl (.*)", created.stderr)
    failed = ctl(*shlex.split(hint))
    assert failed.stdout.startswith("-a b ")
    watched = ctl("task", "watch", "--", "-a b")
    for verb in ("logs", "start"):
        (hint,) = re.findall(rf"finetunectl (task {verb} .*)", watched.stderr)
        assert ctl(*shlex.split(hint)).returncode == (0 if verb == "logs" else 1)
    refused = ctl("task", "delete", "--", "-a b")
    (hint,) = re.findall(r"next: finetunectl (.*)", refused.stderr)
    assert ctl(*shlex.split(hint)).returncode == 0

"""`finetunectl queue`, and pauses from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import task_pb2
from finetuned.v1.task_service_pb2 import CreateTaskRequest

Run = Callable[..., Any]
FULL = {"step": 2, "reason": "DISK_FULL", "message": "No space is left."}


def running(daemon: Daemon, scene: Scene, name: str, **scenario: Any) -> None:
    """A task that has taken a step, and waits before the next."""
    task = task_pb2.Task(
        training_type=task_pb2.TRAINING_TYPE_SFT,
        parameters=scene.play(**{"steps": 9, "gated": True, **scenario}),
        device="cpu",
        display_name=name,
    )
    created = daemon.tasks.CreateTask(CreateTaskRequest(task=task, start=True)).task
    with daemon.watch(created.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)


def queued(daemon: Daemon, scene: Scene, *names: str) -> None:
    for name in names:
        task = task_pb2.Task(
            training_type=task_pb2.TRAINING_TYPE_SFT,
            parameters=scene.parameters(),
            device="cpu",
            display_name=name,
        )
        daemon.tasks.CreateTask(CreateTaskRequest(task=task, start=True))


def rows(text: str) -> list[str]:
    """The table without its heading, and without dates."""
    return [" ".join(line.partition(" 20")[0].split()).partition(" (")[0] for line in lines(text)]


def lines(text: str) -> list[str]:
    return text.splitlines()[1:]


def test_the_queue_shows_what_runs_waits_and_is_paused_and_changes(
    daemon: Daemon, scene: Scene, ctl: Run
) -> None:
    assert "nothing runs" in ctl("queue").stderr
    running(daemon, scene, "first")
    queued(daemon, scene, "second", "third", "fourth")
    assert "fourth queued, place 1" in ctl("task", "move", "fourth", "1").stdout
    assert ctl("task", "pause", "third").stdout == "third paused\n"
    assert rows(ctl("queue").stdout) == [
        "cpu first running 1/9",
        "cpu 1 fourth queued",
        "cpu 2 second queued",
        "cpu third paused",
    ]
    (device,) = json.loads(ctl("queue", "--json").stdout)
    assert device["device"] == "cpu"
    assert [(t["display_name"], t["queue_position"]) for t in device["tasks"]] == [
        ("first", 0),
        ("fourth", 1),
        ("second", 2),
        ("third", 0),
    ]
    wrong = ctl("task", "move", "fourth", "0")
    assert (wrong.returncode, "position" in wrong.stderr) == (2, True)


def test_a_pause_is_waited_for_and_the_next_step_is_told(
    daemon: Daemon, scene: Scene, ctl: Run
) -> None:
    running(daemon, scene, "mine")
    done = ctl("task", "pause", "mine", "--wait")
    assert (done.returncode, done.stdout) == (0, "mine paused\n")
    assert "checkpoint-1" in done.stderr
    assert "finetunectl task resume mine" in done.stderr
    for verb in (["start"], ["edit", "--set", "general.seed=3"], ["delete", "--yes"]):
        refused = ctl("task", verb[0], "mine", *verb[1:])
        assert refused.returncode == 1
        assert "finetunectl task resume mine" in refused.stderr
    assert "paused" in ctl("task", "list").stdout
    assert "paused" in ctl("task", "show", "mine").stdout
    scene.let_pass(8)
    watched = ctl("task", "resume", "mine", "--watch")
    assert watched.returncode == 0
    assert "completed" in watched.stdout


def test_a_paused_task_is_stopped_from_the_command_line(
    daemon: Daemon, scene: Scene, ctl: Run
) -> None:
    running(daemon, scene, "mine")
    ctl("task", "pause", "mine", "--wait")
    stopped = ctl("task", "stop", "mine", "--wait")
    assert (stopped.returncode, stopped.stdout) == (0, "mine stopped\n")


def test_a_watch_lives_through_a_pause(daemon: Daemon, scene: Scene, ctl: Run) -> None:
    """It was somebody else who paused it: the watch of its start goes on to its end."""
    running(daemon, scene, "mine")
    with ThreadPoolExecutor(1) as pool:
        watched = pool.submit(ctl, "task", "watch", "mine")
        ctl("task", "pause", "mine", "--wait")
        scene.let_pass(8)
        ctl("task", "resume", "mine")
        done = watched.result(60)
    assert done.returncode == 0
    shown = [line.split("  ", 1)[-1] for line in done.stdout.splitlines()]
    assert any(line.startswith("paused: Paused at step 1") for line in shown)
    assert any(line.startswith("step 9/9") for line in shown)


def test_a_run_that_waits_for_room_says_so_and_can_be_mended(
    daemon: Daemon, scene: Scene, ctl: Run
) -> None:
    running(daemon, scene, "mine", save_steps=1, fail=FULL)
    scene.let_pass(1)
    name = json.loads(ctl("task", "show", "mine", "--json").stdout)["name"]
    daemon.wait(name, "PAUSED")
    assert "paused (disk full)" in ctl("task", "list").stdout
    assert "64 MiB" in ctl("task", "show", "mine").stdout
    told = ctl("task", "fix", "mine")
    assert told.returncode == 2, "it asks, and there is no terminal"
    assert "training.save_total_limit" in told.stdout
    assert daemon.get(name).state == task_pb2.TASK_STATE_PAUSED
    scene.play(steps=1)
    mended = ctl("task", "fix", "mine", "--yes", "--start")
    assert mended.returncode == 0, mended.stderr
    ended = daemon.wait(name, "COMPLETED")
    assert ended.run == 2, "it was stopped, and is a new run"


def test_a_fix_is_for_what_failed(daemon: Daemon, scene: Scene, ctl: Run) -> None:
    running(daemon, scene, "mine")
    ctl("task", "pause", "mine", "--wait")
    refused = ctl("task", "fix", "mine")
    assert (refused.returncode, "nothing to mend" in refused.stderr) == (1, True)


async def test_a_pause_ends_no_wait_and_a_resume_goes_on(
    client: Any, daemon: Daemon, scene: Scene
) -> None:
    """Both clients: `wait` and `watch(until_end=True)` end with the run and not with its pause."""
    running(daemon, scene, "mine")
    await client.pause_task("mine")

    async def state() -> task_pb2.TaskState.ValueType:
        return (await client.get_task("mine")).state

    while await state() != task_pb2.TASK_STATE_PAUSED:
        pass
    scene.let_pass(8)
    seen = list[int]()
    async for item in client.watch("mine", until_end=True):
        change = getattr(item, "state_change", None)
        if change is not None and change.new_state:
            seen.append(change.new_state)
        if seen and seen[-1] == task_pb2.TASK_STATE_PAUSED and len(seen) == 3:
            await client.resume_task("mine")
    assert seen[2:] == [
        task_pb2.TASK_STATE_PAUSED,
        task_pb2.TASK_STATE_QUEUED,
        task_pb2.TASK_STATE_RUNNING,
        task_pb2.TASK_STATE_COMPLETED,
    ]
    assert (await client.wait("mine")).state == task_pb2.TASK_STATE_COMPLETED

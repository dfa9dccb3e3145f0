"""A run that finds no space is paused, and goes on by itself once there is room."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import task_pb2
from pauses import (
    FULL,
    PAUSED,
    REQUESTED,
    begun,
    only_run,
    pause,
    results,
    resume,
    stop,
)


@pytest.fixture
def looking(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that often looks for room."""
    daemon = Daemon(tmp_path, "--disk-look-seconds", "0.05").start()
    yield daemon
    daemon.close()


FULL_AT_3 = {"step": 3, "reason": "DISK_FULL", "message": "No space is left."}


def test_a_full_disk_pauses_a_run_and_explains_it(daemon: Daemon, scene: Scene) -> None:
    """It holds no device, the reason is there to be read, and it can be resumed by hand."""
    task = daemon.create(scene.play(steps=4, save_steps=2, fail=FULL_AT_3), start=True)
    now = daemon.wait(task.name, "PAUSED")
    assert (now.pause_reason, now.end_reason) == (FULL, task_pb2.END_REASON_DISK_FULL)
    for words in ("No space is left.", "checkpoint-2", "64 MiB", str(scene.output / "run-1")):
        assert words in now.end_message
    (result,) = results(daemon, task.name)
    assert result.end_reason == task_pb2.END_REASON_DISK_FULL
    assert result.HasField("fix") or result.HasField("advice"), "what would help is said"
    scene.play(steps=4)
    again = resume(daemon, task.name)
    assert (again.end_reason, again.end_message) == (task_pb2.END_REASON_UNSPECIFIED, "")
    daemon.wait(task.name, "COMPLETED")
    assert only_run(daemon, task.name).attempt == 2


def test_once_there_is_room_a_run_goes_on_by_itself(looking: Daemon, scene: Scene) -> None:
    failure = {**FULL_AT_3, "attempt": 1}
    task = looking.create(scene.play(steps=4, save_steps=2, fail=failure), start=True)
    ended = looking.wait(task.name, "COMPLETED")
    assert (ended.run, ended.end_reason) == (1, task_pb2.END_REASON_FINISHED)
    assert only_run(looking, task.name).attempt == 2
    events = looking.events(task.name)
    assert "ROOM_ON_DISK" in [e.notice.reason for e in events if e.HasField("notice")]
    states = [e.state_change.new_state for e in events if e.HasField("state_change")]
    assert states.count(PAUSED) == 1


def test_a_run_does_not_go_on_by_itself_where_somebody_pauses_it(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=4, fail=FULL_AT_3), start=True)
    daemon.wait(task.name, "PAUSED")
    now = pause(daemon, task.name)
    assert (now.state, now.pause_reason) == (PAUSED, REQUESTED)
    assert "MiB" not in now.end_message, "room is not what it waits for"
    assert "resumed" in now.end_message
    run = only_run(daemon, task.name)
    assert run.end_message == now.end_message
    aside = json.loads(Path(run.run_dir, "ended.json").read_text())
    assert aside["pause"] == "REQUESTED", "also of a database that is made of the folders"
    assert any("result" in event for event in aside["events"]), "what was logged stays there"
    daemon.kill()
    daemon.options += ["--disk-look-seconds", "0.05"]
    daemon.start()
    # Another run, paused later for want of space, is looked after: this one was passed over before.
    scene.play(steps=4, fail={**FULL_AT_3, "attempt": 1})
    other = daemon.create(scene.parameters(), start=True)
    daemon.wait(other.name, "COMPLETED")
    assert daemon.get(task.name).state == PAUSED


def test_a_run_that_can_not_go_on_by_itself_says_it_once(looking: Daemon, scene: Scene) -> None:
    """To watchers and in its task; it is tried again, also by the next daemon."""
    task = begun(looking, scene, 2, fail={**FULL_AT_3, "attempt": 1})
    data = scene.data.read_text()
    scene.data.unlink()
    with looking.watch(task.name) as watch:
        scene.let_pass(1)
        notice = watch.until(lambda e: e.notice.reason == "RESUME_REFUSED").notice
    assert str(scene.data) in notice.message
    now = looking.get(task.name)
    assert (now.state, now.pause_reason) == (PAUSED, FULL)
    assert now.end_message == notice.message
    assert only_run(looking, task.name).end_message == notice.message

    def tries() -> int:
        return looking.log.read_text().count("stays paused")

    looking.kill()
    before = tries()
    looking.start()
    eventually(lambda: tries() > before, "the next daemon has tried it")
    scene.data.write_text(data)
    scene.let_pass(9)
    looking.wait(task.name, "COMPLETED")
    notices = [e.notice.reason for e in looking.events(task.name) if e.HasField("notice")]
    assert notices.count("RESUME_REFUSED") == 1


def test_a_full_disk_after_a_stop_was_asked_for_is_a_failure_as_before(
    daemon: Daemon, scene: Scene
) -> None:
    task = begun(daemon, scene, 2, deaf=True, fail=FULL_AT_3)
    stop(daemon, task.name)
    scene.let_pass(1)
    ended = daemon.wait(task.name, "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_DISK_FULL


def test_a_full_disk_in_a_pause_loses_no_run(daemon: Daemon, scene: Scene) -> None:
    """What it could not save is done again; it waits for whoever has paused it."""
    task = begun(daemon, scene, 2, deaf=True, save_steps=2, fail=FULL_AT_3)
    pause(daemon, task.name)
    scene.let_pass(1)
    now = daemon.wait(task.name, "PAUSED")
    assert (now.pause_reason, now.end_reason) == (REQUESTED, task_pb2.END_REASON_DISK_FULL)
    assert "checkpoint-2" in now.end_message

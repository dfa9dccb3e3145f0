"""Runners that give no sign of life: said, then ended; one that somebody stopped is left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from conftest import Scene
from daemon_process import Daemon, Watch, eventually
from finetuned.v1 import event_pb2, system_service_pb2, task_pb2, task_service_pb2

SYSTEM_INFO = system_service_pb2.GetSystemInfoRequest()
NOTICE, DEADLINE = 1.0, 2.5


@pytest.fixture
def watchful(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with little patience for runners that are silent."""
    daemon = Daemon(
        tmp_path,
        *("--hang-notice-seconds", str(NOTICE)),
        *("--hang-deadline-seconds", str(DEADLINE)),
        *("--kill-deadline-seconds", "0.3"),
    )
    yield daemon.start()
    daemon.close()


def run_of(daemon: Daemon, name: str) -> task_pb2.Run:
    return daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs[0]


def notice(watch: Watch, reason: str) -> event_pb2.Notice:
    return watch.until(lambda e: e.notice.reason == reason).notice


def reasons(daemon: Daemon, name: str) -> list[str]:
    return [e.notice.reason for e in daemon.events(name) if e.HasField("notice")]


def test_a_runner_that_hangs_is_said_to_then_ended_and_the_queue_goes_on(
    watchful: Daemon, scene: Scene
) -> None:
    """It hears nothing, not even SIGTERM: FAILED, with the checkpoint to go on from."""
    hangs = scene.play(steps=9, save_steps=1, beats=1, gated=True, deaf=True)
    task = watchful.create(hangs, start=True)
    with watchful.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        scene.play(steps=1)
        after = watchful.create(scene.parameters(), start=True)
        said = notice(watch, "RUNNER_SILENT")
        assert "no sign of life" in said.message
        end = watch.until_end()
    assert end.state_change.end_reason == task_pb2.END_REASON_RUNNER_HUNG
    ended = watchful.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_FAILED
    assert ended.last_checkpoint.endswith("checkpoint-1")
    assert ended.last_checkpoint in ended.end_message
    assert run_of(watchful, task.name).signal == "SIGKILL"
    result = next(e.result for e in watchful.events(task.name) if e.HasField("result"))
    assert result.fix.data.resume_from_checkpoint == ended.last_checkpoint
    watchful.wait(after.name, "COMPLETED")


def test_a_runner_that_wakes_up_on_sigterm_has_hung_all_the_same(
    watchful: Daemon, scene: Scene
) -> None:
    """Nobody asked for a stop, so that the task is not STOPPED; what it saved is named."""
    task = watchful.create(scene.play(steps=9, beats=1, gated=True), start=True)
    scene.let_pass(1)
    ended = watchful.wait(task.name, "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_HUNG
    assert ended.last_checkpoint.endswith("checkpoint-1")


def test_a_stopped_runner_is_never_ended_for_it_also_by_the_next_daemon(
    watchful: Daemon, scene: Scene
) -> None:
    """The deadline passes several times over; on SIGCONT the run goes on to its end."""
    task = watchful.create(scene.play(steps=2, beats=True, gated=True), start=True)
    with watchful.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        pid = run_of(watchful, task.name).pid
        os.kill(pid, signal.SIGSTOP)
        said = notice(watch, "RUNNER_SILENT")
        assert "SIGSTOP" in said.message
        last = said and watch.seqs[-1]
    watchful.kill()
    watchful.start()
    with watchful.watch(task.name, last) as watch:
        assert "SIGSTOP" in notice(watch, "RUNNER_SILENT").message, "adopted runs are looked at too"
        # Heartbeats of the watch come every 0.3 s: twice the deadline has passed with them.
        for response in watch.call:
            watch.heartbeats += [1] if response.HasField("heartbeat") else []
            if len(watch.heartbeats) * 0.3 > 2 * DEADLINE:
                break
        assert psutil.Process(pid).status() == psutil.STATUS_STOPPED, "nothing was sent to it"
        os.kill(pid, signal.SIGCONT)
        notice(watch, "RUNNER_BACK")
        scene.let_pass(1)
        watch.until_end()
    assert watchful.get(task.name).state == task_pb2.TASK_STATE_COMPLETED


def test_a_runner_that_never_begins_is_ended(tmp_path: Path, scene: Scene) -> None:
    """It has not even said who it is; no other start of it is tried, and the device is free."""
    daemon = Daemon(tmp_path, "--start-deadline-seconds", "1").start()
    try:
        task = daemon.create(scene.play(frozen=True), start=True)
        pid = eventually(lambda: run_of(daemon, task.name).pid, "the process is known")
        ended = daemon.wait(task.name, "FAILED")
        assert ended.end_reason == task_pb2.END_REASON_RUNNER_HUNG
        assert not psutil.pid_exists(pid)
        assert run_of(daemon, task.name).number == 1
        assert "RUNNER_RESTARTED" not in reasons(daemon, task.name)
        assert daemon.system.GetSystemInfo(SYSTEM_INFO).running_tasks == 0
    finally:
        daemon.close()


def test_a_runner_that_beats_is_let_alone_however_long_it_takes(
    watchful: Daemon, scene: Scene
) -> None:
    """A phase may take longer than the deadline; it is silence that counts."""
    task = watchful.create(scene.play(hold="LOADING_MODEL", beats=True), start=True)
    with watchful.watch(task.name) as watch:
        loading = task_pb2.RUN_PHASE_LOADING_MODEL
        watch.until(lambda e: e.phase_change.phase == loading)
        while len(watch.heartbeats) * 0.3 < 2 * DEADLINE:
            response = next(watch.call)
            watch.heartbeats += [1] if response.HasField("heartbeat") else []
    assert watchful.get(task.name).state == task_pb2.TASK_STATE_RUNNING
    later = [e.notice.reason for e in watchful.events(task.name)[watch.seqs[-1] :]]
    assert "RUNNER_SILENT" not in later

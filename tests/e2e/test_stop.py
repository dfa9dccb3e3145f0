"""Ends: stops in every phase, the ladder, and deaths with their names."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import event_pb2, task_pb2, task_service_pb2


def run_of(daemon: Daemon, name: str) -> task_pb2.Run:
    return daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs[0]


def stop(daemon: Daemon, name: str, *, discard: bool = False) -> task_pb2.Task:
    request = task_service_pb2.StopTaskRequest(name=name, discard=discard)
    return daemon.tasks.StopTask(request).task


def result_of(daemon: Daemon, name: str) -> event_pb2.Result:
    return next(e.result for e in daemon.events(name) if e.HasField("result"))


def test_a_stop_in_mid_run_saves_and_is_stopped(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=9, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(2)
        watch.until_step(2)
        asked = stop(daemon, task.name)
        assert asked.phase == task_pb2.RUN_PHASE_STOPPING
        stopping = watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_STOPPING)
        assert stopping.phase_change.deadline_seconds > 0, "a user can see how long it may take"
        end = watch.until_end()
    assert end.state_change.end_reason == task_pb2.END_REASON_STOPPED_BY_USER
    ended = daemon.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_STOPPED
    assert Path(ended.last_checkpoint).name == "checkpoint-2"


@pytest.mark.parametrize("phase", ["STARTING", "LOADING_MODEL", "PREPARING_DATA"])
def test_a_stop_works_in_every_phase(daemon: Daemon, scene: Scene, phase: str) -> None:
    task = daemon.create(scene.play(hold=phase), start=True)
    wanted = task_pb2.RunPhase.Value(f"RUN_PHASE_{phase}")
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == wanted)
        stop(daemon, task.name)
        watch.until_end()
    assert daemon.get(task.name).state == task_pb2.TASK_STATE_STOPPED


def test_a_wish_to_save_is_never_taken_back(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=9, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        pid = run_of(daemon, task.name).pid
        os.kill(pid, signal.SIGSTOP)
        stop(daemon, task.name)
        stop(daemon, task.name, discard=True)
        os.kill(pid, signal.SIGCONT)
        watch.until_end()
    assert daemon.get(task.name).last_checkpoint.endswith("checkpoint-1")


def test_a_stop_that_discards_saves_nothing(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=9, gated=True), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        stop(daemon, task.name, discard=True)
        watch.until_end()
    assert daemon.get(task.name).last_checkpoint == ""


def test_a_queued_task_is_stopped_at_once(daemon: Daemon, scene: Scene) -> None:
    first = daemon.create(scene.play(gated=True, steps=1), start=True)
    queued = daemon.create(scene.play(gated=True, steps=1), start=True)
    assert stop(daemon, queued.name).state == task_pb2.TASK_STATE_STOPPED
    scene.let_pass(1)
    daemon.wait(first.name, "COMPLETED")
    with pytest.raises(grpc.RpcError) as caught:
        stop(daemon, first.name)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION


@pytest.fixture
def impatient(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(
        tmp_path,
        *("--save-deadline-seconds", "0.3"),
        *("--kill-deadline-seconds", "0.3"),
    ).start()
    yield daemon
    daemon.close()


def test_a_run_that_hears_nothing_is_ended_step_by_step(impatient: Daemon, scene: Scene) -> None:
    task = impatient.create(scene.play(steps=9, gated=True, deaf=True, save_steps=1), start=True)
    with impatient.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        stop(impatient, task.name)
        watch.until_end()
    ended = impatient.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_STOPPED
    assert "by force" in ended.end_message
    assert ended.last_checkpoint in ended.end_message, "what remains is named"
    assert run_of(impatient, task.name).signal == "SIGKILL"


def test_a_killed_runner_is_failed_with_its_signal_within_two_seconds(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=9, gated=True, save_steps=1), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(2)
        watch.until_step(2)
        pid = run_of(daemon, task.name).pid
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        watch.until_end()
        seconds = time.monotonic() - killed
    assert seconds < 2
    ended = daemon.get(task.name)
    assert ended.state == task_pb2.TASK_STATE_FAILED
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_KILLED
    assert "SIGKILL" in ended.end_message
    assert ended.last_checkpoint in ended.end_message
    assert result_of(daemon, task.name).signal == "SIGKILL"
    again = daemon.create(scene.play(steps=1), start=True)
    daemon.wait(again.name, "COMPLETED")


def test_what_a_killed_runner_was_about_to_write_is_removed(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=9, gated=True, save_steps=1), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
        run = run_of(daemon, task.name)
        output = Path(run.output_dir)
        (output / ".tmp-checkpoint-2").mkdir()
        (output / ".tmp-checkpoint-2/weights").write_bytes(b"half")
        os.kill(run.pid, signal.SIGKILL)
        watch.until_end()
    assert [path.name for path in output.iterdir()] == ["checkpoint-1"]


def test_children_of_a_killed_runner_end_with_it(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=9, gated=True, child=True), start=True)
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)
        run = run_of(daemon, task.name)
        child = int((Path(run.run_dir) / "child").read_text())
        os.kill(run.pid, signal.SIGKILL)
        watch.until_end()
    eventually(lambda: not Path(f"/proc/{child}").exists(), "the child is gone")


def test_a_runner_that_leaves_no_result_is_never_completed(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(exit=[2, 0], console="last words"), start=True)
    ended = daemon.wait(task.name, "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_CRASHED
    result = result_of(daemon, task.name)
    assert result.exit_code == 0
    assert "last words" in result.detail


def test_lines_that_are_no_events_are_reported_and_the_rest_is_kept(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=2, garble=True), start=True)
    daemon.wait(task.name, "COMPLETED")
    events = daemon.events(task.name)
    assert [e.log_line.text for e in events if "unreadable" in e.log_line.text]
    assert [e.progress.step for e in events if e.HasField("progress")] == [1, 2]


def test_a_runner_that_can_not_be_started_is_a_failed_run(tmp_path: Path, scene: Scene) -> None:
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    daemon = Daemon(tmp_path, "--runner-python", str(python))
    try:
        daemon.start()
        first = daemon.create(scene.play(gated=True), start=True)
        queued = daemon.create(scene.parameters(), start=True)
        python.unlink()  # it was there when the start was checked
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=first.name))
        ended = daemon.wait(queued.name, "FAILED")
        assert ended.end_reason == task_pb2.END_REASON_RUNNER_CRASHED
        assert str(python) in ended.end_message
    finally:
        daemon.close()

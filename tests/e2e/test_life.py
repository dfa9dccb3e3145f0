"""The life of a run depends on no client and not on the daemon."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import task_pb2, task_service_pb2


def run_of(daemon: Daemon, name: str) -> task_pb2.Run:
    return daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs[0]


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_killed_daemon_loses_nothing_and_its_watcher_goes_on_without_gap_or_repeat(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=9, gated=True), start=True)
    seen = list[int]()
    with daemon.watch(task.name) as watch:
        scene.let_pass(3)
        watch.until_step(3)
        seen += watch.seqs
    pid = run_of(daemon, task.name).pid
    daemon.kill()
    scene.let_pass(3)
    events = daemon.paths.state_dir / f"runs/{task.name.removeprefix('tasks/')}/1/events.jsonl"
    eventually(lambda: '"step":6' in events.read_text(), "the run goes on without a daemon")
    daemon.start()
    assert run_of(daemon, task.name).pid == pid, "adopted, not started again"
    with daemon.watch(task.name, seen[-1]) as watch:
        watch.until_step(6)
        scene.let_pass(3)
        watch.until_end()
        seen += watch.seqs
    assert seen == list(range(1, len(seen) + 1))
    done = daemon.get(task.name)
    assert done.state == task_pb2.TASK_STATE_COMPLETED
    steps = [e.progress.step for e in daemon.events(task.name) if e.HasField("progress")]
    assert steps == list(range(1, 10))


def test_while_a_long_report_is_taken_over_calls_are_answered_all_the_time(
    daemon: Daemon, scene: Scene
) -> None:
    """A client sees the task at many places on the way; all of it is there in the end."""
    task = daemon.create(scene.play(steps=300, gated=True, lines=[60, 40]), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    daemon.kill()
    scene.let_pass(300)
    eventually(lambda: is_gone(pid), "the run ended")
    daemon.start()
    seen = set[int]()
    while daemon.get(task.name).state == task_pb2.TASK_STATE_RUNNING:
        seen.add(daemon.get(task.name).last_seq)
    assert len(seen) > 8, "that many chunks, and a call between them"
    assert daemon.wait(task.name, "COMPLETED").last_seq > 300 * 62


def test_a_run_that_ended_unseen_is_what_it_says_of_itself(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=2, gated=True), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    daemon.kill()
    scene.let_pass(2)
    eventually(lambda: is_gone(pid), "the run ended")
    daemon.start()
    assert daemon.wait(task.name, "COMPLETED", "FAILED").state == task_pb2.TASK_STATE_COMPLETED


def test_a_run_that_died_unseen_is_interrupted_and_its_device_is_free(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(gated=True, steps=1), start=True)
    queued = daemon.create(scene.play(gated=True, steps=1), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    daemon.kill()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid), "the runner is dead")
    daemon.start()
    ended = daemon.wait(task.name, "COMPLETED", "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_INTERRUPTED
    scene.let_pass(1)
    daemon.wait(queued.name, "COMPLETED")


def test_an_adopted_run_that_is_killed_fails_and_no_signal_is_invented(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(gated=True), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    daemon.kill()
    daemon.start()
    os.kill(pid, signal.SIGKILL)
    ended = daemon.wait(task.name, "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_KILLED
    assert "can't be known" in ended.end_message
    assert run_of(daemon, task.name).signal == ""


def test_a_stop_that_was_acknowledged_outlives_the_daemon(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True, steps=5), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
    run = run_of(daemon, task.name)
    os.kill(run.pid, signal.SIGSTOP)  # it can't see the wish before the daemon is gone
    daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
    daemon.kill()
    (Path(run.run_dir) / "control.json").unlink()  # as if the daemon had died just before it
    daemon.start()
    os.kill(run.pid, signal.SIGCONT)
    ended = daemon.wait(task.name, "STOPPED")
    assert ended.last_checkpoint.endswith("checkpoint-1")


def test_the_queue_outlives_the_daemon(daemon: Daemon, scene: Scene) -> None:
    names = [daemon.create(scene.play(steps=1, gated=True), start=True).name for _ in range(3)]
    daemon.kill()
    daemon.start()
    assert [daemon.get(name).queue_position for name in names] == [0, 1, 2]
    scene.let_pass(3)
    for name in names:
        daemon.wait(name, "COMPLETED")


def test_a_start_cut_short_before_the_process_is_done_by_the_next_daemon(
    daemon: Daemon, scene: Scene
) -> None:
    scene.play(steps=2, gated=True)
    task = daemon.create(scene.parameters(), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    daemon.kill()
    os.kill(pid, signal.SIGKILL)
    eventually(lambda: is_gone(pid), "the runner is dead")
    # The state in which a daemon leaves a run that it was about to start.
    for file in (daemon.paths.state_dir / "runs").glob("*/1/*.json*"):
        file.unlink()
    subprocess.run(
        ["python3", "-c", _FORGET, str(daemon.paths.state_dir / "finetuned.db")], check=True
    )
    daemon.start()
    scene.let_pass(2)
    daemon.wait(task.name, "COMPLETED")


_FORGET = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("UPDATE runs SET identity = NULL, ingested_bytes = 0, ingested_seq = 0")
connection.commit()
"""


def test_a_stopped_daemon_leaves_its_runs_alone(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=2, gated=True), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    assert daemon.stop() == 0
    assert not daemon.paths.socket.exists()
    assert not daemon.paths.endpoint.exists()
    assert not is_gone(pid)
    daemon.start()
    scene.let_pass(2)
    daemon.wait(task.name, "COMPLETED")


def test_a_runner_has_nothing_of_the_daemons(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True), start=True)
    pid = eventually(lambda: run_of(daemon, task.name).pid, "the runner started")
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)
    assert daemon.process is not None
    assert os.getpgid(pid) == pid
    assert os.getsid(pid) == pid
    files = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
    for name in ("finetuned.db", "finetuned.sock", "lock"):
        assert not [file for file in files if file.endswith(name)]
    assert not [file for file in files if file.startswith("socket:")]
    assert b"FINETUNED_" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_a_second_daemon_refuses_with_the_address_of_the_first(daemon: Daemon) -> None:
    second = daemon.spawn()
    assert second.wait(20) == 3
    assert f"already serves on unix:{daemon.paths.socket}" in daemon.log.read_text()
    daemon.system.GetSystemInfo(task_service_pb2.GetTaskRequest())  # type: ignore[arg-type]


def test_a_stale_socket_is_no_hindrance(daemon: Daemon) -> None:
    daemon.kill()
    assert daemon.paths.socket.exists(), "a kill leaves it behind"
    daemon.start()
    assert json.loads(daemon.paths.endpoint.read_bytes())["addresses"] == [daemon.address]


@pytest.mark.parametrize(
    "content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"x" * 5000]
)
def test_a_damaged_database_is_refused_with_its_path_and_left_as_it_is(
    daemon: Daemon, content: bytes
) -> None:
    daemon.stop()
    database = daemon.paths.state_dir / "finetuned.db"
    for file in daemon.paths.state_dir.glob("finetuned.db*"):
        file.unlink()
    database.write_bytes(content)
    assert daemon.spawn().wait(20) == 1
    assert str(database) in daemon.log.read_text()
    assert database.read_bytes() == content

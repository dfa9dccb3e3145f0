"""A start that crashes the runner at once is tried again, a limited number of times."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import event_pb2, task_pb2, task_service_pb2

PHASES = [
    task_pb2.RUN_PHASE_STARTING,
    task_pb2.RUN_PHASE_LOADING_MODEL,
    task_pb2.RUN_PHASE_PREPARING_DATA,
    task_pb2.RUN_PHASE_TRAINING,
]


@pytest.fixture
def quick(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon that waits little between two starts."""
    daemon = Daemon(tmp_path, "--restart-pause-seconds", "0.05").start()
    yield daemon
    daemon.close()


def run_dir(daemon: Daemon, name: str) -> Path:
    request = task_service_pb2.ListRunsRequest(parent=name)
    return Path(daemon.tasks.ListRuns(request).runs[0].run_dir)


def restarts(daemon: Daemon, name: str) -> list[event_pb2.Notice]:
    notices = [e.notice for e in daemon.events(name) if e.HasField("notice")]
    return [notice for notice in notices if notice.reason == "RUNNER_RESTARTED"]


@pytest.mark.parametrize("how", ["SIGSEGV", 7])
def test_one_that_gets_over_it_runs_to_its_end(quick: Daemon, scene: Scene, how: str | int) -> None:
    """Two starts crash, the third runs: one notice each, and every event exactly once."""
    task = quick.create(scene.play(crash=[2, how], steps=3), start=True)
    quick.wait(task.name, "COMPLETED")
    said = restarts(quick, task.name)
    assert [notice.message.count("start 2 of 3") for notice in said] == [1, 0]
    assert all("it went wrong early" in notice.message for notice in said)
    events = quick.events(task.name)
    assert [e.seq for e in events] == list(range(1, len(events) + 1))
    assert [e.progress.step for e in events if e.HasField("progress")] == [1, 2, 3]
    phases = [e.phase_change.phase for e in events if e.HasField("phase_change")]
    assert phases == PHASES, "the run starts once, whatever its processes do"
    assert not [e for e in events if e.log_line.level == "warning"], "no event was missed"
    assert (run_dir(quick, task.name) / "console.log").read_text().count("went wrong") == 2


def test_after_three_starts_it_fails_with_its_last_words(quick: Daemon, scene: Scene) -> None:
    """It is not tried for ever, and the device goes to the next."""
    task = quick.create(scene.play(crash=[99, "SIGABRT"]), start=True)
    ended = quick.wait(task.name, "FAILED")
    assert ended.end_reason == task_pb2.END_REASON_RUNNER_KILLED
    for words in ("SIGABRT", "started 3 times", "it went wrong early"):
        assert words in ended.end_message
    assert (run_dir(quick, task.name) / "starts").read_text() == "..."
    assert len(restarts(quick, task.name)) == 2
    scene.play(steps=1)
    after = quick.create(scene.parameters(), start=True)
    quick.wait(after.name, "COMPLETED")


def test_wrong_usage_is_not_tried_again(quick: Daemon, scene: Scene) -> None:
    task = quick.create(scene.play(crash=[99, 2]), start=True)
    assert "exit status 2" in quick.wait(task.name, "FAILED").end_message
    assert restarts(quick, task.name) == []


def test_a_runner_that_is_not_there_is_not_tried_again(tmp_path: Path, scene: Scene) -> None:
    daemon = Daemon(tmp_path, runner_module="no_such_runner").start()
    try:
        task = daemon.create(scene.play(), start=True)
        ended = daemon.wait(task.name, "FAILED")
        assert ended.end_reason == task_pb2.END_REASON_RUNNER_CRASHED
        assert restarts(daemon, task.name) == []
    finally:
        daemon.close()


def test_a_stop_between_two_starts_ends_the_run(tmp_path: Path, scene: Scene) -> None:
    """Nothing is started after it; the run was never begun and is STOPPED."""
    daemon = Daemon(tmp_path, "--restart-pause-seconds", "60").start()
    try:
        task = daemon.create(scene.play(crash=[99, 7]), start=True)
        with daemon.watch(task.name) as watch:
            watch.until(lambda e: e.notice.reason == "RUNNER_RESTARTED")
            daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
            watch.until_end()
        assert daemon.get(task.name).state == task_pb2.TASK_STATE_STOPPED
        assert (run_dir(daemon, task.name) / "starts").read_text() == "."
    finally:
        daemon.close()


def test_a_daemon_killed_between_two_starts_counts_on(tmp_path: Path, scene: Scene) -> None:
    """The number of starts is kept by the database, not by the daemon's memory."""
    daemon = Daemon(tmp_path, "--restart-pause-seconds", "60").start()
    try:
        task = daemon.create(scene.play(crash=[99, 7]), start=True)
        with daemon.watch(task.name) as watch:
            watch.until(lambda e: "start 2 of 3" in e.notice.message)
        daemon.kill()
        daemon.start()  # it can't know whether the second start came about, and makes the third
        ended = daemon.wait(task.name, "FAILED")
        assert "started 3 times" in ended.end_message
        starts = run_dir(daemon, task.name) / "starts"
        assert eventually(starts.read_text, "it was started") == ".."
    finally:
        daemon.close()

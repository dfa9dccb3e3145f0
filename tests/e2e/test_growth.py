"""A bound on the whole database: of old runs what matters stays."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import event_pb2, system_service_pb2, task_pb2, task_service_pb2
from finetuned_daemon.store.digest_rows import TAIL
from reach import finetuned

STEPS = 1500
"""More than the points that stay of a curve."""


def metrics(daemon: Daemon, name: str, run: int) -> task_service_pb2.GetMetricsResponse:
    """The curves of a run, as thin as they are kept."""
    request = task_service_pb2.GetMetricsRequest(name=name, run=run, max_points=1000)
    return daemon.tasks.GetMetrics(request)


def of_run(daemon: Daemon, name: str, run: int) -> list[event_pb2.Event]:
    """All events of a run that there are, in pages."""
    found = list[event_pb2.Event]()
    while True:
        after = found[-1].seq if found else 0
        request = task_service_pb2.ListEventsRequest(
            parent=name, run=run, after_seq=after, page_size=7
        )
        page = daemon.tasks.ListEvents(request).events
        if not page:
            return found
        found += page


def first_seq(daemon: Daemon, name: str) -> int:
    request = task_service_pb2.ListEventsRequest(parent=name, page_size=1)
    return daemon.tasks.ListEvents(request).first_seq


def used(daemon: Daemon) -> int:
    """Bytes of the database in use, as the daemon says."""
    info = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    return next(limit.used for limit in info.limits if limit.name == "database_bytes")


def train(daemon: Daemon, scene: Scene, runs: int, steps: int = STEPS) -> task_pb2.Task:
    """A task with so many runs that have ended."""
    task = daemon.create(scene.play(steps=steps, save_steps=steps // 2))
    for _ in range(runs):
        task = train_again(daemon, task)
    return task


def train_again(daemon: Daemon, task: task_pb2.Task) -> task_pb2.Task:
    """The task once one more run of it has ended."""
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    eventually(lambda: daemon.get(task.name).state == task_pb2.TASK_STATE_COMPLETED, "its end")
    return daemon.get(task.name)


def end(daemon: Daemon, task: task_pb2.Task) -> list[event_pb2.Event]:
    """The events of a task that are never deleted."""
    request = task_service_pb2.ListEventsRequest(
        parent=task.name, after_seq=task.last_seq - TAIL, page_size=1000
    )
    return list(daemon.tasks.ListEvents(request).events)


def kinds(events: list[event_pb2.Event]) -> set[str]:
    return {str(event.WhichOneof("payload")) for event in events}


def bound(daemon: Daemon, size: int) -> None:
    """Starts the daemon again, with a bound on its database."""
    daemon.stop()
    daemon.options += ["--most-database-bytes", str(size)]
    daemon.start()


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """One that can be started again with a bound."""
    daemon = Daemon(tmp_path).start()
    yield daemon
    daemon.close()


def test_of_the_oldest_run_the_curve_and_what_people_look_back_at_stay(
    daemon: Daemon, scene: Scene
) -> None:
    """No more runs than have to; the curve is the thinned one of before; events keep numbers."""
    task = train(daemon, scene, 3)
    whole = {run: of_run(daemon, task.name, run) for run in (1, 2, 3)}
    curves = {run: metrics(daemon, task.name, run) for run in (1, 2, 3)}
    assert all(one.point_count == STEPS for one in curves[1].series), "it has to be thinned out"
    size = used(daemon)
    bound(daemon, size - 1)
    floor = whole[2][0].seq
    eventually(lambda: first_seq(daemon, task.name) == floor, "the oldest is thinned out")
    eventually(lambda: "1 old runs were thinned out" in daemon.log.read_text(), "it is said")
    assert used(daemon) < size * 0.95
    kept = of_run(daemon, task.name, 1)
    assert kept == [event for event in whole[1] if kinds([event]) & kinds(kept)]
    assert {"state_change", "result", "checkpoint_saved"} <= kinds(kept)
    assert not kinds(kept) & {"metrics", "progress", "log_line", "phase_change"}
    for run in (2, 3):
        assert of_run(daemon, task.name, run) == whole[run]
    for run, curve in curves.items():
        assert metrics(daemon, task.name, run) == curve
    page = daemon.tasks.GetMetrics(task_service_pb2.GetMetricsRequest(name=task.name, run=1))
    assert {one.point_count for one in page.series} == {STEPS}, "it says how many there were"
    assert {len(one.steps) for one in page.series} == {1000}


def test_the_newest_runs_are_thinned_out_last_and_their_end_stays(
    daemon: Daemon, scene: Scene
) -> None:
    """A watcher sees how the task ended; one with an old cursor is told from where it can go on."""
    old, new = train(daemon, scene, 2), train(daemon, scene, 1)
    curves = {task.name: metrics(daemon, task.name, task.run) for task in (old, new)}
    ends = {task.name: end(daemon, task) for task in (old, new)}
    bound(daemon, used(daemon) // 2)
    for task in (old, new):
        goal = task.last_seq - TAIL + 1
        eventually(lambda goal=goal, task=task: first_seq(daemon, task.name) == goal, "its end")  # type: ignore[misc]
        assert daemon.events(task.name) == ends[task.name]
        assert metrics(daemon, task.name, task.run) == curves[task.name]
        with daemon.watch(task.name) as watch:
            assert watch.snapshot.last_seq == task.last_seq
            assert next(watch).seq == goal
        with pytest.raises(grpc.RpcError) as caught:
            daemon.watch(task.name, 5)
        assert caught.value.code() is grpc.StatusCode.OUT_OF_RANGE
        assert f"the oldest that is kept is {goal}" in caught.value.details()
    assert train(daemon, scene, 1, steps=3).state == task_pb2.TASK_STATE_COMPLETED


def test_where_that_is_not_enough_nothing_but_the_records_stay(
    daemon: Daemon, scene: Scene
) -> None:
    """A bound that can't be kept is said once; runs and checkpoints are still listed."""
    task = train(daemon, scene, 2)
    runs = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name))
    saved = daemon.tasks.ListCheckpoints(task_service_pb2.ListCheckpointsRequest(parent=task.name))
    bound(daemon, 1)
    eventually(lambda: "no log of an old run is left" in daemon.log.read_text(), "it is said")
    assert not metrics(daemon, task.name, 1).series
    assert not of_run(daemon, task.name, 1)
    assert daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)) == runs
    request = task_service_pb2.ListCheckpointsRequest(parent=task.name)
    assert daemon.tasks.ListCheckpoints(request) == saved
    assert daemon.get(task.name) == task


def test_nothing_of_a_task_goes_while_a_run_of_it_is_under_way(
    daemon: Daemon, scene: Scene
) -> None:
    """Watchers of a run that lives see all of it; its earlier runs go once it has ended."""
    task = train(daemon, scene, 1)
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    scene.play(gated=True)
    daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
    eventually(lambda: daemon.get(task.name).state != task_pb2.TASK_STATE_RUNNING, "its end")
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    daemon.wait(task.name, "RUNNING")
    other = daemon.create(scene.parameters())
    bound(daemon, 1)
    eventually(lambda: "no log of an old run is left" in daemon.log.read_text(), "it has looked")
    assert first_seq(daemon, task.name) == 1
    daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
    eventually(lambda: first_seq(daemon, task.name) > STEPS, "the first run is thinned out")
    assert daemon.get(other.name).last_seq == 0


def test_a_database_that_was_rewritten_says_what_it_said(daemon: Daemon, scene: Scene) -> None:
    """`finetuned db compact` takes what nothing uses, and refuses while a daemon serves."""
    task = train(daemon, scene, 1, steps=600)
    command = ("db", "compact", "--json")
    serving = finetuned(daemon, *command)
    assert serving.returncode == 3
    assert "stop it first" in serving.stderr
    events = daemon.events(task.name)
    other = train(daemon, scene, 1, steps=600)
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=other.name))
    daemon.stop()
    done = finetuned(daemon, *command)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["bytes_after"] < said["bytes_before"]
    daemon.start()
    assert daemon.events(task.name) == events
    assert daemon.get(task.name) == task


def test_a_task_with_a_long_log_is_deleted_whole_whatever_becomes_of_the_call(
    daemon: Daemon, scene: Scene
) -> None:
    """A client that gives up, and a daemon that is killed, leave no half of it for good."""
    task, other = (train(daemon, scene, 1, steps=6000) for _ in range(2))

    def is_gone(name: str) -> bool:
        listed = daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest()).tasks
        return name not in {each.name for each in listed}

    def has_begun(name: str) -> bool:
        with contextlib.suppress(grpc.RpcError):  # it is gone already
            return first_seq(daemon, name) > 1
        return True

    def deleting(name: str) -> grpc.Future:
        future = daemon.tasks.DeleteTask.future(task_service_pb2.DeleteTaskRequest(name=name))
        eventually(lambda: has_begun(name), "it has begun")
        return future

    deleting(task.name).cancel()
    eventually(lambda: is_gone(task.name), "it is finished")
    deleting(other.name)
    daemon.kill()
    daemon.start()
    eventually(lambda: is_gone(other.name), "it is finished after the next start")
    assert not list(daemon.paths.state_dir.glob("runs/*"))


def test_a_task_that_is_started_while_its_log_is_thinned_out_keeps_its_end(
    daemon: Daemon, scene: Scene
) -> None:
    """What was the end of the log, and is none any more, is listed with what stands for the run."""
    task = train(daemon, scene, 1, steps=6000)
    ends = end(daemon, task)
    curve = metrics(daemon, task.name, 1)
    scene.play(steps=3)
    bound(daemon, used(daemon) // 2)
    eventually(lambda: first_seq(daemon, task.name) > 1, "it has begun")
    again = train_again(daemon, task)
    goal = task.last_seq - TAIL + 1
    eventually(lambda: first_seq(daemon, task.name) >= goal, "the first run is thinned out")
    kept = of_run(daemon, task.name, 1)
    looked_back_at = [e for e in ends if kinds([e]) & {"state_change", "result", "notice"}]
    assert {"state_change", "result"} <= kinds(looked_back_at)
    assert all(event in kept for event in looked_back_at)
    assert metrics(daemon, task.name, 1) == curve
    assert again.run == 2

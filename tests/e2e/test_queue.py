"""The queue: one run a device, in an order that everybody sees and can change."""

from __future__ import annotations

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import task_pb2, task_service_pb2

QUEUED = task_pb2.TASK_STATE_QUEUED


def move(daemon: Daemon, name: str, position: int) -> task_pb2.Task:
    request = task_service_pb2.MoveTaskRequest(name=name, position=position)
    return daemon.tasks.MoveTask(request).task


def places(daemon: Daemon) -> list[str]:
    """Names of the queued tasks by their places, as the list tells them."""
    listed = daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest(states=[QUEUED])).tasks
    ordered = sorted(listed, key=lambda task: task.queue_position)
    assert [task.queue_position for task in ordered] == list(range(1, len(ordered) + 1))
    assert all(daemon.get(t.name).queue_position == t.queue_position for t in ordered)
    return [task.name for task in ordered]


def full(daemon: Daemon, scene: Scene, count: int) -> list[str]:
    """A task that runs until a step is let pass, and others behind it; their names."""
    scene.play(steps=1, gated=True)
    return [daemon.create(scene.parameters(), start=True).name for _ in range(count)]


def test_runs_start_in_the_order_that_moves_have_made_across_restarts(
    daemon: Daemon, scene: Scene
) -> None:
    running, a, b, c, d = full(daemon, scene, 5)
    assert places(daemon) == [a, b, c, d]
    before = daemon.get(d)
    now = move(daemon, d, 1)
    assert (now.state, now.queue_position) == (QUEUED, 1)
    assert now.etag != before.etag
    assert move(daemon, d, 1).queue_position == 1, "a repeat is safe"
    assert move(daemon, a, 99).queue_position == 4, "beyond the end is last"
    assert places(daemon) == [d, b, c, a]
    daemon.kill()
    daemon.start()
    assert places(daemon) == [d, b, c, a]
    last = daemon.create(scene.parameters(), start=True).name
    assert places(daemon) == [d, b, c, a, last], "a new one waits behind what was moved"
    order = list[str]()
    for name in (running, d, b, c, a, last):
        daemon.wait(name, "RUNNING")
        active = [t for t in (running, a, b, c, d, last) if daemon.get(t).state == 3]
        assert active == [name], "one run a device"
        order.append(name)
        scene.let_pass(1)
        daemon.wait(name, "COMPLETED")
    starts = [daemon.get(name).start_time.ToNanoseconds() for name in order]
    assert starts == sorted(starts)


def test_a_cancelled_task_leaves_its_place_to_those_behind(daemon: Daemon, scene: Scene) -> None:
    _, a, b, c = full(daemon, scene, 4)
    daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=b))
    assert places(daemon) == [a, c]
    assert move(daemon, c, 1).queue_position == 1
    assert places(daemon) == [c, a]


def test_a_move_that_makes_no_sense_changes_nothing(daemon: Daemon, scene: Scene) -> None:
    running, a, b = full(daemon, scene, 3)
    pending = daemon.create(scene.parameters()).name
    for name, position, code in (
        (a, 0, grpc.StatusCode.INVALID_ARGUMENT),
        (a, -1, grpc.StatusCode.INVALID_ARGUMENT),
        (running, 1, grpc.StatusCode.FAILED_PRECONDITION),
        (pending, 1, grpc.StatusCode.FAILED_PRECONDITION),
        ("tasks/none", 1, grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as caught:
            move(daemon, name, position)
        assert caught.value.code() is code
    assert places(daemon) == [a, b]

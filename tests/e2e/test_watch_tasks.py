"""The list of tasks and the devices as streams: they tell what is, to however slow a reader."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import system_service_pb2, task_pb2, task_service_pb2
from finetuned_daemon.events.changes import PROGRESS_SECONDS
from pauses import pause, resume, stop
from reach import bearer, finetuned, tcp_address

QUEUED, RUNNING, PENDING, COMPLETED, PAUSED = (
    task_pb2.TaskState.Value(f"TASK_STATE_{name}")
    for name in ("QUEUED", "RUNNING", "PENDING", "COMPLETED", "PAUSED")
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One daemon for all tests here."""
    root = tmp_path_factory.mktemp("tasks")
    daemon = Daemon(root, "--listen", "127.0.0.1:0").start()
    yield daemon
    daemon.close()


class List:
    """A list of tasks as a client keeps it: what came, less what was deleted."""

    def __init__(self, daemon: Daemon, *states: task_pb2.TaskState.ValueType) -> None:
        request = task_service_pb2.WatchTasksRequest(states=states)
        self.call = daemon.tasks.WatchTasks(request, timeout=60)
        self.tasks = dict[str, task_pb2.Task]()
        self.messages = list[task_service_pb2.WatchTasksResponse]()
        self.synced: task_service_pb2.Synced | None = None

    def __enter__(self) -> List:
        return self

    def __exit__(self, *_: object) -> None:
        self.call.cancel()

    def next(self) -> task_service_pb2.WatchTasksResponse:
        response: task_service_pb2.WatchTasksResponse = next(self.call)
        self.messages.append(response)
        if response.HasField("task"):
            self.tasks[response.task.name] = response.task
        elif response.HasField("deleted"):
            del self.tasks[response.deleted]
        elif response.HasField("synced"):
            self.synced = response.synced
        return response

    def until(self, is_it: Callable[[], object]) -> None:
        while not is_it():
            self.next()

    def until_synced(self) -> List:
        self.until(lambda: self.synced)
        return self

    def until_state(self, name: str, state: task_pb2.TaskState.ValueType) -> task_pb2.Task:
        self.until(lambda: name in self.tasks and self.tasks[name].state == state)
        return self.tasks[name]


def without_parameters(task: task_pb2.Task) -> task_pb2.Task:
    task.ClearField("parameters")
    return task


def delete(daemon: Daemon, name: str) -> None:
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=name))


def test_first_comes_all_that_there_is_newest_first(daemon: Daemon, scene: Scene) -> None:
    made = [daemon.create(scene.parameters()) for _ in range(150)]
    with List(daemon) as tasks:
        tasks.until_synced()
        listed = [m.task for m in tasks.messages[:-1]]
        assert [t.name for t in listed[:150]] == [t.name for t in reversed(made)]
        assert tasks.synced is not None
        assert tasks.synced.task_count == len(listed)
        assert listed[0] == without_parameters(daemon.get(listed[0].name))
        assert not any(task.HasField("parameters") for task in listed)
        for task in made[:-1]:
            delete(daemon, task.name)
        tasks.until(lambda: len(tasks.tasks) == len(listed) - 149)
        assert made[-1].name in tasks.tasks


def test_it_shows_whatever_get_shows(daemon: Daemon, scene: Scene) -> None:
    """State, phase, progress, edits, a pause and its reason: the last message on a task is it."""
    with List(daemon) as tasks:
        tasks.until_synced()

        def as_get(name: str) -> bool:
            return tasks.tasks.get(name) == without_parameters(daemon.get(name))

        task = daemon.create(scene.play(steps=3, gated=True))
        tasks.until(lambda: as_get(task.name))
        edited = task_pb2.Task(name=task.name, display_name=f"edited {task.name}")
        daemon.tasks.UpdateTask(task_service_pb2.UpdateTaskRequest(task=edited))
        tasks.until(lambda: as_get(task.name))
        assert tasks.tasks[task.name].display_name == edited.display_name
        daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
        tasks.until_state(task.name, RUNNING)
        tasks.until(lambda: tasks.tasks[task.name].phase == task_pb2.RUN_PHASE_TRAINING)
        scene.let_pass(1)
        tasks.until(lambda: tasks.tasks[task.name].progress.step == 1)
        tasks.until(lambda: as_get(task.name))
        pause(daemon, task.name)
        paused = tasks.until_state(task.name, PAUSED)
        assert paused.pause_reason == task_pb2.PAUSE_REASON_REQUESTED
        tasks.until(lambda: as_get(task.name))
        resume(daemon, task.name)
        scene.let_pass(2)
        ended = tasks.until_state(task.name, COMPLETED)
        assert ended.end_reason == task_pb2.END_REASON_FINISHED
        tasks.until(lambda: as_get(task.name))
        delete(daemon, task.name)
        tasks.until(lambda: task.name not in tasks.tasks)


def test_when_one_moves_in_the_queue_the_others_do(daemon: Daemon, scene: Scene) -> None:
    parameters = scene.play(gated=True)
    first, *waiting = (daemon.create(parameters, start=True) for _ in range(4))
    one, two, three = (task.name for task in waiting)
    with List(daemon, QUEUED) as tasks:
        tasks.until_synced()

        def places() -> dict[str, int]:
            return {name: task.queue_position for name, task in tasks.tasks.items()}

        assert places() == {one: 1, two: 2, three: 3}
        daemon.tasks.MoveTask(task_service_pb2.MoveTaskRequest(name=three, position=1))
        tasks.until(lambda: places() == {three: 1, one: 2, two: 3})
        stop(daemon, one)
        tasks.until(lambda: places() == {three: 1, two: 2})
        stop(daemon, first.name, discard=True)
        tasks.until(lambda: places() == {two: 1})
        stop(daemon, two)
        stop(daemon, three, discard=True)
        tasks.until(lambda: not tasks.tasks)
    for name in (first.name, three):
        daemon.wait(name, "STOPPED")


def test_one_that_leaves_its_states_is_told_as_deleted(daemon: Daemon, scene: Scene) -> None:
    other = daemon.create(scene.parameters())
    with List(daemon, QUEUED, RUNNING) as tasks:
        tasks.until_synced()
        task = daemon.create(scene.play(), start=True)
        delete(daemon, other.name)  # of which it has not heard
        daemon.wait(task.name, "COMPLETED")
        last = daemon.create(scene.play(gated=True), start=True)
        tasks.until(lambda: last.name in tasks.tasks)
        assert set(tasks.tasks) == {last.name}, "what changed before it was told before it"
        told = [m for m in tasks.messages if m.HasField("task") or m.HasField("deleted")]
        assert {m.task.name or m.deleted for m in told} <= {task.name, last.name}
    stop(daemon, last.name, discard=True)
    daemon.wait(last.name, "STOPPED")


def test_a_name_that_is_used_again_is_another_task(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters(), task_id="used-again")
    with List(daemon) as tasks:
        tasks.until_synced()
        delete(daemon, task.name)
        again = daemon.create(scene.parameters(), task_id="used-again")
        assert again.etag != task.etag
        tasks.until(lambda: task.name in tasks.tasks and tasks.tasks[task.name].etag == again.etag)


def test_a_reader_that_stalls_gets_the_newest_and_costs_little(
    daemon: Daemon, scene: Scene
) -> None:
    """What it missed is not kept for it, and nobody waits for it."""
    task = daemon.create(scene.play(steps=3000, gated=True), start=True)
    assert daemon.process is not None
    with List(daemon) as tasks, List(daemon) as quick:
        tasks.until_synced()
        quick.until_synced()
        scene.let_pass(3000)
        before = psutil.Process(daemon.process.pid).memory_info().rss
        quick.until_state(task.name, COMPLETED)
        last = without_parameters(daemon.get(task.name))
        tasks.until(lambda: tasks.tasks.get(task.name) == last)
        progress = [m for m in tasks.messages if m.HasField("task") and m.task.name == task.name]
        assert len(progress) < 300, "3000 steps, as fast as they go"
        assert psutil.Process(daemon.process.pid).memory_info().rss - before < 64 << 20


def test_progress_alone_comes_four_times_a_second(daemon: Daemon, scene: Scene) -> None:
    """However slow the machine is: no more than the time that has passed allows."""
    task = daemon.create(scene.play(steps=40, gated=True), start=True)
    with List(daemon) as tasks, daemon.watch(task.name) as watch:
        tasks.until_synced()
        began = time.monotonic()
        for step in range(1, 41):
            scene.let_pass(1)
            watch.until_step(step)
        tasks.until_state(task.name, COMPLETED)
        passed = time.monotonic() - began
    steps = {
        m.task.progress.step
        for m in tasks.messages
        if m.task.name == task.name and m.task.state == RUNNING
    }
    assert len(steps) <= 2 + passed / PROGRESS_SECONDS


def test_a_quiet_stream_shows_that_it_lives(daemon: Daemon) -> None:
    with List(daemon, PENDING) as tasks:
        tasks.until_synced()
        beats = [tasks.next() for _ in range(2)]
    assert all(beat.HasField("heartbeat") and beat.heartbeat.last_seq == 0 for beat in beats)
    assert beats[1].heartbeat.time.ToMicroseconds() > beats[0].heartbeat.time.ToMicroseconds()


def open_streams(daemon: Daemon) -> int:
    answer = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    return next(limit.used for limit in answer.limits if limit.name == "open_streams")


def watch_devices(daemon: Daemon, **asked: Any) -> Any:
    request = system_service_pb2.WatchDevicesRequest(**asked)
    return daemon.system.WatchDevices(request, timeout=60)


def test_both_count_as_open_streams(daemon: Daemon) -> None:
    eventually(lambda: open_streams(daemon) == 0, "those of other tests have ended")
    with List(daemon) as tasks:
        tasks.until_synced()
        devices = watch_devices(daemon)
        next(devices)
        assert open_streams(daemon) == 2
        devices.cancel()
    eventually(lambda: open_streams(daemon) == 0, "they ended")


def test_the_read_only_token_is_enough(daemon: Daemon) -> None:
    assert finetuned(daemon, "token", "rotate", "--read-only").returncode == 0
    token = bearer(daemon.paths.read_only_token)
    with grpc.insecure_channel(tcp_address(daemon)) as channel:
        for path, request, answer in (
            ("TaskService/WatchTasks", task_service_pb2.WatchTasksRequest(), "response"),
            ("SystemService/WatchDevices", system_service_pb2.WatchDevicesRequest(), ""),
        ):
            stream: Any = channel.unary_stream(f"/finetuned.v1.{path}")
            call = stream(request.SerializeToString(), metadata=token, timeout=20)
            assert next(call), answer
            call.cancel()


def test_a_state_that_is_none_is_refused(daemon: Daemon) -> None:
    request = task_service_pb2.WatchTasksRequest(states=[0, 99])  # type: ignore[list-item]
    with pytest.raises(grpc.RpcError) as caught:
        next(daemon.tasks.WatchTasks(request, timeout=20))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "states" in caught.value.details()


def test_states_that_come_again_are_one(daemon: Daemon, scene: Scene) -> None:
    """However often: they are neither too many for the database, nor many mistakes."""
    daemon.create(scene.parameters())
    often = 300_000
    request = task_service_pb2.ListTasksRequest(states=[PENDING] * often, page_size=1)
    assert [task.state for task in daemon.tasks.ListTasks(request).tasks] == [PENDING]
    none = task_service_pb2.ListTasksRequest(states=[99] * often)  # type: ignore[list-item]
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.ListTasks(none)
    assert caught.value.details() == "states: 99 is no state"


def test_of_very_many_wrong_states_the_first_are_named_and_the_others_counted(
    daemon: Daemon,
) -> None:
    """What is done for them does not grow with the square of their number."""
    wrong: Any = range(1000, 500_000)
    calls: tuple[Callable[[], object], ...] = (
        lambda: daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest(states=wrong)),
        lambda: next(daemon.tasks.WatchTasks(task_service_pb2.WatchTasksRequest(states=wrong))),
    )
    for call in calls:
        with pytest.raises(grpc.RpcError) as caught:
            call()
        status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
        assert status is not None
        found = error_details_pb2.BadRequest()
        assert any(detail.Unpack(found) for detail in status.details)
        first, *_, last = found.field_violations
        assert (first.field, first.description) == ("states", "1000 is no state")
        named = len(found.field_violations) - 1
        assert last.description == f"{499_000 - named:,} more numbers are no states"


# --- devices


def test_devices_come_again_at_once_when_one_is_taken_or_freed(
    daemon: Daemon, scene: Scene
) -> None:
    """The interval is a minute: nothing but the change brings them."""
    devices = watch_devices(daemon, interval_seconds=60)

    def cpu() -> system_service_pb2.Device:
        answer: system_service_pb2.WatchDevicesResponse = next(devices)
        assert answer.time.ToMicroseconds() > 0
        return answer.devices[-1]

    first = cpu()
    assert (first.id, first.running_task, first.queued_tasks) == ("cpu", "", 0)
    assert not first.HasField("temperature_celsius")
    assert not first.HasField("power_watts")
    one = daemon.create(scene.play(gated=True), start=True)
    two = daemon.create(scene.play(gated=True), start=True)
    while (seen := cpu()).queued_tasks == 0:
        assert seen.running_task in ("", one.name)
    assert (seen.running_task, seen.queued_tasks) == (one.name, 1)
    stop(daemon, two.name)
    stop(daemon, one.name, discard=True)
    while (seen := cpu()).running_task:
        assert seen.running_task == one.name
    assert seen.queued_tasks == 0
    devices.cancel()


def test_devices_come_at_the_interval(daemon: Daemon) -> None:
    devices = watch_devices(daemon, interval_seconds=0.5)
    times = [next(devices).time.ToMicroseconds() for _ in range(3)]
    devices.cancel()
    assert times == sorted(set(times)), "looked at anew each time"


@pytest.mark.parametrize("seconds", [0.4, 60.1, -1.0, float("nan"), float("inf")])
def test_an_interval_has_bounds(daemon: Daemon, seconds: float) -> None:
    with pytest.raises(grpc.RpcError) as caught:
        next(watch_devices(daemon, interval_seconds=seconds))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "interval_seconds" in caught.value.details()


# --- the end


def test_when_the_daemon_stops_its_watchers_are_told_to_come_again(daemon: Daemon) -> None:
    with List(daemon) as tasks:
        tasks.until_synced()
        devices = watch_devices(daemon, interval_seconds=60)
        next(devices)
        assert daemon.stop() == 0
        for read in (lambda: tasks.until(lambda: False), lambda: next(devices)):
            with pytest.raises(grpc.RpcError) as caught:
                read()
            assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
            assert "daemon stops" in caught.value.details()
    daemon.start()

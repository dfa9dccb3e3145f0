"""Bounds: each is held, says how with a reason of its own, and lets others go on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import REPOSITORY, Scene
from daemon_process import Daemon, eventually
from finetuned import Client, OutOfRange, ResourceExhausted
from finetuned.v1 import (
    event_pb2,
    system_service_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)
from finetuned_daemon.events.log import EventLog
from finetuned_daemon.limits import BY_NAME, LIMITS, render
from finetuned_daemon.services.calls import ALWAYS, HEAVY
from finetuned_daemon.store.database import Database
from reach import bearer, finetuned, tcp_address


@pytest.fixture
def bounded(tmp_path: Path) -> Iterator[Callable[..., Daemon]]:
    """Makes a daemon with options."""
    daemons = list[Daemon]()

    def make(*options: str) -> Daemon:
        daemon = Daemon(tmp_path, *options)
        daemons.append(daemon)
        return daemon.start()

    yield make
    for daemon in daemons:
        daemon.close()


def refusal(call: Callable[[], object]) -> tuple[str, error_details_pb2.ErrorInfo, str]:
    """Code, reason and sentence of a call that is refused."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    error = caught.value
    info = error_details_pb2.ErrorInfo()
    status = rpc_status.from_call(error)
    assert status is not None, f"{error.code()} without a reason: {error.details()}"
    assert any(detail.Unpack(info) for detail in status.details)
    return error.code().name, info, error.details()


def limits(daemon: Daemon) -> dict[str, system_service_pb2.Limit]:
    answer = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
    return {limit.name: limit for limit in answer.limits}


# --- the table


def test_the_docs_have_the_table() -> None:
    assert render() in (REPOSITORY / "docs/limits.md").read_text()


def test_every_limit_says_what_is_beyond_it() -> None:
    assert all(bool(limit.error) is not bool(limit.beyond) for limit in LIMITS)
    assert len(BY_NAME) == len(LIMITS)
    assert all(re.fullmatch("[a-z_]+", limit.name) for limit in LIMITS)


def test_calls_with_a_class_of_their_own_are_calls() -> None:
    protos = (REPOSITORY / "proto/finetuned/v1").glob("*_service.proto")
    rpcs = {name for file in protos for name in re.findall(r"rpc (\w+)\(", file.read_text())}
    assert rpcs >= HEAVY
    assert {*rpcs, "Check"} >= ALWAYS
    assert not HEAVY & ALWAYS


def test_the_daemon_says_what_it_bounds_and_what_is_in_use(
    bounded: Callable[..., Daemon], scene: Scene
) -> None:
    daemon = bounded("--most-tasks", "7")
    task = daemon.create(scene.parameters())
    with daemon.watch(task.name):
        found = limits(daemon)
    assert set(found) == set(BY_NAME)
    assert (found["tasks"].value, found["tasks"].used) == (7, 1)
    assert (found["open_streams"].value, found["open_streams"].used) == (1000, 1)
    assert not found["display_name_characters"].HasField("used")
    eventually(lambda: limits(daemon)["open_streams"].used == 0, "a stream that ended is counted")


# --- calls


def test_a_message_that_is_too_large_has_a_reason(daemon: Daemon) -> None:
    request = task_service_pb2.GetTaskRequest(name="x" * (5 << 20))
    code, info, sentence = refusal(lambda: daemon.tasks.GetTask(request))
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_MESSAGE_BYTES")
    assert info.metadata["limit"] == str(4 << 20)
    assert "4,194,304 bytes" in sentence


def test_a_path_as_long_as_a_message_is_refused_at_once(daemon: Daemon, scene: Scene) -> None:
    """To look for its parents would keep everybody waiting for minutes."""
    parameters = scene.parameters()
    parameters.data.output_dir = "/a" * 2_000_000
    code, _, sentence = refusal(lambda: daemon.create(parameters, start=True))
    assert code == "INVALID_ARGUMENT"
    assert "data.output_dir: has 4,000,000 characters" in sentence


def test_the_client_has_the_reason_however_large_a_message_is(daemon: Daemon) -> None:
    """Far beyond the bound gRPC itself answers, which knows no reasons."""
    with Client(daemon.address) as client, pytest.raises(ResourceExhausted) as caught:
        client.get_task("tasks/" + "x" * (20 << 20))
    assert caught.value.reason == "LIMIT_MESSAGE_BYTES"


def test_metadata_is_bounded(daemon: Daemon) -> None:
    request = system_service_pb2.GetSystemInfoRequest()
    assert daemon.system.GetSystemInfo(request, metadata=(("x", "y" * 8000),)).pid
    with pytest.raises(grpc.RpcError) as caught:
        daemon.system.GetSystemInfo(request, metadata=(("x", "y" * 20_000),))
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert daemon.system.GetSystemInfo(request).pid


def test_streams_are_bounded_and_calls_go_on(bounded: Callable[..., Daemon], scene: Scene) -> None:
    daemon = bounded("--most-open-streams", "3")
    task = daemon.create(scene.parameters())
    watches = [daemon.watch(task.name) for _ in range(3)]
    code, info, sentence = refusal(lambda: daemon.watch(task.name))
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_OPEN_STREAMS")
    assert info.metadata["limit"] == "3"
    assert "--most-open-streams" in sentence
    assert daemon.get(task.name).name == task.name
    watches.pop().call.cancel()
    eventually(lambda: limits(daemon)["open_streams"].used == 2, "a place is free again")
    with daemon.watch(task.name) as watch:
        assert watch.snapshot.name == task.name


def test_streams_over_tcp_leave_some_to_the_unix_socket(
    bounded: Callable[..., Daemon], scene: Scene
) -> None:
    """Whoever has but the read-only token can't shut the owner out."""
    daemon = bounded("--most-open-streams", "5", "--listen", "127.0.0.1:0")
    assert finetuned(daemon, "token", "rotate", "--read-only").returncode == 0
    token = bearer(daemon.paths.read_only_token)
    request = task_service_pb2.WatchTasksRequest()
    with grpc.insecure_channel(tcp_address(daemon)) as channel:
        tasks = task_service_pb2_grpc.TaskServiceStub(channel)
        streams = [tasks.WatchTasks(request, metadata=token) for _ in range(4)]
        for stream in streams:
            next(stream)
        code, info, sentence = refusal(lambda: next(tasks.WatchTasks(request, metadata=token)))
        assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_OPEN_STREAMS")
        assert info.metadata["limit"] == "4"
        assert sentence.startswith("4 streams are open")
        task = daemon.create(scene.parameters())
        with daemon.watch(task.name) as watch:
            assert watch.snapshot.name == task.name
            code, info, _ = refusal(lambda: daemon.watch(task.name))
            assert (info.reason, info.metadata["limit"]) == ("LIMIT_OPEN_STREAMS", "5")
        streams.pop().cancel()
        eventually(lambda: limits(daemon)["open_streams"].used == 3, "places are free again")
        next(tasks.WatchTasks(request, metadata=token))


def test_heavy_calls_are_bounded_and_a_stop_gets_in(tmp_path: Path, scene: Scene) -> None:
    """A training environment that never answers holds a call for as long as a test wants."""
    probe = tmp_path / "probe.json"
    probe.write_text("{}")
    daemon = Daemon(tmp_path, "--most-heavy-calls", "1", "--most-calls-in-flight", "2")
    daemon.environment["FAKE_PROBE"] = str(probe)
    daemon.start()
    try:
        running = daemon.create(scene.play(gated=True), start=True)
        probe.write_text(json.dumps({"hang": True}))
        request = system_service_pb2.CheckEnvironmentRequest(refresh=True)
        held = daemon.system.CheckEnvironment.future(request)
        eventually(lambda: limits(daemon)["heavy_calls"].used == 1, "a call is held")
        code, info, _ = refusal(lambda: daemon.create(scene.parameters()))
        assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_HEAVY_CALLS")
        assert daemon.get(running.name).name == running.name, "others are answered"
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=running.name))
        daemon.wait(running.name, "STOPPED")
        held.cancel()
        eventually(lambda: limits(daemon)["heavy_calls"].used == 0, "its place is free")
    finally:
        daemon.close()


def test_calls_in_flight_are_bounded_and_a_stop_gets_in(tmp_path: Path, scene: Scene) -> None:
    probe = tmp_path / "probe.json"
    probe.write_text("{}")
    daemon = Daemon(tmp_path, "--most-calls-in-flight", "1")
    daemon.environment["FAKE_PROBE"] = str(probe)
    daemon.start()
    try:
        running = daemon.create(scene.play(gated=True), start=True)
        probe.write_text(json.dumps({"hang": True}))
        request = system_service_pb2.CheckEnvironmentRequest(refresh=True)
        held = daemon.system.CheckEnvironment.future(request)
        eventually(lambda: limits(daemon)["calls_in_flight"].used == 1, "a call is held")
        code, info, _ = refusal(lambda: daemon.get(running.name))
        assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_CALLS_IN_FLIGHT")
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=running.name))
        held.cancel()
        eventually(lambda: limits(daemon)["calls_in_flight"].used == 0, "its place is free")
        daemon.wait(running.name, "STOPPED")
    finally:
        daemon.close()


def test_many_stalled_watchers_cost_little_and_keep_nobody_waiting(
    daemon: Daemon, scene: Scene
) -> None:
    """What a client does not read stays in the log, and in the client; not in the daemon."""
    task = daemon.create(scene.parameters())
    fill(daemon, task.name, events=4000, text="x" * 4000)
    assert daemon.process is not None
    process = psutil.Process(daemon.process.pid)
    stalled = [Stalled(daemon, task.name) for _ in range(50)]
    try:
        with daemon.watch(task.name) as watch:
            watch.until(lambda event: event.seq == 4000)
        memory = process.memory_info().rss
        more = [Stalled(daemon, task.name) for _ in range(50)]
        stalled += more
        with daemon.watch(task.name) as watch:
            watch.until(lambda event: event.seq == 4000)
        grown = process.memory_info().rss - memory
    finally:
        for one in stalled:
            one.close()
    assert grown < 50 << 20, f"16 MB of log for each of 50 more watchers: {grown >> 20} MiB"


class Stalled:
    """A client with a connection of its own that reads the snapshot and no more."""

    def __init__(self, daemon: Daemon, name: str) -> None:
        self.channel = grpc.insecure_channel(
            daemon.address, options=[("grpc.use_local_subchannel_pool", 1)]
        )
        stub = task_service_pb2_grpc.TaskServiceStub(self.channel)
        self.call = stub.WatchTask(task_service_pb2.WatchTaskRequest(name=name))
        next(self.call)

    def close(self) -> None:
        self.channel.close()


# --- what is kept


def test_tasks_are_bounded(bounded: Callable[..., Daemon], scene: Scene) -> None:
    daemon = bounded("--most-tasks", "2")
    first, _ = daemon.create(scene.parameters()), daemon.create(scene.parameters())
    for start in (False, True):
        create = partial(daemon.create, scene.parameters(), start=start)
        code, info, sentence = refusal(create)
        assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_TASKS")
        assert "delete some" in sentence
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=first.name))
    assert daemon.create(scene.parameters()).name


def test_the_queue_is_bounded(bounded: Callable[..., Daemon], scene: Scene) -> None:
    daemon = bounded("--most-queued-tasks", "1")
    parameters = scene.play(gated=True)
    daemon.create(parameters, start=True)
    daemon.create(parameters, start=True)
    code, info, sentence = refusal(lambda: daemon.create(parameters, start=True))
    assert (code, info.reason) == ("RESOURCE_EXHAUSTED", "LIMIT_QUEUED_TASKS")
    assert "at most 1 may wait" in sentence
    assert "--most-queued-tasks" in sentence
    answer = daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest())
    assert len(answer.tasks) == 2, "nothing of the third is there"


def test_a_field_mask_is_bounded(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters())
    request = task_service_pb2.UpdateTaskRequest(task=task)
    request.update_mask.paths.extend(f"x{number}" for number in range(10_000))
    code, _, sentence = refusal(lambda: daemon.tasks.UpdateTask(request))
    assert code == "INVALID_ARGUMENT"
    assert "more than 200 paths" in sentence


def test_the_oldest_events_of_earlier_runs_go_and_numbers_stay(
    bounded: Callable[..., Daemon], scene: Scene
) -> None:
    daemon = bounded("--most-events", "30")
    task = daemon.create(scene.play(steps=20), start=True)
    daemon.wait(task.name, "COMPLETED")
    one = daemon.events(task.name)
    assert len(one) > 40
    assert one[0].seq == 1, "however many, the newest run keeps all of its own"
    scene.play(steps=2)
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    daemon.wait(task.name, "COMPLETED")
    last = daemon.get(task.name).last_seq
    kept = eventually(
        lambda: (e := daemon.events(task.name)) and len(e) == 30 and e, "the log is cut"
    )
    assert [event.seq for event in kept] == list(range(last - 29, last + 1))
    floor = kept[0].seq
    assert kept[0] == one[floor - 1], "what is left is what was there"

    check = [sys.executable, "-m", "finetuned_daemon.main", "db", "check", "--state-dir"]
    subprocess.run([*check, str(daemon.paths.state_dir)], check=True, capture_output=True)

    with daemon.watch(task.name) as watch:  # 0: from the oldest that is kept
        watch.until(lambda event: event.seq == last)
    assert watch.seen == kept
    with daemon.watch(task.name, floor - 1) as watch:
        assert next(watch).seq == floor

    def watch_from(seq: int) -> object:
        request = task_service_pb2.WatchTaskRequest(name=task.name, after_seq=seq)
        return next(daemon.tasks.WatchTask(request, timeout=10))

    def list_from(seq: int) -> object:
        request = task_service_pb2.ListEventsRequest(parent=task.name, after_seq=seq)
        return daemon.tasks.ListEvents(request, timeout=10)

    for ask in (watch_from, list_from):
        code, info, sentence = refusal(partial(ask, floor - 2))
        assert (code, info.reason) == ("OUT_OF_RANGE", "SEQ_COMPACTED")
        assert info.metadata["first_seq"] == str(floor)
        assert f"oldest that is kept is {floor}" in sentence

    with Client(daemon.address) as client:
        items = list(client.watch(task.name, until_end=True))
        assert [i for i in items if isinstance(i, event_pb2.Event)] == kept
        assert list(client.list_events(task.name)) == kept
        with pytest.raises(OutOfRange) as caught:
            list(client.watch(task.name, floor - 2, until_end=True))
        assert caught.value.reason == "SEQ_COMPACTED"

    scene.play(steps=1)
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    with daemon.watch(task.name, last) as watch:
        assert next(watch).seq == last + 1, "no number comes again"
        watch.until_end()


def test_what_is_cut_while_the_daemon_is_away_is_cut_at_its_start(
    bounded: Callable[..., Daemon], scene: Scene
) -> None:
    daemon = bounded()
    task = daemon.create(scene.play(steps=20), start=True)
    daemon.wait(task.name, "COMPLETED")
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    last = daemon.wait(task.name, "COMPLETED").last_seq
    daemon.kill()
    daemon.options += ["--most-events", "50"]
    daemon.start()
    newest = [e for e in daemon.events(task.name) if e.run == 2]
    eventually(
        lambda: len(daemon.events(task.name)) == max(50, len(newest)), "the log is at its bound"
    )
    assert daemon.events(task.name)[-1].seq == last


def test_a_page_of_events_is_never_too_large_for_a_client(daemon: Daemon, scene: Scene) -> None:
    """A client with gRPC's own bound, 4 MiB, can read every log: a page ends where it must."""
    task = daemon.create(scene.parameters())
    fill(daemon, task.name, events=200, text="y" * 200_000)
    request = task_service_pb2.ListEventsRequest(parent=task.name, page_size=1000)
    seen = list[int]()
    while not seen or seen[-1] < 200:
        request.after_seq = seen[-1] if seen else 0
        answer = daemon.tasks.ListEvents(request)
        seen += [event.seq for event in answer.events]
        assert all(len(event.log_line.text) <= 64 << 10 for event in answer.events)
    assert seen == list(range(1, 201))


def fill(daemon: Daemon, name: str, *, events: int, text: str) -> None:
    """Gives a task a long log, while no daemon serves."""
    daemon.stop()
    database = Database(daemon.paths.state_dir / "finetuned.db")
    log = EventLog(database)
    row = database.query_one("SELECT key FROM tasks WHERE task_id = ?", name.partition("/")[2])
    assert row is not None
    line = event_pb2.LogLine(text=text)
    with database.transaction(durable=False) as connection:
        log.append(connection, row["key"], [event_pb2.Event(log_line=line) for _ in range(events)])
    database.close()
    daemon.start()


def test_a_client_that_opens_many_connections_shuts_nobody_out(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.parameters())
    crowd = [Stalled(daemon, task.name) for _ in range(60)]
    answers = list[str]()
    thread = threading.Thread(target=lambda: answers.append(daemon.get(task.name).name))
    thread.start()
    thread.join(20)
    assert answers == [task.name]
    for one in crowd:
        one.close()

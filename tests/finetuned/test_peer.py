"""The clients against a peer that misbehaves in ways that our daemon cannot be made to."""

# The servicer's methods are called what the contract calls them.
# ruff: noqa: N802

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf import any_pb2
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from daemon_process import eventually
from finetuned import (
    AsyncClient,
    Client,
    ConnectionLost,
    DaemonUnavailable,
    DeadlineExceeded,
    Event,
    EventsLost,
    InvalidArgument,
    LogReplaced,
    OutOfRange,
    Snapshot,
    Task,
    TaskDeleted,
    TasksSynced,
    Unimplemented,
    _silence,
    _streams,
)
from finetuned.v1 import task_pb2
from finetuned.v1.dataset_service_pb2 import InspectDatasetResponse, InspectionProgress
from finetuned.v1.dataset_service_pb2_grpc import (
    DatasetServiceServicer,
    add_DatasetServiceServicer_to_server,
)
from finetuned.v1.system_service_pb2 import Device, WatchDevicesResponse
from finetuned.v1.system_service_pb2_grpc import (
    SystemServiceServicer,
    add_SystemServiceServicer_to_server,
)
from finetuned.v1.task_service_pb2 import (
    CreateTaskResponse,
    GetMetricsResponse,
    GetTaskResponse,
    MetricSeries,
    Synced,
    UpdateTaskResponse,
    WatchTaskResponse,
    WatchTasksResponse,
)
from finetuned.v1.task_service_pb2_grpc import (
    TaskServiceServicer,
    add_TaskServiceServicer_to_server,
)


class Peer(TaskServiceServicer, DatasetServiceServicer, SystemServiceServicer):
    """Answers as each test scripts it, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.failures = 0
        self.failure = grpc.StatusCode.UNAVAILABLE
        self.fails_after = 0.0
        self.metadata: list[dict[str, str | bytes]] = []
        self.streams: list[list[Any]] = []
        self.pages: list[GetMetricsResponse] = []
        self.over = threading.Event()

    def _fail_first(self, request: Any, context: grpc.ServicerContext) -> None:
        self.asked.append(request)
        self.metadata.append(dict(context.invocation_metadata()))
        if len(self.asked) <= self.failures:
            self.over.wait(self.fails_after)
            context.abort(self.failure, "not now")

    def CreateTask(self, request: Any, context: grpc.ServicerContext) -> CreateTaskResponse:
        self._fail_first(request, context)
        return CreateTaskResponse(task=request.task)

    def DeleteTask(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._fail_first(request, context)

    def UpdateTask(self, request: Any, context: grpc.ServicerContext) -> UpdateTaskResponse:
        self._fail_first(request, context)
        return UpdateTaskResponse(task=request.task)

    def GetTask(self, request: Any, context: grpc.ServicerContext) -> GetTaskResponse:
        self.asked.append(request)
        self.over.wait()
        return GetTaskResponse(
            task=Task(name="tasks/a", display_name="a") if self.streams else None
        )

    def StartTask(self, request: Any, context: grpc.ServicerContext) -> Any:
        violation = error_details_pb2.BadRequest.FieldViolation(field="a", description="b" * 500)
        packed = any_pb2.Any()
        packed.Pack(error_details_pb2.BadRequest(field_violations=[violation] * 80))
        status = status_pb2.Status(code=code_pb2.INVALID_ARGUMENT, message="c", details=[packed])
        context.abort_with_status(rpc_status.to_status(status))

    def InspectDataset(
        self, request: Any, context: grpc.ServicerContext
    ) -> Iterator[InspectDatasetResponse]:
        context.add_callback(self.over.set)
        self._fail_first(request, context)
        yield InspectDatasetResponse(progress=InspectionProgress(samples=1))
        if request.path == "/breaks":
            context.abort(grpc.StatusCode.UNAVAILABLE, "gone")
        self.over.wait()

    def GetMetrics(self, request: Any, context: grpc.ServicerContext) -> GetMetricsResponse:
        self.asked.append(type(request).FromString(request.SerializeToString()))
        return self.pages.pop(0)

    def _play(self, request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
        self.asked.append(request)
        for message in self.streams.pop(0):
            if message == "hang":
                self.over.wait()
                return
            yield message

    WatchTasks = WatchDevices = _play  # type: ignore[assignment]

    def WatchTask(self, request: Any, context: grpc.ServicerContext) -> Iterator[WatchTaskResponse]:
        self.asked.append(request)
        context.add_callback(self.over.set)  # before anything is sent, so that no end is missed
        for message in self.streams.pop(0):
            if message == "hang":
                self.over.wait()
                return
            if message == "replaced":
                info = error_details_pb2.ErrorInfo(reason="LOG_EPOCH_CHANGED", domain="finetuned")
                packed = any_pb2.Any()
                packed.Pack(info)
                code = code_pb2.OUT_OF_RANGE
                status = status_pb2.Status(code=code, message="another log", details=[packed])
                context.abort_with_status(rpc_status.to_status(status))
            assert isinstance(message, WatchTaskResponse)
            yield message


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Peer]:
    """The peer, served at `tmp_path / "s"`."""
    peer = Peer()
    server = grpc.server(ThreadPoolExecutor(4))
    add_TaskServiceServicer_to_server(peer, server)
    add_DatasetServiceServicer_to_server(peer, server)
    add_SystemServiceServicer_to_server(peer, server)
    server.add_insecure_port(f"unix:{tmp_path}/s")
    server.start()
    yield peer
    peer.over.set()
    server.stop(None).wait()


@pytest.fixture
def client(make: Callable[..., Any], peer: Peer, tmp_path: Path) -> Any:
    """A client of the peer that waits half a second for an answer."""
    return make(f"unix:{tmp_path}/s", timeout=0.5)


def snapshot(last_seq: int) -> WatchTaskResponse:
    task = Task(name="tasks/a", state=task_pb2.TASK_STATE_RUNNING, last_seq=last_seq)
    return WatchTaskResponse(snapshot=Snapshot(task=task, log_epoch="e"))


def event(seq: int) -> WatchTaskResponse:
    return WatchTaskResponse(event=Event(seq=seq))


def end(seq: int) -> WatchTaskResponse:
    result = event(seq)
    result.event.state_change.new_state = task_pb2.TASK_STATE_COMPLETED
    return result


async def watched(client: Any) -> list[Any]:
    return [item async for item in client.watch("tasks/a", until_end=True)]


@pytest.mark.parametrize("language", ["en", "zh"])
async def test_the_language_goes_with_every_call(
    make: Callable[..., Any], peer: Peer, tmp_path: Path, language: str
) -> None:
    client = make(f"unix:{tmp_path}/s", language=language)
    await client.create_task("sft", display_name="x")
    items = client.inspect_dataset("/data")
    await anext(items)
    await items.aclose()
    assert [metadata["accept-language"] for metadata in peer.metadata] == [language] * 2


async def test_an_inspection_that_is_closed_ends_the_call(client: Any, peer: Peer) -> None:
    items = client.inspect_dataset("/data", "pretrain", bad_line_policy="skip")
    assert (await anext(items)).samples == 1
    await items.aclose()
    assert await asyncio.to_thread(peer.over.wait, 10)
    (request,) = peer.asked
    assert (request.path, request.bad_line_policy) == ("/data", 2)
    assert not request.HasField("max_rendered_samples")


async def test_an_inspection_is_repeated_until_it_has_begun_and_not_after(
    client: Any, peer: Peer
) -> None:
    peer.failures = 2
    with pytest.raises(DaemonUnavailable, match="gone"):
        async for item in client.inspect_dataset("/breaks"):
            assert item.samples == 1
    assert len(peer.asked) == 3


async def test_a_create_is_repeated_with_the_same_request_id(client: Any, peer: Peer) -> None:
    peer.failures = 2
    await client.create_task("sft", display_name="x")
    assert len(peer.asked) == 3
    assert len({request.request_id for request in peer.asked}) == 1
    assert peer.asked[0].request_id


async def test_a_call_that_a_stopping_daemon_cuts_off_is_repeated(client: Any, peer: Peer) -> None:
    """gRPC ends what comes while its server stops as CANCELLED."""
    peer.failure, peer.failures = grpc.StatusCode.CANCELLED, 2
    await client.create_task("sft", display_name="x")
    assert len(peer.asked) == 3
    peer.failures = 1000
    with pytest.raises(DaemonUnavailable, match="the daemon stops"):
        await client.delete_task("tasks/a")
    assert len(peer.asked) == 4


async def test_a_long_call_that_breaks_is_repeated_too(
    client: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The time for repeats begins with the first failure."""
    monkeypatch.setattr("finetuned._session.RETRY_SECONDS", 0.4)
    peer.failures, peer.fails_after = 1, 0.5
    await client.create_task("sft", display_name="x")
    assert len(peer.asked) == 2


async def test_a_delete_is_not_repeated(client: Any, peer: Peer) -> None:
    peer.failures = 1
    with pytest.raises(DaemonUnavailable):
        await client.delete_task("tasks/a")
    assert len(peer.asked) == 1


@pytest.mark.parametrize(("etag", "asked"), [("", 2), ("e", 1)])
async def test_an_update_is_repeated_unless_its_etag_would_be_stale_by_then(
    client: Any, peer: Peer, etag: str, asked: int
) -> None:
    """The repeat of one that was made already would be told of its own change."""
    peer.failures = 1
    try:
        await client.update_task("tasks/a", display_name="b", etag=etag)
    except DaemonUnavailable:
        assert etag
    assert len(peer.asked) == asked


async def test_a_deadline_of_ones_own_is_for_calls_of_that_client_alone(
    tmp_path: Path, peer: Peer
) -> None:
    with Client(f"unix:{tmp_path}/s", timeout=60) as client:
        hasty = client.with_options(timeout=0.2)
        with pytest.raises(DeadlineExceeded):
            await asyncio.to_thread(hasty.get_task, "tasks/a")
        patient = asyncio.create_task(asyncio.to_thread(client.get_task, "tasks/a"))
        await asyncio.to_thread(lambda: eventually(lambda: len(peer.asked) == 2, "a second call"))
        peer.over.set()
        assert await patient == Task()
    async with AsyncClient(f"unix:{tmp_path}/s", timeout=60) as aio:
        peer.over.clear()
        with pytest.raises(DeadlineExceeded):
            await aio.with_options(timeout=0.2).get_task("tasks/a")


async def test_a_deadline_of_ones_own_counts_repeats_too(
    tmp_path: Path, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finetuned._session.RETRY_SECONDS", 1000.0)
    peer.failures = 1_000_000
    with (
        Client(f"unix:{tmp_path}/s") as client,
        pytest.raises((DaemonUnavailable, DeadlineExceeded)),
    ):
        await asyncio.to_thread(
            client.with_options(timeout=0.3).create_task, "sft", display_name="x"
        )
    async with AsyncClient(f"unix:{tmp_path}/s") as aio:
        with pytest.raises((DaemonUnavailable, DeadlineExceeded)):
            await aio.with_options(timeout=0.3).create_task("sft", display_name="x")


def listed(name: str) -> WatchTasksResponse:
    return WatchTasksResponse(task=Task(name=f"tasks/{name}"))


SYNCED = WatchTasksResponse(synced=Synced())


async def taken(items: Any, count: int) -> list[Any]:
    result = [await anext(items) for _ in range(count)]
    await items.aclose()
    return result


async def test_what_has_gone_while_the_connection_was_lost_is_told(client: Any, peer: Peer) -> None:
    """So that a reader who keeps a dict of tasks has no ghosts in it."""
    deleted = WatchTasksResponse(deleted="tasks/c")
    peer.streams = [
        [listed("a"), listed("b"), SYNCED, listed("c"), deleted, deleted],
        [listed("b"), listed("d")],  # breaks off before it is whole: what is gone is not known
        [listed("d"), SYNCED, "hang"],
    ]
    items = await taken(client.watch_tasks(["running", "queued"]), 13)
    told = [item.name if isinstance(item, Task) else item for item in items]
    assert told[:2] == ["tasks/a", "tasks/b"]
    assert told[2:5] == [TasksSynced(2), "tasks/c", TaskDeleted("tasks/c")]
    assert isinstance(told[5], ConnectionLost)
    assert told[6:8] == ["tasks/b", "tasks/d"]
    assert isinstance(told[8], ConnectionLost)
    assert told[9:] == [
        "tasks/d",
        TaskDeleted("tasks/a"),
        TaskDeleted("tasks/b"),
        TasksSynced(1),
    ]
    assert {tuple(request.states) for request in peer.asked} == {(3, 2)}


async def test_a_silent_list_of_tasks_is_taken_for_dead(
    client: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_silence, "SILENCE_SECONDS", 0.2)
    peer.streams = [[SYNCED, "hang"], [SYNCED, "hang"]]
    first, lost, again = await taken(client.watch_tasks(), 3)
    assert "nothing came" in lost.error.message
    assert first == again == TasksSynced(0)


async def test_devices_are_watched_on_after_an_outage(client: Any, peer: Peer) -> None:
    shown = WatchDevicesResponse(devices=[Device(id="cpu")])
    peer.streams = [[shown], [shown, "hang"]]
    first, lost, again = await taken(client.watch_devices(7.5), 3)
    assert first == again == shown
    assert isinstance(lost, ConnectionLost)
    assert [request.interval_seconds for request in peer.asked] == [7.5, 7.5]


async def test_curves_are_put_together_from_pages_of_one_run(client: Any, peer: Peer) -> None:
    """A run that starts between two pages is not mixed into them."""

    def page(metric: str, steps: list[int], token: str) -> GetMetricsResponse:
        count = len(steps)
        series = MetricSeries(
            metric=metric,
            steps=steps,
            values=map(float, steps),
            epochs=[0.5] * count,
            times=[1.0] * count,
            point_count=3,
        )
        return GetMetricsResponse(run=4, series=[series], next_page_token=token)

    peer.pages = [page("loss", [1, 2], "t"), page("loss", [3], "u"), page("eval_loss", [3], "")]
    metrics = await client.metrics("tasks/a", names=["loss", "eval_loss"])
    assert list(metrics.series) == ["eval_loss", "loss"]
    assert metrics.series["loss"].steps == [1, 2, 3]
    assert metrics.series["loss"].values == [1.0, 2.0, 3.0]
    assert [(r.run, r.page_token) for r in peer.asked] == [(0, ""), (4, "t"), (4, "u")]
    assert metrics.run == 4


async def test_an_answer_that_does_not_come_is_an_error(client: Any, peer: Peer) -> None:
    with pytest.raises(DeadlineExceeded, match=r"GetTask within 0.5 s"):
        await client.get_task("tasks/a")
    assert len(peer.asked) == 1


async def test_a_first_look_that_does_not_come_is_no_longer_than_the_wait(
    make: Callable[..., Any], peer: Peer, tmp_path: Path
) -> None:
    patient = make(f"unix:{tmp_path}/s", timeout=math.inf)
    with pytest.raises(DeadlineExceeded, match=r"has not told of the task within 0.2 s"):
        await asyncio.wait_for(patient.wait("tasks/a", timeout=0.2), 60)
    assert len(peer.asked) == 1


async def test_an_outage_is_no_longer_than_the_wait(
    client: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    peer.over.set()
    peer.streams = [[]] * 1000
    paused: list[float] = []
    seconds = _streams._pause_of

    def pause_of(delay: float, deadline: float | None) -> float:
        paused.append(seconds(1000.0, deadline))
        return paused[-1]

    monkeypatch.setattr(_streams, "_pause_of", pause_of)
    with pytest.raises(DeadlineExceeded, match=r"has not ended within 0\.3 s"):
        await asyncio.wait_for(client.wait("tasks/a", timeout=0.3), 60)
    assert paused


async def test_a_daemon_that_does_not_know_a_call_is_told_apart(client: Any) -> None:
    with pytest.raises(Unimplemented):
        await client.system_info()


@pytest.mark.parametrize("seqs", [[1, 3], [1, 1], [2]])
async def test_events_that_are_not_dense_are_refused(
    client: Any, peer: Peer, seqs: list[int]
) -> None:
    peer.streams = [[snapshot(0), *(event(seq) for seq in seqs)]]
    with pytest.raises(EventsLost):
        await watched(client)


async def test_a_stream_that_breaks_is_taken_up_where_it_broke(client: Any, peer: Peer) -> None:
    peer.streams = [[snapshot(2), event(1), event(2)], [], [snapshot(2), end(3)]]
    items = await watched(client)
    kinds = [type(item) for item in items]
    assert kinds == [Snapshot, Event, Event, ConnectionLost, Snapshot, Event]
    assert [(r.after_seq, r.log_epoch) for r in peer.asked] == [(0, ""), (2, "e"), (2, "e")]


async def test_another_log_is_watched_from_its_first_event_on(client: Any, peer: Peer) -> None:
    """The watcher is told, as events come under numbers that it has seen."""
    peer.streams = [[snapshot(2), event(1), event(2)], ["replaced"], [snapshot(0), end(1)]]
    items = await watched(client)
    kinds = [type(item) for item in items]
    assert kinds == [Snapshot, Event, Event, ConnectionLost, LogReplaced, Snapshot, Event]
    assert [(r.after_seq, r.log_epoch) for r in peer.asked] == [(0, ""), (2, "e"), (0, "")]


async def test_a_place_in_another_log_is_no_place_to_begin(client: Any, peer: Peer) -> None:
    """Whoever kept it has kept what was before, too: that is theirs to throw away."""
    peer.streams = [["replaced"]]
    with pytest.raises(OutOfRange):
        await watched(client)


async def test_a_silent_stream_is_taken_for_dead(
    client: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_silence, "SILENCE_SECONDS", 0.2)
    peer.streams = [[snapshot(0), event(1), "hang"], [snapshot(1), end(2)]]
    items = await watched(client)
    (lost,) = (item for item in items if isinstance(item, ConnectionLost))
    assert "nothing came" in lost.error.message
    assert [item.seq for item in items if isinstance(item, Event)] == [1, 2]


async def test_a_slow_reader_is_not_taken_for_a_silent_stream(
    client: Any, peer: Peer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_silence, "SILENCE_SECONDS", 0.1)
    peer.streams = [[snapshot(0), event(1), event(2), end(3)]]
    items = []
    never = threading.Event()
    async for item in client.watch("tasks/a", until_end=True):
        never.wait(0.15)
        items.append(item)
    assert [type(item) for item in items] == [Snapshot, Event, Event, Event]


async def test_a_watch_that_is_left_ends_its_stream(client: Any, peer: Peer) -> None:
    peer.streams = [[snapshot(0), "hang"]]
    items = client.watch("tasks/a")
    assert isinstance(await anext(items), Snapshot)
    await items.aclose()
    assert await asyncio.to_thread(peer.over.wait, 10), "the server saw the end of the stream"


async def test_many_long_violations_arrive(client: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.start_task("tasks/a")
    assert [len(violation.description) for violation in caught.value.violations] == [500] * 80

"""Both clients against a real daemon."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from daemon_process import Daemon
from finetuned import (
    AlreadyExists,
    AsyncClient,
    Client,
    ConnectionLost,
    DaemonUnavailable,
    DeadlineExceeded,
    EndReason,
    Event,
    FailedPrecondition,
    FinetunedError,
    InvalidArgument,
    NotFound,
    OutOfRange,
    Snapshot,
    Task,
    TaskState,
    Unauthenticated,
)
from finetuned._checks import seconds
from finetuned._connect import find
from finetuned._parameters import from_mapping
from finetuned.v1.template_service_pb2 import Template

if TYPE_CHECKING:
    from conftest import Scene

Make = Callable[..., Any]


async def listed(items: Any) -> list[Any]:
    return [item async for item in items]


async def test_a_task_goes_by_any_of_its_names(client: Any, scene: Scene) -> None:
    task = await client.create_task("sft", scene.play(), display_name="My Task", task_id="my-task")
    for name in ("tasks/my-task", "my-task", "My Task"):
        assert (await client.get_task(name)).name == "tasks/my-task"
    await client.create_task("sft", display_name="looks-like-an-id")
    assert (await client.get_task("looks-like-an-id")).display_name == "looks-like-an-id"
    assert task.state == TaskState.TASK_STATE_PENDING


@pytest.mark.parametrize("name", [None, 4, b"a", Task(name="runs/a"), Template(name="templates/a")])
async def test_a_name_that_is_no_text_is_a_type_error(make: Make, name: Any) -> None:
    nowhere = make("unix:/nowhere.sock")
    for call in (nowhere.get_task, nowhere.start_task, nowhere.stop_task, nowhere.delete_task):
        with pytest.raises(TypeError, match="a task's name is a str"):
            await call(name)
    with pytest.raises(TypeError, match="a task's name is a str"):
        await listed(nowhere.watch(name))


@pytest.mark.parametrize("name", ["", " ", "a\udcff", "tasks/\udcff"])
async def test_a_name_that_names_nothing_is_refused_here(make: Make, name: str) -> None:
    nowhere = make("unix:/nowhere.sock")
    for call in (nowhere.get_task, nowhere.start_task, nowhere.delete_task):
        with pytest.raises(InvalidArgument) as caught:
            await call(name)
        assert [violation.field for violation in caught.value.violations] == ["name"]


async def test_texts_that_are_no_utf8_are_all_named(make: Make) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await make("unix:/nowhere.sock").train("sft", display_name="\udcff", device="\udcff")
    assert [v.field for v in caught.value.violations] == ["display_name", "device"]


@pytest.mark.parametrize(
    ("method", "arguments", "options", "field"),
    [
        ("create_task", ["sft"], {"device": 3}, "device"),
        ("create_task", [2.5], {}, "training_type"),
        ("update_task", ["tasks/a"], {"display_name": 0}, "display_name"),
        ("update_task", ["tasks/a"], {"reset": 3}, "reset[0]"),
        ("list_tasks", [3.5], {}, "states"),
        ("metrics", ["tasks/a"], {"run": "1"}, "run"),
        ("metrics", ["tasks/a"], {"max_points": 3.0}, "max_points"),
        ("metrics", ["tasks/a"], {"names": 3}, "names[0]"),
        ("metrics", ["tasks/a"], {"after_step": 10**30}, "after_step"),
        ("list_events", ["tasks/a", "1"], {}, "after_seq"),
        ("logs", ["tasks/a"], {"run": True}, "run"),
        ("logs", ["tasks/a"], {"level": 3}, "level"),
        ("watch", ["tasks/a", 1.5], {}, "after_seq"),
        ("watch", ["tasks/a"], {"reconnect_timeout": "x"}, "reconnect_timeout"),
        ("watch_devices", ["2"], {}, "interval"),
        ("move_task", ["tasks/a", "first"], {}, "position"),
        ("inspect_dataset", ["/a"], {"max_samples": 1.0}, "max_samples"),
        ("wait", ["tasks/a"], {"timeout": "5"}, "timeout"),
        ("wait", ["tasks/a"], {"timeout": math.nan}, "timeout"),
        ("wait", ["tasks/a"], {"timeout": -5}, "timeout"),
        ("wait", ["tasks/a"], {"timeout": timedelta(seconds=-1)}, "timeout"),
    ],
)
async def test_an_argument_of_a_wrong_type_is_refused_by_its_name(
    make: Make, method: str, arguments: list[Any], options: dict[str, Any], field: str
) -> None:
    answer = getattr(make("unix:/nowhere.sock"), method)(*arguments, **options)
    with pytest.raises(InvalidArgument) as caught:
        await (listed(answer) if hasattr(answer, "__aiter__") else answer)
    assert [violation.field for violation in caught.value.violations] == [field]


@pytest.mark.parametrize("timeout", ["x", math.nan, -1, True])
def test_a_client_wants_a_number_of_seconds(make: Make, timeout: Any) -> None:
    for refused in (
        lambda: make(timeout=timeout),
        lambda: Client("unix:/nowhere.sock").with_options(timeout=timeout),
        lambda: AsyncClient("unix:/nowhere.sock").with_options(timeout=timeout),
    ):
        with pytest.raises(InvalidArgument, match="timeout: must be"):
            refused()


def test_what_has_no_end_is_no_deadline() -> None:
    """gRPC has no room for it, and would end the call at once."""
    assert [seconds("t", value) for value in (None, math.inf, 1e18)] == [None] * 3
    assert [seconds("t", value) for value in (0, 2.5, timedelta(minutes=1))] == [0, 2.5, 60]


async def test_a_wait_without_end_waits(make: Make, daemon: Daemon, scene: Scene) -> None:
    client = make(daemon.address, timeout=math.inf)
    task = await client.train("sft", scene.play(steps=1), device="cpu")
    assert (await client.wait(task.name, timeout=1e18)).state == TaskState.TASK_STATE_COMPLETED
    assert (await client.wait(task, timeout=timedelta(days=1))).name == task.name
    assert (await client.get_task(await client.get_task(task))).name == task.name
    assert "unix:" in repr(client)
    await client.close()
    assert repr(client).endswith(", closed>")


async def test_a_wait_that_is_over_says_what_the_task_waits_for(client: Any) -> None:
    await client.create_task("sft", display_name="idle")
    with pytest.raises(DeadlineExceeded, match=r"idle has not ended within 0.1 s; not started"):
        await client.wait("idle", timeout=0.1)


def test_a_client_for_asyncio_says_that_it_is_of_another_loop(daemon: Daemon) -> None:
    client = AsyncClient(daemon.address)

    async def used() -> None:
        async with client:
            await client.list_devices()

    async def first() -> None:
        await client.list_devices()

    asyncio.run(first())
    with pytest.raises(FinetunedError) as caught:
        asyncio.run(used())
    assert caught.value.reason == "CLIENT_OTHER_LOOP"


async def test_parameters_may_be_a_mapping(client: Any, scene: Scene) -> None:
    task = await client.create_task("sft", {"training": {"batch_size": 7}})
    assert task.parameters.training.batch_size == 7
    assert task.parameters.training.num_train_epochs == 2


async def test_tasks_are_listed_over_pages(client: Any) -> None:
    names = [(await client.create_task("sft", display_name=f"t{i}")).name for i in range(130)]
    assert [task.name for task in await listed(client.list_tasks())] == names[::-1]
    assert await listed(client.list_tasks(["running"])) == []
    assert len(await listed(client.list_tasks(["PENDING"]))) == 130


async def test_a_deleted_task_is_gone(client: Any) -> None:
    await client.create_task("sft", display_name="gone")
    await client.delete_task("gone")
    with pytest.raises(NotFound):
        await client.get_task("gone")
    with pytest.raises(NotFound):
        await client.delete_task("gone")
    await client.delete_task("gone", allow_missing=True)


def test_numbers_and_truth_values_of_other_libraries_are_taken() -> None:
    training = {"batch_size": Decimal(4), "learning_rate": Decimal("1e-4")}
    taken = from_mapping({"training": training, "optimization": {"bf16": np.bool_(1)}})
    assert (taken.training.batch_size, taken.training.learning_rate) == (4, 1e-4)
    assert taken.optimization.bf16 is True
    for wrong in ("1.5", "NaN", "sNaN", "Infinity", "1e1000000"):
        with pytest.raises(InvalidArgument, match=r"training\.batch_size"):
            from_mapping({"training": {"batch_size": Decimal(wrong)}})


async def test_the_same_request_id_gives_the_same_task(client: Any) -> None:
    first = await client.create_task("sft", request_id="r")
    assert (await client.create_task("sft", request_id="r")).name == first.name
    assert (await client.create_task("sft")).name != first.name


async def test_every_wrong_field_is_named(client: Any) -> None:
    with pytest.raises(InvalidArgument) as caught:
        await client.train("sft", {"training": {"batch_size": 0, "num_train_epochs": 0}})
    fields = {violation.field for violation in caught.value.violations}
    assert {"training.batch_size", "training.num_train_epochs", "data.train_file"} <= {
        field.removeprefix("parameters.") for field in fields
    }
    assert caught.value.reason == "INVALID_FIELDS"
    assert all(v.description and v.reason for v in caught.value.violations)
    assert await listed(client.list_tasks()) == []


async def test_a_word_that_is_no_type_or_state_is_refused_here(client: Any) -> None:
    with pytest.raises(InvalidArgument, match="sft, pretrain"):
        await client.create_task("sftt")
    with pytest.raises(InvalidArgument, match="pending, queued"):
        await listed(client.list_tasks(["walking"]))


async def test_errors_are_told_apart(client: Any, scene: Scene) -> None:
    await client.create_task("sft", display_name="taken")
    with pytest.raises(AlreadyExists):
        await client.create_task("sft", display_name="taken")
    with pytest.raises(FailedPrecondition) as caught:
        await client.stop_task("taken")
    assert caught.value.violations[0].subject.startswith("tasks/")
    with pytest.raises(NotFound) as missing:
        await client.start_task("tasks/not-there")
    assert (missing.value.code, missing.value.reason) == ("NOT_FOUND", "TASK_NOT_FOUND")


async def test_validate_only_writes_nothing(client: Any, scene: Scene) -> None:
    task = await client.create_task("sft", scene.play(), validate_only=True)
    assert task.parameters.training.batch_size == 2
    assert await listed(client.list_tasks()) == []


async def test_a_watch_shows_the_whole_run_and_ends_with_it(client: Any, scene: Scene) -> None:
    task = await client.train("sft", scene.play(steps=5), device="cpu")
    items = await listed(client.watch(task.name, until_end=True))
    assert isinstance(items[0], Snapshot)
    events = items[1:]
    assert all(isinstance(event, Event) for event in events)
    assert [event.seq for event in events] == list(range(1, len(events) + 1))
    assert events[-1].state_change.new_state == TaskState.TASK_STATE_COMPLETED
    assert any(event.HasField("result") for event in events)
    # The same of a run that has ended, and the rest of it.
    assert (await listed(client.watch(task.name, until_end=True)))[1:] == events
    rest = await listed(client.watch(task.name, events[3].seq, until_end=True))
    assert rest[1:] == events[4:]
    assert await listed(client.list_events(task.name)) == events
    assert await listed(client.list_events(task.name, events[3].seq)) == events[4:]


async def test_wait_gives_the_ended_task(client: Any, scene: Scene) -> None:
    task = await client.train("sft", scene.play(steps=2), device="cpu")
    ended = await client.wait(task.name)
    assert ended.end_reason == EndReason.END_REASON_FINISHED
    assert (await client.wait(task.display_name)).etag == ended.etag
    (run,) = await listed(client.list_runs(task.display_name))
    assert run.state == TaskState.TASK_STATE_COMPLETED


async def test_a_stopped_run_can_be_started_again(client: Any, scene: Scene) -> None:
    task = await client.train("sft", scene.play(gated=True), device="cpu")
    await client.stop_task(task.name, discard=True)
    assert (await client.wait(task.name)).state == TaskState.TASK_STATE_STOPPED
    scene.play(steps=1)
    again = await client.start_task(task.name)
    assert again.run == 2
    assert (await client.wait(task.name)).state == TaskState.TASK_STATE_COMPLETED
    assert [run.number for run in await listed(client.list_runs(task.name))] == [2, 1]
    assert {event.run for event in await listed(client.list_events(task.name, run=2))} == {2}


async def test_a_watch_lives_through_a_killed_daemon(
    client: Any, daemon: Daemon, scene: Scene
) -> None:
    task = await client.train("sft", scene.play(steps=6, gated=True), device="cpu")
    scene.let_pass(2)
    seqs: list[int] = []
    snapshots = losses = 0
    async for item in client.watch(task.name, until_end=True):
        if isinstance(item, Snapshot):
            snapshots += 1
        elif isinstance(item, ConnectionLost):
            losses += 1
            assert item.after_seq == seqs[-1]
            await asyncio.to_thread(daemon.start)
            scene.let_pass(4)
        else:
            seqs.append(item.seq)
            if item.progress.step == 2 and not losses:
                await asyncio.to_thread(daemon.kill)
                scene.let_pass(1)
    assert (snapshots, losses) == (2, 1)
    assert seqs == list(range(1, len(seqs) + 1))
    assert (await client.get_task(task.name)).state == TaskState.TASK_STATE_COMPLETED


async def test_a_watch_lives_through_a_stopped_daemon(
    client: Any, daemon: Daemon, scene: Scene
) -> None:
    task = await client.train("sft", scene.play(steps=3, gated=True), device="cpu")
    seqs: list[int] = []
    has_stopped = False
    async for item in client.watch(task.name, until_end=True):
        if isinstance(item, Event):
            seqs.append(item.seq)
            if not has_stopped:
                has_stopped = True
                assert await asyncio.to_thread(daemon.stop) == 0
        elif isinstance(item, ConnectionLost):
            await asyncio.to_thread(daemon.start)
            scene.let_pass(3)
    assert seqs == list(range(1, len(seqs) + 1))


async def test_a_watch_gives_up_after_the_time_it_was_given(
    client: Any, daemon: Daemon, scene: Scene
) -> None:
    task = await client.create_task("sft", scene.play())
    losses = 0
    with pytest.raises(DaemonUnavailable):
        async for item in client.watch(task.name, reconnect_timeout=0.2):
            if isinstance(item, Snapshot):
                await asyncio.to_thread(daemon.kill)
            losses += isinstance(item, ConnectionLost)
    assert losses == 1


async def test_a_watched_task_that_is_deleted_ends_the_watch(client: Any) -> None:
    task = await client.create_task("sft")
    with pytest.raises(NotFound):
        async for item in client.watch(task.name):
            if isinstance(item, Snapshot):
                await client.delete_task(task.name)


async def test_a_place_beyond_the_log_is_out_of_range(client: Any) -> None:
    task = await client.create_task("sft")
    with pytest.raises(OutOfRange):
        await listed(client.watch(task.name, 1000))
    with pytest.raises(OutOfRange):
        await listed(client.watch(task.name, log_epoch="another"))


async def test_a_call_waits_for_a_daemon_that_restarts(client: Any, daemon: Daemon) -> None:
    task = await client.create_task("sft")
    daemon.kill()
    answer, _ = await asyncio.gather(client.get_task(task.name), asyncio.to_thread(daemon.start))
    assert answer.name == task.name


async def test_where_no_daemon_ever_was_a_call_fails_at_once(make: Make, tmp_path: Path) -> None:
    client = make(f"unix:{tmp_path}/none.sock")
    began = time.monotonic()
    with pytest.raises(DaemonUnavailable, match="no daemon serves"):
        await client.system_info()
    with pytest.raises(DaemonUnavailable):
        await listed(client.watch("tasks/some-task"))
    assert time.monotonic() - began < 5


async def test_a_closed_client_says_so(client: Any) -> None:
    await client.system_info()
    await client.close()
    with pytest.raises(FinetunedError, match="closed"):
        await client.system_info()


async def test_system_and_devices_are_told(client: Any, daemon: Daemon) -> None:
    info = await client.system_info()
    assert daemon.address in info.addresses
    assert (await client.list_devices())[-1].id == "cpu"


async def test_shutdown_ends_the_daemon(client: Any, daemon: Daemon) -> None:
    await client.shutdown()
    assert daemon.process is not None
    assert await asyncio.to_thread(daemon.process.wait, 20) == 0


async def _heavy_calls(client: Any) -> int:
    limits = (await client.system_info()).limits
    return next(limit.used for limit in limits if limit.name == "heavy_calls")


async def _refusal(client: Any) -> str:
    try:
        await client.delete_task("tasks/none")
    except FinetunedError as error:
        return error.reason
    raise AssertionError("there is no such task")


async def test_what_comes_while_the_daemon_stops_is_told_so(make: Make, tmp_path: Path) -> None:
    """It waits for the calls under way, and would cut off what it took in the meantime."""
    probe = tmp_path / "probe.json"
    probe.write_text("{}")
    daemon = Daemon(tmp_path)
    daemon.environment = {"FAKE_PROBE": str(probe)}
    daemon.start()
    client = make(daemon.address)
    long: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    try:
        await client.check_environment()
        probe.write_text('{"hang": true}')
        long = asyncio.create_task(client.check_environment(refresh=True))
        while not await _heavy_calls(client):
            pass
        daemon.process.terminate()
        while (reason := await _refusal(client)) != "DAEMON_STOPPING":
            assert reason == "TASK_NOT_FOUND"
    finally:
        daemon.close()
        await client.close()
        long.cancel()
        await asyncio.gather(long, return_exceptions=True)


async def test_tcp_wants_the_token(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0").start()
    try:
        monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(daemon.paths.runtime_dir))
        unix = make()
        assert find().target == daemon.address
        (address,) = (a for a in (await unix.system_info()).addresses if "127.0.0.1" in a)
        with_file = make(address)
        assert (await with_file.system_info()).addresses
        wrong = make(address, token="wrong")
        with pytest.raises(Unauthenticated):
            await wrong.system_info()
        with pytest.raises(Unauthenticated):
            await listed(wrong.watch("tasks/some-task"))
    finally:
        daemon.close()

"""Both clients against a real daemon."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import Daemon
from finetuned import (
    AlreadyExists,
    ConnectionLost,
    DaemonUnavailable,
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
from finetuned._connect import find

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


@pytest.mark.parametrize("name", [None, 4, b"a", Task(name="tasks/a")])
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

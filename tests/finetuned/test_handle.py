"""A task to work with: `client.train(...)`, `client.task(name)`, and what both handles can do."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from daemon_process import Daemon
from finetuned import (
    Client,
    DeadlineExceeded,
    EndReason,
    Event,
    InvalidArgument,
    LogEntry,
    Metrics,
    NotFound,
    Parameters,
    RunFailed,
    Series,
    Task,
    TaskDeleted,
    TasksSynced,
    TaskState,
    WatchDevicesResponse,
)
from finetuned._connect import Endpoint
from finetuned._local import make_absolute
from finetuned.v1.dataset_service_pb2 import InspectDatasetRequest
from finetuned.v1.task_service_pb2 import StartTaskRequest, UpdateTaskRequest

if TYPE_CHECKING:
    from conftest import Scene

OUT_OF_MEMORY = {"step": 2, "reason": "DEVICE_OUT_OF_MEMORY", "message": "no room", "detail": "tb"}


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One for all tests here: each has tasks of its own."""
    daemon = Daemon(tmp_path_factory.mktemp("handles")).start()
    yield daemon
    daemon.close()


async def train(client: Any, scene: Scene, **scenario: Any) -> Any:
    """A task that was started, of a scenario of its own."""
    return await client.train("sft", scene.play(**scenario), device="cpu")


async def test_training_is_one_call(client: Any, scene: Scene) -> None:
    task = await client.train("sft", scene.play(steps=2), device="cpu", wait=True)
    assert task.state == TaskState.TASK_STATE_COMPLETED
    assert (task.state_name, task.end_reason_name) == ("completed", "finished")
    assert task.has_ended
    assert task.end_reason == EndReason.END_REASON_FINISHED
    assert (task.name, task.run) == (f"tasks/{task.id}", 1)
    assert task.progress.step == 2
    assert task.message.display_name == task.display_name
    assert task.last_checkpoint
    assert "completed (finished) 2/2 steps" in repr(task)


async def test_a_handle_is_of_any_name_or_of_a_task_at_hand(client: Any, scene: Scene) -> None:
    made = await client.create_task("sft", scene.play(), display_name=f"My {scene.root}")
    task = await client.task(made.display_name)
    assert (task.name, task.state_name) == (made.name, "pending")
    made.display_name = "not asked for again"
    assert (await client.task(made)).display_name == "not asked for again"
    with pytest.raises(NotFound):
        await client.task("nobody")


async def test_watching_ends_with_the_run_and_the_handle_follows(client: Any, scene: Scene) -> None:
    task = await train(client, scene, steps=4, gated=True)
    seen = []
    async for item in task.watch():
        if isinstance(item, Event):
            if item.HasField("phase_change"):
                seen.append(task.phase_name)
            if item.HasField("progress") and item.progress.step == 2:
                assert (task.state_name, task.progress.step) == ("running", 2)
        if task.phase_name == "training":
            scene.let_pass(4)
    assert "training" in seen
    assert (task.state_name, task.end_reason_name) == ("completed", "finished")


async def test_a_task_is_led_by_its_handle(client: Any, scene: Scene) -> None:
    """Each verb answers with the handle, up to date."""
    task = await client.task(await client.create_task("sft", scene.play(gated=True), device="cpu"))
    same = await task.update({"training": {"batch_size": 2}}, display_name=f"Led {scene.root}")
    assert same.display_name == task.display_name == f"Led {scene.root}"
    assert task.parameters.training.batch_size == 2
    await task.start()
    assert task.state_name in ("queued", "running")
    async for _ in task.watch():
        if task.phase_name == "training":
            break
    await task.pause()
    async for _ in task.watch(until_end=False):
        if task.state_name == "paused":
            break
    await task.resume()
    assert (await task.refresh()).run == 1
    scene.let_pass(1000)
    await task.wait()
    assert [run.number async for run in task.runs()] == [1]
    assert [c.step async for c in task.checkpoints()]
    with pytest.raises(InvalidArgument, match="tokenizer"):  # the fake model has none to count with
        await task.estimate()
    assert "model" in (await task.export_config()).content
    assert all(v.severity != "error" for v in await task.validate())
    assert [event.seq async for event in task.events(3)][:2] == [4, 5]
    await task.delete()
    with pytest.raises(NotFound):
        await task.refresh()


async def test_a_queued_task_is_moved_and_stopped_by_its_handle(client: Any, scene: Scene) -> None:
    first = await train(client, scene, gated=True)
    waiting = [await client.train("sft", scene.parameters(), device="cpu") for _ in range(2)]
    assert (await waiting[1].move(1)).message.queue_position == 1
    for task in (*waiting, first):
        await task.stop(discard=True)
        await task.wait()
        assert task.state_name == "stopped"


async def test_a_probe_by_a_handle_leaves_it_as_it_was(client: Any, scene: Scene) -> None:
    task = await client.task(await client.create_task("sft", scene.play(), device="cpu"))
    assert (await task.probe()).run_steps
    assert task.state_name == "pending"


async def test_waiting_has_an_end_and_the_run_goes_on(client: Any, scene: Scene) -> None:
    task = await train(client, scene, gated=True)
    for wait in (task.wait(timeout=0.2), client.wait(task.name, timeout=0.2)):
        with pytest.raises(DeadlineExceeded, match="goes on") as caught:
            await wait
        assert caught.value.reason == "RUN_GOES_ON"
    assert (await task.refresh()).state_name in ("queued", "running")
    scene.let_pass(1000)
    assert (await task.wait(timeout=60)).has_ended


async def test_a_run_that_fails_says_why_and_what_would_mend_it(client: Any, scene: Scene) -> None:
    task = await train(client, scene, fail=OUT_OF_MEMORY)
    with pytest.raises(RunFailed, match="no room") as caught:
        await task.wait()
    error = caught.value
    assert (error.reason, error.end_reason) == (
        "DEVICE_OUT_OF_MEMORY",
        EndReason.END_REASON_DEVICE_OUT_OF_MEMORY,
    )
    assert error.evidence is not None
    assert error.evidence.last_metrics["loss"] == 0.5
    assert isinstance(error.fix, Parameters)
    assert error.fix.training.gradient_accumulation_steps > 1
    assert (error.advice != "", error.detail) == (True, "tb")
    assert task.state_name == "failed"
    # It is an error for a handle, and for a client where it asks for that.
    assert (await task.wait(raise_on_failure=False)).state_name == "failed"
    assert (await client.wait(task.name)).state == TaskState.TASK_STATE_FAILED
    with pytest.raises(RunFailed):
        await client.wait(task.name, raise_on_failure=True)
    # The fix fits the task as it comes.
    scene.play()
    await task.update(error.fix)
    assert (await (await task.start()).wait()).state_name == "completed"


async def test_how_a_run_failed_is_found_however_much_was_edited_since(
    client: Any, scene: Scene
) -> None:
    task = await train(client, scene, fail=OUT_OF_MEMORY)
    await task.wait(raise_on_failure=False)
    for size in range(60):
        await task.update({"training": {"batch_size": size % 2 + 1}})
    with pytest.raises(RunFailed) as caught:
        await task.wait()
    assert caught.value.fix is not None


async def test_the_log_comes_as_lines_of_a_level(client: Any, scene: Scene) -> None:
    task = await train(client, scene, steps=2)
    lines = [line async for line in task.logs(follow=True)]
    assert lines
    assert all(isinstance(line, LogEntry) and line.run == 1 for line in lines)
    assert [str(line) async for line in task.logs()] == [str(line) for line in lines]
    assert lines[0].text in str(lines[0])
    assert [line async for line in client.logs(task.name, level="error")] == []
    assert [line async for line in task.logs(run=1)] == lines
    with pytest.raises(InvalidArgument, match="level"):
        _ = [line async for line in task.logs(level="loud")]


async def test_curves_go_to_pandas(client: Any, scene: Scene) -> None:
    """One row a step."""
    task = await train(client, scene, steps=4)
    metrics = await (await task.wait()).metrics()
    frame = metrics.to_pandas()
    assert list(frame.columns)[:2] == ["epoch", "time"]
    assert list(frame.index) == [1, 2, 3, 4]
    assert list(frame["loss"]) == metrics.series["loss"].values
    assert str(frame["time"].dtype).startswith("datetime64[")
    assert frame["time"].dt.year.min() > 2000
    assert metrics.series["loss"].to_pandas().loc[2] == 0.5
    assert repr(metrics.series["loss"]) == "Series('loss', 4 points, 0.25 at step 4)"
    few = await task.metrics(names="loss", after_step=2)
    assert few.series["loss"].steps == [3, 4]
    assert list(few.series) == ["loss"]


def test_what_was_not_measured_at_a_step_is_not_a_number_there() -> None:
    loss = Series("loss", [1, 3], [1.0, 0.5], [0.25, 0.75], [10.0, 30.0])
    evaluation = Series("eval_loss", [2, 3], [0.9, 0.7], [0.5, 0.75], [20.0, 31.0])
    frame = Metrics(1, {"eval_loss": evaluation, "loss": loss}).to_pandas()
    assert list(frame.index) == [1, 2, 3]
    assert list(frame["epoch"]) == [0.25, 0.5, 0.75]
    assert list(frame["eval_loss"].dropna().index) == [2, 3]
    assert list(frame["loss"].dropna().index) == [1, 3]


async def test_before_the_first_step_there_is_an_empty_frame(client: Any, scene: Scene) -> None:
    task = await client.task(await client.create_task("sft", scene.play(), device="cpu"))
    metrics = await task.metrics()
    assert (metrics.run, metrics.series) == (0, {})
    assert list(metrics.to_pandas().columns) == ["epoch", "time"]


def test_without_pandas_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    for part in (Metrics(1), Series("loss")):
        with pytest.raises(ImportError, match=r"pip install 'finetuned\[notebook\]'"):
            part.to_pandas()


async def test_the_list_of_tasks_is_followed(client: Any, scene: Scene) -> None:
    """What is there, that it is whole, what is made, what has gone."""
    made = await client.create_task("sft", scene.play(), device="cpu")
    items = client.watch_tasks()
    names = set()
    async for item in items:
        if isinstance(item, TasksSynced):
            break
        assert isinstance(item, Task)
        names.add(item.name)
    assert made.name in names
    assert item.task_count == len(names)
    second = await client.create_task("sft", scene.play(), device="cpu")
    item = await anext(items)
    assert item.name == second.name
    await client.delete_task(second.name)
    while not isinstance(item, TaskDeleted):
        item = await anext(items)
    assert item == TaskDeleted(second.name)
    await items.aclose()
    wrong = client.watch_tasks("asleep")
    with pytest.raises(InvalidArgument, match="states"):
        await anext(wrong)


async def test_devices_are_followed(client: Any) -> None:
    items = client.watch_devices(0.5)
    for _ in range(2):
        item = await anext(items)
        assert isinstance(item, WatchDevicesResponse)
        assert item.devices[-1].id == "cpu"
    await items.aclose()
    wrong = client.watch_devices(0.1)
    with pytest.raises(InvalidArgument, match="interval"):
        await anext(wrong)


async def test_whether_it_serves_is_an_answer(
    client: Any, make: Callable[..., Any], tmp_path: Path
) -> None:
    assert await client.is_serving() is True
    assert await make(f"unix:{tmp_path}/nowhere").is_serving() is False


async def test_paths_are_seen_from_where_the_caller_is(
    client: Any, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A daemon on a unix socket is on this machine, and takes absolute paths."""
    scene.play(steps=1)
    monkeypatch.chdir(scene.root)
    monkeypatch.setenv("HOME", str(scene.root))
    given = {"train_file": "chats.jsonl", "model_path": Path("model"), "output_dir": "~/out"}
    task = await client.train("sft", {"data": given}, device="cpu", wait=True)
    assert task.parameters.data.train_file == str(scene.data)
    assert task.parameters.data.output_dir == str(scene.output)
    assert (scene.output / "run-1").is_dir()


def test_every_path_of_a_request_is_made_absolute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    update = UpdateTaskRequest()
    update.task.parameters.data.eval_file = "a"
    update.task.parameters.data.train_file = ""
    update.task.parameters.lora.peft_config_path = "/b"
    update.task.parameters.data.model_path = "~nobody-of-that-name/c"
    start = StartTaskRequest(name="tasks/a", resume_path="checkpoint-1")
    inspection = InspectDatasetRequest(path="a", tokenizer_path="b")
    for request in (update, start, inspection):
        make_absolute(request)
    assert update.task.parameters.data.eval_file == str(tmp_path / "a")
    assert update.task.parameters.data.train_file == ""
    assert update.task.parameters.lora.peft_config_path == "/b"
    assert update.task.parameters.data.model_path == "~nobody-of-that-name/c"
    assert (start.name, start.resume_path) == ("tasks/a", str(tmp_path / "checkpoint-1"))
    assert (inspection.path, inspection.tokenizer_path) == (
        str(tmp_path / "a"),
        str(tmp_path / "b"),
    )


def test_a_port_may_be_another_machines() -> None:
    """One that was forwarded: a relative path there means nothing here."""
    assert Endpoint("unix:/a").is_here
    assert Endpoint("127.0.0.1:1", is_default=True).is_here
    assert not Endpoint("127.0.0.1:1").is_here


FORK = """
import os, sys, finetuned
client = finetuned.Client(sys.argv[1])
client.list_devices()
child = os.fork()
if not child:
    try:
        client.list_devices()
    except finetuned.FinetunedError as error:
        print(error.reason, flush=True)
    os._exit(0)
os.waitpid(child, 0)
client.list_devices()
"""


def test_a_client_is_not_used_on_in_a_fork(daemon: Daemon) -> None:
    """It would hang there; and the parent's is as it was."""
    done = subprocess.run(
        [sys.executable, "-c", FORK, daemon.address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "CLIENT_FORKED\n"), done.stderr


FORK_WITH_A_WATCH = """
import os, sys, finetuned
client = finetuned.Client(sys.argv[1])
tasks = client.watch_tasks()
next(tasks)
child = os.fork()
if not child:
    for use in (lambda: next(tasks), lambda: finetuned.Client(sys.argv[1]).list_devices()):
        try:
            use()
        except finetuned.FinetunedError as error:
            print(error.reason, "spawn" in error.message, flush=True)
    tasks.close()
    client.close()
    print("closed", flush=True)
    os._exit(0)
os.waitpid(child, 0)
client.list_devices()
"""


def test_a_fork_under_a_watch_harms_nobody(daemon: Daemon) -> None:
    """A client in the child would end the parent, and what was inherited would hang."""
    done = subprocess.run(
        [sys.executable, "-c", FORK_WITH_A_WATCH, daemon.address],
        capture_output=True,
        text=True,
        timeout=60,
    )
    said = "CLIENT_FORKED False\nCLIENT_FORKED True\nclosed\n"
    assert (done.returncode, done.stdout) == (0, said), done.stderr


def test_a_handle_is_neither_pickled_nor_copied(daemon: Daemon, scene: Scene) -> None:
    with Client(daemon.address) as client:
        task = client.task(client.create_task("sft", scene.play()))
        for use in (pickle.dumps, copy.deepcopy):
            with pytest.raises(TypeError, match=r"keep task\.name"):
                use(task)
        assert client.task(task) == task
        assert client.wait(client.train("sft", scene.play(steps=1), device="cpu")).run == 1


def test_levels_of_logs_are_pythons_own(daemon: Daemon, scene: Scene) -> None:
    with Client(daemon.address) as client:
        task = client.train("sft", scene.play(steps=1, log="x"), device="cpu", wait=True)
        shown = list(task.logs(level="info"))
        assert shown
        assert list(task.logs(level="INFO")) == shown
        assert list(task.logs(level="WARN")) == list(task.logs(level="warning"))


PROBE = """
import signal, sys, threading, finetuned
with finetuned.Client(sys.argv[1]) as client:
    client.task(sys.argv[2]).probe()
"""


def test_an_interrupt_ends_the_waiting_and_not_the_probe(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True))
    probing = subprocess.Popen(
        [sys.executable, "-c", PROBE, daemon.address, task.name], stderr=subprocess.PIPE, text=True
    )
    daemon.wait(task.name, "RUNNING")
    probing.send_signal(signal.SIGINT)
    _, err = probing.communicate(timeout=60)
    assert "KeyboardInterrupt: the probe goes on" in err
    assert daemon.get(task.name).state == TaskState.TASK_STATE_RUNNING
    with Client(daemon.address) as client:
        client.stop_task(task.name, discard=True)


SCRIPT = """
import sys, finetuned
with finetuned.Client(sys.argv[1]) as client:
    client.task(sys.argv[2]).show()
"""


def test_an_interrupt_ends_the_showing_and_not_the_run(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True), start=True)
    shown = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, daemon.address, task.name],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    assert shown.stdout is not None
    assert shown.stderr is not None
    for line in shown.stdout:
        if line.rstrip().endswith("training"):
            break
    shown.send_signal(signal.SIGINT)
    out, err = shown.communicate(timeout=60)
    assert "the run goes on" in out
    assert err.rstrip().endswith("KeyboardInterrupt: the run goes on; show it again: task.show()")
    assert "_follow" not in err, "the frames of what was waited in are left out"
    assert daemon.get(task.name).state == TaskState.TASK_STATE_RUNNING
    scene.let_pass(1000)
    daemon.wait(task.name, "COMPLETED")


def test_a_run_is_shown_in_lines(
    daemon: Daemon, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a text of its log can do nothing to the terminal."""
    with Client(daemon.address) as client:
        task = client.train("sft", scene.play(steps=2, log="x"), device="cpu")
        task.show()
    lines = capsys.readouterr().out.splitlines()
    said = [line.partition("  ")[2] for line in lines]
    assert "training" in said
    assert any(line.startswith("step 2  loss 0.5") for line in said)
    assert said[-1] == "completed (finished)"
    assert not any("\x1b" in line for line in lines)


async def test_a_handle_is_shown_from_asyncio(
    daemon: Daemon, scene: Scene, capsys: pytest.CaptureFixture[str]
) -> None:
    from finetuned import AsyncClient

    async with AsyncClient(daemon.address) as client:
        task = await client.train("sft", scene.play(steps=1), device="cpu")
        await asyncio.wait_for(task.show(), 60)
        assert (task.state_name, task == await client.task(task.name)) == ("completed", True)
    assert "completed (finished)" in capsys.readouterr().out

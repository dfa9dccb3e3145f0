"""Tasks through the bare protos: create, list, start, delete, repeat, and wrong requests."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2


@dataclass
class Refusal:
    """What came back instead of an answer."""

    code: grpc.StatusCode = grpc.StatusCode.OK
    reason: str = ""
    details: list[Any] = field(default_factory=list)

    def of(self, kind: type[Any]) -> Any:
        return next(d for d in self.details if isinstance(d, kind))

    @property
    def fields(self) -> dict[str, str]:
        return {v.field: v.reason for v in self.of(error_details_pb2.BadRequest).field_violations}


@contextmanager
def refused() -> Iterator[Refusal]:
    """Expects a call to fail, and gives its code and typed details."""
    refusal = Refusal()
    with pytest.raises(grpc.RpcError) as caught:
        yield refusal
    refusal.code = caught.value.code()
    status = rpc_status.from_call(caught.value)
    assert status is not None, "every error has typed details"
    kinds = [
        getattr(error_details_pb2, name)
        for name in ("ErrorInfo", "BadRequest", "ResourceInfo", "PreconditionFailure")
    ]
    for packed in status.details:
        kind = next(k for k in kinds if packed.Is(k.DESCRIPTOR))
        detail = kind()
        packed.Unpack(detail)
        refusal.details.append(detail)
    info = refusal.of(error_details_pb2.ErrorInfo)
    assert info.domain == "finetuned"
    refusal.reason = info.reason


def list_tasks(daemon: Daemon, **request: Any) -> task_service_pb2.ListTasksResponse:
    return daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest(**request))


def test_a_task_is_created_with_all_defaults_resolved_and_a_name_of_its_own(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.parameters(learning_rate=1e-3))
    assert re.fullmatch(r"sft_\d{8}_\d{6}", task.display_name)
    assert task.state == task_pb2.TASK_STATE_PENDING
    assert task.parameters.training.learning_rate == 1e-3
    assert task.parameters.training.batch_size == 2
    assert list(task.parameters.lora.lora_target_modules.values)[:2] == ["q_proj", "k_proj"]
    assert daemon.get(task.name) == task
    names = {daemon.create(scene.parameters()).display_name for _ in range(3)}
    assert len(names) == 3, "unique, also within one second"


def test_a_create_that_is_checked_only_writes_nothing(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters(), validate_only=True, task_id="would-be")
    assert task.name == "tasks/would-be"
    assert list(list_tasks(daemon).tasks) == []


def test_a_repeated_create_gives_the_first_answer_again(daemon: Daemon, scene: Scene) -> None:
    first = daemon.create(scene.play(), start=True, request_id="once")
    again = daemon.create(scene.play(), start=True, request_id="once")
    assert again.name == first.name
    assert len(list_tasks(daemon).tasks) == 1
    with refused() as refusal:
        daemon.create(scene.parameters(batch_size=3), start=True, request_id="once")
    assert refusal.fields == {"request_id": "REQUEST_ID_REUSED"}


def test_a_repeated_start_starts_one_run(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=1))
    request = task_service_pb2.StartTaskRequest(name=task.name, request_id="go")
    daemon.tasks.StartTask(request)
    daemon.wait(task.name, "COMPLETED")
    daemon.tasks.StartTask(request)
    assert daemon.get(task.name).run == 1


def test_bad_input_names_all_its_fields_and_writes_nothing(daemon: Daemon, scene: Scene) -> None:
    scene.data.write_text(scene.data.read_text() * 6 + "{broken\n")
    gguf = scene.root / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0")
    parameters = scene.parameters(batch_size=0)
    parameters.data.model_path = str(gguf)
    parameters.data.eval_file = str(scene.root / "absent.jsonl")
    request = task_service_pb2.CreateTaskRequest(
        task=task_pb2.Task(parameters=parameters, device="cuda:99", display_name=" x"),
        task_id="NO",
    )
    with refused() as refusal:
        daemon.tasks.CreateTask(request)
    assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
    assert refusal.fields == {
        "training_type": "REQUIRED",
        "task_id": "BAD_TASK_ID",
        "display_name": "BAD_DISPLAY_NAME",
        "device": "DEVICE_NOT_FOUND",
        "data.model_path": "MODEL_IS_GGUF",
        "data.train_file": "BAD_DATA_LINE",
        "data.eval_file": "FILE_NOT_FOUND",
        "training.batch_size": "OUT_OF_RANGE",
    }
    assert list(list_tasks(daemon).tasks) == []


def test_all_fields_are_named_however_long_their_values(daemon: Daemon) -> None:
    parameters = parameters_pb2.Parameters()
    for section in parameters.DESCRIPTOR.fields:
        part = getattr(parameters, section.name)
        for f in section.message_type.fields:
            if f.type == f.TYPE_STRING:
                setattr(part, f.name, "/日本語" * 1000)
            elif f.type in (f.TYPE_INT32, f.TYPE_DOUBLE):
                setattr(part, f.name, -5)
    with refused() as refusal:
        daemon.create(parameters, request_id="x" * 5000)
    assert refusal.fields["request_id"] == "BAD_REQUEST_ID"
    wrong = [f for section in parameters.DESCRIPTOR.fields for f in section.message_type.fields]
    numbers_and_texts = [f for f in wrong if f.type != f.TYPE_BOOL and f.type != f.TYPE_MESSAGE]
    assert len(refusal.fields) == len(numbers_and_texts) + 1
    with refused() as refusal:
        daemon.get("tasks/" + "ü" * 70_000)
    assert refusal.reason == "TASK_NOT_FOUND"


def test_an_unfinished_task_may_be_created_but_not_started(daemon: Daemon) -> None:
    task = daemon.create(parameters_pb2.Parameters())
    with refused() as refusal:
        daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    assert refusal.fields == {
        "data.train_file": "REQUIRED",
        "data.output_dir": "REQUIRED",
        "data.model_path": "REQUIRED",
    }
    assert daemon.get(task.name) == task


def test_tasks_are_listed_newest_first_in_pages(daemon: Daemon) -> None:
    names = [daemon.create(parameters_pb2.Parameters()).name for _ in range(5)]
    listed, token = list[str](), ""
    while True:
        page = list_tasks(daemon, page_size=2, page_token=token)
        listed += [task.name for task in page.tasks]
        token = page.next_page_token
        if not token:
            break
    assert listed == names[::-1]
    (one,) = list_tasks(daemon, display_name=daemon.get(names[2]).display_name).tasks
    assert one.name == names[2]
    assert not list_tasks(daemon, states=[task_pb2.TASK_STATE_RUNNING]).tasks
    assert len(list_tasks(daemon, states=[task_pb2.TASK_STATE_PENDING]).tasks) == 5


def test_a_name_that_is_taken_is_refused(daemon: Daemon) -> None:
    task = daemon.create(parameters_pb2.Parameters(), task_id="mine")
    with refused() as refusal:
        daemon.create(parameters_pb2.Parameters(), task_id="mine")
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.ALREADY_EXISTS, "TASK_ID_TAKEN")
    with refused() as refusal:
        request = task_service_pb2.CreateTaskRequest(
            task=task_pb2.Task(
                training_type=task_pb2.TRAINING_TYPE_SFT, display_name=task.display_name
            )
        )
        daemon.tasks.CreateTask(request)
    assert refusal.reason == "DISPLAY_NAME_TAKEN"


def test_a_second_run_of_a_task_overwrites_nothing_of_the_first(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.play(steps=2), start=True)
    first = daemon.wait(task.name, "COMPLETED")
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    second = daemon.wait(task.name, "COMPLETED")
    assert second.run == 2
    assert second.last_checkpoint != first.last_checkpoint
    runs = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
    assert [run.number for run in runs] == [2, 1]
    assert [run.state for run in runs] == [task_pb2.TASK_STATE_COMPLETED] * 2
    assert runs[0].name == f"{task.name}/runs/2"
    of_second = daemon.tasks.ListEvents(
        task_service_pb2.ListEventsRequest(parent=task.name, run=2)
    ).events
    assert {event.run for event in of_second} == {2}


def test_a_deleted_task_is_gone_and_its_results_stay(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=1), start=True)
    ended = daemon.wait(task.name, "COMPLETED")
    (run,) = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
    with refused() as refusal:
        daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name, etag=task.etag))
    assert refusal.code is grpc.StatusCode.ABORTED, "it has changed since that etag"
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name, etag=ended.etag))
    with refused() as refusal:
        daemon.get(task.name)
    assert (refusal.code, refusal.reason) == (grpc.StatusCode.NOT_FOUND, "TASK_NOT_FOUND")
    assert refusal.of(error_details_pb2.ResourceInfo).resource_name == task.name
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name, allow_missing=True))
    paths = daemon.paths.state_dir
    assert run.run_dir.startswith(str(paths))
    assert not list(paths.glob("runs/*"))
    assert (scene.output / "run-1/checkpoint-1").is_dir()


def test_what_runs_is_neither_deleted_nor_started_again(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True), start=True)
    for call, request in (
        (daemon.tasks.DeleteTask, task_service_pb2.DeleteTaskRequest(name=task.name)),
        (daemon.tasks.StartTask, task_service_pb2.StartTaskRequest(name=task.name)),
    ):
        with refused() as refusal:
            call(request)  # type: ignore[operator]
        assert refusal.code is grpc.StatusCode.FAILED_PRECONDITION
        (violation,) = refusal.of(error_details_pb2.PreconditionFailure).violations
        assert (violation.type, violation.subject) == ("TASK_ACTIVE", task.name)


def test_a_device_runs_one_task_at_a_time_in_the_order_of_their_starts(
    daemon: Daemon, scene: Scene
) -> None:
    names = [daemon.create(scene.play(steps=1, gated=True), start=True).name for _ in range(3)]
    tasks = [daemon.get(name) for name in names]
    assert [task.queue_position for task in tasks] == [0, 1, 2]
    assert tasks[1].state == task_pb2.TASK_STATE_QUEUED
    scene.let_pass(3)
    ended = [daemon.wait(name, "COMPLETED") for name in names]
    spans = [(t.start_time.ToMicroseconds(), t.end_time.ToMicroseconds()) for t in ended]
    assert spans[0][1] <= spans[1][0]
    assert spans[1][1] <= spans[2][0]


def test_a_delete_follows_no_link_out_of_the_run_folders(
    daemon: Daemon, scene: Scene, tmp_path: Path
) -> None:
    task = daemon.create(scene.play(steps=1), start=True)
    daemon.wait(task.name, "COMPLETED")
    (folder,) = (daemon.paths.state_dir / "runs").iterdir()
    treasure = tmp_path / "treasure"
    folder.rename(treasure)
    folder.symlink_to(treasure)
    daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=task.name))
    assert not folder.is_symlink()
    assert list(treasure.iterdir())


@pytest.mark.parametrize("name", ["", "tasks/", "tasks/none", "none", "tasks/a/runs/1", "täsks/😀"])
def test_a_name_of_nothing_is_not_found(daemon: Daemon, name: str) -> None:
    for call, request in (
        (daemon.tasks.GetTask, task_service_pb2.GetTaskRequest(name=name)),
        (daemon.tasks.StopTask, task_service_pb2.StopTaskRequest(name=name)),
        (daemon.tasks.StartTask, task_service_pb2.StartTaskRequest(name=name)),
        (daemon.tasks.DeleteTask, task_service_pb2.DeleteTaskRequest(name=name)),
        (daemon.tasks.ListRuns, task_service_pb2.ListRunsRequest(parent=name)),
        (daemon.tasks.ListEvents, task_service_pb2.ListEventsRequest(parent=name)),
    ):
        with refused() as refusal:
            call(request)  # type: ignore[operator]
        assert refusal.code is grpc.StatusCode.NOT_FOUND


def test_bad_pages_are_named(daemon: Daemon) -> None:
    with refused() as refusal:
        list_tasks(daemon, page_size=-1, page_token="x", states=[99])
    assert set(refusal.fields) == {"page_size", "page_token", "states"}


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff", b"\n\x7f\x01", b"\x12\x02\xff\xfe", bytes(range(256)), b"\n\xff\xff\xff\x7f"],
)
def test_bytes_that_are_no_message_are_a_bad_request(daemon: Daemon, data: bytes) -> None:
    for method in ("CreateTask", "GetTask", "StartTask", "StopTask", "ListEvents"):
        call = daemon.channel.unary_unary(f"/finetuned.v1.TaskService/{method}")
        with pytest.raises(grpc.RpcError) as caught:
            call(data, timeout=10)
        assert caught.value.code() in (
            grpc.StatusCode.INVALID_ARGUMENT,
            grpc.StatusCode.NOT_FOUND,  # some of these bytes are a message, with an odd name
        )

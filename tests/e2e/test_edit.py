"""Tasks after their creation: renamed, edited and started again, deleted with their outputs."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf import field_mask_pb2

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2
from finetuned.v1 import task_service_pb2 as pb2


def update(daemon: Daemon, task: task_pb2.Task, *paths: str, **options: bool) -> task_pb2.Task:
    mask = field_mask_pb2.FieldMask(paths=paths) if paths else None
    request = pb2.UpdateTaskRequest(task=task, update_mask=mask, **options)  # type: ignore[arg-type]
    return daemon.tasks.UpdateTask(request).task


def batch(size: int) -> parameters_pb2.Parameters:
    return parameters_pb2.Parameters(training=parameters_pb2.TrainingParameters(batch_size=size))


def code_of(daemon: Daemon, task: task_pb2.Task, *paths: str) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        update(daemon, task, *paths)
    code: grpc.StatusCode = caught.value.code()
    return code


def test_an_edited_task_starts_again_and_keeps_its_history(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters(batch_size=4), start=True)
    task = daemon.wait(task.name, "COMPLETED")
    edited = update(daemon, task_pb2.Task(name=task.name, etag=task.etag, parameters=batch(8)))
    assert edited.parameters.data.train_file == str(scene.data), "what is not given stays"
    assert edited.state == task_pb2.TASK_STATE_COMPLETED
    daemon.tasks.StartTask(pb2.StartTaskRequest(name=task.name, etag=edited.etag))
    daemon.watch(task.name, edited.last_seq).until_end()
    runs = daemon.tasks.ListRuns(pb2.ListRunsRequest(parent=task.name)).runs
    assert [run.parameters.training.batch_size for run in runs] == [8, 4]


def test_a_watcher_is_told_of_an_edit_and_misses_no_number(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters())
    with daemon.watch(task.name) as watch:
        edit = task_pb2.Task(name=task.name, display_name="renamed", parameters=batch(8))
        edited = update(daemon, edit)
        event = watch.until(lambda e: e.HasField("task_edited"))
    assert list(event.task_edited.fields) == ["display_name", "training.batch_size"]
    assert (event.seq, event.run) == (1, 0)
    assert edited.last_seq == 1


def test_edits_at_once_that_name_no_revision_are_all_made(daemon: Daemon, scene: Scene) -> None:
    """An edit without an etag is of whatever is there, also where another came in between."""
    task = daemon.create(scene.parameters())
    edits = [
        pb2.UpdateTaskRequest(task=task_pb2.Task(name=task.name, parameters=batch(size)))
        for size in range(1, 13)
    ]
    calls = [daemon.tasks.UpdateTask.future(edit, timeout=30) for edit in edits]
    sizes = [call.result().task.parameters.training.batch_size for call in calls]
    assert sizes == list(range(1, 13))


def test_a_task_is_renamed_and_moved_to_another_device(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters())
    other = daemon.create(scene.parameters())
    renamed = update(daemon, task_pb2.Task(name=task.name, display_name="my task"))
    assert renamed.display_name == "my task"
    assert renamed.etag != task.etag
    moved = update(daemon, task_pb2.Task(name=task.name), "device")
    assert moved.device == "", "masked and absent: the device by default"
    taken = task_pb2.Task(name=other.name, display_name="my task")
    assert code_of(daemon, taken) is grpc.StatusCode.ALREADY_EXISTS
    assert code_of(daemon, task_pb2.Task(name=other.name), "display_name") is (
        grpc.StatusCode.INVALID_ARGUMENT
    )
    assert code_of(daemon, task_pb2.Task(name="tasks/none")) is grpc.StatusCode.NOT_FOUND


def test_a_bad_edit_names_all_fields_and_writes_nothing(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters())
    bad = task_pb2.Task(name=task.name, device="cuda:7", parameters=batch(0))
    bad.parameters.data.train_file = str(scene.root / "absent")
    with pytest.raises(grpc.RpcError) as caught:
        update(daemon, bad, "device", "parameters", "state", "parameters.training.nope")
    for field in ("device", "batch_size", "train_file", "'state'", "nope"):
        assert field in caught.value.details()
    assert daemon.get(task.name) == task


def test_only_what_the_mask_names_changes(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters(batch_size=4, num_train_epochs=7))
    edit = task_pb2.Task(name=task.name, display_name="not in the mask", parameters=batch(16))
    edit.parameters.general.seed = 7
    edited = update(daemon, edit, "parameters.training")
    assert edited.parameters.training.batch_size == 16
    assert edited.parameters.training.num_train_epochs == 2, "in the mask and absent: the default"
    assert edited.parameters.general.seed == 42
    assert edited.display_name == task.display_name
    looked = update(daemon, task_pb2.Task(name=task.name, parameters=batch(1)), validate_only=True)
    assert looked.parameters.training.batch_size == 1
    assert daemon.get(task.name) == edited


def test_a_running_task_can_be_neither_edited_nor_deleted(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True), start=True)
    assert code_of(daemon, task_pb2.Task(name=task.name, display_name="x")) is (
        grpc.StatusCode.FAILED_PRECONDITION
    )
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.DeleteTask(pb2.DeleteTaskRequest(name=task.name, delete_outputs=True))
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    daemon.tasks.StopTask(pb2.StopTaskRequest(name=task.name))
    daemon.wait(task.name, "STOPPED")


def test_a_delete_takes_outputs_only_when_asked_and_only_recorded_files(
    daemon: Daemon, scene: Scene
) -> None:
    kept, gone = [
        daemon.wait(daemon.create(scene.play(save_steps=2), start=True).name, "COMPLETED")
        for _ in range(2)
    ]
    folders = [
        Path(daemon.tasks.ListRuns(pb2.ListRunsRequest(parent=task.name)).runs[0].output_dir)
        for task in (kept, gone)
    ]
    answer = daemon.tasks.DeleteTask(pb2.DeleteTaskRequest(name=kept.name))
    assert (answer.deleted_files, list(answer.left_output_dirs)) == (0, [str(folders[0])])
    assert (folders[0] / "checkpoint-2" / "manifest.json").is_file()
    written = [path for path in folders[1].rglob("*") if path.is_file()]
    size = sum(path.stat().st_size for path in written)
    own = folders[1] / "notes.txt"
    own.write_text("of the user")
    answer = daemon.tasks.DeleteTask(pb2.DeleteTaskRequest(name=gone.name, delete_outputs=True))
    assert (answer.deleted_files, answer.deleted_bytes) == (len(written), size)
    assert [p.name for p in folders[1].iterdir()] == ["notes.txt"]
    assert list(answer.left_output_dirs) == [str(folders[1])]


def test_two_tasks_of_the_same_second_have_names_of_their_own(daemon: Daemon, scene: Scene) -> None:
    names = {daemon.create(scene.parameters()).display_name for _ in range(5)}
    assert len(names) == 5

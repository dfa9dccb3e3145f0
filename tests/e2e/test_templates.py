"""Templates: presets, custom ones, and the box that says whether a task's edits reach them."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import field_mask_pb2

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2, template_service_pb2
from finetuned.v1 import task_service_pb2 as tasks_pb2

SFT = task_pb2.TRAINING_TYPE_SFT


def parameters(**training: object) -> parameters_pb2.Parameters:
    return parameters_pb2.Parameters(training=parameters_pb2.TrainingParameters(**training))  # type: ignore[arg-type]


def create(daemon: Daemon, name: str, **training: object) -> template_service_pb2.Template:
    template = template_service_pb2.Template(
        display_name=name, training_type=SFT, parameters=parameters(**training)
    )
    request = template_service_pb2.CreateTemplateRequest(template=template)
    return daemon.templates.CreateTemplate(request).template


def get(daemon: Daemon, name: str) -> template_service_pb2.Template:
    request = template_service_pb2.GetTemplateRequest(name=name)
    return daemon.templates.GetTemplate(request).template


def names(daemon: Daemon, **fields: object) -> list[str]:
    request = template_service_pb2.ListTemplatesRequest(**fields)  # type: ignore[arg-type]
    return [t.display_name for t in daemon.templates.ListTemplates(request).templates]


def refusal(call: object, request: object) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call(request)  # type: ignore[operator]
    return caught.value.code(), caught.value.details()


def test_the_presets_are_there_and_never_change(daemon: Daemon) -> None:
    assert names(daemon) == ["SFT", "Pretrain"]
    assert get(daemon, "templates/sft").parameters.lora.use_lora is True
    pretrain = get(daemon, "templates/pretrain")
    assert pretrain.parameters.lora.use_lora is False
    assert pretrain.preset
    for call, request in (
        (
            daemon.templates.UpdateTemplate,
            template_service_pb2.UpdateTemplateRequest(
                template=template_service_pb2.Template(
                    name="templates/sft", parameters=parameters(batch_size=8)
                )
            ),
        ),
        (
            daemon.templates.DeleteTemplate,
            template_service_pb2.DeleteTemplateRequest(name="templates/sft"),
        ),
    ):
        code, message = refusal(call, request)
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "preset" in message


def test_a_custom_template_is_made_changed_and_deleted(daemon: Daemon) -> None:
    template = create(daemon, "short answers", batch_size=8)
    assert template.parameters.training.batch_size == 8
    assert template.parameters.training.num_train_epochs == 2, "defaults are filled in"
    assert names(daemon) == ["SFT", "Pretrain", "short answers"]
    update = template_service_pb2.UpdateTemplateRequest(
        template=template_service_pb2.Template(
            name=template.name, etag=template.etag, parameters=parameters(learning_rate=1e-3)
        )
    )
    changed = daemon.templates.UpdateTemplate(update).template
    assert changed.parameters.training.batch_size == 8
    assert changed.parameters.training.learning_rate == 1e-3
    assert changed.etag != template.etag
    code, _ = refusal(daemon.templates.UpdateTemplate, update)
    assert code is grpc.StatusCode.ABORTED, "the etag is stale by now"
    mask = field_mask_pb2.FieldMask(paths=["parameters.training.batch_size", "display_name"])
    masked = template_service_pb2.UpdateTemplateRequest(
        template=template_service_pb2.Template(name=template.name, display_name="renamed"),
        update_mask=mask,
    )
    changed = daemon.templates.UpdateTemplate(masked).template
    assert changed.display_name == "renamed"
    assert changed.parameters.training.batch_size == 2, "masked and absent: the default"
    assert changed.parameters.training.learning_rate == 1e-3
    daemon.templates.DeleteTemplate(template_service_pb2.DeleteTemplateRequest(name=template.name))
    assert names(daemon) == ["SFT", "Pretrain"]


def test_names_are_unique_and_a_bad_template_names_all_that_is_wrong(daemon: Daemon) -> None:
    create(daemon, "mine")
    for taken in ("mine", "SFT", "sft"):
        template = template_service_pb2.Template(display_name=taken, training_type=SFT)
        request = template_service_pb2.CreateTemplateRequest(template=template)
        assert refusal(daemon.templates.CreateTemplate, request)[0] is (
            grpc.StatusCode.ALREADY_EXISTS
        )
    template = template_service_pb2.Template(
        parameters=parameters(batch_size=0, eval_strategy="steps")
    )
    request = template_service_pb2.CreateTemplateRequest(template=template, template_id="A")
    code, message = refusal(daemon.templates.CreateTemplate, request)
    assert code is grpc.StatusCode.INVALID_ARGUMENT
    for field in ("template_id", "display_name", "training_type", "batch_size", "eval_strategy"):
        assert field in message
    assert names(daemon) == ["SFT", "Pretrain", "mine"]


def test_a_task_keeps_its_own_parameters(daemon: Daemon, scene: Scene) -> None:
    """Editing or deleting a template changes no task."""
    template = create(daemon, "mine", batch_size=8, num_train_epochs=5)
    task = task_pb2.Task(
        template=template.name, parameters=parameters(num_train_epochs=3), device="cpu"
    )
    task = daemon.tasks.CreateTask(tasks_pb2.CreateTaskRequest(task=task)).task
    assert task.training_type == SFT, "the template says what is trained"
    assert task.parameters.training.batch_size == 8
    assert task.parameters.training.num_train_epochs == 3
    assert get(daemon, template.name).parameters.training.num_train_epochs == 5, "by default"
    daemon.templates.DeleteTemplate(template_service_pb2.DeleteTemplateRequest(name=template.name))
    assert daemon.get(task.name).parameters.training.batch_size == 8


def test_edits_reach_the_template_only_where_the_caller_asks(daemon: Daemon) -> None:
    template = create(daemon, "mine", batch_size=8)
    task = task_pb2.Task(template=template.name, device="cpu")
    task = daemon.tasks.CreateTask(tasks_pb2.CreateTaskRequest(task=task)).task
    for batch_size, writes, kept in ((16, False, 8), (32, True, 32)):
        edit = task_pb2.Task(name=task.name, parameters=parameters(batch_size=batch_size))
        request = tasks_pb2.UpdateTaskRequest(task=edit, update_template=writes)
        edited = daemon.tasks.UpdateTask(request).task
        assert edited.parameters.training.batch_size == batch_size
        assert get(daemon, template.name).parameters.training.batch_size == kept
    of_preset = task_pb2.Task(template="templates/sft", device="cpu")
    request = tasks_pb2.CreateTaskRequest(task=of_preset, update_template=True)
    code, _ = refusal(daemon.tasks.CreateTask, request)
    assert code is grpc.StatusCode.FAILED_PRECONDITION


def test_edits_reach_no_template_of_another_type_by_the_same_name(daemon: Daemon) -> None:
    first = template_service_pb2.Template(display_name="one", training_type=SFT)
    request = template_service_pb2.CreateTemplateRequest(template=first, template_id="tt-one")
    daemon.templates.CreateTemplate(request)
    task = task_pb2.Task(template="templates/tt-one", device="cpu")
    task = daemon.tasks.CreateTask(tasks_pb2.CreateTaskRequest(task=task)).task
    daemon.templates.DeleteTemplate(
        template_service_pb2.DeleteTemplateRequest(name="templates/tt-one")
    )
    request.template.training_type = task_pb2.TRAINING_TYPE_PRETRAIN
    daemon.templates.CreateTemplate(request)
    edit = task_pb2.Task(name=task.name, parameters=parameters(batch_size=77))
    update = tasks_pb2.UpdateTaskRequest(task=edit, update_template=True)
    assert refusal(daemon.tasks.UpdateTask, update)[0] is grpc.StatusCode.FAILED_PRECONDITION
    assert get(daemon, "templates/tt-one").parameters.training.batch_size == 2


def test_only_the_edit_goes_into_the_template_and_never_a_tasks_own_folders(
    daemon: Daemon, scene: Scene
) -> None:
    template = create(daemon, "mine", batch_size=8)
    task = task_pb2.Task(template=template.name, parameters=scene.parameters(), device="cpu")
    task = daemon.tasks.CreateTask(tasks_pb2.CreateTaskRequest(task=task)).task
    edit = task_pb2.Task(name=task.name, parameters=parameters(batch_size=16))
    edit.parameters.data.output_dir = str(scene.root / "elsewhere")
    daemon.tasks.UpdateTask(tasks_pb2.UpdateTaskRequest(task=edit, update_template=True))
    written = get(daemon, template.name).parameters
    assert written.training.batch_size == 16
    assert not written.data.HasField("train_file"), "not edited"
    assert not written.data.HasField("output_dir")


def test_a_template_is_saved_as_from_a_task(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters(batch_size=16))
    template = template_service_pb2.Template(
        display_name="as that task", parameters=parameters(num_train_epochs=9)
    )
    request = template_service_pb2.CreateTemplateRequest(
        template=template, task=task.name, request_id="once"
    )
    saved = daemon.templates.CreateTemplate(request).template
    assert saved.training_type == SFT
    assert saved.parameters.training.batch_size == 16
    assert saved.parameters.training.num_train_epochs == 9
    assert saved.parameters.data.train_file == str(scene.data)
    assert not saved.parameters.data.HasField("output_dir"), "where it writes is the task's own"
    assert daemon.templates.CreateTemplate(request).template == saved, "a repeat is safe"
    daemon.tasks.DeleteTask(tasks_pb2.DeleteTaskRequest(name=task.name))
    assert daemon.templates.CreateTemplate(request).template == saved, "the task has gone since"
    request.request_id = "twice"
    code, message = refusal(daemon.templates.CreateTemplate, request)
    assert code is grpc.StatusCode.NOT_FOUND
    assert task.name in message


def test_custom_templates_survive_a_restart(daemon: Daemon) -> None:
    template = create(daemon, "mine", batch_size=8)
    daemon.kill()
    daemon.start()
    assert get(daemon, template.name) == template

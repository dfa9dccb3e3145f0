"""What a daemon that runs knows of names, asked once and in a short time, for completion."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias, TypeVar

import grpc

from finetuned._channel import open_channel
from finetuned._connect import find
from finetuned._errors import FinetunedError

_SECONDS = 0.25
"""For an answer; a key that was pressed waits for it."""
_PAGE = 500

A_PATH = (("", "path"),)
"""Values of a parameter that is a path, which the shell knows better."""

# What can be done in which states; where none of the tasks fits, all are shown.
_STATES = {
    "stop": ("RUNNING", "QUEUED", "PAUSED"),
    "pause": ("RUNNING", "QUEUED"),
    "resume": ("PAUSED",),
    "move": ("QUEUED",),
    "fix": ("FAILED", "PAUSED"),
}

Answer = TypeVar("Answer")
Named = Iterator[tuple[str, str]]
Values: TypeAlias = tuple[tuple[str, str], ...]


def tasks(address: str | None, verb: str, word: str) -> Named:
    """Display names with states; ids too, where the word is the beginning of one."""
    from finetuned._words import enum_name
    from finetuned.v1.task_pb2 import TaskState

    found = _tasks(address)
    states = [TaskState.Value(f"TASK_STATE_{name}") for name in _STATES.get(verb, ())]
    fitting = [task for task in found if task.state in states] or found
    for task in fitting:
        state = enum_name(TaskState, task.state).removeprefix("TASK_STATE_").lower()
        yield task.display_name or task.name.removeprefix("tasks/"), state
        if word:
            yield task.name.removeprefix("tasks/"), f"{task.display_name}, {state}"


def templates(address: str | None, word: str) -> Named:
    """Display names of templates with types; ids too, where the word is the beginning of one."""
    from finetuned._words import enum_name
    from finetuned.v1.task_pb2 import TrainingType
    from finetuned.v1.template_service_pb2 import ListTemplatesRequest
    from finetuned.v1.template_service_pb2_grpc import TemplateServiceStub

    answer = _ask(
        address,
        lambda channel, options: TemplateServiceStub(channel).ListTemplates(
            ListTemplatesRequest(page_size=_PAGE), **options
        ),
    )
    for template in answer.templates if answer is not None else ():
        kind = (
            enum_name(TrainingType, template.training_type).removeprefix("TRAINING_TYPE_").lower()
        )
        text = f"preset, {kind}" if template.preset else kind
        yield template.display_name, text
        if word:
            yield template.name.removeprefix("templates/"), f"{template.display_name}, {text}"


def devices(address: str | None) -> Named:
    """Devices with their products; without a daemon the one that there always is."""
    from finetuned.v1.system_service_pb2 import ListDevicesRequest
    from finetuned.v1.system_service_pb2_grpc import SystemServiceStub

    answer = _ask(
        address,
        lambda channel, options: SystemServiceStub(channel).ListDevices(
            ListDevicesRequest(), **options
        ),
    )
    if answer is None:
        yield "cpu", ""
        return
    for device in answer.devices:
        yield device.id, device.product_name


def steps(address: str | None, task: str) -> Named:
    """Steps of a task's checkpoints, newest first."""
    from finetuned.v1.task_service_pb2 import ListCheckpointsRequest
    from finetuned.v1.task_service_pb2_grpc import TaskServiceStub

    full = f"tasks/{task.removeprefix('tasks/')}"
    name = next((t.name for t in _tasks(address) if task == t.display_name or full == t.name), "")
    if not name:
        return
    answer = _ask(
        address,
        lambda channel, options: TaskServiceStub(channel).ListCheckpoints(
            ListCheckpointsRequest(parent=name, page_size=_PAGE), **options
        ),
    )
    for checkpoint in answer.checkpoints if answer is not None else ():
        loss = f", eval loss {checkpoint.eval_loss:.4f}" if checkpoint.HasField("eval_loss") else ""
        marks = (", newest" if checkpoint.is_newest else "") + (
            ", best" if checkpoint.is_best else ""
        )
        yield str(checkpoint.step), f"run {checkpoint.run}{loss}{marks}"


def parameters(address: str | None) -> dict[str, tuple[str, Values]]:
    """Paths with their labels, and with their values and those values' labels.

    Without a daemon: the paths that this program knows, and the values of switches.
    """
    found = {path: ("", _values_of(field)) for path, field in _fields().items()}
    from finetuned._language import language_of
    from finetuned.v1.parameter_service_pb2 import GetParameterSchemaRequest, ParameterType
    from finetuned.v1.parameter_service_pb2_grpc import ParameterServiceStub
    from finetuned.v1.task_pb2 import TrainingType

    answer = _ask(
        address,
        lambda channel, options: ParameterServiceStub(channel).GetParameterSchema(
            GetParameterSchemaRequest(training_type=TrainingType.TRAINING_TYPE_SFT), **options
        ),
    )
    if answer is None:
        return found
    is_chinese = language_of(None) == "zh"
    paths = (ParameterType.PARAMETER_TYPE_FILE, ParameterType.PARAMETER_TYPE_DIRECTORY)
    for section in answer.sections:
        for field in section.fields:
            label = field.label.zh if is_chinese else field.label.en
            values = found.get(field.path, ("", ()))[1]
            if field.type in paths:
                values = A_PATH
            elif field.choices:
                values = tuple(
                    (choice.value, choice.label.zh if is_chinese else choice.label.en)
                    for choice in field.choices
                )
            found[field.path] = (label, values)
    return found


def _fields() -> dict[str, Any]:
    from finetuned._parameters import fields

    return dict(fields())


def _values_of(field: Any) -> tuple[tuple[str, str], ...]:
    from google.protobuf.descriptor import FieldDescriptor

    is_switch = field.cpp_type == FieldDescriptor.CPPTYPE_BOOL
    return (("true", ""), ("false", "")) if is_switch else ()


def _tasks(address: str | None) -> list[Any]:
    from finetuned.v1.task_service_pb2 import ListTasksRequest
    from finetuned.v1.task_service_pb2_grpc import TaskServiceStub

    answer = _ask(
        address,
        lambda channel, options: TaskServiceStub(channel).ListTasks(
            ListTasksRequest(page_size=_PAGE), **options
        ),
    )
    return list(answer.tasks) if answer is not None else []


def _ask(address: str | None, call: Callable[[grpc.Channel, Any], Answer]) -> Answer | None:
    """The daemon's answer; None where there is none in time."""
    try:
        endpoint = find(address)
        with open_channel(endpoint) as channel:
            return call(channel, {"timeout": _SECONDS, "metadata": endpoint.metadata})
    except (FinetunedError, grpc.RpcError):
        return None

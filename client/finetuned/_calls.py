"""What both clients do, without input or output of its own.

Each operation is a generator that yields the `Call`s to make, is sent their answers, and returns
the operation's result. `Client` and `AsyncClient` differ only in how they make a call.
"""

from __future__ import annotations

import re
import uuid
from collections.abc import Generator, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeVar

from google.protobuf.field_mask_pb2 import FieldMask
from google.protobuf.message import Message

from finetuned._checks import check_numbers, check_texts, refuse
from finetuned._errors import FieldViolation, NotFound
from finetuned._parameters import (
    SECTIONS,
    UNKNOWN_FIELD,
    closest,
    fields,
    flatten,
    from_mapping,
    wrong_type,
)
from finetuned.v1 import system_service_pb2 as system
from finetuned.v1 import task_service_pb2 as tasks
from finetuned.v1 import template_service_pb2 as templates
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.system_service_pb2 import Device, GetSystemInfoResponse
from finetuned.v1.task_pb2 import ResumeChoice, Task, TaskState, TrainingType
from finetuned.v1.template_service_pb2 import Template

T = TypeVar("T")

TASK_SERVICE = "TaskService"
SYSTEM_SERVICE = "SystemService"
PARAMETER_SERVICE = "ParameterService"
TEMPLATE_SERVICE = "TemplateService"
DATASET_SERVICE = "DatasetService"
HEALTH_SERVICE = "Health"

READING_SECONDS = 120.0
"""For calls that read the whole training file."""

ALL_PARAMETERS = "parameters"
"""As what is to be reset: every parameter."""

# Presets have shorter ids than the daemon takes for others.
_TEMPLATE_ID = re.compile(r"[a-z][a-z0-9-]{2,62}")
_TASK_ID = re.compile(r"[a-z][a-z0-9-]{3,62}")
_RESOURCE = {kind: re.compile(rf"{kind}s/[^/]+") for kind in ("task", "template")}


class Named(Protocol):
    """What has a resource name, such as a `Task` or a handle."""

    @property
    def name(self) -> str:
        """Such as `tasks/{task_id}`."""
        ...


TaskName: TypeAlias = str | Named
"""What a task is asked for by."""


@dataclass(frozen=True)
class Call:
    """One unary call to make."""

    service: str
    rpc: str
    request: Message
    repeatable: bool = True
    """Whether the contract says that a repeat is safe."""
    timeout: float | None = None
    """Seconds that it may take, where the client's own are fewer; None for the client's own."""
    may_start: bool = True
    """Whether a daemon may be started for it."""


Steps = Generator[Call, Any, T]
"""An operation: yields calls, is sent their answers, returns its result."""


def create_task(
    training_type: str | TrainingType.ValueType,
    parameters: Mapping[str, Any] | Parameters | None,
    display_name: str,
    device: str,
    task_id: str,
    start: bool,
    request_id: str,
    validate_only: bool,
    template: str,
    update_template: bool,
) -> Steps[Task]:
    """CreateTask, repeatable by a request id of our own."""
    check_texts(display_name=display_name, device=device, task_id=task_id, request_id=request_id)
    request = tasks.CreateTaskRequest(
        task=Task(
            display_name=display_name,
            training_type=training_type_number(training_type),
            parameters=from_mapping(parameters),
            device=device,
            template=(yield from resolve_template(template)) if template else "",
        ),
        task_id=task_id,
        start=start,
        request_id=request_id or str(uuid.uuid4()),
        validate_only=validate_only,
        update_template=update_template,
    )
    answer: tasks.CreateTaskResponse = yield Call(
        TASK_SERVICE, "CreateTask", request, timeout=READING_SECONDS
    )
    return answer.task


def get_task(name: TaskName) -> Steps[Task]:
    """GetTask, by any of its names."""
    name = name_of(name)
    if name.startswith("tasks/"):
        answer: tasks.GetTaskResponse = yield Call(
            TASK_SERVICE, "GetTask", tasks.GetTaskRequest(name=name)
        )
        return answer.task
    if _TASK_ID.fullmatch(name):
        try:
            return (yield from get_task(f"tasks/{name}"))
        except NotFound:
            pass  # it can be a display name of the same form
    found: tasks.ListTasksResponse = yield Call(
        TASK_SERVICE, "ListTasks", tasks.ListTasksRequest(display_name=name)
    )
    if not found.tasks:
        raise NotFound(f"there is no task {name!r}", reason="TASK_NOT_FOUND")
    return found.tasks[0]


def resolve(name: TaskName) -> Steps[str]:
    """The resource name `tasks/{task_id}` for any name of a task."""
    name = name_of(name)
    if name.startswith("tasks/"):
        return name
    task = yield from get_task(name)
    return task.name


def template_of(name: str) -> Steps[Template]:
    """GetTemplate, by any of its names."""
    name = name_of(name, "template")
    if name.startswith("templates/"):
        answer: templates.GetTemplateResponse = yield Call(
            TEMPLATE_SERVICE, "GetTemplate", templates.GetTemplateRequest(name=name)
        )
        return answer.template
    if _TEMPLATE_ID.fullmatch(name):
        try:
            return (yield from template_of(f"templates/{name}"))
        except NotFound:
            pass  # it can be a display name of the same form
    found: templates.ListTemplatesResponse = yield Call(
        TEMPLATE_SERVICE, "ListTemplates", templates.ListTemplatesRequest(display_name=name)
    )
    if not found.templates:
        raise NotFound(f"there is no template {name!r}", reason="TEMPLATE_NOT_FOUND")
    return found.templates[0]


def resolve_template(name: str) -> Steps[str]:
    """The resource name `templates/{template_id}` for any name of a template."""
    name = name_of(name, "template")
    if name.startswith("templates/"):
        return name
    template = yield from template_of(name)
    return template.name


def mask_of(
    texts: Mapping[str, str | None], parameters: Iterable[str], reset: str | Iterable[str]
) -> FieldMask:
    """What an update changes: texts that are not None, the parameters given, those to reset.

    Raises:
        InvalidArgument: A path to reset names no parameter and no section.
    """
    known = {*fields(), *SECTIONS, ALL_PARAMETERS}
    check_texts(**{f"reset[{place}]": path for place, path in enumerate(items(reset))})
    to_reset = [path.removeprefix("parameters.") for path in items(reset)]
    unknown = [path for path in to_reset if path not in known]
    if unknown:
        refuse([FieldViolation(path, _no_parameter(path), UNKNOWN_FIELD) for path in unknown])
    paths = [name for name, text in texts.items() if text is not None]
    paths += [f"parameters.{path}" for path in (*parameters, *to_reset) if path != ALL_PARAMETERS]
    paths += [ALL_PARAMETERS] if ALL_PARAMETERS in to_reset else []
    return FieldMask(paths=sorted(set(paths)))


def items(one_or_more: str | int | Iterable[T]) -> tuple[Any, ...]:
    """Each of these; a text, or what is no collection, is one."""
    if isinstance(one_or_more, str) or not isinstance(one_or_more, Iterable):
        return (one_or_more,)
    return tuple(one_or_more)


def list_tasks_page(
    states: Iterable[str | TaskState.ValueType], page_token: str
) -> Steps[tasks.ListTasksResponse]:
    """One page of ListTasks."""
    request = tasks.ListTasksRequest(
        page_token=page_token, states=[task_state(state) for state in states]
    )
    page: tasks.ListTasksResponse = yield Call(TASK_SERVICE, "ListTasks", request)
    return page


def update_task(
    name: str,
    parameters: Mapping[str, Any] | Parameters | None,
    display_name: str | None,
    device: str | None,
    reset: str | Iterable[str],
    update_template: bool,
    validate_only: bool,
    etag: str,
) -> Steps[Task]:
    """UpdateTask. With an etag a repeat would be ABORTED, by the change that was made."""
    given = from_mapping(parameters)
    mask = mask_of({"display_name": display_name, "device": device}, flatten(given), reset)
    check_texts(
        display_name="" if display_name is None else display_name,
        device="" if device is None else device,
        etag=etag,
    )
    request = tasks.UpdateTaskRequest(
        task=Task(
            name=(yield from resolve(name)),
            display_name=display_name or "",
            device=device or "",
            parameters=given,
            etag=etag,
        ),
        update_mask=mask,
        update_template=update_template,
        validate_only=validate_only,
    )
    answer: tasks.UpdateTaskResponse = yield Call(
        TASK_SERVICE, "UpdateTask", request, repeatable=not etag, timeout=READING_SECONDS
    )
    return answer.task


def delete_task(
    name: str, etag: str, allow_missing: bool, delete_outputs: bool
) -> Steps[tasks.DeleteTaskResponse]:
    """DeleteTask. A repeat would be NOT_FOUND, so it is made only where that is no error."""
    try:
        name = yield from resolve(name)
    except NotFound:
        if allow_missing:
            return tasks.DeleteTaskResponse()
        raise
    check_texts(etag=etag)
    request = tasks.DeleteTaskRequest(
        name=name, etag=etag, allow_missing=allow_missing, delete_outputs=delete_outputs
    )
    answer: tasks.DeleteTaskResponse = yield Call(
        TASK_SERVICE, "DeleteTask", request, repeatable=allow_missing, timeout=READING_SECONDS
    )
    return answer


def start_task(
    name: str,
    etag: str,
    request_id: str,
    resume: ResumeChoice.ValueType,
    resume_path: str,
    *,
    probe: bool = False,
) -> Steps[Task]:
    """StartTask, repeatable by a request id of our own."""
    check_texts(etag=etag, request_id=request_id)
    request = tasks.StartTaskRequest(
        name=(yield from resolve(name)),
        etag=etag,
        request_id=request_id or str(uuid.uuid4()),
        resume=resume,
        resume_path=resume_path,
        probe=probe,
    )
    answer: tasks.StartTaskResponse = yield Call(
        TASK_SERVICE, "StartTask", request, timeout=READING_SECONDS
    )
    return answer.task


def stop_task(name: str, discard: bool) -> Steps[Task]:
    """StopTask."""
    request = tasks.StopTaskRequest(name=(yield from resolve(name)), discard=discard)
    answer: tasks.StopTaskResponse = yield Call(TASK_SERVICE, "StopTask", request)
    return answer.task


def list_runs_page(name: str, page_token: str) -> Steps[tasks.ListRunsResponse]:
    """One page of ListRuns; `name` is a resource name."""
    request = tasks.ListRunsRequest(parent=name, page_token=page_token)
    page: tasks.ListRunsResponse = yield Call(TASK_SERVICE, "ListRuns", request)
    return page


def list_events_page(name: str, after_seq: int, run: int) -> Steps[tasks.ListEventsResponse]:
    """One page of ListEvents; `name` is a resource name."""
    check_numbers(run=run)
    check_numbers(64, after_seq=after_seq)
    request = tasks.ListEventsRequest(parent=name, after_seq=after_seq, run=run)
    page: tasks.ListEventsResponse = yield Call(TASK_SERVICE, "ListEvents", request)
    return page


def system_info() -> Steps[GetSystemInfoResponse]:
    """GetSystemInfo."""
    info: GetSystemInfoResponse = yield Call(
        SYSTEM_SERVICE, "GetSystemInfo", system.GetSystemInfoRequest()
    )
    return info


def list_devices() -> Steps[list[Device]]:
    """ListDevices."""
    answer: system.ListDevicesResponse = yield Call(
        SYSTEM_SERVICE, "ListDevices", system.ListDevicesRequest()
    )
    return list(answer.devices)


def shutdown() -> Steps[None]:
    """Shutdown, never repeated: a lost answer would be followed by "nobody there"."""
    yield Call(SYSTEM_SERVICE, "Shutdown", system.ShutdownRequest(), repeatable=False)


def name_of(name: object, kind: str = "task") -> str:
    """The name, or that of the task or handle given.

    Raises:
        TypeError: It is neither: what came of it would be about another task or template.
        InvalidArgument: It can be no name.
    """
    own: object = getattr(name, "name", None)
    if isinstance(own, str) and _RESOURCE[kind].fullmatch(own):
        return own
    if not isinstance(name, str):
        kind_of = type(name).__name__
        raise TypeError(f"a {kind}'s name is a str, such as {kind}.name, not {kind_of}")
    check_texts(name=name)
    if not name.strip():
        refuse([FieldViolation("name", f"must name a {kind}, and is empty", "REQUIRED")])
    return name


def _no_parameter(path: str) -> str:
    close = closest(path)
    return "is no parameter" + (f"; did you mean {close[0]}?" if close else "")


def training_type_number(value: str | TrainingType.ValueType) -> TrainingType.ValueType:
    """The number for `sft` or `pretrain`."""
    number: TrainingType.ValueType = enum_number(
        TrainingType, "TRAINING_TYPE_", "training_type", value
    )
    return number


def task_state(value: str | TaskState.ValueType) -> TaskState.ValueType:
    number: TaskState.ValueType = enum_number(TaskState, "TASK_STATE_", "states", value)
    return number


def enum_number(enum: Any, prefix: str, field: str, value: Any) -> Any:
    """The enum's number for `sft`, `SFT`, `TRAINING_TYPE_SFT` or the number itself."""
    if isinstance(value, int) and not isinstance(value, bool):
        check_numbers(**{field: value})
        return value
    if not isinstance(value, str):
        refuse(
            [
                wrong_type(
                    field, "a word such as " + enum.keys()[1].removeprefix(prefix).lower(), value
                )
            ]
        )
    word = value.upper().removeprefix(prefix)
    choices = [name.removeprefix(prefix).lower() for name in enum.keys()[1:]]
    if word.lower() not in choices:
        violation = FieldViolation(
            field, f"must be one of {', '.join(choices)}, not {value!r}", "NOT_A_CHOICE"
        )
        refuse([violation])
    return enum.Value(prefix + word)

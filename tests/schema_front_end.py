"""A front-end of text that knows the protos and the served schema, and no parameter by name.

It draws the form, evaluates its conditions, takes what a user enters beside a label, builds the
message, has it judged, and creates and starts the task: what the author of any front-end would
write, in any language.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any, Literal

import grpc
from google.protobuf import json_format, struct_pb2

from finetuned.v1 import parameter_service_pb2 as pb2
from finetuned.v1 import (
    parameter_service_pb2_grpc,
    parameters_pb2,
    task_pb2,
    task_service_pb2,
    task_service_pb2_grpc,
)

Language = Literal["zh", "en"]
_SEVERITY = {
    pb2.SEVERITY_ERROR: "error",
    pb2.SEVERITY_WARNING: "warning",
    pb2.SEVERITY_NOTICE: "notice",
}
_ENDED = (
    task_pb2.TASK_STATE_COMPLETED,
    task_pb2.TASK_STATE_STOPPED,
    task_pb2.TASK_STATE_FAILED,
)


@dataclass
class Form:
    """The form of one training type, and what the user has entered into it."""

    channel: grpc.Channel
    training_type: task_pb2.TrainingType.ValueType
    language: Language
    entered: dict[str, Any] = field(default_factory=dict[str, Any])
    violations: list[pb2.ParameterViolation] = field(default_factory=list[pb2.ParameterViolation])

    def __post_init__(self) -> None:
        self._parameters = parameter_service_pb2_grpc.ParameterServiceStub(self.channel)
        self._tasks = task_service_pb2_grpc.TaskServiceStub(self.channel)
        request = pb2.GetParameterSchemaRequest(training_type=self.training_type)
        self.schema = self._parameters.GetParameterSchema(request)
        self.fields = {f.path: f for section in self.schema.sections for f in section.fields}

    # --- what a user does

    def enter(self, label: str, value: Any) -> None:
        """Enters a value into the field with this label."""
        parameter = self._labelled(label)
        assert self._holds(parameter.visible_when), f"{label} is not to be seen"
        assert self._holds(parameter.enabled_when), f"{label} can't be changed"
        self.entered[parameter.path] = value

    def ask(self, label: str) -> str:
        """What is shown where the user asks what a field means."""
        return self._text(self._labelled(label).help)

    def validate(self, device: str) -> bool:
        """Asks the daemon; its answers stand beside their fields from now on."""
        request = pb2.ValidateParametersRequest(
            training_type=self.training_type, parameters=self.message(), device=device
        )
        answer = self._parameters.ValidateParameters(
            request, metadata=(("accept-language", self.language),)
        )
        self.violations = list(answer.violations)
        return answer.valid

    def take_suggestion(self, path: str) -> None:
        """Presses the button beside a message that offers a value."""
        (violation,) = [v for v in self.violations if v.field == path]
        self.entered[violation.suggested_field or path] = _plain(violation.suggested_value)

    def start(self, device: str) -> task_pb2.Task:
        """Creates the task and starts it; returns it as it has ended."""
        task = task_pb2.Task(
            training_type=self.training_type, parameters=self.message(), device=device
        )
        created = self._tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task)).task
        self._tasks.StartTask(task_service_pb2.StartTaskRequest(name=created.name))
        request = task_service_pb2.WatchTaskRequest(name=created.name)
        watch = self._tasks.WatchTask(request, timeout=60)
        for response in watch:
            if response.event.state_change.new_state in _ENDED:
                break
        watch.cancel()
        request = task_service_pb2.GetTaskRequest(name=created.name)
        return self._tasks.GetTask(request).task

    def state(self, task: task_pb2.Task) -> str:
        """How the list of tasks shows the state of one."""
        (look,) = [look for look in self.schema.task_states if look.state == task.state]
        return f"{self._text(look.label)} ({look.color})"

    def message(self) -> parameters_pb2.Parameters:
        """What was entered, as the message of the API."""
        document: dict[str, dict[str, Any]] = {}
        for path, value in self.entered.items():
            section, name = path.split(".")
            if self.fields[path].type == pb2.PARAMETER_TYPE_MULTICHOICE:
                value = {"values": value}
            document.setdefault(section, {})[name] = value
        return json_format.ParseDict(document, parameters_pb2.Parameters())

    # --- how it looks

    def draw(self) -> str:
        """The form as text: every section with its folds, and messages beside their fields."""
        types = self.schema.training_types
        lines = [
            "  ".join(
                f"({'o' if kind.training_type == self.training_type else ' '}) "
                f"{self._text(kind.label)}"
                for kind in types
            )
        ]
        for section in self.schema.sections:
            title = self._text(section.label)
            lines += ["", title, "=" * sum(1 if c.isascii() else 2 for c in title)]
            for fold in self.schema.folds:
                fields = [
                    f for f in section.fields if f.fold == fold.name and self._holds(f.visible_when)
                ]
                if fields:
                    lines.append(f"{'v' if fold.expanded else '>'} {self._text(fold.label)}")
                for parameter in fields:
                    lines += self._draw(parameter)
        return "\n".join(line.rstrip() for line in lines).strip() + "\n"

    def _draw(self, parameter: pb2.ParameterField) -> list[str]:
        mark = "*" if parameter.required else "!" if parameter.discouraged else " "
        off = "" if self._holds(parameter.enabled_when) else "~"
        unit = self._text(parameter.unit)
        note = self._text(parameter.note)
        line = f"  {mark} {self._text(parameter.label)}: {off}{self._control(parameter)}"
        line += (f" {unit}" if unit else "") + (f"  ({note})" if note else "")
        beside = [
            f"      {_SEVERITY[v.severity]}: {v.message}"
            for v in self.violations
            if v.field == parameter.path
        ]
        return [line, *beside]

    def _control(self, parameter: pb2.ParameterField) -> str:
        value = self.value(parameter.path)
        match parameter.widget:
            case pb2.WIDGET_SWITCH:
                return "[x]" if value else "[ ]"
            case pb2.WIDGET_SELECT:
                labels = {c.value: self._text(c.label) or c.value for c in parameter.choices}
                return f"< {labels.get(value, value)} >"
            case pb2.WIDGET_MULTISELECT:
                names = [choice.value for choice in parameter.choices]
                ticks = [f"[{'x' if name in value else ' '}] {name}" for name in names]
                ticks += [f"[x] {name}" for name in value if name not in names]
                return " ".join([*ticks, *(["[+]"] if parameter.allows_other_choices else [])])
            case pb2.WIDGET_FILE_PICKER | pb2.WIDGET_DIRECTORY_PICKER:
                button = "..." if parameter.widget == pb2.WIDGET_FILE_PICKER else ".../"
                return f"[{value or '':<20}] ({button})"
            case pb2.WIDGET_SLIDER:
                span = parameter.maximum - parameter.minimum
                place = round((value - parameter.minimum) / span * 10)
                return f"|{'-' * place}o{'-' * (10 - place)}| {value:g}"
            case pb2.WIDGET_SCIENTIFIC:
                mantissa, exponent = f"{value:e}".split("e")
                return f"[ {float(mantissa):g}e{int(exponent)} ]"
            case _:
                limits = f"{parameter.minimum:g}..{parameter.maximum:g}"
                return f"[ {value:g} ] {limits} ±{parameter.step:g}"

    def value(self, path: str) -> Any:
        """The present value of a field: as entered, else its default."""
        if path in self.entered:
            return self.entered[path]
        parameter = self.fields[path]
        return _plain(parameter.default_value) if parameter.HasField("default_value") else None

    def _labelled(self, label: str) -> pb2.ParameterField:
        (found,) = [f for f in self.fields.values() if self._text(f.label) == label]
        return found

    def _holds(self, conditions: Any) -> bool:
        return all(self._one_holds(condition) for condition in conditions)

    def _one_holds(self, condition: pb2.Condition) -> bool:
        if condition.field == "training_type":
            name = task_pb2.TrainingType.Name(self.training_type)
            value: Any = name.removeprefix("TRAINING_TYPE_").lower()
        elif condition.field in self.fields:
            value = self.value(condition.field)
            value = None if value == "" else value
        else:
            value = None
        is_one = value in [_plain(v) for v in condition.values]
        return is_one is (condition.operator == pb2.CONDITION_OPERATOR_ONE_OF)

    def _text(self, text: pb2.LocalizedText) -> str:
        return text.zh if self.language == "zh" else text.en


def _plain(value: struct_pb2.Value) -> Any:
    return json.loads(json_format.MessageToJson(value))

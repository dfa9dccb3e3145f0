"""What the daemon says about parameters, as Python values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.struct_pb2 import Value

from finetuned._errors import FieldViolation
from finetuned._parameters import fields
from finetuned._words import enum_name
from finetuned.v1 import parameter_service_pb2 as wire

SeverityWord = Literal["error", "warning", "notice"]

_INTEGERS = (FieldDescriptor.CPPTYPE_INT32, FieldDescriptor.CPPTYPE_INT64)


@dataclass(frozen=True)
class ParameterViolation:
    """One thing about parameters that is wrong, unusual, or good to know."""

    field: str
    """Path, such as `training.batch_size`."""
    reason: str
    """Stable, in capitals, such as `OUT_OF_RANGE`."""
    message: str
    """A sentence, in the client's language."""
    severity: SeverityWord
    """`error`: it can't be started like this. `warning`: it can, and is probably not what is
    wanted. `notice`: good to know."""
    suggested_value: Any = None
    """A value that would be right, of the field's own type; None where none is known."""
    suggested_field: str = ""
    """The field that `suggested_value` is for; empty where it is for `field`."""


def from_messages(messages: Iterable[wire.ParameterViolation]) -> list[ParameterViolation]:
    """Violations as they came, in their order."""
    return [_from_message(message) for message in messages]


def from_shape(violations: Iterable[FieldViolation]) -> list[ParameterViolation]:
    """Errors that were seen before anything was sent: unknown names and wrong types."""
    return [
        ParameterViolation(wrong.field, wrong.reason, wrong.description, "error")
        for wrong in violations
    ]


def plain_value(value: Value, path: str = "") -> Any:
    """A protobuf value as a Python one; a number as the parameter at `path` holds it."""
    match value.WhichOneof("kind"):
        case "number_value":
            field = fields().get(path)
            number = value.number_value
            is_whole = field.cpp_type in _INTEGERS if field is not None else number % 1 == 0
            return int(number) if is_whole else number
        case "string_value":
            return value.string_value
        case "bool_value":
            return value.bool_value
        case "list_value":
            return [plain_value(item) for item in value.list_value.values]
        case "struct_value":
            return {key: plain_value(item) for key, item in value.struct_value.fields.items()}
        case _:
            return None


def _from_message(message: wire.ParameterViolation) -> ParameterViolation:
    name = enum_name(wire.Severity, message.severity).removeprefix("SEVERITY_").lower()
    return ParameterViolation(
        field=message.field,
        reason=message.reason,
        message=message.message,
        severity=cast("SeverityWord", name if message.severity else "error"),
        suggested_value=plain_value(
            message.suggested_value, message.suggested_field or message.field
        ),
        suggested_field=message.suggested_field,
    )

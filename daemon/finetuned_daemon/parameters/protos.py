"""Parameters between their proto messages and their models. Both have the same fields.

A test compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from finetuned.v1 import parameters_pb2
from finetuned_daemon.parameters.models import SECTIONS, Parameters


def to_dict(message: parameters_pb2.Parameters) -> dict[str, dict[str, Any]]:
    """The fields that are set, by section; what is absent stays absent."""
    result = dict[str, dict[str, Any]]()
    for section in SECTIONS:
        values = dict[str, Any]()
        for field, value in getattr(message, section).ListFields():
            values[field.name] = (
                list(value.values) if isinstance(value, parameters_pb2.StringList) else value
            )
        result[section] = values
    return result


def to_proto(parameters: Parameters) -> parameters_pb2.Parameters:
    """The message with every field set that has a value."""
    message = parameters_pb2.Parameters()
    for section, model in SECTIONS.items():
        part = getattr(message, section)
        values = getattr(parameters, section)
        for name in model.model_fields:
            value = getattr(values, name)
            if isinstance(value, list):
                getattr(part, name).values.extend(value)
            elif value is not None:
                setattr(part, name, value)
    return message


def patch_to_proto(
    values: Mapping[str, bool | int | float | str | Sequence[str]],
) -> parameters_pb2.Parameters:
    """The message with the fields of these paths set, such as `training.batch_size`."""
    message = parameters_pb2.Parameters()
    for path, value in values.items():
        section, _, name = path.partition(".")
        part = getattr(message, section)
        if isinstance(value, str | int | float):
            setattr(part, name, value)
        else:
            getattr(part, name).values.extend(value)
    return message

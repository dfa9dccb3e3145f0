"""Parameters as documents: plain values by section, as in YAML, JSON and parameter files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from finetuned._parameters import flatten
from finetuned._violations import plain_value
from finetuned._words import enum_name
from finetuned.v1.parameter_service_pb2 import GetParameterSchemaResponse
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.task_pb2 import TrainingType
from finetuned.v1.template_service_pb2 import Template


def template_document(
    template: Template, schema: GetParameterSchemaResponse | None = None
) -> dict[str, Any]:
    """A template as a document, which `finetunectl train -f` and `template import` read.

    Args:
        template: The template.
        schema: Of its training type, to leave out what equals its default. None: everything.

    Returns:
        `kind` (`template`), `training_type`, `display_name`, and `parameters`: section to field to
        value.
    """
    word = enum_name(TrainingType, template.training_type).removeprefix("TRAINING_TYPE_").lower()
    return {
        "kind": "template",
        "training_type": word,
        "display_name": template.display_name,
        "parameters": sections(differing(template.parameters, schema)),
    }


def differing(parameters: Parameters, schema: GetParameterSchemaResponse | None) -> dict[str, Any]:
    """Values by path that differ from their defaults; without a schema, all that there are.

    An empty text is as good as none, and is left out.
    """
    defaults: dict[str, Any] = {}
    if schema is not None:
        for section in schema.sections:
            for field in section.fields:
                defaults[field.path] = plain_value(field.default_value, field.path)
    return {
        path: value
        for path, value in flatten(parameters).items()
        if value != "" and (schema is None or (path in defaults and value != defaults[path]))
    }


def sections(values: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Values by path as section to field to value."""
    result: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, name = path.partition(".")
        result.setdefault(section, {})[name] = value
    return result

"""How one parameter is written down: a pydantic field with all that a form needs to draw it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic.fields import FieldInfo

from finetuned_daemon.texts import NOTHING, Text

Fold = Literal["common", "optional", "advanced", "optimization", "saving", "evaluation"]
Widget = Literal[
    "SWITCH",
    "NUMBER",
    "SCIENTIFIC",
    "SLIDER",
    "SELECT",
    "MULTISELECT",
    "FILE_PICKER",
    "DIRECTORY_PICKER",
]
"""Names as in `finetuned.v1.Widget`."""

Value = bool | int | float | str | None

_KEY = "parameter"


@dataclass(frozen=True)
class Condition:
    """A comparison with the present value of another field; None stands for empty."""

    field: str
    """Path of a parameter, or `training_type`, whose values are `sft` and `pretrain`."""
    values: tuple[Value, ...]
    is_negated: bool = False
    """Holds where the value is none of them."""


def one_of(field: str, *values: Value) -> Condition:
    """Holds where the field has one of these values."""
    return Condition(field, values)


def none_of(field: str, *values: Value) -> Condition:
    """Holds where the field has another value."""
    return Condition(field, values, is_negated=True)


SFT_ONLY = one_of("training_type", "sft")


@dataclass(frozen=True, kw_only=True)
class ParameterInfo:
    """All that is said of a parameter beside its type, default and range."""

    label: Text
    help: Text
    fold: Fold
    required: bool
    """The user must see and confirm it; without a default it must be filled before a start."""
    discouraged: bool
    path: Literal["file", "directory"] | None
    widget: Widget | None
    """None: the usual one of its type."""
    step: float | None
    """Step of the control, where its type has no step of its own."""
    unit: Text
    note: Text
    """What special values mean."""
    choices: Mapping[str, Text]
    """Label of each choice; of a list, its usual values."""
    visible_when: tuple[Condition, ...]
    enabled_when: tuple[Condition, ...]


def parameter(
    default: Any,
    zh: str,
    en: str,
    fold: Fold,
    *,
    help: Text,  # noqa: A002 - the schema's own word
    required: bool = False,
    discouraged: bool = False,
    path: Literal["file", "directory"] | None = None,
    widget: Widget | None = None,
    step: float | None = None,
    unit: Text = NOTHING,
    note: Text = NOTHING,
    choices: Mapping[str, Text] | None = None,
    visible_when: tuple[Condition, ...] = (),
    enabled_when: tuple[Condition, ...] = (),
    **constraints: Any,
) -> Any:
    """One parameter: default, labels, fold, what `ParameterInfo` says, and pydantic's constraints.

    `constraints` are `ge`, `le`, `multiple_of`, `min_length`, `max_length`.
    """
    info = ParameterInfo(
        label=Text(en, zh),
        help=help,
        fold=fold,
        required=required,
        discouraged=discouraged,
        path=path,
        widget=widget,
        step=step,
        unit=unit,
        note=note,
        choices=choices or {},
        visible_when=visible_when,
        enabled_when=enabled_when,
    )
    # Nobody asks these models for JSON schema: the schema of the API says more.
    return Field(default, json_schema_extra=cast("Any", {_KEY: info}), **constraints)


class Section(BaseModel):
    """A section of the form."""

    # Strict: a bool is no int and a string no number; clients that read text convert it themselves.
    # A section is read within all parameters: what it would be on its own is hardly ever built.
    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, allow_inf_nan=False, defer_build=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _empty_path_is_none(cls, value: Any, validation: ValidationInfo) -> Any:
        # What a form sends once a user has cleared the field; absent would keep what was there.
        if value == "" and validation.field_name is not None:
            return None if info_of(cls.model_fields[validation.field_name]).path else value
        return value


def info_of(field: FieldInfo) -> ParameterInfo:
    """What is said of a field of a section."""
    extra = field.json_schema_extra
    assert isinstance(extra, dict)
    return cast("ParameterInfo", extra[_KEY])


def limits_of(field: FieldInfo) -> dict[str, Any]:
    """The constraints `ge`, `le` and `multiple_of` of a field, as far as it has them."""
    return {
        name: getattr(constraint, name)
        for constraint in field.metadata
        for name in ("ge", "le", "multiple_of")
        if hasattr(constraint, name)
    }


STEPS = Text("steps", "步")
SAMPLES = Text("samples", "个样本")
TOKENS = Text("tokens", "token")

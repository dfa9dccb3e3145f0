"""The form as the API serves it, built from the models: sections, folds, fields, conditions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, get_args

from google.protobuf import struct_pb2
from pydantic.fields import FieldInfo

from finetuned.v1 import parameter_service_pb2 as pb2
from finetuned.v1 import task_pb2
from finetuned_daemon.parameters.field import (
    Condition,
    Fold,
    ParameterInfo,
    Widget,
    info_of,
    limits_of,
)
from finetuned_daemon.parameters.models import EXTENSIONS, SECTIONS
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.tasks import LABELS
from finetuned_daemon.texts import Text

SECTION_LABELS: Mapping[str, Text] = {
    "data": Text("Data", "数据配置"),
    "training": Text("Training", "训练配置"),
    "lora": Text("LoRA", "LoRA 配置"),
    "optimization": Text("Optimization", "优化配置"),
    "logging": Text("Logging", "日志配置"),
    "general": Text("General", "通用配置"),
    EXTENSIONS: Text("Extensions", "扩展功能"),
}

FOLD_LABELS: Mapping[Fold, Text] = {
    "common": Text("Common", "常规参数"),
    "optional": Text("Optional", "可选参数"),
    "advanced": Text("Advanced", "高级参数"),
    "optimization": Text("Optimization", "优化参数"),
    "saving": Text("Saving", "保存参数"),
    "evaluation": Text("Evaluation", "评估参数"),
}
"""In the order of the form; the first is shown open."""

TRAINING_TYPE_LABELS: Mapping[TrainingType, Text] = {
    TrainingType.SFT: Text("Supervised fine-tuning", "监督微调"),
    TrainingType.PRETRAIN: Text("Pretraining", "预训练"),
}

_TYPE = pb2.ParameterType
_WIDGETS: Mapping[int, Widget] = {
    _TYPE.PARAMETER_TYPE_BOOL: "SWITCH",
    _TYPE.PARAMETER_TYPE_INT: "NUMBER",
    _TYPE.PARAMETER_TYPE_FLOAT: "NUMBER",
    _TYPE.PARAMETER_TYPE_CHOICE: "SELECT",
    _TYPE.PARAMETER_TYPE_MULTICHOICE: "MULTISELECT",
    _TYPE.PARAMETER_TYPE_FILE: "FILE_PICKER",
    _TYPE.PARAMETER_TYPE_DIRECTORY: "DIRECTORY_PICKER",
}


@cache
def build_schema(training_type: TrainingType) -> pb2.GetParameterSchemaResponse:
    """The form of a training type. A field that is never visible for it is left out."""
    sections = []
    for name, model in SECTIONS.items():
        fields = [
            _field(f"{name}.{field}", info)
            for field, info in model.model_fields.items()
            if _applies(info_of(info), training_type)
        ]
        if fields:
            label = _text(SECTION_LABELS[name])
            sections.append(pb2.ParameterSection(name=name, label=label, fields=fields))
    return pb2.GetParameterSchemaResponse(
        sections=sections,
        folds=[
            pb2.ParameterFold(name=name, label=_text(label), expanded=name == "common")
            for name, label in FOLD_LABELS.items()
        ],
        task_states=[
            pb2.TaskStateLabel(
                state=task_pb2.TaskState.Value(f"TASK_STATE_{state.value}"),
                label=_text(look.label),
                color=look.color,
            )
            for state, look in LABELS.items()
        ],
        training_types=[
            pb2.TrainingTypeLabel(
                training_type=task_pb2.TrainingType.Value(f"TRAINING_TYPE_{kind.value}"),
                label=_text(label),
            )
            for kind, label in TRAINING_TYPE_LABELS.items()
        ],
    )


def _applies(info: ParameterInfo, training_type: TrainingType) -> bool:
    return all(
        (training_type.value.lower() in condition.values) is not condition.is_negated
        for condition in info.visible_when
        if condition.field == "training_type"
    )


def _field(path: str, field: FieldInfo) -> pb2.ParameterField:
    info = info_of(field)
    kind = _type(field, info)
    limits = limits_of(field)
    step = limits.get("multiple_of", info.step)
    if step is None and kind == _TYPE.PARAMETER_TYPE_INT:
        step = 1
    default = field.get_default()
    values = get_args(field.annotation) if kind == _TYPE.PARAMETER_TYPE_CHOICE else info.choices
    return pb2.ParameterField(
        path=path,
        label=_text(info.label),
        help=_text(info.help),
        type=kind,
        widget=pb2.Widget.Value(f"WIDGET_{info.widget or _WIDGETS[kind]}"),
        fold=info.fold,
        required=info.required,
        discouraged=info.discouraged,
        default_value=None if default is None else json_value(default),
        minimum=limits.get("ge"),
        maximum=limits.get("le"),
        step=step,
        unit=_text(info.unit),
        choices=[
            pb2.ParameterChoice(value=value, label=_text(info.choices[value])) for value in values
        ],
        allows_other_choices=kind == _TYPE.PARAMETER_TYPE_MULTICHOICE,
        visible_when=_conditions(info.visible_when),
        enabled_when=_conditions(info.enabled_when),
        note=_text(info.note),
        extension=path.startswith(f"{EXTENSIONS}."),
    )


def _type(field: FieldInfo, info: ParameterInfo) -> pb2.ParameterType.ValueType:
    if info.path:
        return _TYPE.Value(f"PARAMETER_TYPE_{info.path.upper()}")
    if field.annotation is bool:
        return _TYPE.PARAMETER_TYPE_BOOL
    if field.annotation is int:
        return _TYPE.PARAMETER_TYPE_INT
    if field.annotation is float:
        return _TYPE.PARAMETER_TYPE_FLOAT
    if field.annotation == list[str]:
        return _TYPE.PARAMETER_TYPE_MULTICHOICE
    return _TYPE.PARAMETER_TYPE_CHOICE


def _conditions(conditions: Iterable[Condition]) -> list[pb2.Condition]:
    return [
        pb2.Condition(
            field=condition.field,
            operator=pb2.CONDITION_OPERATOR_NONE_OF
            if condition.is_negated
            else pb2.CONDITION_OPERATOR_ONE_OF,
            values=[json_value(value) for value in condition.values],
        )
        for condition in conditions
    ]


def _text(text: Text) -> pb2.LocalizedText:
    return pb2.LocalizedText(zh=text.zh, en=text.en)


def json_value(value: Any) -> struct_pb2.Value:
    """A value as JSON has it."""
    if value is None:
        return struct_pb2.Value(null_value=struct_pb2.NULL_VALUE)
    if isinstance(value, bool):
        return struct_pb2.Value(bool_value=value)
    if isinstance(value, int | float):
        return struct_pb2.Value(number_value=value)
    if isinstance(value, str):
        return struct_pb2.Value(string_value=value)
    return struct_pb2.Value(list_value=struct_pb2.ListValue(values=[json_value(v) for v in value]))

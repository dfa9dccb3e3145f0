"""The schema of the form: what the daemon serves is what the facts say, row by row."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from google.protobuf import json_format

from conftest import REPOSITORY
from finetuned.v1 import parameter_service_pb2 as pb2
from finetuned.v1 import parameters_pb2, task_pb2
from finetuned_daemon.parameters.models import SECTIONS
from finetuned_daemon.parameters.schema import build_schema
from finetuned_daemon.runs.contract import TrainingType

FACTS: list[dict[str, Any]] = json.loads((REPOSITORY / "tests/data/parameters.json").read_text())
FORM: dict[str, list[dict[str, Any]]] = json.loads(
    (REPOSITORY / "tests/data/form.json").read_text()
)
HAN = re.compile("[\u4e00-\u9fff]")
TYPES = {"bool": "BOOL", "int": "INT", "float": "FLOAT", "choice": "CHOICE"} | {
    "multichoice": "MULTICHOICE",
    "file": "FILE",
    "directory": "DIRECTORY",
}
FIELDS = {f.path: f for s in build_schema(TrainingType.SFT).sections for f in s.fields}


def plain(value: Any) -> Any:
    """A value as JSON has it."""
    return json.loads(json_format.MessageToJson(value))


@pytest.mark.parametrize("training_type", list(TrainingType))
def test_sections_and_their_fields_come_in_the_order_of_the_facts(
    training_type: TrainingType,
) -> None:
    served = build_schema(training_type)
    kind = training_type.value.lower()
    sections = [s for s in FORM["sections"] if s.get("applies", kind) == kind]
    assert [(s.name, s.label.zh, s.label.en) for s in served.sections] == [
        (s["name"], s["zh"], s["en"]) for s in sections
    ]
    rows = [f for f in FACTS if f.get("applies", kind) == kind]
    assert [f.path for s in served.sections for f in s.fields] == [
        f"{row['section']}.{row['name']}" for row in rows
    ]
    assert len(rows) == (49 if kind == "sft" else 42)


@pytest.mark.parametrize("fact", FACTS, ids=lambda fact: fact["name"])
def test_a_field_is_what_the_facts_say(fact: dict[str, Any]) -> None:
    field = FIELDS[f"{fact['section']}.{fact['name']}"]
    assert (field.label.zh, field.label.en) == (fact["zh"], fact["en"])
    assert field.type == pb2.ParameterType.Value(f"PARAMETER_TYPE_{TYPES[fact['type']]}")
    assert field.required is fact["required"]
    assert field.discouraged is fact.get("discouraged", False)
    assert field.fold == fact["fold"]
    given = plain(field.default_value) if field.HasField("default_value") else None
    assert given == fact["default"]
    for name, key in (("minimum", "min"), ("maximum", "max")):
        value = getattr(field, name) if field.HasField(name) else None  # type: ignore[arg-type]
        assert value == fact.get(key), name
    if "step" in fact:
        assert field.step == fact["step"]
    if "choices" in fact:
        assert [choice.value for choice in field.choices] == fact["choices"]


def test_folds_states_and_types_are_what_the_facts_say() -> None:
    served = build_schema(TrainingType.SFT)
    assert [(f.name, f.label.zh, f.label.en, f.expanded) for f in served.folds] == [
        (f["name"], f["zh"], f["en"], f["expanded"]) for f in FORM["folds"]
    ]
    rows = {row["name"]: row for row in FORM["task_states"]}
    for label in served.task_states:
        name = task_pb2.TaskState.Name(label.state).removeprefix("TASK_STATE_").lower()
        row = rows["pending" if name == "queued" else name]
        assert (label.label.zh, label.label.en, label.color) == (row["zh"], row["en"], row["color"])
    assert len(served.task_states) == len(task_pb2.TaskState.keys()) - 1
    assert [t.training_type for t in served.training_types] == [1, 2]


@pytest.mark.parametrize("path", FIELDS)
def test_help_is_there_in_both_languages(path: str) -> None:
    field = FIELDS[path]
    assert 60 < len(field.help.en) < 500
    assert 20 < len(field.help.zh) < 300
    assert field.help.en.endswith(".")
    assert field.help.zh.endswith("。")
    assert len(HAN.findall(field.help.zh)) > 12
    assert not HAN.search(field.help.en)
    for text in (field.unit, field.note):
        assert bool(text.en) == bool(text.zh)


def test_no_two_fields_have_the_same_help() -> None:
    assert len({f.help.en for f in FIELDS.values()}) == len(FIELDS)
    assert len({f.help.zh for f in FIELDS.values()}) == len(FIELDS)


@pytest.mark.parametrize("path", FIELDS)
def test_a_condition_compares_a_field_there_is_with_values_it_can_have(path: str) -> None:
    for condition in [*FIELDS[path].visible_when, *FIELDS[path].enabled_when]:
        assert condition.operator != pb2.CONDITION_OPERATOR_UNSPECIFIED
        for value in condition.values:
            if condition.field == "training_type":
                assert plain(value) in ("sft", "pretrain")
                continue
            assert condition.field != path
            section, name = condition.field.split(".")
            wanted = plain(value)
            if FIELDS[condition.field].type == pb2.PARAMETER_TYPE_INT:
                wanted = int(wanted)  # JSON knows no whole numbers
            SECTIONS[section].model_validate({name: wanted})


@pytest.mark.parametrize("path", FIELDS)
def test_a_default_can_be_put_into_the_message_as_it_comes(path: str) -> None:
    field = FIELDS[path]
    section, name = path.split(".")
    message = parameters_pb2.Parameters()
    if not field.HasField("default_value"):
        return
    value = plain(field.default_value)
    if field.type == pb2.PARAMETER_TYPE_MULTICHOICE:
        value = {"values": value}
    json_format.ParseDict({section: {name: value}}, message)
    assert getattr(message, section).HasField(name)


def test_the_comments_of_the_protos_name_the_same_defaults_and_ranges() -> None:
    text = (REPOSITORY / "proto/finetuned/v1/parameters.proto").read_text()
    for fact in FACTS:
        match = re.search(rf"((?:  // .*\n)+)  (?:optional )?\w+ {fact['name']} = \d+;", text)
        assert match, f"{fact['name']} is not in the proto"
        comment = match[1].replace("\n  //", "")
        if isinstance(fact["default"], bool):
            assert f"Default {str(fact['default']).lower()}" in comment, fact["name"]
        elif isinstance(fact["default"], int | float):
            (said,) = re.findall(r"Default (-?[0-9](?:[0-9.e-]*[0-9])?)", comment)
            assert float(said) == fact["default"], fact["name"]
        elif isinstance(fact["default"], str):
            assert f"Default {fact['default']}" in comment, fact["name"]
        if "min" in fact:
            low, high = re.findall(r"(-?[0-9][0-9.e-]*) to ([0-9][0-9.e-]*)", comment)[0]
            assert (float(low), float(high.rstrip("."))) == (fact["min"], fact["max"]), fact["name"]

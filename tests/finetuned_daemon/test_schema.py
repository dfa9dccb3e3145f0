"""The schema of the form: what the daemon serves is what the facts say, row by row."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, get_args

import pytest
from google.protobuf import json_format

from conftest import REPOSITORY
from finetuned import _local
from finetuned.v1 import parameter_service_pb2 as pb2
from finetuned.v1 import parameters_pb2, task_pb2
from finetuned_daemon.errors import Severity
from finetuned_daemon.parameters.field import Condition, Section, info_of, limits_of, parameter
from finetuned_daemon.parameters.models import SECTIONS
from finetuned_daemon.parameters.schema import SECTION_LABELS, build_schema
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.check import check
from finetuned_daemon.validation.surroundings import Surroundings

FACTS: list[dict[str, Any]] = json.loads((REPOSITORY / "tests/data/parameters.json").read_text())
EXTENSION_FACTS: list[dict[str, Any]] = json.loads(
    (REPOSITORY / "tests/data/extensions.json").read_text()
)
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
    for facts, is_extension in ((FACTS, False), (EXTENSION_FACTS, True)):
        rows = [f for f in facts if f.get("applies", kind) == kind]
        fields = [f for s in served.sections for f in s.fields if f.extension is is_extension]
        assert [f.path for f in fields] == [f"{row['section']}.{row['name']}" for row in rows]
        if not is_extension:
            assert len(rows) == (49 if kind == "sft" else 42)


@pytest.mark.parametrize("fact", [*FACTS, *EXTENSION_FACTS], ids=lambda fact: fact["name"])
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
        if name == "paused":  # goes beyond the form
            assert (label.label.zh, label.label.en, label.color) == ("已暂停", "Paused", "orange")
            continue
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


# --- a new parameter is one edit; these are the places that can't follow by themselves


def gaps(sections: Mapping[str, type[Section]]) -> list[str]:
    """What is missing elsewhere, or left over there, for the parameters of these models."""
    found = list[str]()
    proto = (REPOSITORY / "proto/finetuned/v1/parameters.proto").read_text()
    of_models = dict[str, bool]()
    for section, model in sections.items():
        if section not in SECTION_LABELS:
            found.append(f"section {section}: it has no label in parameters/schema.py")
        for name, field in model.model_fields.items():
            path = f"{section}.{name}"
            of_models[path] = info_of(field).path is not None
            match = re.search(rf"((?:  // .*\n)+)  (?:optional )?\w+ {name} = \d+;", proto)
            if match is None:
                found.append(f"{path}: it is not in parameters.proto")
            else:
                comment = match[1].replace("\n  //", "")
                found += [f"{path}: {gap}" for gap in comment_gaps(comment, field)]
    facts = {f"{fact['section']}.{fact['name']}" for fact in [*FACTS, *EXTENSION_FACTS]}
    messages = {
        f"{section.name}.{field.name}"
        for section in parameters_pb2.Parameters.DESCRIPTOR.fields
        for field in (section.message_type.fields if section.message_type else ())
    }
    for place, paths in (("tests/data", facts), ("the stubs", messages)):
        found += [f"{path}: it is not in {place}" for path in of_models if path not in paths]
        found += [f"{path}: it is in {place}, not in the models" for path in paths - set(of_models)]
    # The client makes paths absolute, and can't ask a daemon which fields are paths.
    found += [
        f"{path}: it is a path, and not in PATHS of _local.py"
        for path, is_path in of_models.items()
        if is_path and path not in _local.PATHS
    ]
    return found


def comment_gaps(comment: str, field: Any) -> Iterator[str]:
    """Default and range of a parameter that the comment of its proto field doesn't name."""
    default = field.get_default()
    if isinstance(default, int | float) and not isinstance(default, bool):
        said = re.findall(r"Default (-?[0-9](?:[0-9.e-]*[0-9])?)", comment)
        if list(map(float, said)) != [default]:
            yield f"its comment says default {said}, the model {default}"
    elif isinstance(default, bool | str):
        word = str(default).lower() if isinstance(default, bool) else default
        if f"Default {word}" not in comment:
            yield f"its comment doesn't say `Default {word}`"
    limits = limits_of(field)
    if limits:
        said = re.findall(r"(-?[0-9][0-9.e-]*) to ([0-9](?:[0-9.e-]*[0-9])?)", comment)[:1]
        if [tuple(map(float, pair)) for pair in said] != [(limits["ge"], limits["le"])]:
            yield f"its comment says range {said}, the model {limits['ge']} to {limits['le']}"


def test_every_parameter_is_wherever_it_has_to_be() -> None:
    assert gaps(SECTIONS) == []


def test_for_a_new_parameter_it_is_said_what_is_missing() -> None:
    class MoreGeneral(SECTIONS["general"]):  # type: ignore[misc, name-defined]
        folder: str | None = parameter(
            None, "目录", "Folder", "common", path="directory", help=Text("A folder.", "目录。")
        )

    class OtherRange(SECTIONS["logging"]):  # type: ignore[misc, name-defined]
        logging_steps: int = parameter(
            20, "步数", "Steps", "common", ge=1, le=99, help=Text("Steps.", "步数。")
        )

    more = {**SECTIONS, "general": MoreGeneral, "logging": OtherRange}
    del more["lora"]
    found = gaps(more)
    assert [gap for gap in found if "lora" not in gap] == [
        "logging.logging_steps: its comment says default ['10'], the model 20",
        "logging.logging_steps: its comment says range [('1', '1000')], the model 1 to 99",
        "general.folder: it is not in parameters.proto",
        "general.folder: it is not in tests/data",
        "general.folder: it is not in the stubs",
        "general.folder: it is a path, and not in PATHS of _local.py",
    ]
    assert "lora.lora_r: it is in the stubs, not in the models" in found


# --- fields that can't be changed


def breaking(condition: Condition) -> list[Any]:
    """Values of the other field with which the condition does not hold."""
    section, name = condition.field.split(".")
    field = SECTIONS[section].model_fields[name]
    if condition.is_negated:
        return list(condition.values)
    if field.annotation is bool:
        return [value for value in (True, False) if value not in condition.values]
    if get_args(field.annotation) and all(isinstance(c, str) for c in get_args(field.annotation)):
        return [value for value in get_args(field.annotation) if value not in condition.values]
    if info_of(field).path:
        return ["/absent"]
    return [value for value in (1, 5, limits_of(field)["le"]) if value not in condition.values]


def extremes(field: Any) -> list[Any]:
    """Values of a field that are right in themselves."""
    limits = limits_of(field)
    if field.annotation is bool:
        return [True, False]
    if limits:
        return [type(field.get_default())(limits[end]) for end in ("ge", "le")]
    return ["/absent"] if info_of(field).path else [["any"]]


LOCKED = [
    (f"{section}.{name}", condition)
    for section, model in SECTIONS.items()
    for name, field in model.model_fields.items()
    for condition in info_of(field).enabled_when
]


@pytest.mark.parametrize(
    ("path", "condition"), LOCKED, ids=[f"{path}-{c.field}" for path, c in LOCKED]
)
def test_an_error_at_a_field_that_can_not_be_changed_offers_a_way_out(
    path: str, condition: Condition
) -> None:
    """Or a user would look at a message beside a field that is grey."""
    section, name = path.split(".")
    is_type = condition.field == "training_type"
    training_type = TrainingType.PRETRAIN if is_type else TrainingType.SFT
    for other in [None] if is_type else breaking(condition):
        for value in extremes(SECTIONS[section].model_fields[name]):
            given: dict[str, dict[str, Any]] = {section: {name: value}}
            if not is_type:
                other_section, other_name = condition.field.split(".")
                given.setdefault(other_section, {})[other_name] = other
            _, violations = check(given, training_type, Surroundings(), complete=False)
            for violation in violations:
                if violation.field == path and violation.severity is Severity.ERROR:
                    assert violation.suggested is not None, (other, value, violation)

"""The 49 parameters and the extensions: the models against the facts, and what the check says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from conftest import REPOSITORY
from finetuned_daemon.environment.model import Capability
from finetuned_daemon.errors import Violation
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.models import EXTENSIONS, SECTIONS, Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.validation.check import check
from finetuned_daemon.validation.surroundings import Surroundings

FACTS: list[dict[str, Any]] = json.loads((REPOSITORY / "tests/data/parameters.json").read_text())
EXTENSION_FACTS: list[dict[str, Any]] = json.loads(
    (REPOSITORY / "tests/data/extensions.json").read_text()
)
BY_PATH = {f"{fact['section']}.{fact['name']}": fact for fact in [*FACTS, *EXTENSION_FACTS]}
PATHS = ("file", "directory")


CAN_ALL = Surroundings(
    device="cuda:0",
    capability=Capability(bf16=True, fp16=True, tf32=True, four_bit=True, eight_bit_optimizer=True),
)


def judge(
    values: dict[str, Any] | None = None,
    training_type: TrainingType = TrainingType.SFT,
    *,
    complete: bool = False,
) -> list[Violation]:
    """The violations of values by path."""
    given = dict[str, dict[str, Any]]()
    for path, value in (values or {}).items():
        section, name = path.split(".")
        given.setdefault(section, {})[name] = value
    return check(given, training_type, CAN_ALL, complete=complete)[1]


def test_the_models_have_the_49_parameters_in_their_order() -> None:
    of_models = [
        f"{s}.{name}"
        for s, model in SECTIONS.items()
        if s != EXTENSIONS
        for name in model.model_fields
    ]
    assert of_models == [f"{fact['section']}.{fact['name']}" for fact in FACTS]
    assert len(of_models) == 49


def test_extensions_are_a_section_of_their_own_and_off_by_default() -> None:
    """The default of each is the value that changes nothing."""
    assert list(SECTIONS)[-1] == EXTENSIONS
    assert list(SECTIONS[EXTENSIONS].model_fields) == [fact["name"] for fact in EXTENSION_FACTS]
    off = {"bool": False, "float": 0}
    for fact in EXTENSION_FACTS:
        assert fact["default"] == off.get(fact["type"], fact.get("choices", [None])[0])


WRONG_IN_ITSELF = ("WRONG_TYPE", "OUT_OF_RANGE", "NOT_A_CHOICE", "NOT_A_PATH", "NOT_ABSOLUTE")


def refused(path: str, value: Any) -> list[Violation]:
    """What is said of a value whatever other fields and the world are like."""
    found = [v for v in judge({path: value}) if v.reason in WRONG_IN_ITSELF]
    assert all(v.field.startswith(path) for v in found)
    return found


NUMBERS = [path for path, fact in BY_PATH.items() if "min" in fact]


@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_is_accepted_at_its_ends_and_refused_beyond(path: str) -> None:
    fact = BY_PATH[path]
    low, high = fact["min"], fact["max"]
    section, name = path.split(".")
    for good in (low, high):
        model = SECTIONS[section].model_validate({name: good})
        assert getattr(model, name) == good
        assert refused(path, good) == []
    step = fact.get("step", 1)
    is_whole = fact["type"] == "int"
    for bad, end in (
        (low - step if is_whole else math.nextafter(low, -math.inf), low),
        (high + step if is_whole else math.nextafter(high, math.inf), high),
    ):
        (violation,) = refused(path, bad)
        assert (violation.field, violation.reason) == (path, "OUT_OF_RANGE")
        assert violation.suggested == end
        for text in violation.message:
            assert all(str(number) in text for number in (low, high, bad))


@pytest.mark.parametrize("path", [p for p in NUMBERS if BY_PATH[p]["type"] == "float"])
def test_a_fraction_may_be_written_without_a_point_and_finer_than_the_step(path: str) -> None:
    """The step is the control's: 0.05 and 0.033 are both ratios."""
    fact = BY_PATH[path]
    assert refused(path, (fact["min"] + fact["max"]) / 3) == []
    assert refused(path, 1) == [] or fact["max"] < 1
    for bad in (math.nan, math.inf, -math.inf):
        (violation,) = refused(path, bad)
        assert violation.reason == "OUT_OF_RANGE"


@pytest.mark.parametrize(
    "path", [p for p in NUMBERS if BY_PATH[p]["type"] == "int" and "step" in BY_PATH[p]]
)
def test_a_whole_number_between_two_steps_is_refused_with_the_nearest(path: str) -> None:
    fact = BY_PATH[path]
    assert fact["step"] > 1
    assert refused(path, fact["min"] + fact["step"]) == []
    for bad in (fact["min"] + 1, fact["min"] + fact["step"] - 1, fact["max"] - 1):
        (violation,) = refused(path, bad)
        assert (violation.field, violation.reason) == (path, "OUT_OF_RANGE")
        assert violation.suggested % fact["step"] == 0
        assert abs(violation.suggested - bad) <= fact["step"] / 2


@pytest.mark.parametrize("path", [p for p, f in BY_PATH.items() if f["type"] == "bool"])
def test_a_switch_is_accepted_on_and_off(path: str) -> None:
    for value in (True, False):
        assert refused(path, value) == []


@pytest.mark.parametrize("path", [p for p, f in BY_PATH.items() if f["type"] in PATHS])
def test_a_path_is_accepted_where_it_is_absolute(path: str) -> None:
    assert refused(path, "/absent") == []
    (violation,) = refused(path, "relative")
    assert (violation.field, violation.reason) == (path, "NOT_ABSOLUTE")


@pytest.mark.parametrize("path", [p for p, f in BY_PATH.items() if f["type"] in PATHS])
def test_an_empty_path_is_none(path: str) -> None:
    """A form sends it where a user has cleared the field."""
    section, name = path.split(".")
    assert getattr(SECTIONS[section].model_validate({name: ""}), name) is None
    for empty in ("", None):
        found = [v.reason for v in judge({path: empty}, complete=True) if v.field == path]
        assert found == (["REQUIRED"] if BY_PATH[path]["required"] else [])


@pytest.mark.parametrize("path", BY_PATH)
def test_the_default_is_the_one_of_the_facts_and_accepted(path: str) -> None:
    fact = BY_PATH[path]
    section, name = path.split(".")
    assert getattr(getattr(Parameters(), section), name) == fact["default"]
    assert judge({path: fact["default"]}) == []


WRONG_TYPES: dict[str, tuple[Any, ...]] = {
    "bool": (1, "true", None),
    "int": (1.5, "1", True, [1]),
    "float": ("1", True, None),
    "choice": (1, True, None),
    "multichoice": ("q_proj", [1], None),
    "file": (1, True),
    "directory": (1, ["/a"]),
}


@pytest.mark.parametrize("path", BY_PATH)
def test_a_value_of_another_type_is_refused(path: str) -> None:
    for bad in WRONG_TYPES[BY_PATH[path]["type"]]:
        found = refused(path, bad)
        assert found, f"{bad!r} is taken"
        assert found[0].reason in ("WRONG_TYPE", "NOT_A_CHOICE")


def test_a_list_takes_any_names_from_one_to_256() -> None:
    path = "lora.lora_target_modules"
    assert judge({path: ["any"]}) == judge({path: ["x"] * 256}) == []
    for choice in BY_PATH[path]["choices"]:
        assert refused(path, [choice]) == []
    for bad in ([], ["x"] * 257):
        assert [v.reason for v in judge({path: bad})] == ["OUT_OF_RANGE"]


@pytest.mark.parametrize("path", [p for p, f in BY_PATH.items() if f["type"] == "choice"])
def test_a_choice_is_one_of_its_choices(path: str) -> None:
    for choice in BY_PATH[path]["choices"]:
        assert refused(path, choice) == []
    first, default = BY_PATH[path]["choices"][0], BY_PATH[path]["default"]
    for bad, meant in (("xyzzy", default), ("", default), (first.upper(), first)):
        (violation,) = judge({path: bad})
        assert (violation.field, violation.reason) == (path, "NOT_A_CHOICE")
        assert violation.suggested == meant
        for text in violation.message:
            assert all(choice in text for choice in BY_PATH[path]["choices"])


@pytest.mark.parametrize("word", ["No", "off", "OFF", "none", "False"])
def test_a_word_for_no_is_understood_as_no(word: str) -> None:
    (violation,) = judge({"training.save_strategy": word})
    assert violation.suggested == "no"


def test_a_start_demands_what_is_required_and_has_no_default() -> None:
    missing = {v.field for v in judge(complete=True) if v.reason == "REQUIRED"}
    assert missing == {"data.train_file", "data.output_dir", "data.model_path"}
    assert judge(complete=False) == []


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"lora.lora_target_modules": []}, "lora.lora_target_modules", "OUT_OF_RANGE"),
        ({"data.train_file": "relative.jsonl"}, "data.train_file", "NOT_ABSOLUTE"),
        ({"data.train_file": "/a\0b"}, "data.train_file", "NOT_A_PATH"),
        ({"data.model_path": "/" + "x" * 300}, "data.model_path", "NOT_A_PATH"),
        ({"data.output_dir": "/" + "x" * 300}, "data.output_dir", "NOT_A_PATH"),
        ({"data.output_dir": "/dev/null"}, "data.output_dir", "NOT_A_FOLDER"),
        ({"data.train_file": "/dev/zero"}, "data.train_file", "NOT_A_FILE"),
        (
            {"data.resume_from_checkpoint": "/absent"},
            "data.resume_from_checkpoint",
            "FOLDER_NOT_FOUND",
        ),
        (
            {"data.resume_from_checkpoint": "/tmp"},
            "data.resume_from_checkpoint",
            "NOT_A_CHECKPOINT",
        ),
        ({"lora.lora_target_modules": ["x"] * 300}, "lora.lora_target_modules", "OUT_OF_RANGE"),
    ],
)
def test_a_path_or_list_is_judged_alone(values: dict[str, Any], field: str, reason: str) -> None:
    (violation,) = judge(values)
    assert (violation.field, violation.reason) == (field, reason)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("3", "not a JSON object"),
        ("{}", '"messages" must be a list'),
        ('{"messages": [{"role": "robot", "content": ""}]}', "role must be"),
        ('{"messages": [{"role": "user", "content": 3}]}', "content must be a string"),
        ('{"messages": [{"role": "user", "content": "x"}]}', "no assistant turn"),
        ('{"messages": [{"role": "assistant", "content": "\\ud800"}]}', "surrogate"),
        ("\udcff", "not UTF-8"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": ' + "9" * 5000 + "}", "not JSON"),
    ],
)
def test_a_bad_line_is_named_with_its_reason(tmp_path: Path, line: str, reason: str) -> None:
    data = tmp_path / "data.jsonl"
    data.write_bytes(b"\n\n" + line.encode("utf-8", "surrogateescape") + b"\n")
    (violation,) = judge({"data.train_file": str(data)})
    assert violation.reason == "BAD_DATA_LINE"
    assert "line 3: " in violation.message.en
    assert reason in violation.message.en


def test_pretraining_reads_text_files_and_json_lines(tmp_path: Path) -> None:
    for name, content in (("a.txt", "Once upon a time."), ("b.jsonl", '{"text": "Once."}')):
        (tmp_path / name).write_text(content)
        assert judge({"data.train_file": str(tmp_path / name)}, TrainingType.PRETRAIN) == []
    (tmp_path / "empty.txt").write_text(" \n")
    (violation,) = judge({"data.train_file": str(tmp_path / "empty.txt")}, TrainingType.PRETRAIN)
    assert violation.reason == "DATA_EMPTY"


def test_parameters_survive_the_way_through_the_protos() -> None:
    original = Parameters.model_validate(
        {
            "data": {"train_file": "/x", "eval_ratio": 0.25},
            "lora": {"lora_target_modules": ["q_proj"]},
            "general": {"seed": 0},
        }
    )
    message = protos.to_proto(original)
    assert not message.data.HasField("eval_file"), "what has no value stays absent"
    assert Parameters.model_validate(protos.to_dict(message)) == original

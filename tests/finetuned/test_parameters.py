"""Parameters from mappings, files and `--set`."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from finetuned import FieldViolation, InvalidArgument, Parameters
from finetuned._local import PATHS
from finetuned._parameters import convert, fields, flatten, from_mapping
from finetuned.cli.params import Draft, Wish, draft, read_file


def test_there_are_49_parameters_beside_extensions_and_the_path_fields_are_texts() -> None:
    assert len([path for path in fields() if not path.startswith("extensions.")]) == 49
    for path in PATHS:
        assert fields()[path].cpp_type == fields()[path].CPPTYPE_STRING


def test_a_mapping_becomes_parameters() -> None:
    parameters = from_mapping(
        {
            "data": {"train_file": Path("/a.jsonl"), "eval_file": None},
            "training": {"batch_size": 4, "learning_rate": 1},
            "lora": {"lora_target_modules": ("q_proj", "v_proj"), "use_lora": False},
            "general": None,
        }
    )
    assert flatten(parameters) == {
        "data.train_file": "/a.jsonl",
        "training.batch_size": 4,
        "training.learning_rate": 1.0,
        "lora.use_lora": False,
        "lora.lora_target_modules": ["q_proj", "v_proj"],
    }
    assert not parameters.data.HasField("eval_file")


def test_an_empty_list_is_a_value() -> None:
    assert from_mapping({"lora": {"lora_target_modules": []}}).lora.HasField("lora_target_modules")


def test_parameters_pass_as_they_are() -> None:
    parameters = Parameters()
    assert from_mapping(parameters) is parameters
    assert from_mapping(None) == Parameters()


def test_everything_that_is_wrong_comes_at_once() -> None:
    with pytest.raises(InvalidArgument) as caught:
        from_mapping(
            {
                "training": {"batch_size": "4", "batchsize": 4, "learning_rate": True},
                "lora": {"use_lora": 1, "lora_target_modules": "q_proj", "lora_r": 2**40},
                "optimisation": {},
                "data": 3,
                "batch_size": 2,
            }
        )
    assert {v.field: v.description for v in caught.value.violations} == {
        "training.batch_size": "must be a whole number, not '4'",
        "training.batchsize": "is no parameter; did you mean training.batch_size?",
        "training.learning_rate": "must be a number, not True",
        "lora.use_lora": "must be true or false, not 1",
        "lora.lora_target_modules": "must be a list of names, not 'q_proj'",
        "lora.lora_r": f"must be a value that fits, not {2**40}",
        "optimisation": "is no section; did you mean optimization?",
        "data": "must be a section with fields, not 3",
        "batch_size": "is no section; did you mean training.batch_size?",
    }


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("training.lr", "training.learning_rate"),
        ("training.epochs", "training.num_train_epochs"),
        ("training.lora_r", "lora.lora_r"),
        ("lora.target_modules", "lora.lora_target_modules"),
        ("data.trainfile", "data.train_file"),
    ],
)
def test_a_misspelt_parameter_is_guessed(path: str, meant: str) -> None:
    section, name = path.split(".")
    _, (violation,) = convert({section: {name: 1}})
    assert violation.description == f"is no parameter; did you mean {meant}?"


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("training.learning_rate", "2e-4", 2e-4),
        ("training.batch_size", "4", 4),
        ("training.batch_size", "4.0", 4),
        ("training.batch_size", "1e2", 100),
        ("training.save_strategy", "no", "no"),
        ("optimization.fp16", "no", False),
        ("optimization.fp16", "True", True),
        ("lora.lora_target_modules", "q_proj, v_proj", ["q_proj", "v_proj"]),
        ("lora.lora_target_modules", "[q_proj,v_proj]", ["q_proj", "v_proj"]),
        ("data.train_file", "/a b=c.jsonl", "/a b=c.jsonl"),
    ],
)
def test_text_is_read_by_the_type_of_its_field(path: str, text: str, value: Any) -> None:
    wish = Wish()
    wish.set_all([f"{path}={text}"])
    plan = draft(wish, output_default=False)
    assert plan.violations == []
    assert flatten(plan.parameters) == {path: value}


@pytest.mark.parametrize("text", ["four", "4.5", "nan", "", "inf"])
def test_text_that_is_no_whole_number_is_refused(text: str) -> None:
    wish = Wish()
    wish.set_all([f"training.batch_size={text}"])
    (violation,) = draft(wish).violations
    assert violation == FieldViolation("training.batch_size", violation.description, "WRONG_TYPE")


def read(tmp_path: Path, text: str, name: str = "params.yaml") -> Draft:
    file = tmp_path / name
    file.write_text(text)
    return draft(read_file(file), output_default=False)


def test_a_yaml_file_has_sections_type_name_and_device(tmp_path: Path) -> None:
    plan = read(
        tmp_path,
        """
        type: pretrain
        name: my task
        device: cpu
        training:
          learning_rate: 2e-4
          save_strategy: no
          num_train_epochs: 3
        lora: {use_lora: off, lora_target_modules: [q_proj, v_proj]}
        data:
          eval_file: null
          max_samples: ~
        """,
    )
    assert (plan.training_type, plan.display_name, plan.device) == ("pretrain", "my task", "cpu")
    assert plan.violations == []
    assert flatten(plan.parameters) == {
        "training.learning_rate": 2e-4,
        "training.num_train_epochs": 3,
        "training.save_strategy": "no",
        "lora.use_lora": False,
        "lora.lora_target_modules": ["q_proj", "v_proj"],
    }


def test_a_json_file_may_have_its_sections_under_parameters(tmp_path: Path) -> None:
    content = {
        "training_type": "sft",
        "display_name": "x",
        "parameters": {"training": {"batch_size": 8, "learning_rate": "1e-5"}},
    }
    plan = read(tmp_path, json.dumps(content), "params.json")
    assert (plan.training_type, plan.display_name) == ("sft", "x")
    assert flatten(plan.parameters) == {"training.batch_size": 8, "training.learning_rate": 1e-5}


def test_wrong_keys_of_a_file_are_all_named(tmp_path: Path) -> None:
    plan = read(tmp_path, "typ: sft\ntraining: {batchsize: 1}\nfoo: 1\n")
    assert {v.field for v in plan.violations} == {"typ", "training.batchsize", "foo"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.yaml", "training: [1"),
        ("a.json", "{"),
        ("a.yaml", "- 1"),
        ("a.yaml", "a: b: c"),
        ("a.yaml", "[" * 100_000),
        ("a.json", "[" * 100_000),
    ],
)
def test_a_file_that_is_none_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        read(tmp_path, text, name)
    assert caught.value.violations[0].field == str(tmp_path / name)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"none\.yaml is not there: no such file"):
        read_file(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    "text",
    ["", "{}", "training:\n", "training: null", "parameters: ~", "name:\n", "device: null", "null"],
)
def test_an_empty_file_says_nothing(tmp_path: Path, text: str) -> None:
    plan = read(tmp_path, text)
    assert plan.violations == []
    assert flatten(plan.parameters) == {}


def test_relative_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    wish = Wish()
    wish.set_all(["data.train_file=a.jsonl", "data.model_path=~/m", "data.eval_file="])
    parameters = draft(wish).parameters
    assert parameters.data.train_file == str(tmp_path / "a.jsonl")
    assert parameters.data.model_path == "/home/somebody/m"
    assert parameters.data.eval_file == ""


def test_the_output_folder_has_a_safe_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    named = draft(Wish(display_name="../my task"))
    assert Path(named.parameters.data.output_dir).parent == tmp_path / "finetuned-output"
    unnamed = {draft(Wish()).parameters.data.output_dir for _ in range(5)}
    assert len(unnamed) == 5


def test_an_assignment_without_a_sign_is_refused() -> None:
    wish = Wish()
    wish.set_all(["training.batch_size"])
    (violation,) = draft(wish).violations
    assert violation.field == "--set"
    assert violation.description == "wants section.field=value, not 'training.batch_size'"


@pytest.mark.parametrize(
    ("assignment", "field", "description"),
    [
        ("=4", "--set", "wants section.field=value, not '=4'"),
        (".batch_size=4", "--set", "wants section.field=value, not '.batch_size=4'"),
        ("training.=4", "training", "names no field; those of training are "),
        ("training=4", "training", "names no field; those of training are "),
        ("batch_size=4", "batch_size", "is no section; did you mean training.batch_size?"),
    ],
)
def test_an_assignment_to_nothing_says_what_is_missing(
    assignment: str, field: str, description: str
) -> None:
    wish = Wish()
    wish.set_all([assignment, "training.batch_size=1"])
    (violation,) = draft(wish).violations
    assert violation.field == field
    assert violation.description.startswith(description)


# A billion texts, if somebody unfolds it.
LAUGHS = "".join(f"x{i}: &a{i} {{a: *a{i - 1}, b: *a{i - 1}}}\n" for i in range(1, 30))


@pytest.mark.parametrize(
    ("text", "field"),
    [
        ("training: 4", "training"),
        ("training: [4]", "training"),
        ("parameters: 4", "parameters"),
        ("parameters: {training: 4}", "training"),
        ("name: [4]", "name"),
        ('training: {"": 4}', "training"),
        (f"x0: &a0 {{a: a}}\n{LAUGHS}training: {{batch_size: *a29}}", "training.batch_size"),
    ],
)
def test_what_holds_no_fields_is_a_wrong_field(tmp_path: Path, text: str, field: str) -> None:
    (violation,) = (v for v in read(tmp_path, text).violations if v.field[0] != "x")
    assert violation.field == field
    assert len(violation.description) < 600


ODD = "a\udcff"


@pytest.mark.parametrize(
    ("wish", "field"),
    [
        (Wish(display_name=ODD), "display_name"),
        (Wish(device=ODD), "device"),
        (Wish(sections={"data": {"train_file": ODD}}), "data.train_file"),
        (Wish(sections={"lora": {"lora_target_modules": ODD}}), "lora.lora_target_modules"),
    ],
)
def test_a_text_that_is_no_utf8_is_named(wish: Wish, field: str) -> None:
    (violation,) = draft(wish).violations
    assert (violation.field, violation.reason) == (field, "NOT_UTF8")
    assert violation.description == "holds bytes that are no UTF-8"


def test_a_current_folder_that_is_no_utf8_is_no_place_for_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ODD).mkdir()
    monkeypatch.chdir(tmp_path / ODD)
    wish = Wish()
    wish.put("data.train_file", "a.jsonl")
    assert [v.field for v in draft(wish).violations] == ["data.train_file", "data.output_dir"]


def test_a_home_of_nobody_is_a_wrong_path() -> None:
    wish = Wish()
    wish.put("data.model_path", "~no-such-user-here/model")
    (violation,) = draft(wish).violations
    assert violation.field == "data.model_path"


def test_the_training_type_is_one_of_two() -> None:
    assert draft(Wish(training_type="SFT")).training_type == "sft"
    (violation,) = draft(Wish(training_type="sftt")).violations
    assert violation.field == "training_type"


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        ("a.yaml", "training:\n  batch_size: 1\n  batch_size: 2\n", "line 2 and again in line 3"),
        ("a.yaml", "training: {batch_size: 1}\nlora: {}\ntraining: {}\n", "in line 1 and again"),
        ("a.yaml", "training: {batch_size: 1, batch_size: 2}\n", "'batch_size' in line 1"),
        ("a.json", '{"training": {},\n "training": {}}', "in line 1 and again in line 2"),
        ("a.json", '{\n\t"lora": {"lora_r": 1, "lora_r": 2}}', "names 'lora_r' twice"),
    ],
)
def test_a_key_that_stands_twice_is_refused(
    tmp_path: Path, name: str, text: str, says: str
) -> None:
    file = tmp_path / name
    file.write_text(text)
    with pytest.raises(InvalidArgument, match=says) as caught:
        read_file(file)
    assert caught.value.reason == "DUPLICATE_KEY"


def test_a_section_below_parameters_and_beside_it_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("type: sft\ntraining_type: pretrain\nlora: {}\nparameters: {lora: {}}\n")
    violations = read_file(file).violations
    assert [(v.field, v.reason) for v in violations] == [
        ("lora", "DUPLICATE_KEY"),
        ("training_type", "DUPLICATE_KEY"),
    ]


def test_a_path_as_a_key_is_told_its_section(tmp_path: Path) -> None:
    _, violations = convert({"training.batch_size": 3})
    assert [(v.field, v.description) for v in violations] == [
        (
            "training.batch_size",
            "stands outside its section: write batch_size below training:",
        )
    ]
    file = tmp_path / "a.yaml"
    file.write_text("training.batch_size: 3\n")
    assert draft(read_file(file)).violations == violations


@pytest.mark.parametrize("given", [[1], "training", 3])
def test_what_is_no_mapping_is_refused_with_a_sentence(given: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be sections with fields, not"):
        from_mapping(given)


def test_keys_that_are_no_texts_are_no_sections() -> None:
    given: Any = {1: {}, "training": {2: 3}}
    assert [v.field for v in convert(given)[1]] == ["1", "training.2"]


def test_real_numbers_of_other_libraries_are_numbers() -> None:
    given = {"training": {"batch_size": Fraction(4), "learning_rate": Fraction(1, 4)}}
    parameters = from_mapping(given).training
    assert (parameters.batch_size, parameters.learning_rate) == (4, 0.25)
    assert convert({"training": {"batch_size": Fraction(1, 2)}})[1][0].reason == "WRONG_TYPE"


@pytest.mark.parametrize("text", ['["q_proj", "v_proj"]', "[q_proj, v_proj]", "q_proj,v_proj"])
def test_a_list_is_read_as_json_or_as_names_with_commas(text: str) -> None:
    wish = Wish()
    wish.set_all([f"lora.lora_target_modules={text}"])
    plan = draft(wish)
    assert list(plan.parameters.lora.lora_target_modules.values) == ["q_proj", "v_proj"]

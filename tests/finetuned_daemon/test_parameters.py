"""The 49 parameters: the models against the facts, and what the check says."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, get_args

import pytest

from conftest import REPOSITORY, Scene
from finetuned_daemon.errors import Violation
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.check import check
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.runs.contract import TrainingType

FACTS: list[dict[str, Any]] = json.loads((REPOSITORY / "tests/data/parameters.json").read_text())
BY_PATH = {f"{fact['section']}.{fact['name']}": fact for fact in FACTS}


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
    return check(given, training_type, "cpu", complete=complete)[1]


def test_the_models_have_the_49_parameters_in_their_order() -> None:
    of_models = [f"{s}.{name}" for s, model in SECTIONS.items() for name in model.model_fields]
    assert of_models == list(BY_PATH)
    assert len(of_models) == 49


@pytest.mark.parametrize("path", BY_PATH)
def test_a_parameter_is_what_the_facts_say(path: str) -> None:
    fact = BY_PATH[path]
    info = SECTIONS[fact["section"]].model_fields[fact["name"]]
    extra = info.json_schema_extra
    assert isinstance(extra, dict)
    assert info.get_default() == fact["default"]
    for name in ("zh", "en", "fold", "required"):
        assert extra[name] == fact[name], name
    assert extra["discouraged"] == fact.get("discouraged", False)
    limits = {
        name: getattr(constraint, name)
        for constraint in info.metadata
        for name in ("ge", "le", "multiple_of")
        if hasattr(constraint, name)
    }
    assert limits.get("ge") == fact.get("min")
    assert limits.get("le") == fact.get("max")
    if fact["type"] == "int":
        assert limits.get("multiple_of") == fact.get("step")
    if fact["type"] == "choice":
        assert list(get_args(info.annotation)) == fact["choices"]
    if fact["type"] == "multichoice":
        assert extra["choices"] == fact["choices"]
    if fact["type"] in ("file", "directory"):
        assert extra["path"] == fact["type"]


NUMBERS = [path for path, fact in BY_PATH.items() if "min" in fact]


@pytest.mark.parametrize("path", NUMBERS)
def test_a_number_is_accepted_at_its_ends_and_refused_beyond(path: str) -> None:
    fact = BY_PATH[path]
    step = fact.get("step", 1) if fact["type"] == "int" else fact["min"] / 10 or 0.01
    section, name = path.split(".")
    for good in (fact["min"], fact["max"]):
        model = SECTIONS[section].model_validate({name: good})
        assert getattr(model, name) == good
    for bad in (fact["min"] - step, fact["max"] + step):
        (violation,) = [v for v in judge({path: bad}) if v.reason == "OUT_OF_RANGE"]
        assert violation.field == path
        assert str(fact["min"]) in violation.message
        assert str(bad) in violation.message


@pytest.mark.parametrize("path", [p for p, f in BY_PATH.items() if f["type"] == "choice"])
def test_a_choice_is_one_of_its_choices(path: str) -> None:
    (violation,) = judge({path: "nope"})
    assert (violation.field, violation.reason) == (path, "NOT_A_CHOICE")
    for choice in BY_PATH[path]["choices"]:
        assert choice in violation.message


def test_not_a_number_is_no_number() -> None:
    assert [v.field for v in judge({"training.learning_rate": math.nan})] == [
        "training.learning_rate"
    ]


def test_a_start_demands_what_is_required_and_has_no_default() -> None:
    missing = {v.field for v in judge(complete=True) if v.reason == "REQUIRED"}
    assert missing == {"data.train_file", "data.output_dir", "data.model_path"}
    assert judge(complete=False) == []


def test_all_wrong_fields_come_in_one_answer_whatever_their_kind(scene: Scene) -> None:
    scene.data.write_text(scene.data.read_text() * 6 + "{broken\n")
    gguf = scene.root / "model.gguf"
    gguf.write_bytes(b"GGUF\x03\0\0\0")
    found = judge(
        {
            "data.model_path": str(gguf),
            "data.train_file": str(scene.data),
            "data.eval_file": str(scene.root / "absent.jsonl"),
            "training.batch_size": 0,
            "training.optimizer": "nope",
            "optimization.bf16": True,
        },
        complete=True,
    )
    assert {(v.field, v.reason) for v in found} == {
        ("data.model_path", "MODEL_IS_GGUF"),
        ("data.train_file", "BAD_DATA_LINE"),
        ("data.eval_file", "FILE_NOT_FOUND"),
        ("data.output_dir", "REQUIRED"),
        ("training.batch_size", "OUT_OF_RANGE"),
        ("training.optimizer", "NOT_A_CHOICE"),
        ("optimization.bf16", "CONFLICT"),
    }
    (bad_line,) = [v for v in found if v.reason == "BAD_DATA_LINE"]
    assert "line 7: not JSON" in bad_line.message


@pytest.mark.parametrize(
    ("values", "field", "reason"),
    [
        ({"training.eval_strategy": "steps"}, "training.eval_strategy", "EVAL_DATA_MISSING"),
        (
            {"training.early_stopping_patience": 2},
            "training.early_stopping_patience",
            "EVAL_STRATEGY_MISSING",
        ),
        ({"data.eval_ratio": 1.0}, "data.eval_ratio", "OUT_OF_RANGE"),
        ({"training.max_steps": 0}, "training.max_steps", "OUT_OF_RANGE"),
        ({"training.optimizer": "adamw_8bit"}, "training.optimizer", "DEVICE_LACKS_IT"),
        ({"optimization.use_qlora": True}, "optimization.use_qlora", "DEVICE_LACKS_IT"),
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
def test_a_rule_fires_alone(values: dict[str, Any], field: str, reason: str) -> None:
    (violation,) = judge(values)
    assert (violation.field, violation.reason) == (field, reason)


def test_a_model_folder_is_judged_by_what_is_in_it(scene: Scene) -> None:
    def reasons(**kwargs: Any) -> list[str]:
        return [v.reason for v in judge({"data.model_path": str(scene.model)}, **kwargs)]

    assert reasons() == []
    (scene.model / "chat_template.jinja").unlink()
    assert reasons() == ["CHAT_TEMPLATE_MISSING"]
    assert reasons(training_type=TrainingType.PRETRAIN) == []
    (scene.model / "tokenizer.json").unlink()
    assert reasons() == ["TOKENIZER_NOT_FOUND"]
    (scene.model / "model.safetensors").unlink()
    assert reasons() == ["MODEL_WITHOUT_SAFETENSORS"]
    (scene.model / "config.json").unlink()
    assert reasons() == ["MODEL_WITHOUT_CONFIG"]
    (scene.model / "x.gguf").write_bytes(b"GGUF")
    assert reasons() == ["MODEL_IS_GGUF"]


def test_results_never_go_into_the_models_folder(scene: Scene) -> None:
    found = judge(
        {"data.model_path": str(scene.model), "data.output_dir": str(scene.model / "out")}
    )
    assert [(v.field, v.reason) for v in found] == [("data.output_dir", "CONFLICT")]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[]", "not a JSON object"),
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
    assert "line 3: " in violation.message
    assert reason in violation.message


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

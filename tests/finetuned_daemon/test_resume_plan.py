"""What a change of parameters means for a resume: one row for each, and what comes of the rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.checkpoints import notices_of
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import STATE_FILES, DataFile, FileEntry, Manifest
from finetuned_daemon.validation.checkpoint import FILES_CHANGED, check_checkpoint
from finetuned_daemon.validation.resume import TABLE, Effect, ResumePlan, plan_resume

PATHS = [f"{section}.{name}" for section, model in SECTIONS.items() for name in model.model_fields]


def parameters(**sections: dict[str, Any]) -> Parameters:
    return Parameters.model_validate(sections)


def made_with(then: Parameters, **facts: Any) -> Manifest:
    """The manifest of a checkpoint at step 40 of 120."""
    known: dict[str, Any] = {
        "step": 40,
        "total_steps": 120,
        "epoch": 1.25,
        "num_tokens": 5000,
        "num_samples": 64,
        "optimizer": then.training.optimizer,
        "parameters": then.model_dump(mode="json"),
    }
    return Manifest(**known | facts)


def plan(
    manifest: Manifest,
    now: Parameters,
    training_type: TrainingType = TrainingType.SFT,
    *,
    total_steps: int = 120,
    samples: int = 64,
) -> ResumePlan:
    return plan_resume(
        Path("/out/run-1/checkpoint-40"),
        manifest,
        now,
        training_type,
        total_steps=total_steps,
        samples=samples,
    )


def changes(result: ResumePlan) -> dict[str, Effect]:
    """Effect by path of what has changed."""
    return {i.field: i.effect for i in result.items if i.effect is not Effect.CONTINUES}


def test_every_parameter_has_its_row() -> None:
    assert sorted(TABLE) == sorted(PATHS)
    assert sum(not path.startswith("extensions.") for path in PATHS) == 49


def test_every_row_says_why_in_both_languages() -> None:
    for path, row in TABLE.items():
        assert row.message.en, path
        assert row.message.zh, path
        assert row.message.en != row.message.zh, path


def test_without_a_change_everything_goes_on() -> None:
    now = parameters(training={"learning_rate": 1e-3})
    result = plan(made_with(now), now)
    assert changes(result) == {}
    assert {item.field for item in result.items} == {
        "weights",
        "optimizer",
        "schedule",
        "random_state",
        "tokens",
        "data_position",
    }
    assert (result.step, result.epoch, result.num_tokens) == (40, 1.25, 5000)


@pytest.mark.parametrize(
    ("path", "value", "effect"),
    [
        ("logging.logging_steps", 7, Effect.MAY_CHANGE),
        ("training.save_steps", 7, Effect.MAY_CHANGE),
        ("training.save_total_limit", 7, Effect.MAY_CHANGE),
        ("data.output_dir", "/elsewhere", Effect.MAY_CHANGE),
        ("data.dataloader_num_workers", 3, Effect.MAY_CHANGE),
        ("training.learning_rate", 5e-5, Effect.DIFFERENT_RUN),
        ("training.batch_size", 3, Effect.DIFFERENT_RUN),
        ("general.seed", 7, Effect.DIFFERENT_RUN),
        ("data.max_samples", 9, Effect.DIFFERENT_RUN),
        ("lora.lora_r", 8, Effect.IMPOSSIBLE),
        ("lora.use_lora", False, Effect.IMPOSSIBLE),
        ("lora.lora_target_modules", ["q_proj"], Effect.IMPOSSIBLE),
        ("training.optimizer", "sgd", Effect.IMPOSSIBLE),
    ],
)
def test_a_change_is_told_with_what_it_means(path: str, value: Any, effect: Effect) -> None:
    section, name = path.split(".")
    then = parameters()
    result = plan(made_with(then), parameters(**{section: {name: value}}))
    item = next(item for item in result.items if item.field == path)
    assert item.effect is effect
    assert item.now == value
    before = getattr(getattr(then, section), name)
    assert item.then == (sorted(before) if isinstance(before, list) else before)
    assert list(changes(result)) == [path]


def test_what_moves_the_place_in_the_data_does_not_let_it_go_on() -> None:
    for change in ({"training": {"batch_size": 3}}, {"general": {"seed": 1}}):
        result = plan(made_with(parameters()), parameters(**change))
        assert "data_position" not in {item.field for item in result.items}


def test_the_gravest_comes_first() -> None:
    now = parameters(
        logging={"logging_steps": 7}, lora={"lora_r": 8}, training={"learning_rate": 5e-5}
    )
    effects = [item.effect for item in plan(made_with(parameters()), now).items]
    assert effects == sorted(effects, key=list(Effect).index)
    assert effects[:3] == [Effect.IMPOSSIBLE, Effect.DIFFERENT_RUN, Effect.MAY_CHANGE]


def test_a_longer_run_is_another_one_unless_the_learning_rate_is_constant() -> None:
    longer = {"num_train_epochs": 9}
    assert changes(plan(made_with(parameters()), parameters(training=longer))) == {
        "training.num_train_epochs": Effect.DIFFERENT_RUN
    }
    constant = {"lr_scheduler_type": "constant"}
    then, now = parameters(training=constant), parameters(training=constant | longer)
    result = plan(made_with(then), now, total_steps=360)
    assert changes(result) == {"training.num_train_epochs": Effect.MAY_CHANGE}
    schedule = next(item for item in result.items if item.field == "schedule")
    assert "40 of 360" in schedule.message.en
    assert "120" in schedule.message.en


def test_the_same_optimizer_by_another_name_is_no_hindrance() -> None:
    then = parameters(training={"optimizer": "adamw_8bit"})
    now = parameters(
        training={"optimizer": "adamw_torch"}, optimization={"use_8bit_optimizer": True}
    )
    assert Effect.IMPOSSIBLE not in changes(plan(made_with(then), now)).values()


def test_what_has_no_effect_is_no_change() -> None:
    """LoRA in a pretraining; the steps of a strategy that goes by epochs."""
    now = parameters(lora={"lora_r": 8}, training={"save_strategy": "epoch", "save_steps": 3})
    then = parameters(training={"save_strategy": "epoch"})
    assert changes(plan(made_with(then), now, TrainingType.PRETRAIN)) == {}


def test_a_data_file_that_was_written_to_is_another_run(tmp_path: Path) -> None:
    file = tmp_path / "chats.jsonl"
    file.write_text("{}\n")
    now = parameters(data={"train_file": str(file)})
    seen = DataFile.of(str(file))
    assert seen is not None
    manifest = made_with(now, data_files={"data.train_file": seen})
    assert changes(plan(manifest, now)) == {}
    file.write_text("{}\n{}\n")
    result = plan(manifest, now)
    assert changes(result) == {"data.train_file": Effect.DIFFERENT_RUN}
    (item,) = [item for item in result.items if item.field == "data.train_file"]
    assert "6 bytes" in item.message.en


def test_a_model_that_was_changed_in_place_is_another_run(tmp_path: Path) -> None:
    """Each file of the folder counts: one that is swapped for an older one of its size, too."""
    weights, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    for file in (weights, config):
        file.write_text("{}")
    now = parameters(data={"model_path": str(tmp_path)})
    found = {f"data.model_path/{path.name}": DataFile.of(str(path)) for path in (weights, config)}
    manifest = made_with(now, data_files=found)
    assert changes(plan(manifest, now)) == {}
    os.utime(weights, (1, 1))
    result = plan(manifest, now)
    assert changes(result) == {"data.model_path": Effect.DIFFERENT_RUN}
    (item,) = [item for item in result.items if item.field == "data.model_path"]
    assert "model.safetensors was written to since" in item.message.en


def test_a_check_warns_of_files_that_are_not_those_of_the_checkpoint(tmp_path: Path) -> None:
    chats, folder = tmp_path / "chats.jsonl", tmp_path / "checkpoint-40"
    chats.write_text("{}")
    data = {"train_file": str(chats), "resume_from_checkpoint": str(folder)}
    now = parameters(data=data)
    whole_checkpoint(folder, now, data_files={"data.train_file": DataFile.of(str(chats))})
    assert list(check_checkpoint(now, TrainingType.SFT, None)) == []
    chats.write_text("{}{}")
    (found,) = check_checkpoint(now, TrainingType.SFT, None)
    assert (found.field, found.reason) == ("data.train_file", FILES_CHANGED)
    assert found.severity is Severity.WARNING
    (notice,) = notices_of([found])
    assert "chats.jsonl was written to since" in notice.message


def test_a_checkpoint_at_the_end_is_said_to_have_nothing_left(tmp_path: Path) -> None:
    """Before the data are read, too: 64 samples and 16 a step are 40 steps in 10 epochs."""
    folder = tmp_path / "checkpoint-40"
    data = {"resume_from_checkpoint": str(folder)}
    steps = {"batch_size": 4, "gradient_accumulation_steps": 4}
    found = dict[int, list[Violation]]()
    for epochs in (9, 10, 11):
        now = parameters(data=data, training={**steps, "num_train_epochs": epochs})
        whole_checkpoint(folder, now, num_samples=64)
        found[epochs] = list(check_checkpoint(now, TrainingType.SFT, None))
        result = plan(made_with(now), now, total_steps=4 * epochs)
        (schedule,) = [item for item in result.items if item.field == "schedule"]
        assert ("nothing is left to train" in schedule.message.en) == (epochs < 11)
    assert found[11] == []
    for epochs in (9, 10):
        (violation,) = found[epochs]
        assert violation.reason == "NOTHING_LEFT_TO_TRAIN"
        assert violation.severity is Severity.WARNING
        assert f"ends at step {4 * epochs}: nothing is left" in violation.message.en
        assert "raise training.num_train_epochs" in violation.message.en


def test_another_number_of_samples_is_told_where_nothing_else_explains_it() -> None:
    now = parameters()
    assert changes(plan(made_with(now), now, samples=63)) == {
        "data.train_file": Effect.DIFFERENT_RUN
    }
    fewer = parameters(data={"max_samples": 63})
    assert changes(plan(made_with(now), fewer, samples=63)) == {
        "data.max_samples": Effect.DIFFERENT_RUN
    }


def test_a_checkpoint_of_an_earlier_version_can_be_planned_too() -> None:
    result = plan(Manifest(step=40, num_tokens=7), parameters())
    assert not result.knows_parameters
    assert changes(result) == {}
    assert result.step == 40


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("lora.lora_r", 8),
        ("lora.lora_alpha", 8),
        ("lora.lora_target_modules", ["q_proj"]),
        ("lora.use_lora", False),
        ("training.optimizer", "sgd"),
        ("optimization.use_8bit_optimizer", True),
        ("extensions.use_rslora", True),
        ("extensions.use_dora", True),
        ("extensions.lora_init", "pissa"),
        ("extensions.loraplus_lr_ratio", 4.0),
    ],
)
def test_what_the_plan_calls_impossible_a_check_refuses(
    tmp_path: Path, path: str, value: Any
) -> None:
    then = parameters()
    section, name = path.split(".")
    data = {"resume_from_checkpoint": str(tmp_path)}
    now = parameters(data=data, **{section: {name: value}})
    assert changes(plan(made_with(then), now)) == {path: Effect.IMPOSSIBLE}
    whole_checkpoint(tmp_path, then)
    same = then.model_copy(update={"data": now.data})
    assert list(check_checkpoint(same, TrainingType.SFT, None)) == []
    found = list(check_checkpoint(now, TrainingType.SFT, None))
    assert [violation.severity for violation in found] == [Severity.ERROR]


def whole_checkpoint(folder: Path, then: Parameters, **facts: Any) -> None:
    """A checkpoint of LoRA weights, as far as a check looks."""
    folder.mkdir(exist_ok=True)
    files = dict.fromkeys(STATE_FILES, b"state")
    shape = {
        "r": then.lora.lora_r,
        "lora_alpha": then.lora.lora_alpha,
        "target_modules": then.lora.lora_target_modules,
    }
    files["adapter_config.json"] = json.dumps(shape).encode()
    files["adapter_model.safetensors"] = (2).to_bytes(8, "little") + b"{}"
    for file, content in files.items():
        (folder / file).write_bytes(content)
    entries = {file: FileEntry(size=len(content), sha256="") for file, content in files.items()}
    manifest = made_with(then, files=entries, **{"num_samples": 6400} | facts)
    (folder / "manifest.json").write_text(manifest.model_dump_json())


def test_every_impossible_row_is_among_those_that_a_check_was_seen_to_refuse() -> None:
    (mark,) = test_what_the_plan_calls_impossible_a_check_refuses.pytestmark  # type: ignore[attr-defined]
    seen = {path for path, _ in mark.args[1]}
    assert {path for path, row in TABLE.items() if row.effect is Effect.IMPOSSIBLE} <= seen

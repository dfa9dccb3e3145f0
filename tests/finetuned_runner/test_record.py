"""What a run leaves beside its weights: a record to repeat it from, and a model card."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from finetuned.cli.params import draft, read_file
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason, Evaluation, TrainingType
from finetuned_runner.model_card import base_name, model_card
from finetuned_runner.record import RECORD, TrainingRecord


@pytest.fixture(scope="module")
def run(module_shop: Any) -> Any:
    """A LoRA run with evaluations that also leaves the whole model."""
    run = module_shop.make(
        training={
            "num_train_epochs": 2,
            "learning_rate": 1e-2,
            "eval_strategy": "steps",
            "eval_steps": 4,
        },
        data={"eval_ratio": 0.2},
        lora={"merge_lora": True, "lora_dropout": 0.1},
        general={"seed": 7},
    )
    module_shop.here(run)
    assert run.result.end_reason is EndReason.FINISHED, run.result
    return run


@pytest.fixture(scope="module")
def record(run: Any) -> TrainingRecord:
    return TrainingRecord.model_validate_json((run.output / "final" / RECORD).read_bytes())


def card(run: Any, folder: str = "final") -> str:
    return Path(run.output, folder, "README.md").read_text()


def front_matter(text: str) -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return document


def test_a_run_repeated_from_its_record_has_the_same_weights_to_the_bit(
    module_shop: Any, run: Any, record: TrainingRecord
) -> None:
    """Nothing but the record is needed: type, device and parameters of the new run are its."""
    plan = draft(read_file(run.output / "final" / RECORD))
    assert plan.violations == []
    assert (plan.training_type, plan.device) == ("sft", "cpu")
    parameters = Parameters.model_validate(protos.to_dict(plan.parameters))
    assert parameters == run.spec.parameters == record.parameters
    again = module_shop.make("again", **parameters.model_dump())
    module_shop.here(again)
    for name in ("final/adapter_model.safetensors", "merged/model.safetensors"):
        assert (again.output / name).read_bytes() == (run.output / name).read_bytes(), name
    other = module_shop.make("other", **{**parameters.model_dump(), "general": {"seed": 8}})
    module_shop.here(other)
    weights = "final/adapter_model.safetensors"
    assert (other.output / weights).read_bytes() != (run.output / weights).read_bytes()


def test_a_record_has_the_hashes_of_all_that_was_read(run: Any, record: TrainingRecord) -> None:
    """Data, weights, tokenizer: whether they are the same is a comparison, not a guess."""
    data = run.spec.parameters.data
    named = {(key, file.name): file for key, files in record.files.items() for file in files}
    for key, path in (
        ("data.train_file", Path(data.train_file)),
        ("data.model_path", Path(data.model_path, "model.safetensors")),
        ("data.model_path", Path(data.model_path, "tokenizer.json")),
        ("data.model_path", Path(data.model_path, "config.json")),
    ):
        content = path.read_bytes()
        file = named[key, path.name]
        assert (file.size, file.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    template = Path(data.model_path, "chat_template.jinja").read_bytes()
    assert record.chat_template_sha256 == hashlib.sha256(template).hexdigest()


def test_a_record_tells_what_came_of_the_run(run: Any, record: TrainingRecord) -> None:
    """Losses, steps and tokens are those that the run reported."""
    assert record.train_losses == pytest.approx(run.losses())
    scores = {event.step: event.values["eval_loss"] for event in run.events(Evaluation)}
    assert record.eval_losses == pytest.approx(scores)
    assert len(scores) == 3
    assert record.step == run.result.step == max(record.train_losses)
    assert record.end_reason is run.result.end_reason
    assert (record.num_samples, record.num_eval_samples) == (19, 5)
    assert record.num_tokens > 19 * 2 * 20
    assert {"python", "torch", "transformers", "peft", "finetuned"} <= record.versions.keys()
    assert record.machine.num_threads == 1
    assert 0 < record.trained_parameters < record.total_parameters


def test_the_card_of_an_adapter_is_one_of_the_hub(run: Any) -> None:
    """It is ours, not the one with gaps that peft writes; its head names base model and library."""
    text = card(run)
    head = front_matter(text)
    assert head["base_model"] == "chatml"
    assert (head["library_name"], head["pipeline_tag"]) == ("peft", "text-generation")
    assert head["base_model_relation"] == "adapter"
    assert "license" not in head
    assert "More Information Needed" not in text
    for section in ("Use", "Training data", "Results", "Hyperparameters", "License"):
        assert f"\n## {section}\n" in text


def test_a_card_can_be_published(run: Any) -> None:
    """No folder of the machine, and no name of its user, stands in it."""
    for folder in ("final", "merged"):
        text = card(run, folder)
        assert not re.search(r"[\s\"'`(]/\w", text.replace("\n/", "")), text
        assert str(run.output.parent) not in text


def test_the_card_of_a_merged_model_is_that_of_a_whole_one(run: Any) -> None:
    """Who loads it needs no peft."""
    text = card(run, "merged")
    head = front_matter(text)
    assert (head["library_name"], head["base_model_relation"]) == ("transformers", "finetune")
    assert "peft import" not in text
    assert "worked into its weights" in text


def test_a_card_lists_what_took_effect_and_nothing_else(run: Any) -> None:
    """What other settings make idle would be read as if it had been used."""
    table = card(run).split("## Hyperparameters")[1].split("##")[0]
    rows = dict(re.findall(r"\| (\S+) \| (.+) \|", table))
    assert rows["training.learning_rate"] == "0.01"
    assert rows["lora.lora_dropout"] == "0.1"
    assert rows["general.seed"] == "7"
    assert rows["precision"] == "float32"
    for idle in ("training.lr_num_cycles", "training.warmup_steps", "optimization.fp16"):
        assert idle not in rows
    assert not any(name.startswith(("extensions.", "logging.", "data.output")) for name in rows)


def test_a_card_shows_the_losses(run: Any, record: TrainingRecord) -> None:
    """First and last training loss, each evaluation, and which was best."""
    text = card(run)
    last = record.step
    assert f"| {last} | {record.train_losses[last]:.4f} | {record.eval_losses[last]:.4f} |" in text
    assert f"| 1 | {record.train_losses[1]:.4f} |  |" in text
    best = min(record.eval_losses, key=lambda step: record.eval_losses[step])
    assert f"The best evaluation loss is {record.eval_losses[best]:.4f}, at step {best}" in text


@pytest.mark.parametrize("folder", ["final", "merged"])
def test_what_a_card_says_about_use_works(
    run: Any, folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The snippet answers, where the base model lies under its name."""
    base = Path(run.spec.parameters.data.model_path)
    shutil.copytree(run.output / folder, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    Path(base.name).symlink_to(base)
    snippet = card(run, folder).split("```python\n")[1].split("```")[0]
    said: list[str] = []
    exec(snippet, {"print": said.append})
    assert len(said) == 1
    assert said[0].strip()


def test_pretraining_leaves_card_and_record_too(module_shop: Any) -> None:
    """All weights: the card speaks of no LoRA and of no chats."""
    run = module_shop.make("pretrain", kind=TrainingType.PRETRAIN)
    module_shop.here(run)
    text = card(run)
    assert front_matter(text)["tags"] == ["pretraining"]
    assert "lora" not in text.lower()
    assert "blocks of text" in text
    assert json.loads((run.output / "final" / RECORD).read_text())["training_type"] == "pretrain"


def test_a_model_is_called_by_its_id_where_it_is_certain() -> None:
    """In the Hub's cache the folder's own name is a commit."""
    path = "/cache/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/93efa2f097d58c2a74874c7e"
    assert base_name(path) == "HuggingFaceTB/SmolLM2-135M"
    assert base_name("/models/small") == "small"


def test_deleting_what_a_run_wrote_takes_card_and_record_along(run: Any) -> None:
    """They are recorded as outputs, with their times."""
    lines = (run.folder / "outputs.jsonl").read_text().splitlines()
    final = next(entry for line in lines if (entry := json.loads(line))["name"] == "final")
    for name in (RECORD, "README.md"):
        assert final["files"][name] == (run.output / "final" / name).stat().st_mtime_ns


@pytest.fixture(scope="module")
def earlier(module_shop: Any) -> Path:
    """A checkpoint of step 3, of a run that trained on `chats.jsonl`."""
    saved = module_shop.make("earlier", training={"max_steps": 3, "save_steps": 3})
    return Path(module_shop.here(saved).output, "checkpoint-3")


@pytest.mark.parametrize(("max_steps", "is_idle"), [(5, False), (3, True)])
def test_card_and_record_of_a_resumed_run_tell_what_is_the_checkpoints(
    module_shop: Any, earlier: Path, max_steps: int, is_idle: bool
) -> None:
    """Who reads them takes nothing of the earlier run for the new data's doing."""
    run = module_shop.make(
        f"resumed-{max_steps}",
        training={"max_steps": max_steps},
        data={
            "resume_from_checkpoint": str(earlier),
            "train_file": str(module_shop.chats(16, name="more.jsonl")),
        },
    )
    module_shop.here(run)
    record = TrainingRecord.model_validate_json((run.output / "final" / RECORD).read_bytes())
    assert record.resumed_from is not None
    assert record.resumed_from.model_dump() == {
        "checkpoint": "checkpoint-3",
        "step": 3,
        "data_files": {"data.train_file": "chats.jsonl"},
    }
    text = card(run)
    assert "went on from `checkpoint-3`, a checkpoint at step 3" in text
    assert "`chats.jsonl`" in text
    assert str(earlier.parent) not in text
    assert ("16 chats for training" in text) is not is_idle
    assert ("trained on nothing of it" in text) is is_idle
    assert ("| nothing: read for training | `more.jsonl`" in text) is is_idle
    assert "in 0 epochs" not in text


def test_a_card_writes_a_name_in_its_own_letters(record: TrainingRecord) -> None:
    """A reader copies the snippet: escapes are no name of a model."""
    data = record.parameters.data.model_copy(update={"model_path": "/models/größe-模型"})
    parameters = record.parameters.model_copy(update={"data": data})
    changed = record.model_copy(update={"parameters": parameters})
    text = model_card(changed, is_adapter=True, name="final")
    assert 'from_pretrained("größe-模型")' in text

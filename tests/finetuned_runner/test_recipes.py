"""What each parameter does to a run, and how runs end that can't go on."""

from __future__ import annotations

import errno
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    EndReason,
    Evaluation,
    Progress,
    TrainingType,
)
from run_samples import samples_of
from tiny import chats, weights, write_jsonl

# --- ends


def test_bad_lines_are_named(shop):
    file = shop.chats(10)
    lines = file.read_text().splitlines()
    lines[6] = '{"messages": 5}'
    lines[8] = "{"
    file.write_text("\n".join(lines))
    run = shop.here(shop.make(data={"train_file": str(file)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID
    assert 'line 7: "messages" must be a list of turns; line 9: not JSON' in run.result.message


@pytest.mark.parametrize(
    ("name", "content"), [("empty.jsonl", ""), ("missing.jsonl", None), ("blank.txt", " \n")]
)
def test_data_that_isnt_there_is_invalid(shop, name, content):
    file = shop.root / name
    if content is not None:
        file.write_text(content)
    kind = TrainingType.PRETRAIN if name.endswith("txt") else TrainingType.SFT
    run = shop.here(shop.make(kind=kind, data={"train_file": str(file)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID
    assert name in run.result.message


def test_data_without_a_token_to_learn_is_invalid(shop):
    turns = [{"role": "user", "content": "word " * 300}, {"role": "assistant", "content": "no"}]
    file = write_jsonl(shop.root / "long.jsonl", [{"messages": turns}] * 3)
    run = shop.here(shop.make(data={"train_file": str(file)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID
    assert "max_seq_length (128)" in run.result.message


def test_a_loss_that_is_not_finite_ends_the_run_at_its_step_without_a_checkpoint_of_it(shop):
    import numpy as np
    from safetensors.numpy import save_file

    poisoned = shop.root / "poisoned"
    shutil.copytree(shop.model(), poisoned)
    tensors = weights(poisoned)
    tensors["lm_head.weight"] = np.full_like(tensors["lm_head.weight"], np.inf)
    save_file(tensors, str(poisoned / "model.safetensors"), metadata={"format": "pt"})
    run = shop.here(shop.make(data={"model_path": str(poisoned)}, training={"save_steps": 1}))
    assert run.result.end_reason is EndReason.LOSS_NOT_FINITE
    assert "at step 1; look at the model's weights" in run.result.message
    assert not run.checkpoints()


def test_modules_that_the_model_lacks_are_named_with_those_it_has(shop):
    run = shop.here(shop.make(lora={"lora_target_modules": ["q_proj", "c_attn", "wte"]}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "no module c_attn, wte" in run.result.message
    assert "down_proj, embed_tokens, gate_proj, k_proj, lm_head" in run.result.message


def _remove(name: str) -> Any:
    return lambda folder: (folder / name).unlink()


def _drop_weight(folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = weights(folder)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, str(folder / "model.safetensors"), metadata={"format": "pt"})


def _only_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"never read")


def _foreign_code(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoModelForCausalLM": "code.Model"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text("raise SystemExit('ran')")


def _torn(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize(
    "damage",
    [
        _remove("config.json"),
        _remove("tokenizer.json"),
        _drop_weight,
        _only_pickle,
        _foreign_code,
        _torn,
        shutil.rmtree,
    ],
    ids=["config", "tokenizer", "a weight", "only a pickle", "foreign code", "torn", "all"],
)
def test_a_damaged_model_folder_is_told(shop, damage):
    folder = shop.root / "damaged"
    shutil.copytree(shop.model(), folder)
    damage(folder)
    run = shop.here(shop.make(data={"model_path": str(folder)}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE, run.result
    assert "damaged" in run.result.message


def test_a_tokenizer_of_another_model_is_told(shop):
    small = shop.root / "small"
    shutil.copytree(shop.model(), small)
    tensors = weights(small)
    from safetensors.numpy import save_file

    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = tensors[name][:300]
    save_file(tensors, str(small / "model.safetensors"), metadata={"format": "pt"})
    config = json.loads((small / "config.json").read_text()) | {"vocab_size": 300}
    (small / "config.json").write_text(json.dumps(config))
    run = shop.here(shop.make(data={"model_path": str(small)}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "the model has 300 only" in run.result.message


def test_what_needs_bitsandbytes_fails_before_the_work_begins(shop, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    run = shop.here(shop.make(optimization={"use_qlora": True}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "QLoRA needs bitsandbytes" in run.result.message
    run = shop.here(shop.make("second", optimization={"use_8bit_optimizer": True}))
    assert run.result.end_reason is EndReason.RUNNER_CRASHED
    assert "adamw_8bit needs bitsandbytes" in run.result.message


def test_qlora_without_lora_is_refused(shop):
    run = shop.here(shop.make(optimization={"use_qlora": True}, lora={"use_lora": False}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "turn lora.use_lora on" in run.result.message


def test_a_gpu_that_isnt_there_is_lost(shop):
    run = shop.make()
    run.spec = run.spec.model_copy(update={"device": "cuda:0"})
    assert shop.here(run).result.end_reason is EndReason.DEVICE_LOST


def test_errors_are_told_apart_by_type_and_text():
    import torch

    from finetuned_runner.failures import judge

    def reason(error: BaseException) -> str:
        return judge(error, Parameters(), 3).end_reason.name

    wrapped = RuntimeError("PytorchStreamWriter failed")
    wrapped.__cause__ = OSError(errno.ENOSPC, "No space left on device")
    assert reason(wrapped) == "DISK_FULL"
    assert reason(OSError(errno.EDQUOT, "quota")) == "DISK_FULL"
    torch_says = "[enforce fail at inline_container.cc:672] . unexpected pos 135360 vs 135248"
    assert reason(RuntimeError(torch_says)) == "DISK_FULL"
    assert reason(Exception("I/O error: No space left on device (os error 28)")) == "DISK_FULL"
    assert reason(torch.OutOfMemoryError("CUDA out of memory. Tried")) == "DEVICE_OUT_OF_MEMORY"
    assert reason(MemoryError()) == "HOST_OUT_OF_MEMORY"
    allocator = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."
    assert reason(RuntimeError(allocator)) == "HOST_OUT_OF_MEMORY"
    assert reason(RuntimeError("CUDA error: uncorrectable ECC error encountered")) == "DEVICE_LOST"
    assert reason(OSError(errno.EACCES, "Permission denied")) == "RUNNER_CRASHED"
    with pytest.raises(ZeroDivisionError) as raised:
        _ = 1 / 0
    result = judge(raised.value, Parameters(), 3)
    assert (result.message, result.step) == ("ZeroDivisionError: division by zero", 3)
    assert "ZeroDivisionError" in result.detail


# --- parameters


def test_max_steps_decides_over_epochs(shop):
    run = shop.here(shop.make(training={"max_steps": 8, "num_train_epochs": 1}))
    assert run.result.end_reason is EndReason.STEP_LIMIT
    assert run.result.step == 8
    assert run.events(Progress)[-1].total_steps == 8


@pytest.mark.proves("training.warmup_ratio", "training.lr_num_cycles", "training.lr_scheduler_type")
@pytest.mark.parametrize(
    ("training", "expected"),
    [
        ({"lr_scheduler_type": "constant"}, [1, 1, 1, 1, 1, 1]),
        (
            {"lr_scheduler_type": "linear", "warmup_ratio": 0.0},
            [1, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6],
        ),
        ({"lr_scheduler_type": "linear", "warmup_ratio": 0.5}, [0, 1 / 3, 2 / 3, 1, 2 / 3, 1 / 3]),
        (
            {"lr_scheduler_type": "linear", "warmup_ratio": 1.0},
            [0, 1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6],
        ),
        (
            {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 2, "warmup_ratio": 0.9},
            [0, 1 / 2, 1, 1, 1, 1],
        ),
        (
            {"lr_scheduler_type": "cosine", "warmup_ratio": 0.0, "lr_num_cycles": 3},
            [(1 + math.cos(math.pi * step / 6)) / 2 for step in range(6)],
        ),
        (
            {"lr_scheduler_type": "cosine_with_restarts", "warmup_ratio": 0.0, "lr_num_cycles": 2},
            [1, 0.75, 0.25, 1, 0.75, 0.25],
        ),
    ],
)
def test_schedules_and_warm_up(shop, training, expected):
    """The rate of each step is the schedule's: it rises for its share, starts again so often."""
    run = shop.here(shop.make(training={"learning_rate": 1e-3, "save_strategy": "no", **training}))
    assert [rate / 1e-3 for rate in run.rates().values()] == pytest.approx(expected)


@pytest.mark.parametrize("optimizer", ["adafactor", "sgd"])
def test_each_optimizer_trains(shop, optimizer):
    training = {"optimizer": optimizer, "learning_rate": 0.1, "num_train_epochs": 2}
    run = shop.here(shop.make(training=training, lora={"use_lora": False}))
    assert run.result.end_reason is EndReason.FINISHED
    losses = run.losses()
    assert losses[12] < losses[1]


def test_an_optimizer_without_8_bits_runs_in_full_with_a_notice(shop):
    run = shop.here(
        shop.make(training={"optimizer": "sgd"}, optimization={"use_8bit_optimizer": True})
    )
    assert run.result.end_reason is EndReason.FINISHED
    assert "NO_8BIT_OPTIMIZER" in run.notices()


def test_precision_follows_the_device_with_notices(shop):
    run = shop.here(shop.make(optimization={"fp16": True, "tf32": True}))
    assert {"FP16_UNAVAILABLE_ON_CPU", "TF32_UNAVAILABLE"} <= set(run.notices())
    plain = shop.here(shop.make("plain"))
    assert run.losses() == plain.losses()
    bf16 = shop.here(shop.make("bf16", optimization={"bf16": True}))
    assert not bf16.notices()
    assert bf16.losses() != plain.losses()
    assert bf16.losses() == pytest.approx(plain.losses(), rel=0.01)


def test_the_seed_decides(shop):
    first = shop.here(shop.make("first"))
    same = shop.here(shop.make("same"))
    other = shop.here(shop.make("other", general={"seed": 7}))
    assert first.losses() == same.losses() != other.losses()


def test_gradient_checkpointing_changes_nothing_but_memory(shop):
    plain = shop.here(shop.make("plain"))
    run = shop.here(shop.make("checkpointing", optimization={"gradient_checkpointing": True}))
    assert run.losses() == pytest.approx(plain.losses(), rel=1e-6)


def test_evaluation_stops_a_run_that_improves_no_more(shop):
    training = {
        "eval_strategy": "steps",
        "eval_steps": 2,
        "early_stopping_patience": 2,
        "early_stopping_threshold": 1.0,
        "num_train_epochs": 10,
        "save_strategy": "epoch",
    }
    run = shop.here(shop.make(training=training, data={"eval_ratio": 0.25}))
    assert run.result.end_reason is EndReason.EARLY_STOPPED, run.result
    assert run.result.step == 6  # the first sets the mark, two don't better it by the threshold
    assert len(run.events(Evaluation)) == 3
    assert "eval_loss" in run.events(Evaluation)[0].values
    assert (run.output / "final" / "adapter_model.safetensors").exists()


def test_evaluation_settings_that_do_nothing_are_told(shop):
    run = shop.here(
        shop.make(training={"eval_strategy": "epoch", "early_stopping_patience": 1, "max_steps": 1})
    )
    assert {"NO_EVALUATION_DATA", "EARLY_STOPPING_WITHOUT_EVALUATION"} <= set(run.notices())
    run = shop.here(shop.make("off", data={"eval_ratio": 0.5}, training={"max_steps": 1}))
    assert set(run.notices()) == {"EVALUATION_OFF"}
    run = shop.here(shop.make("all", data={"eval_ratio": 1.0}, training={"eval_strategy": "epoch"}))
    assert run.result.end_reason is EndReason.DATASET_INVALID


def test_max_samples_takes_the_first(shop):
    run = shop.here(shop.make(data={"max_samples": 8}))
    assert run.result.step == 2


def test_a_peft_file_wins_with_a_notice(shop):
    file = shop.root / "peft.json"
    file.write_text(json.dumps({"peft_type": "LORA", "r": 3, "target_modules": ["v_proj"]}))
    run = shop.here(shop.make(lora={"peft_config_path": str(file)}))
    assert "PEFT_CONFIG_WINS" in run.notices()
    config = json.loads((run.output / "final" / "adapter_config.json").read_text())
    assert (config["r"], config["target_modules"]) == (3, ["v_proj"])
    for content in ('{"peft_type": "IA3"}', '{"rank": 8}', "[]", "no"):
        file.write_text(content)
        shutil.rmtree(shop.root / "bad", ignore_errors=True)
        bad = shop.here(shop.make("bad", lora={"peft_config_path": str(file)}))
        assert bad.result.end_reason is EndReason.MODEL_UNLOADABLE
        assert "peft.json can't be used" in bad.result.message


def test_attached_lora_weights_begin_a_fresh_run(shop):
    training = {"learning_rate": 1e-2, "num_train_epochs": 2}
    first = shop.here(shop.make("first", training=training))
    final = str(first.output / "final")
    attached = {"attach_lora": True, "resume_from_checkpoint": final}
    second = shop.here(shop.make("second", data=attached, training=training))
    assert "LORA_ATTACHED" in second.notices()
    assert second.result.step == 12
    assert second.losses()[1] < first.losses()[1] - 0.1
    # The adapter's folder as the model: the base is where the adapter says.
    third = shop.here(
        shop.make("third", data={"attach_lora": True, "model_path": final}, training=training)
    )
    assert third.losses() == second.losses()
    none = shop.here(shop.make("none", data={"attach_lora": True}))
    assert none.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "no LoRA weights to attach" in none.result.message
    alone = shop.here(shop.make("alone", data={"model_path": final}))
    assert alone.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "holds LoRA weights only" in alone.result.message


def test_an_adapter_beside_the_model_is_not_attached_unasked(shop):
    first = shop.here(shop.make("first", training={"learning_rate": 1e-2}))
    both = shop.root / "both"
    shutil.copytree(shop.model(), both)
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        shutil.copy(first.output / "final" / name, both)
    run = shop.here(
        shop.make("run", data={"model_path": str(both)}, training={"learning_rate": 1e-2})
    )
    assert run.losses() == first.losses()
    assert "ADAPTER_NOT_ATTACHED" in run.notices()


def test_samples_are_cut_at_the_models_last_position(shop):
    model = shop.model(positions=64)
    run = shop.here(shop.make(data={"model_path": str(model)}))
    assert run.result.end_reason is EndReason.FINISHED
    assert "MAX_SEQ_LENGTH_ABOVE_MODEL" in run.notices()


def test_all_weights_are_trained_and_saved_without_lora(shop):
    model = shop.root / "model"
    shutil.copytree(shop.model(), model)
    # A temperature without sampling: released models have it, and transformers would not save it.
    (model / "generation_config.json").write_text('{"temperature": 0.5, "do_sample": false}')
    run = shop.here(
        shop.make(
            data={"model_path": str(model)},
            lora={"use_lora": False, "merge_lora": True},
            training={"learning_rate": 1e-2, "lr_scheduler_type": "constant"},
        )
    )
    assert "LORA_OFF" in run.notices()
    before, after = weights(shop.model()), weights(run.output / "final")
    assert before.keys() == after.keys()
    assert all((before[name] != after[name]).any() for name in before)
    assert json.loads((run.output / "final" / "config.json").read_text())["use_cache"] is True


def test_pretraining_learns_every_token_of_blocks_of_equal_length(shop):
    from transformers import AutoTokenizer

    from finetuned_runner.report import Report

    tokenizer = AutoTokenizer.from_pretrained(shop.model())
    texts = ["How do I list files? " * 10, "Use `ls`.", "Sort lines. " * 40]
    file = write_jsonl(shop.root / "texts.jsonl", [{"text": text} for text in texts])
    run = shop.make(kind=TrainingType.PRETRAIN, data={"train_file": str(file)})
    dataset = samples_of(run.spec, Report(shop.root))
    samples = [dataset[index] for index in range(len(dataset))]
    assert all((sample["input_ids"] == sample["labels"]).all() for sample in samples)
    assert [len(sample["input_ids"]) for sample in samples][:-1] == [128] * (len(samples) - 1)
    tokens = [token for sample in samples for token in sample["input_ids"].tolist()]
    assert tokenizer.decode(tokens) == "".join(text + tokenizer.eos_token for text in texts)


def test_pretraining_a_text_file_ignores_lora_and_says_so_where_it_was_asked_for(shop):
    file = shop.root / "book.txt"
    file.write_text("How do I list files? Use `ls`.\n" * 200)
    run = shop.here(
        shop.make(
            kind=TrainingType.PRETRAIN,
            data={"train_file": str(file), "attach_lora": True, "eval_ratio": 0.2},
            training={"eval_strategy": "epoch", "learning_rate": 1e-2},
            optimization={"use_qlora": True},
        )
    )
    assert run.result.end_reason is EndReason.FINISHED, run.result
    assert "NOT_FOR_PRETRAINING" in run.notices()
    assert (run.output / "final" / "model.safetensors").exists()
    (evaluation,) = run.events(Evaluation)
    assert evaluation.values["eval_loss"] > 0


def test_qwen3_trains_as_well(shop):
    file = write_jsonl(shop.root / "multi.jsonl", chats(8, turns=3))
    model = shop.model(family="qwen3")
    run = shop.here(shop.make(data={"model_path": str(model), "train_file": str(file)}))
    assert run.result.end_reason is EndReason.FINISHED

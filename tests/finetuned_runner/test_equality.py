"""A run's numbers are the plain Trainer's, a resumed run's those of one never interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.runs.contract import (
    EndReason,
    Evaluation,
    Progress,
    StopWish,
    TrainingType,
)

NEAR = 2e-5
"""Sums in another order: the plain Trainer pads, and has logits where nothing is learned."""
STEPS = {"num_train_epochs": 2, "learning_rate": 1e-2, "warmup_steps": 2}


def plain_losses(
    model_path: str,
    samples: list[dict[str, list[int]]],
    output: Path,
    *,
    lora: bool,
    **options: Any,
) -> dict[int, float]:
    """Losses of transformers' Trainer, driven by a script that knows nothing of ours."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        Trainer,
        TrainingArguments,
        set_seed,
    )

    def pad(batch: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
        length = -(-max(len(sample["input_ids"]) for sample in batch) // 8) * 8

        def rows(key: str, fill: int) -> torch.Tensor:
            return torch.tensor([s[key] + [fill] * (length - len(s[key])) for s in batch])

        for sample in batch:
            sample["attention_mask"] = [1] * len(sample["input_ids"])
        return {
            "input_ids": rows("input_ids", 0),
            "attention_mask": rows("attention_mask", 0),
            "labels": rows("labels", -100),
        }

    set_seed(42)
    model: Any = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    if lora:
        set_seed(42)
        modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        model = get_peft_model(
            model,
            LoraConfig(r=16, lora_alpha=16, target_modules=modules, task_type="CAUSAL_LM"),
        )
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(output),
            use_cpu=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
            weight_decay=0.01,
            lr_scheduler_type="cosine",
            warmup_steps=2,
            optim="adamw_torch",
            seed=42,
            logging_steps=1,
            save_strategy="no",
            remove_unused_columns=False,
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **options,
        ),
        data_collator=pad,
        train_dataset=samples,
    )
    trainer.train()
    return {log["step"]: log["loss"] for log in trainer.state.log_history if "loss" in log}


def chat_samples(model_path: str, file: str) -> list[dict[str, list[int]]]:
    """Tokens and labels of one-turn chats, put together by hand as ChatML."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    samples = []
    for line in Path(file).read_text().splitlines():
        question, answer = (message["content"] for message in json.loads(line)["messages"])
        prompt = tokenizer.encode(
            "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
            f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        learned = tokenizer.encode(f"{answer}<|im_end|>")
        rest = tokenizer.encode("\n")
        samples.append(
            {
                "input_ids": prompt + learned + rest,
                "labels": [-100] * len(prompt) + learned + [-100] * len(rest),
            }
        )
    return samples


def block_samples(model_path: str, file: str) -> list[dict[str, list[int]]]:
    """Blocks of 128 tokens of all documents, parted by the end-of-text token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path)
    tokens: list[int] = []
    for line in Path(file).read_text().splitlines():
        tokens += [*tokenizer.encode(json.loads(line)["text"]), tokenizer.eos_token_id]
    blocks = [tokens[start : start + 128] for start in range(0, len(tokens), 128)]
    return [{"input_ids": block, "labels": block} for block in blocks]


@pytest.mark.parametrize("lora", [True, False])
def test_fine_tuning_has_the_losses_of_the_plain_trainer_at_every_step(shop, lora):
    run = shop.make(
        training=STEPS,
        lora={"use_lora": lora},
        data={"reshuffle": True},  # as the plain Trainer does
    )
    shop.here(run)
    assert run.result.end_reason is EndReason.FINISHED, run.result
    data = run.spec.parameters.data
    samples = chat_samples(data.model_path, data.train_file)
    expected = plain_losses(
        data.model_path, samples, shop.root / "plain", lora=lora, num_train_epochs=2
    )
    assert len(expected) == 12
    assert run.losses() == pytest.approx(expected, abs=NEAR)
    assert expected[12] < expected[1]


def test_pretraining_has_the_losses_of_the_plain_trainer_at_every_step(shop):
    file = shop.documents(60)
    run = shop.make(
        kind=TrainingType.PRETRAIN,
        training=STEPS | {"max_steps": 8},
        data={"reshuffle": True, "train_file": str(file)},
    )
    shop.here(run)
    assert run.result.end_reason is EndReason.STEP_LIMIT, run.result
    data = run.spec.parameters.data
    samples = block_samples(data.model_path, data.train_file)
    expected = plain_losses(data.model_path, samples, shop.root / "plain", lora=False, max_steps=8)
    assert len(expected) == 8
    assert run.losses() == pytest.approx(expected, abs=NEAR)


def test_without_reshuffling_the_first_epoch_is_the_plain_trainers_and_all_have_its_order(shop):
    run = shop.here(shop.make(training=STEPS | {"num_train_epochs": 1, "learning_rate": 1e-6}))
    again = shop.here(shop.make("again", training=STEPS | {"learning_rate": 1e-6}))
    # At a learning rate of next to nothing the loss of a step is that of its samples.
    losses = again.losses()
    for step in range(1, 7):
        assert losses[step] == pytest.approx(losses[step + 6], rel=1e-3)
        assert losses[step] == pytest.approx(run.losses()[step], rel=1e-3)


@pytest.fixture
def stop_after(monkeypatch):
    """Gives a watch whose wish to stop comes during a certain micro-step."""

    def make(micro_steps: int, stop: StopWish = StopWish.SAVE) -> Any:
        from finetuned_runner.control import Watch
        from finetuned_runner.trainer import RunTrainer

        def watch(folder: Path, report: Any) -> Watch:
            watch = Watch(folder, report)
            count = 0
            original = RunTrainer.training_step

            def step(trainer: Any, *arguments: Any) -> Any:
                nonlocal count
                count += 1
                if count == micro_steps:
                    watch._take(stop, "stop")
                return original(trainer, *arguments)

            monkeypatch.setattr(RunTrainer, "training_step", step)
            return watch

        return watch

    yield make
    monkeypatch.undo()


@pytest.mark.parametrize(
    ("micro_steps", "reshuffle", "eval_strategy"),
    [
        pytest.param(16, True, "steps", id="at the end of a step with an evaluation"),
        pytest.param(15, True, "steps", id="in mid-step"),
        pytest.param(17, False, "steps", id="in mid-step, the order the same in all epochs"),
        pytest.param(11, True, "epoch", id="in an epoch's first step"),
        pytest.param(10, True, "epoch", id="at the end of an epoch"),
    ],
)
def test_a_resumed_run_has_the_losses_of_one_that_was_never_stopped(
    shop, stop_after, monkeypatch, micro_steps, reshuffle, eval_strategy
):
    options: dict[str, Any] = {
        # An evaluation draws a random number too. 19 samples: ten micro-steps, five steps an epoch.
        "training": STEPS
        | {"eval_strategy": eval_strategy, "eval_steps": 4, "num_train_epochs": 3},
        "lora": {"lora_dropout": 0.1},
    }
    data = {"reshuffle": reshuffle, "eval_ratio": 0.2}
    whole = shop.here(shop.make("whole", data=data, **options))
    stopped = shop.here(shop.make("stopped", data=data, **options), stop_after(micro_steps))
    monkeypatch.undo()
    assert stopped.result.end_reason is EndReason.STOPPED_BY_USER, stopped.result
    assert stopped.phases()[-1] == "STOPPING"
    (saved,) = stopped.checkpoints()
    assert saved.cause == "stop"
    assert saved.step == stopped.result.step == micro_steps // 2
    resumed = shop.here(
        shop.make("resumed", data=data | {"resume_from_checkpoint": saved.path}, **options)
    )
    assert resumed.result.end_reason is EndReason.FINISHED, resumed.result
    assert stopped.losses() | resumed.losses() == whole.losses()
    assert not set(stopped.losses()) & set(resumed.losses())
    assert whole.rates() == stopped.rates() | resumed.rates()
    assert resumed.events(Progress)[-1].num_tokens == whole.events(Progress)[-1].num_tokens
    scores = [run.events(Evaluation)[-1].values["eval_loss"] for run in (resumed, whole)]
    assert scores[0] == scores[1]

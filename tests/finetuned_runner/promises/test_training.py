"""What the parameters of the section `training` do, but for saving and evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finetuned_daemon.runs.contract import EndReason, Metrics, TrainingType
from tiny import chats, weights, write_jsonl

FULL = {"use_lora": False}
# No warm-up and no decline: every step has the rate that is set.
CONSTANT = {"lr_scheduler_type": "constant", "weight_decay": 0.0}
ONE_STEP = {**CONSTANT, "batch_size": 6, "gradient_accumulation_steps": 1, "max_steps": 1}


def moved(run: Any) -> float:
    """How far all weights together moved from the model's, as the length of one vector."""
    before, after = (
        weights(Path(run.spec.parameters.data.model_path)),
        weights(run.output / "final"),
    )
    return math.sqrt(sum(float(((after[name] - before[name]) ** 2).sum()) for name in before))


def final(run: Any) -> dict[str, Any]:
    return weights(run.output / "final")


def gradient_norm(run: Any, step: int = 1) -> float:
    """The logged length of the gradient, before it is cut."""
    norms: dict[int, float] = {e.step: e.values["grad_norm"] for e in run.events(Metrics)}
    return norms[step]


# --- batches and steps


@pytest.mark.proves("training.batch_size")
def test_a_batch_has_so_many_samples(
    train: Any, oracle: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """Of 10 samples, batches of 4 make 3 steps an epoch: 4, 4 and 2 samples, each once."""
    samples = [chats(1)[0]] * 10  # all of one length
    file = str(write_jsonl(shop.root / "ten.jsonl", samples))
    length = oracle.num_tokens(shop.model(layers=1), samples[:1])
    for size, expected in ((4, [4, 4, 2]), (10, [10]), (1, [1] * 10)):
        training = {"batch_size": size, "gradient_accumulation_steps": 1}
        run = train(data={"train_file": file}, training=training)
        assert tokens_of_steps(run) == [count * length for count in expected]


@pytest.mark.proves("training.gradient_accumulation_steps")
def test_accumulated_batches_are_one_large_batch(
    train: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """1 x 4, 2 x 2 and 4 x 1 give the same weights to 1e-6; twice the batches, half the steps."""
    file = str(shop.chats(22))  # the last step has less to add up
    runs = [
        train(
            data={"train_file": file},
            training={
                **CONSTANT,
                "optimizer": "sgd",
                "learning_rate": 0.1,
                "batch_size": size,
                "gradient_accumulation_steps": batches,
            },
            lora=FULL,
        )
        for size, batches in ((4, 1), (2, 2), (1, 4), (2, 4))
    ]
    large = runs[0]
    assert moved(large) > 0.01
    for run in runs[1:3]:
        assert tokens_of_steps(run) == tokens_of_steps(large)
        assert run.losses() == pytest.approx(large.losses(), rel=1e-5)
        for name, weight in final(run).items():
            np.testing.assert_allclose(weight, final(large)[name], rtol=0, atol=1e-6)
    assert [run.result.step for run in runs] == [6, 6, 6, 3]


@pytest.mark.proves("training.max_seq_length")
def test_nothing_longer_is_trained(
    train: Any, oracle: Any, shop: Any, tokens_of_steps: Any
) -> None:
    """Longer chats are cut, with a notice; texts are joined and make blocks of this length."""
    short, long = chats(2)
    long["messages"][1]["content"] = "Use `ls`. " * 60
    model = shop.model(layers=1)
    lengths = [oracle.num_tokens(model, [chat]) for chat in (short, long)]
    assert lengths[0] < 128
    assert lengths[1] > 136
    file = str(write_jsonl(shop.root / "two.jsonl", [short, long]))
    for limit in (128, 136, 512):
        training = {**ONE_STEP, "max_seq_length": limit}
        run = train(data={"train_file": file}, training=training)
        assert tokens_of_steps(run) == [lengths[0] + min(lengths[1], limit)]
        assert ("SAMPLES_CUT" in run.notices()) == (limit < lengths[1])
    blocks = train(
        kind=TrainingType.PRETRAIN,
        training={"batch_size": 1, "gradient_accumulation_steps": 1, "max_seq_length": 128},
    )
    assert sorted(tokens_of_steps(blocks))[1:] == [128] * (blocks.result.step - 1)


@pytest.mark.proves("training.num_train_epochs")
def test_the_data_is_gone_through_so_often(train: Any, tokens_of_steps: Any) -> None:
    """Three epochs are three times the steps and tokens of one."""
    one, three = (train(training={"num_train_epochs": count}) for count in (1, 3))
    assert three.result.end_reason is EndReason.FINISHED
    assert three.result.step == 3 * one.result.step == 18
    assert sum(tokens_of_steps(three)) == 3 * sum(tokens_of_steps(one))


@pytest.mark.proves("training.max_steps")
def test_the_training_ends_after_so_many_steps(train: Any) -> None:
    """Fewer than the epochs have, or more; without it, -1, the epochs decide."""
    for limit, steps, reason in (
        (2, 2, EndReason.STEP_LIMIT),
        (8, 8, EndReason.STEP_LIMIT),
        (-1, 6, EndReason.FINISHED),
    ):
        run = train(training={"max_steps": limit, "num_train_epochs": 1})
        assert (run.result.step, run.result.end_reason) == (steps, reason)
        assert list(run.losses()) == list(range(1, steps + 1))


# --- the step


@pytest.mark.proves("training.learning_rate")
def test_the_first_step_of_adamw_has_the_size_of_the_rate(train: Any) -> None:
    """AdamW's first change of a weight is the rate in size, whatever the gradient: of B, from 0."""
    for rate in (1e-3, 4e-3):
        run = train(training={**ONE_STEP, "learning_rate": rate})
        changes = [abs(w) for name, w in final(run).items() if ".lora_B." in name]
        assert len(changes) == 7
        for change in changes:
            assert np.median(change) == pytest.approx(rate, rel=1e-2)
            assert change.max() <= rate * (1 + 1e-5)


@pytest.mark.proves("training.max_grad_norm")
def test_a_longer_gradient_is_cut_to_this_length(train: Any) -> None:
    """SGD moves the weights by rate times gradient: by the logged length, or by the limit."""
    for limit in (0.1, 10.0):
        rate = {"optimizer": "sgd", "learning_rate": 0.1, "max_grad_norm": limit}
        run = train(training={**ONE_STEP, **rate}, lora=FULL)
        length = gradient_norm(run)
        assert 0.1 < length < 10
        assert moved(run) == pytest.approx(0.1 * min(length, limit), rel=1e-3)


@pytest.mark.proves("training.weight_decay")
def test_weights_shrink_by_rate_times_decay_at_each_step(train: Any, shop: Any) -> None:
    """Embeddings of tokens that never occur have no gradient: only the decay moves them."""
    before = weights(shop.model(layers=1))["model.embed_tokens.weight"]
    for decay in (0.0, 0.5):
        training = {**CONSTANT, "learning_rate": 1e-2, "weight_decay": decay, "max_steps": 3}
        run = train(training=training, lora=FULL)
        after = final(run)["model.embed_tokens.weight"]
        untouched = np.isclose(after, before * (1 - 1e-2 * decay) ** 3, rtol=1e-5, atol=0)
        rows = untouched.all(axis=1)
        assert 0.2 < rows.mean() < 1, "some tokens occur, others don't"
        assert not untouched[~rows].all(axis=1).any()


@pytest.mark.proves("training.optimizer")
def test_each_optimizer_keeps_its_own_state_and_makes_its_own_step(train: Any) -> None:
    """AdamW keeps two moments, Adafactor sums of rows and columns, SGD nothing at all."""
    import torch

    kept = {}
    for optimizer in ("adamw_torch", "adafactor", "sgd"):
        training = {**ONE_STEP, "optimizer": optimizer, "learning_rate": 1e-2}
        training |= {"save_strategy": "steps", "max_grad_norm": 10.0}
        run = train(training=training, lora=FULL)
        saved = torch.load(run.output / "checkpoint-1" / "optimizer.pt", weights_only=True)
        states = list(saved["state"].values())
        kept[optimizer] = {key for state in states for key, value in state.items() if _size(value)}
        changes = [final(run)[n] - w for n, w in weights(_model(run)).items() if w.ndim == 2]
        largest = max(abs(change).max() for change in changes)
        if optimizer == "sgd":
            assert moved(run) == pytest.approx(1e-2 * gradient_norm(run), rel=1e-3)
        elif optimizer == "adafactor":  # a matrix moves by the rate as a whole
            sizes = [math.sqrt(float((change**2).mean())) for change in changes]
            assert max(sizes) == pytest.approx(1e-2, rel=1e-3)
            assert largest > 1.2e-2
        else:  # each weight moves by the rate
            assert largest == pytest.approx(1e-2, rel=1e-3)
    assert kept["adamw_torch"] == {"exp_avg", "exp_avg_sq"}
    assert kept["adafactor"] >= {"exp_avg_sq_row", "exp_avg_sq_col"}
    assert "exp_avg" not in kept["adafactor"]
    assert kept["sgd"] == set()


def _model(run: Any) -> Path:
    return Path(run.spec.parameters.data.model_path)


def _size(value: Any) -> int:
    """How many numbers a part of an optimizer's state has; 0 for a counter."""
    return int(value.numel()) if hasattr(value, "numel") and value.ndim else 0


# --- the schedule


def _cosine(progress: float) -> float:
    return (1 + math.cos(math.pi * progress)) / 2


# Of 8 steps, from 0, of which two warm up.
SCHEDULES: dict[str, Callable[[int], float]] = {
    "constant": lambda _: 1,
    "constant_with_warmup": lambda step: min(1, step / 2),
    "linear": lambda step: step / 2 if step < 2 else (8 - step) / 6,
    "cosine": lambda step: step / 2 if step < 2 else _cosine((step - 2) / 6),
    "cosine_with_restarts": lambda step: step / 2 if step < 2 else _cosine((step - 2) / 3 % 1),
}


@pytest.mark.proves("training.lr_scheduler_type")
@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_of_each_step_follows_the_formula(train: Any, name: str) -> None:
    """The logged rate is the schedule's, and the weights move by it: SGD's change tells it too."""
    run = train(
        training={
            "lr_scheduler_type": name,
            "optimizer": "sgd",
            "learning_rate": 1e-2,
            "weight_decay": 0.0,
            "warmup_steps": 2,
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 1,
            "max_grad_norm": 10.0,
        },
        lora={"lora_target_modules": ["q_proj"]},
    )
    expected = [SCHEDULES[name](step) * 1e-2 for step in range(8)]
    assert list(run.rates().values()) == pytest.approx(expected)
    at = [weights(run.output / f"checkpoint-{step}") for step in range(1, 9)]
    for step in range(1, 8):
        change = math.sqrt(
            sum(float(((at[step][n] - w) ** 2).sum()) for n, w in at[step - 1].items())
        )
        length = gradient_norm(run, step + 1)
        assert change == pytest.approx(expected[step] * length, rel=1e-2, abs=1e-7)


@pytest.mark.proves("training.warmup_steps")
def test_the_rate_rises_for_so_many_steps_whatever_the_ratio(train: Any) -> None:
    """Three steps of warm-up win over the ratio; in the first, at a rate of 0, no weight moves."""
    training = {"lr_scheduler_type": "constant_with_warmup", "warmup_ratio": 0.9}
    training |= {"warmup_steps": 3, "learning_rate": 1e-2, "max_steps": 5}
    run = train(training={**training, "save_strategy": "steps", "save_steps": 1})
    rates = [rate / 1e-2 for rate in run.rates().values()]
    assert rates == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    for step, moves in ((1, False), (2, True)):
        adapter = weights(run.output / f"checkpoint-{step}")
        assert any(w.any() for name, w in adapter.items() if ".lora_B." in name) == moves

"""What the parameters of saving and evaluation do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest

from finetuned_daemon.runs.contract import CheckpointDeleted, EndReason, Evaluation

# 24 samples make 6 steps an epoch.
TWO_EPOCHS = {"num_train_epochs": 2, "learning_rate": 1e-2}


def saved(run: Any) -> list[tuple[int, str]]:
    """Steps and causes of the checkpoints."""
    return [(event.step, event.cause) for event in run.checkpoints()]


def standing(run: Any) -> list[int]:
    """Steps of the checkpoints on the disk."""
    return sorted(int(path.name.partition("-")[2]) for path in run.output.glob("checkpoint-*"))


@pytest.mark.proves("training.save_strategy", "training.save_steps")
def test_checkpoints_are_of_these_steps(train: Any) -> None:
    """Every so many steps and at the end, or after each epoch, or none; `final` comes anyway."""
    for training, expected in (
        ({"save_strategy": "steps", "save_steps": 5}, [(5, "steps"), (10, "steps"), (12, "end")]),
        ({"save_strategy": "epoch", "save_steps": 5}, [(6, "epoch"), (12, "epoch")]),
        ({"save_strategy": "no", "save_steps": 5}, []),
    ):
        run = train(training={**TWO_EPOCHS, **training})
        assert saved(run) == expected
        assert standing(run) == [step for step, _ in expected]
        assert (run.output / "final" / "adapter_model.safetensors").is_file()


@pytest.mark.proves("training.save_total_limit")
def test_the_newest_checkpoints_stay(train: Any) -> None:
    """Of six checkpoints two are kept; the oldest go, one at a time, and the run says so."""
    run = train(training={"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2})
    assert [step for step, _ in saved(run)] == [1, 2, 3, 4, 5, 6]
    assert [event.step for event in run.events(CheckpointDeleted)] == [1, 2, 3, 4]
    assert standing(run) == [5, 6]


@pytest.fixture
def a_minute_a_step(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A clock by which each optimizer step takes a minute, and nothing else takes any time."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    now = time.monotonic()

    def step(*_: Any) -> None:
        nonlocal now
        now += 60

    hook = register_optimizer_step_post_hook(step)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    yield
    hook.remove()


@pytest.mark.proves("training.save_interval_minutes")
@pytest.mark.usefixtures("a_minute_a_step")
def test_the_clock_saves_beside_the_strategy_and_never_where_it_is_no(train: Any) -> None:
    """So many minutes after the last checkpoint, whatever that was for, there is another."""
    for training, expected in (
        (
            {"save_strategy": "steps", "save_steps": 4, "save_interval_minutes": 3},
            [(3, "interval"), (4, "steps"), (7, "interval"), (8, "steps"), (11, "interval")],
        ),
        (
            {"save_strategy": "epoch", "save_interval_minutes": 4},
            [(4, "interval"), (6, "epoch"), (10, "interval")],
        ),
        ({"save_strategy": "no", "save_interval_minutes": 1}, []),
    ):
        run = train(training={**TWO_EPOCHS, **training})
        assert [(step, cause) for step, cause in saved(run) if step < 12] == expected


@pytest.mark.proves("training.eval_strategy", "training.eval_steps")
def test_evaluations_are_of_these_steps(train: Any) -> None:
    """Every so many steps, or after each epoch, or none; then no sample is taken away for it."""
    for training, steps, expected in (
        # 24 samples less 6: 18 make 5 steps an epoch.
        ({"eval_strategy": "steps", "eval_steps": 2}, 10, [2, 4, 6, 8, 10]),
        ({"eval_strategy": "epoch", "eval_steps": 2}, 10, [5, 10]),
        ({"eval_strategy": "no", "eval_steps": 2}, 12, []),
    ):
        run = train(data={"eval_ratio": 0.25}, training={**TWO_EPOCHS, **training})
        assert run.result.step == steps
        assert [event.step for event in run.events(Evaluation)] == expected
        assert ("EVALUATION_OFF" in run.notices()) == (not expected)


@pytest.mark.proves("training.early_stopping_patience", "training.early_stopping_threshold")
def test_a_run_ends_when_so_many_evaluations_improve_by_less_than_the_threshold(train: Any) -> None:
    """Whoever knows all evaluation losses of a run can tell where each setting ends it."""

    def run(patience: int, threshold: float) -> Any:
        return train(
            data={"eval_ratio": 0.25},
            training={
                "num_train_epochs": 4,
                "learning_rate": 5e-3,
                "lr_scheduler_type": "constant",
                "eval_strategy": "steps",
                "eval_steps": 2,
                "early_stopping_patience": patience,
                "early_stopping_threshold": threshold,
            },
        )

    whole = run(0, 1.0)
    assert (whole.result.step, whole.result.end_reason) == (20, EndReason.FINISHED)
    losses = {event.step: event.values["eval_loss"] for event in whole.events(Evaluation)}
    ends = set()
    for patience, threshold in ((1, 1.0), (2, 0.2), (2, 0.001)):
        expected = last_step(losses, patience, threshold)
        ended = run(patience, threshold)
        assert ended.result.step == expected
        early = ended.result.end_reason is EndReason.EARLY_STOPPED
        assert early == (expected < 20)
        assert ended.losses() == {step: whole.losses()[step] for step in range(1, expected + 1)}
        ends.add(expected)
    assert len(ends) == 3, losses


def last_step(losses: dict[int, float], patience: int, threshold: float) -> int:
    """Where the rule ends a run with these evaluation losses by step."""
    best, without = float("inf"), 0
    for step, loss in losses.items():
        if best - loss > threshold:
            best, without = loss, 0
        else:
            without += 1
        if without >= patience:
            return step
    return max(losses)

"""What the parameters of reports do, and the seed."""

from __future__ import annotations

from typing import Any

import pytest

from finetuned_daemon.runs.contract import Metrics
from tiny import weights


def whole(run: Any) -> tuple[Any, ...]:
    """All numbers of a run, to the last bit: what it logged, and its final weights."""
    logged = [event.values for event in run.events(Metrics)]
    return logged, {name: w.tobytes() for name, w in weights(run.output / "final").items()}


@pytest.mark.proves("logging.logging_steps")
def test_metrics_come_every_so_many_steps_and_are_their_mean(train: Any) -> None:
    """With 4 of 10 steps: 4, 8 and the last, each with the mean loss since the one before."""
    training = {"max_steps": 10, "learning_rate": 1e-2}
    single = train(training=training).losses()
    assert list(single) == list(range(1, 11))
    run = train(training=training, logging={"logging_steps": 4})
    assert run.losses() == {
        last: pytest.approx(sum(single[step] for step in steps) / len(steps), rel=1e-4)
        for last, steps in ((4, range(1, 5)), (8, range(5, 9)), (10, range(9, 11)))
    }


@pytest.mark.proves("general.seed")
def test_the_same_seed_is_the_same_run_to_the_bit_and_another_one_another(train: Any) -> None:
    """Order, split, first LoRA weights and dropout: with the same seed every number is the same."""
    options = {
        "data": {"eval_ratio": 0.25, "reshuffle": True},
        "training": {"eval_strategy": "epoch", "num_train_epochs": 2, "learning_rate": 1e-2},
        "lora": {"lora_dropout": 0.3},
    }
    one, same, other = (train(**options, general={"seed": seed}) for seed in (11, 11, 12))
    assert whole(one) == whole(same)
    assert not set(one.losses().values()) & set(other.losses().values())

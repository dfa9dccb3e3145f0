"""Steps, evaluations and checkpoints, against a simulation of the loop that takes them."""

from __future__ import annotations

from random import Random

import pytest

from finetuned_daemon.parameters.models import TrainingParameters
from finetuned_daemon.planning.schedule import plan_schedule, split_sizes


def simulate(
    training: TrainingParameters, samples: int, resume_step: int
) -> tuple[int, int, list[int], list[int]]:
    """Steps in all, steps taken, and the steps at which is saved and evaluated.

    Batch for batch, as transformers' Trainer goes through the data.
    """
    batches = [
        range(samples)[begin : begin + training.batch_size]
        for begin in range(0, samples, training.batch_size)
    ]
    due = {"save": list[int](), "eval": list[int]()}
    strategies = {
        "save": (training.save_strategy, training.save_steps),
        "eval": (training.eval_strategy, training.eval_steps),
    }
    step = taken = epoch = 0

    def note(at_epoch_end: bool, is_last: bool) -> None:
        for what, (strategy, every) in strategies.items():
            if strategy == "steps" and not at_epoch_end and (step % every == 0 or is_last):
                due[what].append(step)
            if strategy == "epoch" and at_epoch_end:
                due[what].append(step)

    def is_done() -> bool:
        if training.max_steps > 0:
            return step >= training.max_steps
        return epoch >= training.num_train_epochs

    while not is_done():
        waiting = 0
        for number, _ in enumerate(batches):
            waiting += 1
            if waiting < training.gradient_accumulation_steps and number + 1 < len(batches):
                continue
            waiting = 0
            step += 1
            is_last_batch = number + 1 == len(batches)
            is_last = step == training.max_steps or (
                training.max_steps <= 0 and is_last_batch and epoch + 1 == training.num_train_epochs
            )
            if step > resume_step:
                taken += 1
                note(False, is_last)
            if step == training.max_steps:
                break
        epoch += 1
        if step > resume_step:
            note(True, False)
    return step, taken, due["save"], due["eval"]


def kept(limit: int, saved: list[int], evaluated: list[int]) -> int:
    """Most checkpoints that can be left, whichever evaluation is the best.

    Checkpoint by checkpoint: of more than the limit the oldest goes that is neither newest nor
    best; that is asked for every one that can be the best.
    """
    counts = [min(len(saved), limit)]
    for best in set(saved) & set(evaluated):
        there = list[int]()
        for step in saved:
            there.append(step)
            surplus = [s for s in there if s not in (step, best)]
            there = [s for s in there if s not in surplus[: max(0, len(there) - limit)]]
        counts.append(len(there))
    return max(counts)


@pytest.mark.parametrize("seed", range(8))
def test_a_schedule_is_what_the_loop_does(seed: int) -> None:
    random = Random(seed)
    for _ in range(150):
        training = TrainingParameters(
            batch_size=random.randint(1, 5),
            gradient_accumulation_steps=random.randint(1, 5),
            num_train_epochs=random.randint(1, 4),
            max_steps=random.choice([-1, -1, 0, 1, random.randint(1, 40)]),
            save_strategy=random.choice(["steps", "epoch", "no"]),
            save_steps=random.randint(1, 12),
            eval_strategy=random.choice(["steps", "epoch", "no"]),
            eval_steps=random.randint(1, 12),
            save_total_limit=random.randint(1, 6),
        )
        samples = random.randint(1, 60)
        total, *_ = simulate(training, samples, 0)
        resume_step = random.choice([0, random.randint(0, total)])
        _, taken, saved, evaluated = simulate(training, samples, resume_step)
        plan = plan_schedule(training, samples, evaluates=True, resume_step=resume_step)
        case = f"{training!r}, {samples} samples, from {resume_step}"
        assert plan.total_steps == total, case
        assert plan.run_steps == taken, case
        assert plan.checkpoints == len(saved), case
        assert plan.evaluations == len(evaluated), case
        assert plan.kept_checkpoints == kept(training.save_total_limit, saved, evaluated), case
        assert plan_schedule(training, samples, evaluates=False).evaluations == 0


def test_a_checkpoint_of_the_last_step_leaves_nothing_to_do() -> None:
    training = TrainingParameters(max_steps=10, save_steps=4)
    for step in (10, 11):
        plan = plan_schedule(training, 100, evaluates=True, resume_step=step)
        assert (plan.run_steps, plan.checkpoints, plan.evaluations) == (0, 0, 0)


@pytest.mark.parametrize(
    ("samples", "ratio", "expected"),
    [
        (10, 0.25, (8, 2)),
        (10, 0.01, (9, 1)),
        (10, 0.35, (6, 4)),
        (3, 1.0, (0, 3)),
        (1, 0.5, (0, 1)),
    ],
)
def test_a_share_for_evaluation_is_at_least_one_sample(
    samples: int, ratio: float, expected: tuple[int, int]
) -> None:
    assert split_sizes(samples, ratio) == expected

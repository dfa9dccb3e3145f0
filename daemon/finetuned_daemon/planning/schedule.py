"""How many steps a run takes, and at which of them it evaluates and saves.

As transformers 5 and the runner's trainer do it; a test holds it against a simulation of their
loop, another against real runs.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass

from finetuned_daemon.parameters.models import IntervalStrategy, TrainingParameters


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The steps of a run, and what is due at them."""

    total_steps: int
    """Optimizer steps of the whole training."""
    steps_per_epoch: int
    run_steps: int
    """Steps that this run takes: fewer than `total_steps` where it resumes."""
    evaluations: int
    checkpoints: int
    """Checkpoints that it saves; those by the clock and early stopping are left out."""
    kept_checkpoints: int
    """Checkpoints that are there at the end, at most: the best one may be the newest."""


def split_sizes(samples: int, eval_ratio: float) -> tuple[int, int]:
    """Samples to train on and to evaluate with, where a share is taken for evaluation.

    No sample to train on may be left, which the runner refuses.
    """
    evaluation = min(samples, max(1, round(samples * eval_ratio)))
    return samples - evaluation, evaluation


def packed_rows(
    lengths: Sequence[int], samples: int, tokens: int, row_length: int
) -> tuple[int, bool]:
    """Rows that the runner packs samples into (best fit), and whether that is certain.

    Args:
        lengths: Tokens of the longest samples, longest first.
        samples: How many there are.
        tokens: Of all.
        row_length: Tokens that a row has at most.
    """
    rooms: list[int] = []
    for length in lengths:
        at = bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else row_length
        insort(rooms, room - length)
    if len(lengths) == samples:
        return len(rooms), True
    # The others are short, and fill what is left of rows almost wholly.
    return max(len(rooms), math.ceil(tokens / row_length)), False


def plan_schedule(
    training: TrainingParameters, samples: int, *, evaluates: bool, resume_step: int = 0
) -> Schedule:
    """The schedule of a run over `samples` samples.

    Args:
        training: Of the run.
        samples: To train on, in an epoch; rows, where they are packed.
        evaluates: There is evaluation data, and it is used.
        resume_step: Step of the checkpoint that the run goes on from.
    """
    batches = math.ceil(samples / training.batch_size)
    epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    total = training.max_steps if training.max_steps > 0 else epoch * training.num_train_epochs
    start = min(resume_step, total)
    saved = _times_due(training.save_strategy, training.save_steps, epoch, start, total)
    evaluated = _times_due(training.eval_strategy, training.eval_steps, epoch, start, total)
    limit = training.save_total_limit
    if evaluates and _ranks_before_end(training, epoch, start, total):
        limit = max(limit, 2)  # the best is kept beside the newest
    return Schedule(
        total_steps=total,
        steps_per_epoch=epoch,
        run_steps=total - start,
        evaluations=evaluated if evaluates else 0,
        checkpoints=saved,
        kept_checkpoints=min(saved, limit),
    )


def _ranks_before_end(training: TrainingParameters, epoch: int, start: int, total: int) -> bool:
    """Whether a step before the last is both evaluated and saved, so that it may stay the best."""
    every = [
        steps if strategy == "steps" else epoch
        for strategy, steps in (
            (training.save_strategy, training.save_steps),
            (training.eval_strategy, training.eval_steps),
        )
        if strategy != "no"
    ]
    return len(every) == 2 and (start // math.lcm(*every) + 1) * math.lcm(*every) < total


def _times_due(
    strategy: IntervalStrategy, every_steps: int, epoch: int, start: int, total: int
) -> int:
    """How often something is due in the steps after `start`.

    The last step counts with both strategies, though it be none of the regular ones or the middle
    of an epoch.
    """
    if strategy == "no" or start >= total:
        return 0
    every = every_steps if strategy == "steps" else epoch
    return math.ceil(total / every) - start // every

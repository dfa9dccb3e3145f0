"""How many steps a run takes, and at which of them it evaluates and saves.

As transformers 5 and the runner's trainer do it; a test holds it against a simulation of their
loop, another against real runs.
"""

from __future__ import annotations

import math
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
    """Checkpoints that are there at the end."""


def split_sizes(samples: int, eval_ratio: float) -> tuple[int, int]:
    """Samples to train on and to evaluate with, where a share is taken for evaluation.

    No sample to train on may be left, which the runner refuses.
    """
    evaluation = min(samples, max(1, round(samples * eval_ratio)))
    return samples - evaluation, evaluation


def plan_schedule(
    training: TrainingParameters, samples: int, *, evaluates: bool, resume_step: int = 0
) -> Schedule:
    """The schedule of a run over `samples` samples.

    Args:
        training: Of the run.
        samples: To train on, in an epoch.
        evaluates: There is evaluation data, and it is used.
        resume_step: Step of the checkpoint that the run goes on from.
    """
    batches = math.ceil(samples / training.batch_size)
    epoch = max(1, math.ceil(batches / training.gradient_accumulation_steps))
    total = training.max_steps if training.max_steps > 0 else epoch * training.num_train_epochs
    start = min(resume_step, total)
    saved = _times_due(training.save_strategy, training.save_steps, epoch, start, total)
    evaluated = _times_due(training.eval_strategy, training.eval_steps, epoch, start, total)
    return Schedule(
        total_steps=total,
        steps_per_epoch=epoch,
        run_steps=total - start,
        evaluations=evaluated if evaluates else 0,
        checkpoints=saved,
        kept_checkpoints=min(saved, training.save_total_limit),
    )


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

"""The whole plan of a run: steps, checkpoints, disk, parameters, memory, time."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetuned_daemon.dataset.report import Measured
from finetuned_daemon.devices import Device
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.disk import Disk, plan_disk
from finetuned_daemon.planning.memory import Memory, plan_memory
from finetuned_daemon.planning.model_files import ModelFiles
from finetuned_daemon.planning.schedule import Schedule, plan_schedule, split_sizes
from finetuned_daemon.planning.setup import plan_setup
from finetuned_daemon.runs.contract import TrainingType

_START_SECONDS = 4.0
"""Imports, the model's construction and the first step's own work; seen in short runs."""
_DISK_RATE = 400e6
"""Bytes a second at which a checkpoint is written, made durable and hashed; a rough guess."""
_EVALUATION_COST = 1 / 3
"""Of a token that is scored against one that is learned: it goes forward only."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run will do and take; fields as in `finetuned.v1.EstimateTaskResponse`."""

    train_samples: int
    eval_samples: int
    train_tokens: int
    cut_samples: int
    dropped_samples: int
    exact: bool
    schedule: Schedule
    disk: Disk
    disk_free_bytes: int
    """0 where there is no output folder yet."""
    trainable_parameters: int
    total_parameters: int
    memory: Memory
    memory_total_bytes: int
    memory_free_bytes: int
    duration_seconds: float | None
    """None where this machine has not measured a run of the model yet."""

    @property
    def disk_bytes(self) -> int:
        """Bytes that the run leaves."""
        return self.disk.total_bytes

    @property
    def peak_memory_bytes(self) -> int:
        """Bytes of the device's memory at the peak."""
        return self.memory.peak_bytes


def make_plan(
    parameters: Parameters,
    training_type: TrainingType,
    device: Device,
    model: ModelFiles,
    measured: Measured,
    *,
    resume_step: int = 0,
    tokens_per_second: float | None = None,
    runtime_bytes: int = 0,
) -> Plan:
    """Plans a run.

    Args:
        parameters: In order, with everything filled in that a start needs.
        training_type: Of the run.
        device: That it will run on.
        model: Of `data.model_path`, or the base model of the adapter there.
        measured: The data, read with the run's tokenizer.
        resume_step: Step of the checkpoint that it goes on from.
        tokens_per_second: Of an earlier run of this kind on this machine.
        runtime_bytes: Of the training environment, once all is imported; 0: not known.

    Raises:
        ModelUnreadable: The LoRA configuration file can't be used.
    """
    data, train, scoring = parameters.data, measured.train, measured.evaluation
    samples, tokens, scored = train.samples, train.tokens, 0
    longest = [length for length, _ in train.longest]
    if evaluates(parameters):
        if data.eval_file:
            scored = scoring.samples if scoring is not None else 0
        else:
            samples, scored = split_sizes(samples, data.eval_ratio)
            tokens = round(tokens * samples / max(1, train.samples))
    schedule = plan_schedule(
        parameters.training, samples, evaluates=scored > 0, resume_step=resume_step
    )
    setup = plan_setup(parameters, training_type, device, model)
    disk = plan_disk(parameters, setup, schedule)
    return Plan(
        train_samples=samples,
        eval_samples=scored,
        train_tokens=tokens,
        cut_samples=train.cut,
        dropped_samples=train.dropped,
        exact=measured.exact,
        schedule=schedule,
        disk=disk,
        disk_free_bytes=_free_bytes(data.output_dir),
        trainable_parameters=setup.trained_parameters,
        total_parameters=setup.total_parameters,
        memory=plan_memory(parameters, setup, longest, samples, runtime_bytes),
        memory_total_bytes=device.memory_total_bytes,
        memory_free_bytes=device.memory_free_bytes,
        duration_seconds=_duration(schedule, disk, samples, tokens, scored, tokens_per_second),
    )


def evaluates(parameters: Parameters) -> bool:
    """Whether a run evaluates: it is asked to, and there is data to do it with."""
    data = parameters.data
    has_data = bool(data.eval_file) or data.eval_ratio > 0
    return has_data and parameters.training.eval_strategy != "no"


def _duration(
    schedule: Schedule,
    disk: Disk,
    samples: int,
    tokens: int,
    scored: int,
    tokens_per_second: float | None,
) -> float | None:
    if not tokens_per_second:
        return None
    trained = tokens * schedule.run_steps / schedule.steps_per_epoch
    evaluated = schedule.evaluations * scored * tokens / max(1, samples)
    written = schedule.checkpoints * disk.checkpoint_bytes + disk.final_bytes + disk.merged_bytes
    return (
        _START_SECONDS
        + (trained + _EVALUATION_COST * evaluated) / tokens_per_second
        + written / _DISK_RATE
    )


def _free_bytes(output_dir: str | None) -> int:
    if not output_dir:
        return 0
    path = Path(output_dir)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free

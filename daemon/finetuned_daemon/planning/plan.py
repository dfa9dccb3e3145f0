"""The whole plan of a run: steps, checkpoints, disk, parameters, memory, time."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuned_daemon.dataset.report import Measured, MeasuredFile
from finetuned_daemon.devices import Device
from finetuned_daemon.measurements import Measurement, find
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.calibration import (
    Calibration,
    best_rates,
    calibrated_disk,
    calibrated_memory,
    guessed_scoring,
)
from finetuned_daemon.planning.disk import Disk, log_entries, plan_disk
from finetuned_daemon.planning.memory import Memory, plan_memory
from finetuned_daemon.planning.model_files import ModelFiles
from finetuned_daemon.planning.schedule import Schedule, packed_rows, plan_schedule, split_sizes
from finetuned_daemon.planning.setup import Setup, plan_setup
from finetuned_daemon.planning.timing import Rates, run_seconds
from finetuned_daemon.runs.contract import TrainingType

_START_SECONDS = 4.0
"""Imports, the model's construction and the first step's own work; seen in short runs."""
_DISK_RATE = 400e6
"""Bytes a second at which a checkpoint is written, made durable and hashed; a rough guess."""


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
    calibration: Calibration | None = None
    """The probe that has corrected it."""

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
    measurements: Sequence[Measurement] = (),
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
        measurements: What probes of the model have measured on such a device, newest first.

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
    setup = plan_setup(parameters, training_type, device, model)
    rows, is_certain, lengths = samples, True, longest
    if _packs(parameters, training_type, setup):
        rows, is_certain = _packed(parameters, train, samples)
        lengths = [min(parameters.training.max_seq_length, tokens)]
    schedule = plan_schedule(
        parameters.training, rows, evaluates=scored > 0, resume_step=resume_step
    )
    disk = plan_disk(parameters, setup, schedule)
    memory = plan_memory(
        parameters, setup, lengths, rows, runtime_bytes, learned_share=_learned_share(train)
    )
    found = find(measurements, parameters, training_type, max(longest, default=0), samples)
    calibration = None
    if found is not None:
        known = found.measurement
        calibration = Calibration(
            measured=found.is_equal,
            probe_time=known.time,
            planned_peak_memory_bytes=memory.peak_bytes,
        )
        memory = calibrated_memory(memory, found, device, model, runtime_bytes)
        if found.is_equal:
            disk = calibrated_disk(disk, known.report, log_entries(parameters, schedule))
    rates = best_rates(found, tokens_per_second, _guessed(tokens_per_second or 1.0))
    return Plan(
        train_samples=samples,
        eval_samples=scored,
        train_tokens=tokens,
        cut_samples=train.cut,
        dropped_samples=train.dropped,
        exact=measured.exact and is_certain,
        schedule=schedule,
        disk=disk,
        disk_free_bytes=_free_bytes(data.output_dir),
        trainable_parameters=setup.trained_parameters,
        total_parameters=setup.total_parameters,
        memory=memory,
        memory_total_bytes=device.memory_total_bytes,
        memory_free_bytes=device.memory_free_bytes,
        duration_seconds=_duration(schedule, disk, samples, tokens, scored, rates),
        calibration=calibration,
    )


def _packs(parameters: Parameters, training_type: TrainingType, setup: Setup) -> bool:
    # Blocks of text fill their rows already.
    return parameters.extensions.packing and training_type is TrainingType.SFT and setup.in_rows


def _packed(parameters: Parameters, train: MeasuredFile, samples: int) -> tuple[int, bool]:
    """Rows that `samples` of the training file are packed into, and whether that is certain."""
    lengths = [length for length, _ in train.longest]
    row_length = parameters.training.max_seq_length
    rows, is_certain = packed_rows(lengths, train.samples, train.tokens, row_length)
    if samples == train.samples:
        return rows, is_certain
    return max(1, round(rows * samples / train.samples)), False


def _learned_share(train: MeasuredFile) -> float:
    """Of the tokens of the longest samples, those that are learned."""
    tokens = sum(length for length, _ in train.longest)
    return sum(learned for _, learned in train.longest) / tokens if tokens else 1.0


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
    rates: Rates | None,
) -> float | None:
    if rates is None:
        return None
    trained = tokens * schedule.run_steps / schedule.steps_per_epoch
    evaluated = schedule.evaluations * scored * tokens / max(1, samples)
    written = schedule.checkpoints * disk.checkpoint_bytes + disk.final_bytes + disk.merged_bytes
    return run_seconds(rates, trained=trained, scored=evaluated, written=written)


def _guessed(tokens_per_second: float) -> Rates:
    """What is likely of a run of which nothing but its speed is known."""
    return Rates(
        start_seconds=_START_SECONDS,
        tokens_per_second=tokens_per_second,
        scored_tokens_per_second=guessed_scoring(tokens_per_second),
        written_bytes_per_second=_DISK_RATE,
    )


def _free_bytes(output_dir: str | None) -> int:
    if not output_dir:
        return 0
    path = Path(output_dir)
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return shutil.disk_usage(path).free

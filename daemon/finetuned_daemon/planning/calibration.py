"""What a probe corrects in a plan: peak memory, bytes of a checkpoint, speed."""

from __future__ import annotations

from dataclasses import dataclass, replace

from finetuned_daemon.devices import Device
from finetuned_daemon.measurements import Found
from finetuned_daemon.planning.disk import Disk, log_bytes
from finetuned_daemon.planning.memory import Memory, PartName, plan_memory
from finetuned_daemon.planning.model_files import ModelFiles, ModelUnreadable
from finetuned_daemon.planning.setup import plan_setup
from finetuned_daemon.planning.timing import Rates
from finetuned_daemon.runs.contract import ProbeReport

_PROBE_ENTRIES = 3
"""Of the log in a probe's checkpoint: two summaries and an evaluation at most."""
_MOST_OFF = 2.0
"""A factor beyond this is not the formula's error: something else was measured."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """The probe that has corrected a plan; fields as in `finetuned.v1.Calibration`."""

    measured: bool
    probe_time: int
    """Microseconds since the epoch."""
    planned_peak_memory_bytes: int


def calibrated_memory(
    memory: Memory, found: Found, device: Device, model: ModelFiles, runtime_bytes: int
) -> Memory:
    """The memory of a plan, as a probe makes it: measured, or off by as much as there.

    Args:
        memory: Of the plan.
        found: The probe.
        device: Of both.
        model: Of both.
        runtime_bytes: As in `plan_memory`.
    """
    known, report = found.measurement, found.measurement.report
    if found.is_equal:
        return _with_peak(memory, report.peak_memory_bytes)
    try:
        setup = plan_setup(known.parameters, known.training_type, device, model)
    except ModelUnreadable:  # its PEFT configuration has gone since
        return memory
    planned = plan_memory(
        known.parameters,
        setup,
        report.longest_lengths or [report.longest_tokens],
        report.train_samples,
        runtime_bytes,
        learned_share=report.learned_share,
    )
    runtime = planned.parts["runtime"]
    off = (report.peak_memory_bytes - runtime) / max(1, planned.peak_bytes - runtime)
    off = min(max(off, 1 / _MOST_OFF), _MOST_OFF)
    fixed = memory.parts["runtime"]
    return _with_peak(memory, fixed + int(off * (memory.peak_bytes - fixed)))


def calibrated_disk(disk: Disk, report: ProbeReport, entries: int) -> Disk:
    """The disk of a plan with the checkpoint that a probe with the same settings has written.

    Args:
        disk: Of the plan.
        report: Of the probe.
        entries: Of the log at the end of the run.
    """
    grown = log_bytes(max(0, entries - _PROBE_ENTRIES))
    return replace(disk, checkpoint_bytes=report.checkpoint_bytes + grown)


def rates_of(report: ProbeReport) -> Rates:
    """How fast a run like the probe goes."""
    return Rates(
        start_seconds=report.start_seconds,
        tokens_per_second=report.tokens_per_second,
        scored_tokens_per_second=report.evaluation_tokens_per_second
        or guessed_scoring(report.tokens_per_second),
        written_bytes_per_second=report.checkpoint_bytes / max(1e-3, report.seconds_per_checkpoint),
    )


def guessed_scoring(tokens_per_second: float) -> float:
    """Tokens a second of an evaluation: it goes forward only, a third of the work."""
    return 3 * tokens_per_second


def _with_peak(memory: Memory, peak_bytes: int) -> Memory:
    """The same parts, but for the runtime, more or less of each so that all are `peak_bytes`."""
    runtime = memory.parts["runtime"]
    fixed = runtime if peak_bytes > runtime else 0
    factor = (peak_bytes - fixed) / max(1, memory.peak_bytes - fixed)
    scaled: dict[PartName, int] = {
        name: size if fixed and name == "runtime" else int(size * factor)
        for name, size in memory.parts.items()
    }
    scaled["activations"] += peak_bytes - sum(scaled.values())
    return Memory(parts=scaled)


def best_rates(
    found: Found | None, tokens_per_second: float | None, guessed: Rates
) -> Rates | None:
    """How fast a run goes: a probe of it, an earlier run of the kind, a probe of the kind.

    Args:
        found: The probe.
        tokens_per_second: Of the earlier run.
        guessed: What else goes with that.
    """
    if found is not None and (found.is_equal or not tokens_per_second):
        return rates_of(found.measurement.report)
    return guessed if tokens_per_second else None

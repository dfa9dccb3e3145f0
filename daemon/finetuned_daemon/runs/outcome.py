"""Decides how a run ended, from what is left when its process is gone.

Nothing is written, and no database is asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from finetuned_daemon.runs.contract import EndReason, Result, StopWish
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.tasks import ENDS, PauseReason, Run

if TYPE_CHECKING:
    from finetuned_daemon.runs.room import Need

_OOM_KILLED = "The system ran out of memory and killed the runner (SIGKILL)."
_HUNG = "The runner gave no sign of life any more, and was ended."


@dataclass(frozen=True)
class Evidence:
    """What is known of a run whose process is gone."""

    result: Result | None
    """What the runner wrote last of all; None: it was not able to."""
    exit: Exit
    was_watched: bool
    """Whether a daemon saw it end; if not, only the folder speaks."""
    stop: StopWish | None
    was_forced: bool
    """Whether the daemon sent a signal after a stop wish had not been met in time."""
    step: int
    last_checkpoint: str
    console_tail: str
    was_hung: bool = False
    """Whether the daemon sent a signal for want of signs of life."""


def decide(evidence: Evidence) -> Result:
    """The one account of a run's end.

    A result is believed. Without one it is never "completed", whatever the exit status says.
    """
    if evidence.result is not None:
        result = evidence.result
        message = result.message or ENDS[result.end_reason].sentence.en
        if (
            evidence.was_hung
            and evidence.stop is None
            and result.end_reason is EndReason.STOPPED_BY_USER
        ):
            # Nobody asked for a stop: it woke up on the signal, and saved.
            message = f"{_HUNG} It saved on SIGTERM: {message}"
            return result.model_copy(
                update={"end_reason": EndReason.RUNNER_HUNG, "message": message}
            )
        return result.model_copy(update={"message": message})
    reason, message = _without_result(evidence)
    return Result(
        end_reason=reason,
        message=f"{message} {_what_remains(evidence)}",
        step=evidence.step,
        detail=evidence.console_tail,
    )


def pause_of(run: Run, outcome: Result) -> PauseReason | None:
    """Why a run whose process has ended so is paused; None: it is over.

    Where a pause was asked for, a full disk is no failure: what could not be saved is done again.
    """
    if run.is_probe:
        return None
    if run.pause is not None:
        is_wished = outcome.end_reason is EndReason.STOPPED_BY_USER and not _is_trained(
            run, outcome
        )
        return run.pause if is_wished or outcome.end_reason is EndReason.DISK_FULL else None
    if outcome.end_reason is EndReason.DISK_FULL and run.stop is None:
        return PauseReason.DISK_FULL
    return None


def _is_trained(run: Run, outcome: Result) -> bool:
    """Whether it was stopped behind its last step, where no checkpoint leads back to.

    The pause came while the final weights were written or merged. To go on would be to train all of
    it again, for weights that are there.
    """
    return (
        bool(outcome.output_path)
        and not Path(run.output_dir, f"checkpoint-{outcome.step}").is_dir()
    )


def paused(run: Run, outcome: Result, exit_: Exit) -> str:
    """What is said of a pause that somebody asked for."""
    begins = run.last_checkpoint or run.parameters.data.resume_from_checkpoint
    goes_on = (
        f"it goes on from {begins}." if begins else "it begins anew: no checkpoint had been saved."
    )
    if outcome.end_reason is EndReason.DISK_FULL:
        return f"Paused, and no space was left to save this step; {goes_on}"
    if exit_.signal:
        return f"Paused by force: it did not end in the time it had; {goes_on}"
    step = outcome.step or run.progress.step
    return f"Paused at step {step}; {goes_on}" if step else f"Paused before training; {goes_on}"


def waiting_for_room(run: Run, outcome: Result, needs: Sequence[Need]) -> str:
    """What is said of a pause for want of space; `needs` says how much is needed, and where."""
    begins = run.last_checkpoint or run.parameters.data.resume_from_checkpoint
    goes_on = f"goes on by itself from {begins}" if begins else "begins anew by itself"
    room = " and ".join(map(str, needs))
    return f"{outcome.message} The run is paused; once {room}, it {goes_on}."


def stays_paused(run: Run) -> str:
    """What is said where a pause is asked for of a run that waited for room."""
    begins = run.last_checkpoint or run.parameters.data.resume_from_checkpoint
    goes_on = f"goes on from {begins}" if begins else "begins anew"
    return (
        f"{ENDS[EndReason.DISK_FULL].sentence.en} A pause was asked for: the run {goes_on} "
        "once it is resumed, and not by itself."
    )


def _without_result(evidence: Evidence) -> tuple[EndReason, str]:
    exit_ = evidence.exit
    if evidence.stop is not None and evidence.was_forced:
        return EndReason.STOPPED_BY_USER, "Stopped by force: it did not end in the time it had."
    if evidence.was_hung:
        return EndReason.RUNNER_HUNG, _HUNG
    if exit_.signal == "SIGKILL":
        return _killed(exit_)
    if exit_.signal:
        return EndReason.RUNNER_KILLED, f"{exit_.signal} ended the runner."
    if exit_.code is not None:
        return (
            EndReason.RUNNER_CRASHED,
            f"The runner ended with exit status {exit_.code} and left no result; see its log.",
        )
    if evidence.was_watched:
        if exit_.oom_kills:
            return EndReason.HOST_OUT_OF_MEMORY, _OOM_KILLED
        return (
            EndReason.RUNNER_KILLED,
            "The runner ended without a result. An earlier daemon had started it, so its exit "
            "status can't be known.",
        )
    return EndReason.INTERRUPTED, ENDS[EndReason.INTERRUPTED].sentence.en


def _killed(exit_: Exit) -> tuple[EndReason, str]:
    if exit_.oom_kills:
        return EndReason.HOST_OUT_OF_MEMORY, _OOM_KILLED
    if exit_.oom_kills == 0:
        # Services such as systemd-oomd kill before the kernel has to, and are not counted.
        return (
            EndReason.RUNNER_KILLED,
            "SIGKILL ended the runner: somebody killed it, or a service that watches over memory; "
            "the kernel's own out-of-memory killer did not.",
        )
    return (
        EndReason.RUNNER_KILLED,
        "SIGKILL ended the runner: somebody killed it, or the system was out of memory.",
    )


def _what_remains(evidence: Evidence) -> str:
    if evidence.last_checkpoint:
        return f"The newest checkpoint is {evidence.last_checkpoint}."
    return "No checkpoint had been saved."

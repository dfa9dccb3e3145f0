"""Decides how a run ended, from what is left when its process is gone. Pure.

No files, no database.
"""

from __future__ import annotations

from dataclasses import dataclass

from finetuned_daemon.runs.contract import EndReason, Result, StopWish
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.tasks import ENDS

_OOM_KILLED = "The system ran out of memory and killed the runner (SIGKILL)."


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


def decide(evidence: Evidence) -> Result:
    """The one account of a run's end.

    A result is believed. Without one it is never "completed", whatever the exit status says.
    """
    if evidence.result is not None:
        result = evidence.result
        message = result.message or ENDS[result.end_reason].sentence.en
        return result.model_copy(update={"message": message})
    reason, message = _without_result(evidence)
    return Result(
        end_reason=reason,
        message=f"{message} {_what_remains(evidence)}",
        step=evidence.step,
        detail=evidence.console_tail,
    )


def _without_result(evidence: Evidence) -> tuple[EndReason, str]:
    exit_ = evidence.exit
    if evidence.stop is not None and evidence.was_forced:
        return EndReason.STOPPED_BY_USER, "Stopped by force: it did not end in the time it had."
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

"""How a run ends that can't go on: from the exception to reason, sentence and next step."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import DISK_FULL_ERRNOS, EndReason, Result

_DETAIL_LINES = 30

# safetensors and torch write from native code and pass only the text of the error on; torch's zip
# writer not even that.
_DISK_FULL_TEXTS = (
    "No space left on device",
    "Disk quota exceeded",
    "PytorchStreamWriter failed writing",
    "fail at inline_container.cc",
)
_DEVICE_MEMORY_TEXTS = ("CUDA out of memory", "CUDA error: out of memory", "ALLOC_FAILED")
_HOST_MEMORY_TEXTS = ("can't allocate memory", "Cannot allocate memory", "not enough memory: you")
_DEVICE_LOST_TEXTS = (
    "GPU is lost",
    "fallen off the bus",
    "no CUDA-capable device is detected",
    "CUDA-capable device(s) is/are busy or unavailable",
    "uncorrectable ECC error",
    "unspecified launch failure",
    "hardware stack error",
    "CUDA error: unknown error",
    "CUDA driver initialization failed",
)


class RunFailed(Exception):
    """The run can't go on, for a reason that is known.

    Attributes:
        reason: Why.
        message: One sentence for the user, with the next step.
    """

    def __init__(self, reason: EndReason, message: str):
        super().__init__(message)
        self.reason = reason
        self.message = message


def judge(error: BaseException, parameters: Parameters, step: int) -> Result:
    """How a run ended that `error` broke off at `step` (last whole optimizer step)."""
    reason, message = _reason(error, parameters)
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return Result(
        end_reason=reason,
        message=message,
        step=step,
        detail="\n".join(lines[-_DETAIL_LINES:]),
    )


def _reason(error: BaseException, parameters: Parameters) -> tuple[EndReason, str]:
    chain = list(_chain(error))
    # What lies beneath comes first: a model that can't be loaded for want of memory isn't bad.
    known = [cause for cause in chain if isinstance(cause, RunFailed)]
    chain = [cause for cause in chain if not isinstance(cause, RunFailed)]
    if any(_is_disk_full(cause) for cause in chain):
        return (
            EndReason.DISK_FULL,
            "No space is left on the disk: make room, then start again; a checkpoint that was "
            "saved before is whole.",
        )
    if any(_is_device_memory(cause) for cause in chain):
        return EndReason.DEVICE_OUT_OF_MEMORY, _needs_less_memory(parameters)
    if any(_is_host_memory(cause) for cause in chain):
        return (
            EndReason.HOST_OUT_OF_MEMORY,
            "The machine ran out of memory; a smaller training.batch_size or "
            "training.max_seq_length needs less.",
        )
    if any(_says(cause, _DEVICE_LOST_TEXTS) for cause in chain):
        return (
            EndReason.DEVICE_LOST,
            "The device went away; check it with its driver's tools, then resume from the newest "
            "checkpoint.",
        )
    if known:
        return known[0].reason, known[0].message
    return EndReason.RUNNER_CRASHED, f"{type(error).__name__}: {_first_line(error)}"


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    cause: BaseException | None = error
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        yield cause
        cause = cause.__cause__ or cause.__context__


def _says(error: BaseException, texts: tuple[str, ...]) -> bool:
    message = str(error)
    return any(text in message for text in texts)


def _is_disk_full(error: BaseException) -> bool:
    if isinstance(error, OSError):
        return error.errno in DISK_FULL_ERRNOS
    return _says(error, _DISK_FULL_TEXTS)


def _is_device_memory(error: BaseException) -> bool:
    # torch may not even be there yet, and must not be imported to find out.
    torch = sys.modules.get("torch")
    oom = getattr(torch, "OutOfMemoryError", None)
    return (oom is not None and isinstance(error, oom)) or _says(error, _DEVICE_MEMORY_TEXTS)


def _is_host_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or (
        isinstance(error, (RuntimeError, OSError)) and _says(error, _HOST_MEMORY_TEXTS)
    )


def _needs_less_memory(parameters: Parameters) -> str:
    training = parameters.training
    if training.batch_size > 1:
        half = training.batch_size // 2
        accumulation = training.gradient_accumulation_steps * training.batch_size // half
        advice = (
            f"training.batch_size {training.batch_size} -> {half} with "
            "training.gradient_accumulation_steps"
            f" {training.gradient_accumulation_steps} -> {accumulation} needs less"
        )
    elif not parameters.optimization.gradient_checkpointing:
        advice = "optimization.gradient_checkpointing needs less"
    else:
        advice = f"a training.max_seq_length below {training.max_seq_length} needs less"
    return f"The device ran out of memory; {advice}."


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    # Some errors only announce themselves in their first line.
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])

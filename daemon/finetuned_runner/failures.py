"""How a run ends that can't go on: from the exception to reason, sentence and next step."""

from __future__ import annotations

import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import DISK_FULL_ERRNOS, EndReason, FixValue, Result
from finetuned_daemon.texts import printable

_DETAIL_LINES = 30
_MESSAGE_CHARACTERS = 300
_EXCERPT_CHARACTERS = 500

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
        samples: Lines of a data file (from 1) whose samples it happened with; of an optimizer
            step, all of them.
        file: The data file that they are lines of; empty: the training file.
        excerpt: What such a sample looks like, where that tells more than its line does.
        field: The parameter that is to blame, by path, where the reason alone does not say it.
        fix: Parameters that would mend it, by path such as `lora.lora_target_modules`, where the
            run alone can know them. The daemon checks them, and knows the fixes for the rest.
    """

    def __init__(
        self,
        reason: EndReason,
        message: str,
        *,
        samples: Sequence[int] = (),
        file: str = "",
        excerpt: str = "",
        field: str = "",
        fix: Mapping[str, FixValue] | None = None,
    ):
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.samples = tuple(samples)
        self.file = file
        self.excerpt = excerpt
        self.field = field
        self.fix = dict(fix or {})


def judge(error: BaseException, parameters: Parameters, step: int) -> Result:
    """How a run ended that `error` broke off at `step` (last whole optimizer step)."""
    chain = list(_chain(error))
    known = next((cause for cause in chain if isinstance(cause, RunFailed)), None)
    reason, message = _reason(error, chain, known)
    result = Result(
        end_reason=reason,
        message=printable(message),
        step=step,
        detail="" if _says_it_all(chain, reason) else printable(_traceback(error)),
    )
    if known is None or known.reason is not reason:
        return result
    update: dict[str, object] = {"fix": known.fix, "field": known.field}
    if known.samples:
        file = known.file or parameters.data.train_file or ""
        excerpt = known.excerpt or _line(file, known.samples[0])
        update |= {"samples": known.samples, "sample_file": file, "excerpt": excerpt}
    return result.model_copy(update=update)


def _says_it_all(chain: Sequence[BaseException], reason: EndReason) -> bool:
    """Whether the sentence was ours, and nothing broke beneath: where in the code tells nobody."""
    # A crash asks to be looked into, and its advice is to read the traceback.
    is_crash = reason is EndReason.RUNNER_CRASHED
    return not is_crash and all(isinstance(cause, RunFailed) for cause in chain)


def _traceback(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).rstrip().splitlines()
    return "\n".join(lines[-_DETAIL_LINES:])


def _reason(
    error: BaseException, chain: list[BaseException], known: RunFailed | None
) -> tuple[EndReason, str]:
    # What lies beneath comes first: a model that can't be loaded for want of memory isn't bad.
    chain = [cause for cause in chain if not isinstance(cause, RunFailed)]
    if is_disk_full(error):
        return (
            EndReason.DISK_FULL,
            "No space is left on the disk: make room; a checkpoint that was saved before is whole.",
        )
    for cause in chain:
        if _is_device_memory(cause):
            return (
                EndReason.DEVICE_OUT_OF_MEMORY,
                f"The device ran out of memory{_as_told(cause)}.",
            )
        if _is_host_memory(cause):
            return (
                EndReason.HOST_OUT_OF_MEMORY,
                f"The machine ran out of memory{_as_told(cause)}.",
            )
    if any(_says(cause, _DEVICE_LOST_TEXTS) for cause in chain):
        return (
            EndReason.DEVICE_LOST,
            "The device went away; check it with its driver's tools, then resume from the newest "
            "checkpoint.",
        )
    if known is not None:
        return known.reason, known.message
    return EndReason.RUNNER_CRASHED, f"{type(error).__name__}: {_first_line(error)}"


def is_disk_full(error: BaseException) -> bool:
    """Whether a disk without room lies beneath an error."""
    return any(_is_disk_full(cause) for cause in _chain(error) if not isinstance(cause, RunFailed))


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


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or ["no message"]
    # Some errors only announce themselves in their first line.
    return " ".join(line.strip() for line in lines[: 2 if lines[0].rstrip().endswith(":") else 1])


def _as_told(error: BaseException) -> str:
    """What was asked for and what there was, of an allocator's long story; Python tells nothing."""
    if not str(error).strip():
        return ""
    text = _first_line(error).partition(" If reserved but unallocated memory")[0]
    text = re.sub(r"^\[enforce fail at [^]]*\] err == 0\. ", "", text)
    return f": {text.rstrip('.')[:_MESSAGE_CHARACTERS]}"


def _line(path: str, number: int) -> str:
    """How a line of a file begins; empty where it can't be read."""
    try:
        with open(path, "rb") as file:
            for _ in range(number - 1):
                file.readline()
            data = file.readline(4 * _EXCERPT_CHARACTERS)
    except OSError:
        return ""
    return data.decode("utf-8", "replace").strip()[:_EXCERPT_CHARACTERS]

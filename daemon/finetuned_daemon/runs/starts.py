"""A runner that ends before it has begun is started again, a limited number of times.

What ends it so early is often gone a second later: a driver that was just being loaded, a file
system that was just being mounted, another process that took the memory.
"""

from __future__ import annotations

from finetuned_daemon.runs.contract import EndReason, Notice, Result
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.tasks import Run

MOST_STARTS = 3
"""Of one runner process, the first included."""
EXIT_CLAIMED = 75
"""Exit status of a runner whose folder is another one's."""
_EXIT_USAGE = 2
_GROWTH = 4
_LASTING = ("ImportError:", "ModuleNotFoundError:", "No module named", "SyntaxError:")
"""How the last line of a runner begins, or ends, that will not do better the next time."""
_LINE_CHARACTERS = 300

STOPPED = Result(
    end_reason=EndReason.STOPPED_BY_USER,
    message="Stopped between two starts, before it had begun.",
)


def crashed_at_once(run: Run, exit_: Exit, console_tail: str) -> bool:
    """Whether a runner without a result had not begun, and may do better the next time.

    Its one event is that it is starting. Where nobody knows how it ended, nothing is tried.
    """
    if run.stop is not None or run.ingested_seq > 1 or exit_.oom_kills:
        return False
    if exit_.code in (0, _EXIT_USAGE, EXIT_CLAIMED) or (exit_.code is None and not exit_.signal):
        return False
    return not any(text in _last_line(console_tail) for text in _LASTING)


def pause(first: float, starts: int) -> float:
    """Seconds to wait after so many starts; `first` is that after the first of them."""
    return first * float(_GROWTH ** (starts - 1))


def again(run: Run, exit_: Exit, console_tail: str, seconds: float) -> Notice:
    """What is said of another start."""
    how = exit_.signal or f"exit status {exit_.code}"
    return Notice(
        reason="RUNNER_RESTARTED",
        message=f"The runner ended before it had begun ({how}); it is started again in "
        f"{seconds:g} s, start {run.starts + 1} of {MOST_STARTS}.{_last_words(console_tail)}",
    )


def after_daemon(run: Run) -> Notice:
    """What is said of another start after a daemon that did not survive the last one."""
    return Notice(
        reason="RUNNER_RESTARTED",
        message="The daemon ended before the runner had begun; it is started again, start "
        f"{run.starts + 1} of {MOST_STARTS}.",
    )


def daemon_gave_up(run: Run) -> Result:
    """The end of a run whose starts no daemon survived."""
    return Result(
        end_reason=EndReason.RUNNER_CRASHED,
        message=f"It was started {run.starts} times, and each time the daemon ended before the "
        "runner had begun; see the daemon's log.",
    )


def given_up(outcome: Result, starts: int, console_tail: str) -> Result:
    """The end of a run that was started as often as it may be."""
    message = (
        f"{outcome.message} It was started {starts} times, and ended each time before it had "
        f"begun.{_last_words(console_tail)}"
    )
    return outcome.model_copy(update={"message": message})


def _last_line(console_tail: str) -> str:
    lines = [line.strip() for line in console_tail.splitlines() if line.strip()]
    return lines[-1][:_LINE_CHARACTERS] if lines else ""


def _last_words(console_tail: str) -> str:
    line = _last_line(console_tail)
    return f" Its last words: {line}" if line else ""

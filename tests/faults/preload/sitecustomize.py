"""Kills the process that it is loaded into at a chosen line of our code.

Python imports this by its name, from PYTHONPATH, in each process that a test's daemon is or starts.
It sleeps unless the process is the daemon and FINETUNED_STRIKE names a file (runners don't inherit
that), or it is the fake runner and FAULTS_RUNNER does. The file says in JSON:

    at     `file.py:function`; lines are counted from a call of it on
    nth    from which call, from 1
    lines  SIGKILL at this line
    place  instead of `lines`: count from call `nth` to the next, which shows how many lines the
           operation has, and kill in the next at this part of them, from 0 to 1
    until  `file.py:function`; counting ends at a call of it
    tell   write the number of lines into this file when counting ends
"""

from __future__ import annotations

import json
import os
import signal
import sys
from types import FrameType
from typing import Any


class Strike:
    """Counts lines, and kills."""

    def __init__(self, says: dict[str, Any], *files: str) -> None:
        self.files = files
        self.at = says["at"].split(":")
        self.until = says["until"].split(":") if "until" in says else None
        self.nth = says.get("nth", 1)
        self.place = says.get("place")
        self.deadly = says.get("lines", 0)
        self.tell = says.get("tell")
        self.calls = 0
        self.lines = 0
        self.counts = False

    def __call__(self, frame: FrameType, event: str, _: object) -> Any:
        """A function is called, or a coroutine goes on."""
        code = frame.f_code
        if not any(part in code.co_filename for part in self.files):
            return None
        is_call = frame.f_lineno == code.co_firstlineno  # else it goes on behind an `await`
        if is_call and code.co_name == self.at[1] and code.co_filename.endswith(self.at[0]):
            self.called()
        if (
            self.until is not None
            and code.co_name == self.until[1]
            and code.co_filename.endswith(self.until[0])
        ):
            self.ended()
        return self.line

    def called(self) -> None:
        self.calls += 1
        if self.calls == self.nth:
            self.counts = True
        elif self.calls == self.nth + 1 and self.place is not None:
            self.deadly = 1 + int(self.place * self.lines)
            self.lines = 0
            self.counts = True

    def ended(self) -> None:
        if self.counts:
            self.counts = False
            if self.tell:
                with open(self.tell, "w") as file:
                    file.write(str(self.lines))

    def line(self, frame: FrameType, event: str, _: object) -> Any:
        if self.counts and event == "line":
            self.lines += 1
            if self.lines == self.deadly:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.line


def _arm(strike: Strike) -> None:
    import threading

    threading.settrace(strike)
    sys.settrace(strike)


def _load(variable: str) -> dict[str, Any] | None:
    path = os.environ.get(variable)
    if not path or not os.path.exists(path):  # noqa: PTH110 - pathlib is not loaded otherwise
        return None
    with open(path) as file:
        says: dict[str, Any] = json.load(file)
    return says


def _prepare() -> None:
    if "finetuned_daemon.main" in sys.orig_argv and "serve" in sys.orig_argv:
        says = _load("FINETUNED_STRIKE")
        if says is None:
            return
        strike = Strike(says, "/finetuned_daemon/")
        # The first that `main` does. Imports are not traced: they take long enough.
        umask = os.umask

        def first_umask(mask: int) -> int:
            os.umask = umask
            _arm(strike)
            if strike.at == ["main.py", "main"]:
                strike.called()
            return umask(mask)

        os.umask = first_umask
    elif "fake_runner" in sys.orig_argv and "--probe" not in sys.orig_argv:
        says = _load("FAULTS_RUNNER")
        if says is None:
            return
        strike = Strike(says, "fake_runner.py", "/finetuned_daemon/runs/")

        def imported(event: str, arguments: tuple[Any, ...]) -> None:
            # Its last import.
            if event == "import" and arguments[0] == "finetuned_daemon.runs.manifest":
                _arm(strike)

        sys.addaudithook(imported)


_prepare()

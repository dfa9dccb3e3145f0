"""A process of the training environment that has imported everything, for runs to begin from.

Made when a run has ended, for the next one; dropped when none has come for a while. One at a time.
What it does stands in `finetuned_runner/standby.py`. Whatever goes wrong with it, the run is
started the usual way, which is right always and only slower.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, auto
from pathlib import Path
from typing import IO, Any

from finetuned_daemon.config import Config
from finetuned_daemon.runs.orphans import Orphans
from finetuned_daemon.runs.process import RUN_DIR_VARIABLE, Child, ForkedChild
from finetuned_daemon.tasks import now_us

_log = logging.getLogger(__name__)

_RUNNER = "finetuned_runner"
"""The one runner that has a standby."""
_NAME_BYTES = 1024
"""Room for the path of a run folder."""
_ROOM_BYTES = 1 << 30
"""Memory that must be free before one is made: twice what it takes."""
_REPLY_SECONDS = 2.0
"""The event loop waits for a fork, which takes 20 ms; in more than this something is wrong."""
_WARM_SECONDS = 600.0
"""For the imports, which take seconds, or a minute of a cold disk; in more something hangs."""
_MOST_FAILURES = 3
"""In a row, before none is made any more."""


class StandbyState(Enum):
    """Whether there is one."""

    OFF = auto()
    """None is ever made."""
    NONE = auto()
    """One is made when the next run has ended."""
    WARMING = auto()
    """It imports."""
    READY = auto()
    """The next run begins from it."""


@dataclass(frozen=True)
class StandbyStatus:
    """What is to be seen of it."""

    state: StandbyState
    pid: int = 0
    memory_bytes: int = 0
    """Resident, with pages that runs from it share."""
    ready_time: int = 0
    """When it was ready, in microseconds since the epoch; 0: it is not."""
    started_runs: int = 0
    """Runs of this daemon that began from one."""


@dataclass
class _Process:
    child: subprocess.Popen[bytes]
    control: socket.socket
    threads: str
    """OpenMP threads that its runs have: the library reads that once."""
    mode: str = ""
    """How it makes a run, `fork` or `spare`; empty: it imports still."""
    ready_time: int = 0
    heard: bytes = b""


class Standby:
    """The standby of a daemon, if there is one at present."""

    def __init__(self, config: Config, log: Path, orphans: Orphans) -> None:
        """Makes none yet.

        Args:
            config: The daemon's.
            log: File for what it prints; it is written anew by each.
            orphans: Whether they are ours: a fork needs it.
        """
        self._config = config
        self._log = log
        self._orphans = orphans
        self._idle_seconds = 60 * config.standby_idle_minutes
        self._process: _Process | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._failures = 0
        self._started = 0
        self._is_closed = False
        self._ends = set[asyncio.Task[int]]()
        self._is_off = config.runner_module != _RUNNER or not self._idle_seconds

    @property
    def is_off(self) -> bool:
        """Whether none is ever made."""
        return self._is_off

    def status(self) -> StandbyStatus:
        """What is to be seen of it now."""
        process = self._process
        if process is None:
            state = StandbyState.OFF if self._is_off else StandbyState.NONE
            return StandbyStatus(state, started_runs=self._started)
        return StandbyStatus(
            StandbyState.READY if process.mode else StandbyState.WARMING,
            process.child.pid,
            _resident_bytes(process.child.pid),
            process.ready_time,
            self._started,
        )

    def warm(self, environment: Mapping[str, str], model: str) -> None:
        """Makes one where there is none, and where there is room for it.

        Args:
            environment: Of the runs that it is for.
            model: Folder of a model of their kind.
        """
        if self._is_off or self._is_closed or self._process is not None or not _has_room():
            return
        ours, theirs = socket.socketpair()
        with ours, theirs:
            try:
                with open(self._log, "wb") as log:
                    child = self._spawn(environment, model, theirs, log)
            except OSError as error:
                _log.warning("no standby can be started: %s", error)
                return
            process = _Process(
                child, socket.socket(fileno=ours.detach()), environment["OMP_NUM_THREADS"]
            )
        process.control.setblocking(False)
        self._process = process
        asyncio.get_running_loop().add_reader(process.control, self._hear, process)
        self._wait(_WARM_SECONDS, self._has_hung)

    def start(
        self, run_dir: Path, console: IO[bytes], environment: Mapping[str, str], umask: int
    ) -> Child | None:
        """Begins a run; the event loop waits for it, some hundredths of a second.

        Args:
            run_dir: Its folder.
            console: Open for appending, for what it prints.
            environment: Of its process.
            umask: Of its process.

        Returns:
            Its process, a child of this one. None: there was none to begin from.
        """
        process = self._process
        if process is None or not process.mode:
            return None
        if environment["OMP_NUM_THREADS"] != process.threads:
            self.drop()
            return None
        request = {"run_dir": str(run_dir), "umask": umask, "env": dict(environment)}
        answer = _exchange(process, request, console.fileno())
        pid = answer.get("pid")
        if not isinstance(pid, int):
            _log.info("the standby is dropped: %s", answer.get("refused", "it does not answer"))
            self.drop()
            return None
        self._started += 1
        if process.mode == "spare":
            self._let_go()
            return process.child
        self._rest()
        return ForkedChild(pid)

    def drop(self) -> None:
        """Ends it, if there is one; runs that began from it go on."""
        process = self._let_go()
        if process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.child.pid, 9)
            # In a thread: the kernel takes some time to give back so much memory.
            end = asyncio.get_running_loop().create_task(asyncio.to_thread(process.child.wait))
            self._ends.add(end)
            end.add_done_callback(self._ends.discard)

    async def close(self) -> None:
        """Ends it for good."""
        self._is_closed = True
        self.drop()
        await asyncio.gather(*self._ends, return_exceptions=True)

    def _spawn(
        self, environment: Mapping[str, str], model: str, control: socket.socket, log: IO[bytes]
    ) -> subprocess.Popen[bytes]:
        room = " " * _NAME_BYTES
        may_fork = self._orphans.are_ours and not self._config.standby_spare
        return subprocess.Popen(
            [
                *(self._config.runner_python, "-P", "-m", self._config.runner_module),
                *("--standby", "fork" if may_fork else "spare", model, room),
            ],
            cwd=self._log.parent,
            env={**environment, RUN_DIR_VARIABLE: room},
            stdin=control.fileno(),
            stdout=log,
            stderr=log,
            start_new_session=True,
            close_fds=True,
            umask=self._config.runner_umask,
        )

    def _hear(self, process: _Process) -> None:
        """It says that it is ready, or has ended."""
        try:
            part = process.control.recv(1 << 16)
        except BlockingIOError:
            return
        except OSError:
            part = b""
        process.heard += part
        if part and not process.heard.endswith(b"\n"):
            return
        ready = _decode(process.heard).get("ready") if part else None
        if isinstance(ready, str):
            process.mode, process.ready_time, process.heard = ready, now_us(), b""
            self._failures = 0
            _log.info("a standby is ready, process %d", process.child.pid)
            self._rest()
            return
        if process.mode:
            _log.info("the standby has ended")
        else:
            self._count_failure("could not be made")
        self.drop()

    def _count_failure(self, what: str) -> None:
        self._failures += 1
        self._is_off = self._failures >= _MOST_FAILURES
        _log.warning(
            "a standby %s, see %s%s",
            what,
            self._log,
            "; none is made any more" if self._is_off else "",
        )

    def _rest(self) -> None:
        """Counts its idle time anew."""
        self._wait(self._idle_seconds, self._has_idled)

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_later(seconds, then)

    def _has_hung(self) -> None:
        self._count_failure(f"was not ready within {_WARM_SECONDS:g} seconds")
        self.drop()

    def _has_idled(self) -> None:
        _log.info("the standby is dropped: no run has started for a while")
        self.drop()

    def _let_go(self) -> _Process | None:
        process, self._process = self._process, None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if process is not None:
            asyncio.get_running_loop().remove_reader(process.control)
            process.control.close()
        return process


def _exchange(process: _Process, request: dict[str, Any], descriptor: int) -> dict[str, Any]:
    """Asks for a run; an empty answer: there is none, and it may or may not begin."""
    control = process.control
    # Blocking, for some time; the event loop reads from it again afterwards.
    control.settimeout(_REPLY_SECONDS)
    try:
        data = json.dumps(request).encode() + b"\n"
        sent = socket.send_fds(control, [data], [descriptor])
        control.sendall(data[sent:])
        answer = b""
        while not answer.endswith(b"\n"):
            part = control.recv(1 << 16)
            if not part:
                return {}
            answer += part
        return _decode(answer)
    except OSError:
        return {}
    finally:
        control.setblocking(False)


def _decode(line: bytes) -> dict[str, Any]:
    try:
        content: Any = json.loads(line)
    except ValueError:
        return {}
    return content if isinstance(content, dict) else {}


def _resident_bytes(pid: int) -> int:
    import psutil

    with contextlib.suppress(psutil.Error):
        return int(psutil.Process(pid).memory_info().rss)
    return 0


def _has_room() -> bool:
    import psutil

    return psutil.virtual_memory().available >= _ROOM_BYTES

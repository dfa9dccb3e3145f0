"""One runner process: started by us, or by an earlier daemon and adopted."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from finetuned_daemon.runs.contract import ProcessIdentity, boot_id
from finetuned_daemon.runs.oom import oom_kills

RUN_DIR_VARIABLE = "TRAINING_RUN_DIR"
"""In the environment of a runner and of all that it starts: the folder of their run."""

_POLL_SECONDS = 0.25
_MOST_SWEEPS = 20


@dataclass(frozen=True)
class Exit:
    """How a process ended. Of an adopted process, no child of ours, nobody can know."""

    code: int | None = None
    """Exit status; None: a signal ended it, or nobody can know."""
    signal: str = ""
    """Name such as `SIGKILL`; empty: none did, or nobody can know."""
    oom_kills: int | None = None
    """Processes that the kernel killed for want of memory while it was watched.

    None: nobody can know.
    """


awaited = set[int]()
"""Children whose end somebody looks out for: their exit status is nobody else's."""


class Child(Protocol):
    """A child of this process; `subprocess.Popen` is one."""

    pid: int
    returncode: int | None
    """Its exit status, negative for a signal; None: it lives, or has not been reaped."""

    def poll(self) -> int | None:
        """Its exit status, once it has ended; reaps it."""
        ...


class ForkedChild:
    """A child that another process has forked for us, see `standby`."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """As `Popen.poll`, but that it raises where `Popen` takes a status for 0.

        Raises:
            ChildProcessError: It is no child of ours, or somebody else has its exit status.
        """
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


class RunnerProcess:
    """A live runner. `gone` is set once it has ended, whoever its parent is."""

    def __init__(
        self,
        identity: ProcessIdentity,
        child: Child | None,
        run_dir: Path | None = None,
    ) -> None:
        self.identity = identity
        self._run_dir = run_dir
        self.gone = asyncio.Event()
        self.exit = Exit()
        self._oom_kills = oom_kills()
        self._child = child
        self._pidfd = -1
        self._poller: asyncio.Task[None] | None = None

    @classmethod
    def start(
        cls, argv: Sequence[str], *, cwd: Path, console: Path, env: dict[str, str], umask: int
    ) -> RunnerProcess:
        """Starts a runner in a session and process group of its own, its output in a file.

        Nothing of the daemon's is inherited: no descriptor, no terminal. Files instead of pipes: a
        pipe would break with
        the daemon.

        Raises:
            OSError: It can't be started.
        """
        with open(console, "ab") as output:
            child = subprocess.Popen(
                argv,
                cwd=cwd,
                env={**env, RUN_DIR_VARIABLE: str(cwd)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                close_fds=True,
                umask=umask,
            )
        return cls.of_child(child, cwd)

    @classmethod
    def of_child(cls, child: Child, run_dir: Path) -> RunnerProcess:
        """Watches a child of ours that is a runner; it may have ended already."""
        # As a zombie it keeps its pid until we have asked for its status.
        identity = ProcessIdentity.of(child.pid) or ProcessIdentity(
            pid=child.pid, start_time=0, boot_id=""
        )
        process = cls(identity, child, run_dir)
        awaited.add(child.pid)
        process._watch()
        return process

    @classmethod
    def adopt(cls, identity: ProcessIdentity, run_dir: Path | None = None) -> RunnerProcess:
        """Takes over a runner that an earlier daemon has started; it may be gone already.

        Children that it left end with it where its run folder is given.
        """
        process = cls(identity, None, run_dir)
        process._watch()
        return process

    def signal_group(self, number: signal.Signals) -> bool:
        """Sends a signal to the runner and its children; False: it is gone.

        The group is signalled only while its leader is certainly ours: a leader that lives, or a
        zombie of ours, keeps
        the number from being given to anybody else.
        """
        if self.gone.is_set():
            return False
        if self._child is None and not self.identity.is_alive():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.identity.pid, number)
            return True
        return False

    def close(self) -> None:
        """Stops watching; the process goes on."""
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1
        if self._poller is not None:
            self._poller.cancel()

    def _watch(self) -> None:
        if hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(self.identity.pid)
            except ProcessLookupError:
                self._has_ended()
                return
            except OSError:  # a kernel before 5.3
                self._pidfd = -1
            else:
                # The pid could have been given away between the daemons; the descriptor now holds
                # it still.
                if self._child is None and not self.identity.is_alive():
                    os.close(self._pidfd)
                    self._pidfd = -1
                    self._has_ended()
                    return
                asyncio.get_running_loop().add_reader(self._pidfd, self._has_ended)
                return
        self._poller = asyncio.get_running_loop().create_task(self._poll())

    async def _poll(self) -> None:
        # Only where there is no pidfd: nothing else tells of a process that is nobody's child.
        while self._is_alive():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)
        self._has_ended()

    def _is_alive(self) -> bool:
        if self._child is None:
            return self.identity.is_alive()
        try:
            return self._child.poll() is None
        except ChildProcessError:
            return False

    def _has_ended(self) -> None:
        self._poller = None
        if self._child is not None:
            self._reap(self._child)
        if self._run_dir is not None:
            _end_children(self.identity, self._run_dir)
        before, after = self._oom_kills, oom_kills()
        if before is not None and after is not None:
            self.exit = replace(self.exit, oom_kills=after - before)
        self.close()
        self.gone.set()

    def _reap(self, child: Child) -> None:
        """Takes the exit status of a child that has ended."""
        awaited.discard(child.pid)
        if child.returncode is None:
            # Before the zombie is reaped its number is still ours: children that are left over end
            # with it.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.identity.pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):  # then nobody can know
            status = child.poll()
            if status is not None:
                self.exit = Exit(code=status) if status >= 0 else Exit(signal=_signal_name(-status))


def _end_children(identity: ProcessIdentity, run_dir: Path) -> None:
    """Ends what a runner that is gone has left in its session: it may hold the device's memory.

    The runner was not our child perhaps, so its number alone says nothing: it may have been given
    to another process by now. Each one is known by the run folder in its environment as well, and
    held by a descriptor while it is looked at. Linux alone.
    """
    if not hasattr(os, "pidfd_open") or identity.boot_id not in ("", boot_id()):
        return
    mark = os.fsencode(f"{RUN_DIR_VARIABLE}={run_dir}")
    for _ in range(_MOST_SWEEPS):  # one may start another while we look
        ended = 0
        for entry in os.scandir("/proc"):
            if entry.name.isdecimal() and _end_child(int(entry.name), identity.pid, mark):
                ended += 1
        if not ended:
            return


def _end_child(pid: int, session: int, mark: bytes) -> bool:
    try:
        if os.getsid(pid) != session:
            return False
        held = os.pidfd_open(pid)
    except OSError:  # it went away, or is a thread
        return False
    try:
        # A zombie has no environment any more.
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if mark not in environment or os.getsid(pid) != session:
            return False
        signal.pidfd_send_signal(held, signal.SIGKILL)
    except OSError:  # it went away, or runs as somebody else
        return False
    finally:
        os.close(held)
    return True


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


def find_runner(run_dir: str) -> ProcessIdentity | None:
    """Looks for a runner that has started but not yet written who it is."""
    import psutil  # seldom: a daemon starts sooner without it

    for process in psutil.process_iter(["cmdline"]):
        cmdline = process.info["cmdline"] or []
        while cmdline and not cmdline[-1]:  # room that the name of a standby's run has left
            cmdline.pop()
        if cmdline and cmdline[-1] == run_dir and _leads_session(process.pid):
            return ProcessIdentity.of(process.pid)
    return None


def _leads_session(pid: int) -> bool:
    """A runner does; what it has forked has its command line, and lives some moments longer."""
    with contextlib.suppress(OSError):
        return os.getsid(pid) == pid
    return False

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

from finetuned_daemon.runs.contract import ProcessIdentity
from finetuned_daemon.runs.oom import oom_kills

_POLL_SECONDS = 0.25


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


class RunnerProcess:
    """A live runner. `gone` is set once it has ended, whoever its parent is."""

    def __init__(self, identity: ProcessIdentity, child: subprocess.Popen[bytes] | None) -> None:
        self.identity = identity
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
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                close_fds=True,
                umask=umask,
            )
        # It may have ended already; as a zombie it keeps its pid until we have asked for its
        # status.
        identity = ProcessIdentity.of(child.pid) or ProcessIdentity(
            pid=child.pid, start_time=0, boot_id=""
        )
        process = cls(identity, child)
        process._watch()
        return process

    @classmethod
    def adopt(cls, identity: ProcessIdentity) -> RunnerProcess:
        """Takes over a runner that an earlier daemon has started; it may be gone already."""
        process = cls(identity, None)
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
        while self._child.poll() is None if self._child else self.identity.is_alive():  # noqa: ASYNC110
            await asyncio.sleep(_POLL_SECONDS)
        self._has_ended()

    def _has_ended(self) -> None:
        self._poller = None
        if self._child is not None:
            if self._child.returncode is None:
                # Before the zombie is reaped its number is still ours: children that are left over
                # end with it.
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.killpg(self.identity.pid, signal.SIGKILL)
            status = self._child.wait()
            self.exit = Exit(code=status) if status >= 0 else Exit(signal=_signal_name(-status))
        before, after = self._oom_kills, oom_kills()
        if before is not None and after is not None:
            self.exit = replace(self.exit, oom_kills=after - before)
        self.close()
        self.gone.set()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"

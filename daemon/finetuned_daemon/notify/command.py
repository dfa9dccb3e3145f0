"""Notifications to a program: JSON on its stdin, the main fields in its environment."""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, Paths
from finetuned_daemon import logs
from finetuned_daemon.notify.channel import Channel, NotDelivered
from finetuned_daemon.notify.message import Notification
from finetuned_daemon.texts import printable

_LOOK_SECONDS = 0.02
_MOST_WORDS = 300
"""Characters of what it writes to stderr that are kept."""

_IN_ENVIRONMENT = (
    "title",
    "sentence",
    "task",
    "display_name",
    "run",
    "state",
    "reason",
    "next",
    "output_path",
    "step",
    "total_steps",
    "loss",
    "duration_seconds",
    "host",
)
"""Fields of `data` that stand in the environment, `FINETUNED_` and their name in capitals."""


class Program:
    """Starts a program for a notification, in a process group of its own."""

    def __init__(self, seconds: float, umask: int) -> None:
        """Takes the time that the program has, and the umask of whoever started the daemon."""
        self._seconds = seconds
        self._umask = umask
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, argv: Sequence[str], stdin: bytes, environment: Mapping[str, str]) -> None:
        """Runs it to its end.

        Raises:
            NotDelivered: It can't be started, took too long, or ended with another status than 0.
        """
        try:
            process = subprocess.Popen(
                argv,
                cwd="/",
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
                umask=self._umask,
            )
        except (OSError, ValueError) as error:
            raise NotDelivered(f"it can't be started: {error}") from error
        self._process = process
        try:
            words = self._follow(process, stdin)
        finally:
            self._process = None
            _kill_unless_ended(process)
            for pipe in (process.stdin, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
        if process.returncode:
            raise NotDelivered(f"it ended with {_how(process.returncode)}{words}")

    def abort(self) -> None:
        """Kills what runs."""
        if self._process is not None:
            _kill_unless_ended(self._process)

    def _follow(self, process: subprocess.Popen[bytes], stdin: bytes) -> str:
        """Waits for its end; returns the end of what it wrote to stderr."""
        assert process.stdin is not None
        assert process.stderr is not None
        with contextlib.suppress(BrokenPipeError):  # it does not want to know
            # A pipe takes this much at once, whether or not anybody reads.
            process.stdin.write(stdin)
            process.stdin.close()
        words = b""
        os.set_blocking(process.stderr.fileno(), False)
        deadline = time.monotonic() + self._seconds
        with selectors.DefaultSelector() as selector:
            selector.register(process.stderr, selectors.EVENT_READ)
            while True:
                has_ended = process.poll() is not None
                if selector.get_map() and selector.select(0 if has_ended else _LOOK_SECONDS):
                    chunk = process.stderr.read(1 << 16)
                    words = (words + (chunk or b""))[-4 * _MOST_WORDS :]
                    if not chunk:
                        selector.unregister(process.stderr)
                elif not has_ended and not selector.get_map():
                    time.sleep(_LOOK_SECONDS)
                if has_ended:
                    break
                if time.monotonic() > deadline:
                    _kill_unless_ended(process)
                    raise NotDelivered(f"it was ended after {self._seconds:g} s")
        text = printable(words.decode(errors="replace")).split()
        return f": {logs.redacted(' '.join(text))[-_MOST_WORDS:]}" if text else ""


class Command(Channel):
    """The program that `--notify-command` names."""

    def __init__(self, argv: Sequence[str], paths: Paths, *, seconds: float, umask: int) -> None:
        """Takes the command line; it goes to no shell."""
        self.id = "command"
        self.label = printable(f"command {argv[0]}")
        self._argv = argv
        self._paths = paths
        self._program = Program(seconds, umask)

    def send(self, notification: Notification) -> str:
        """Runs it; status 0 is delivered."""
        self._program.run(self._argv, notification.body.encode(), self._environment(notification))
        return "status 0"

    def abort(self) -> None:
        """Kills it."""
        self._program.abort()

    def _environment(self, notification: Notification) -> dict[str, str]:
        """The daemon's, without its own variables; those of its folders lead clients to it."""
        data = notification.data
        fields = {f"FINETUNED_{name.upper()}": data[name] for name in _IN_ENVIRONMENT}
        return {
            **foreign_environment(),
            STATE_DIR_VARIABLE: str(self._paths.state_dir),
            RUNTIME_DIR_VARIABLE: str(self._paths.runtime_dir),
            "FINETUNED_NOTIFICATION_ID": notification.id,
            "FINETUNED_TYPE": notification.content["type"],
            **{key: "" if value is None else str(value) for key, value in fields.items()},
        }


def foreign_environment() -> dict[str, str]:
    """The daemon's environment without its own variables, such as a token."""
    return {k: v for k, v in os.environ.items() if not k.startswith("FINETUNED_")}


def _kill_unless_ended(process: subprocess.Popen[bytes]) -> None:
    """Kills its group; its number is its own as long as the process was not waited for."""
    if process.poll() is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _how(status: int) -> str:
    if status >= 0:
        return f"status {status}"
    try:
        return signal.Signals(-status).name
    except ValueError:
        return f"signal {-status}"

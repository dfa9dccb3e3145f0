"""The daemon's log: JSON lines in a file that is rotated, plain lines on stderr.

A line is made within the call or the run that it is about: `ABOUT` says which. Nothing that goes
wrong here, such as a full disk, disturbs the daemon. A token has no business in any line; one that
comes in by mistake is replaced. Knows no gRPC.
"""

from __future__ import annotations

import json
import logging
import os
import re
import secrets
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType

from finetuned_daemon.limits import MEBIBYTE, Limits

RPC_LOGGER = "finetuned_daemon.rpc"
"""One line for each call, at its end."""

LEVELS = ("debug", "info", "warning", "error")

_MOST_STDERR_BYTES = MEBIBYTE
_LONGEST_VALUE = 20_000
# Ids come into log lines and events: nothing there has to be quoted.
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_LOOKS_SECRET = re.compile(
    r"(?i)(bearer\s+)[a-z0-9._~+/=-]{8,}"
    r"|(authorization[\"']?\s*[:=,]\s*[\"']?(?:bearer\s+)?)[a-z0-9._~+/=-]{8,}"
    r"|\b(hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}"
)
# One of these stands in whatever looks like a secret. To look for them takes a hundredth of what
# the expression takes.
_HINTS = ("bearer", "authorization", "hf_", "sk-", "ghp_", "github_pat_", "glpat-", "xox")
_REPLACED = "[secret]"

_JSON = json.JSONEncoder(ensure_ascii=False, default=str)

_secrets: set[str] = set()


@dataclass(frozen=True, kw_only=True)
class About:
    """What a log line is about."""

    request_id: str = ""
    """The call, by the metadata `request-id`. Not the field `request_id` of a message, by which a
    repeat gets the first answer again."""
    method: str = ""
    """Such as `/finetuned.v1.TaskService/StartTask`."""
    task: str = ""
    """`tasks/{task_id}`."""
    run: int = 0


ABOUT: ContextVar[About] = ContextVar("about", default=About())  # noqa: B039 - frozen
"""Goes with a call or a run, through its tasks and threads."""


def request_id() -> str:
    """The call that is being answered; empty: none."""
    return ABOUT.get().request_id


def checked_request_id(given: str) -> str:
    """A client's id for its call, or one of ours where that can't be used."""
    return given if _REQUEST_ID.fullmatch(given) else secrets.token_hex(8)


def keep_secret(token: str) -> None:
    """Replaces the token in every line from now on."""
    if len(token) >= 8:
        _secrets.add(token)


def redacted(text: str) -> str:
    """The text without what is, or looks like, a secret."""
    for token in _secrets:
        text = text.replace(token, _REPLACED)
    folded = text.casefold()  # as the expression compares: there is a long s, and a kelvin sign
    if not any(hint in folded for hint in _HINTS):
        return text
    return _LOOKS_SECRET.sub(lambda m: (m[1] or m[2] or m[3] or "") + _REPLACED, text)


class JsonFormatter(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        about = getattr(record, "about", None) or ABOUT.get()
        moment = datetime.fromtimestamp(record.created, UTC)
        content: dict[str, object] = {
            "time": moment.isoformat(timespec="milliseconds")[:-6] + "Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": _cut(record.getMessage()),
        }
        content |= {key: value for key, value in vars(about).items() if value}
        content |= getattr(record, "fields", {})
        if record.exc_info:
            content["exception"] = _cut(self.formatException(record.exc_info))
        return redacted(_JSON.encode(content))


class _PlainFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


class LogFile(logging.Handler):
    """A file of mode 0600. Lines that can't be written are lost; the next that can says how many.

    Written without a buffer: one that a full disk has left behind would fail at every later line.
    """

    def __init__(self, path: Path, limits: Limits, stderr_file: Path) -> None:
        """Opens it at the first line; arguments as for `set_up`."""
        super().__init__()
        self._path = path
        self._most_bytes = limits["log_file_bytes"]
        self._most_files = limits["log_files"]
        self._stderr_file = stderr_file
        self._descriptor: int | None = None
        self._size = 0
        self._lost = 0
        self._is_torn = False

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line, if it can be written."""
        lost = {"lines_lost_before": self._lost} if self._lost else {}
        record.fields = {**getattr(record, "fields", {}), **lost}
        try:
            self._write(self.format(record).encode("utf-8", "backslashreplace") + b"\n")
        except Exception:  # noqa: BLE001 - whatever a line does, the daemon goes on
            self._lost += 1
        else:
            self._lost = 0

    def close(self) -> None:
        """Closes the file."""
        self._close()
        super().close()

    def _write(self, line: bytes) -> None:
        if self._is_torn:
            line = b"\n" + line
        if self._descriptor is not None and self._size + len(line) > self._most_bytes:
            self._rotate()
        if self._descriptor is None:
            flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
            self._descriptor = os.open(self._path, flags, 0o600)
            self._size = os.fstat(self._descriptor).st_size
        written = os.write(self._descriptor, line)
        self._size += written
        self._is_torn = written < len(line)
        if self._is_torn:
            raise OSError("only a part of the line found room")

    def _rotate(self) -> None:
        self._close()
        for number in range(self._most_files - 1, 0, -1):
            older = rotated(self._path, number)
            newer = rotated(self._path, number - 1)
            if newer.exists():
                newer.replace(older)
        _bound(self._stderr_file)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def rotated(path: Path, number: int) -> Path:
    """The log file that has been rotated so many times."""
    return path.with_name(f"{path.name}.{number}") if number else path


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """A terminal that is gone, or a full disk behind it, loses lines and nothing else."""

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - the base's name
        pass


def set_up(path: Path, stderr_file: Path, limits: Limits, level: str = "info") -> None:
    """Sends what is logged to a file, and to stderr for people.

    Args:
        path: The file; its folder is made.
        stderr_file: What a client that starts a daemon in the background gives it for stderr.
        limits: For its size.
        level: The least that is shown on stderr. The file has `info` and above, and with `debug`
            all.
    """
    # In no line of ours, and found out for each.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    least = logging.getLevelNamesMapping()[level.upper()]
    root = logging.getLogger()
    root.setLevel(min(least, logging.INFO))
    stderr = _Stderr(sys.stderr)
    stderr.setLevel(least)
    stderr.setFormatter(_PlainFormatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    if least > logging.DEBUG:
        stderr.addFilter(lambda record: record.name != RPC_LOGGER)
    root.addHandler(stderr)
    sys.excepthook = _log_uncaught
    _bound(stderr_file)
    try:
        path.parent.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        root.error("there is no log file, as %s can't be made: %s", path.parent, error)
        return
    file = LogFile(path, limits, stderr_file)
    file.setFormatter(JsonFormatter())
    root.addHandler(file)


def leave_stderr(stderr_file: Path) -> None:
    """Ends the lines on stderr where it is the file that a client has opened for a start.

    That file is for what comes before the log.
    """
    if _is_stderr(stderr_file):
        for handler in logging.getLogger().handlers:
            if isinstance(handler, _Stderr):
                handler.setLevel(logging.CRITICAL)


def end() -> None:
    """Lets go of stdout and stderr, at the daemon's end.

    What a full disk behind them has not taken would be tried again by Python, and its failure would
    become the exit status.
    """
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        try:
            stream.flush()
        except OSError:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, number)
            os.close(nowhere)


def _is_stderr(file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(2), file.stat())
    except OSError:
        return False


def _bound(stderr_file: Path) -> None:
    """Empties that file where it has become long: what libraries print goes there for ever."""
    try:
        if _is_stderr(stderr_file) and os.fstat(2).st_size > _MOST_STDERR_BYTES:
            os.ftruncate(2, 0)
    except OSError:
        return


def _log_uncaught(
    kind: type[BaseException], error: BaseException, traceback: TracebackType | None
) -> None:
    logging.getLogger("finetuned_daemon").critical(
        "the daemon ends by an error of its own; runs go on", exc_info=(kind, error, traceback)
    )


def _cut(text: str) -> str:
    if len(text) <= _LONGEST_VALUE:
        return text
    half = _LONGEST_VALUE // 2
    return f"{text[:half]} ... {text[-half:]}"

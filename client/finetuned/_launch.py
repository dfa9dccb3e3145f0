"""Start the daemon in the background where none serves."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc

from finetuned._channel import open_channel
from finetuned._connect import TOKEN_VARIABLE, Endpoint, find
from finetuned._errors import DaemonNotStarted, DaemonUnavailable
from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, paths
from finetuned._tls import TLS
from finetuned.v1 import system_service_pb2, system_service_pb2_grpc

START_SECONDS = 15.0
"""How long a started daemon may take to answer."""

_POLL_SECONDS = 0.05
_LOG_TAIL_BYTES = 4000
# The daemon's exit status for "another one serves this state folder".
_ALREADY_SERVED = 3


def start_daemon(
    address: str | None = None,
    *,
    token: str | None = None,
    timeout: float = START_SECONDS,
    on_start: Callable[[Path], None] | None = None,
    tls: TLS | None = None,
) -> bool:
    """Start the daemon if none serves, and wait until it answers.

    The daemon lives on after this process. Where two processes start one at once, one daemon
    stays, as the other finds the state folder locked, and both return.

    Args:
        address: As for `Client`; a daemon is started only at the default address.
        token: As for `Client`.
        timeout: Seconds within which the daemon must answer.
        on_start: Called with the path of the daemon's log once its process has been started.
        tls: As for `Client`.

    Returns:
        Whether a process was started.

    Raises:
        DaemonNotStarted: It is not installed, ended, or did not answer in time.
        DaemonUnavailable: Nobody serves the address that was named.
    """
    deadline = time.monotonic() + timeout
    endpoint = _find(address, token, tls)
    if endpoint is not None and endpoint.is_listening():
        return False
    if endpoint is not None and not endpoint.is_default:
        raise DaemonUnavailable(
            f"nobody serves {endpoint.target}; "
            "a daemon is started only where no address is named by argument or FINETUNED_ADDRESS"
        )
    log = paths().log
    _make_private(log.parent)
    start_of_log = log.stat().st_size if log.exists() else 0
    process = _spawn(log)
    if on_start is not None:
        on_start(log)
    while time.monotonic() < deadline:
        status = process.poll()
        if status == _ALREADY_SERVED and not _is_served(address, token, tls):
            # The one before has closed its socket and still holds its lock.
            time.sleep(_POLL_SECONDS)
            process = _spawn(log)
        elif status not in (None, _ALREADY_SERVED):
            raise DaemonNotStarted(
                f"the daemon ended with status {status}; the end of {log}:\n"
                f"{_tail(log, start_of_log)}"
            )
        if _is_served(address, token, tls):
            # Reaps it, should it end while this process lives, and keeps Popen's warning quiet.
            threading.Thread(target=process.wait, name="finetuned-reaper", daemon=True).start()
            return True
        time.sleep(_POLL_SECONDS)
    threading.Thread(target=process.wait, name="finetuned-reaper", daemon=True).start()
    raise DaemonNotStarted(
        f"the daemon did not answer within {timeout:g} s; the end of {log}:\n"
        f"{_tail(log, start_of_log)}"
    )


def _make_private(folder: Path) -> None:
    """Make the folder and what is missing above it, for this user alone.

    The daemon refuses folders that others can write in, and `mkdir(parents=True)` would leave the
    modes of parents to the umask.
    """
    missing: list[Path] = []
    while not folder.is_dir():
        missing.append(folder)
        folder = folder.parent
    for made in reversed(missing):
        try:
            made.mkdir(mode=0o700)
        except FileExistsError:
            if not made.is_dir():
                raise
        else:
            made.chmod(0o700)  # a umask can take from the owner too


def _find(address: str | None, token: str | None, tls: TLS | None) -> Endpoint | None:
    try:
        return find(address, token, tls)
    except DaemonUnavailable:  # no unix sockets here, and no daemon has written its address yet
        return None


def _is_served(address: str | None, token: str | None, tls: TLS | None) -> bool:
    endpoint = _find(address, token, tls)
    return endpoint is not None and endpoint.is_listening() and _answers(endpoint)


def _spawn(log: Path) -> subprocess.Popen[bytes]:
    environment = dict(os.environ)
    environment.pop(TOKEN_VARIABLE, None)  # a client's, and no business of the daemon's
    # The daemon's working folder is another one: what is relative here must not be relative there.
    for variable in (STATE_DIR_VARIABLE, RUNTIME_DIR_VARIABLE):
        if environment.get(variable):
            environment[variable] = str(Path(environment[variable]).absolute())
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
    with open(log, "ab", opener=lambda path, mode: os.open(path, mode, 0o600)) as output:
        return subprocess.Popen(
            [*_command(), "serve"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            close_fds=True,
            cwd=Path(sys.executable).anchor or "/",
            env=environment,
            creationflags=flags,
            # A session of its own: the terminal's Ctrl-C and hang-up do not reach it.
            start_new_session=True,
        )


def _command() -> list[str]:
    if importlib.util.find_spec("finetuned_daemon") is not None:
        return [sys.executable, "-m", "finetuned_daemon.main"]
    program = shutil.which("finetuned")
    if program is None:
        raise DaemonNotStarted(
            "the daemon is not installed here: pip install 'finetuned[daemon,train]'"
        )
    return [program]


def _answers(endpoint: Endpoint) -> bool:
    with open_channel(endpoint) as channel:
        try:
            system_service_pb2_grpc.SystemServiceStub(channel).GetSystemInfo(
                system_service_pb2.GetSystemInfoRequest(), timeout=1, metadata=endpoint.metadata
            )
        except grpc.RpcError as error:
            call: Any = error
            # Any answer of its own shows that it serves; what it thinks of us comes out later.
            return call.code() not in (
                grpc.StatusCode.UNAVAILABLE,
                grpc.StatusCode.DEADLINE_EXCEEDED,
            )
        return True


def _tail(log: Path, start: int) -> str:
    try:
        with log.open("rb") as file:
            end = file.seek(0, os.SEEK_END)
            file.seek(max(start, end - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip() or "(empty)"
    except OSError as error:
        return f"({error})"

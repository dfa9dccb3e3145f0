"""One daemon a state folder and runtime folder: folders, locks, endpoint file."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuned._paths import Paths
from finetuned._version import __version__
from finetuned_daemon.privacy import check_private, make_private
from finetuned_daemon.runs.contract import boot_id, write_atomic
from finetuned_daemon.store.files import SERVING
from finetuned_daemon.tokens import check_tokens

_CONNECT_SECONDS = 2.0
_ANNOUNCE_SECONDS = 5.0
_LOOK_SECONDS = 0.02


class AlreadyServing(Exception):
    """Another daemon has these folders; the message says where it serves."""


class Instance:
    """Holds the folders of one daemon from its start to its end."""

    def __init__(
        self, paths: Paths, private: Sequence[Path] = (), *, is_activated: bool = False
    ) -> None:
        """Takes the folders.

        Args:
            paths: Where they are.
            private: What else must be this user's alone, where it is there.
            is_activated: A service manager listens at the socket that clients dial. It is left
                alone, and the daemon has another beside it.

        Raises:
            FolderUnsafe: Another user could read or replace what lies in them.
            AlreadyServing: A live daemon has them.
            OSError: They can't be made.
        """
        self.paths = paths
        self.socket = paths.runtime_dir / "daemon.sock" if is_activated else paths.socket
        """Where gRPC listens."""
        for folder in (paths.state_dir, paths.runtime_dir):
            make_private(folder)
        for path in private:
            check_private(path)
        check_tokens(paths)
        self._locks: list[int] = []
        self._has_announced = False
        # A flock goes with its process, however that ends, so a lock that can be had is a lock that
        # nobody holds.
        for lock, endpoint in (
            (paths.lock, paths.endpoint),
            (paths.state_dir / "lock", self._state_endpoint),
        ):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                self._unlock()
                raise AlreadyServing(_describe(lock.parent, endpoint)) from None
            self._locks.append(descriptor)
        self._clear_socket()

    def announce(self, addresses: list[str]) -> None:
        """Tells clients where this daemon serves."""
        content = {
            "addresses": addresses,
            "pid": os.getpid(),
            "version": __version__,
            "state_dir": str(self.paths.state_dir),
            "boot_id": boot_id(),
            "is_activated": self.socket != self.paths.socket,
        }
        self._has_announced = True
        # Beside the database too: who serves it may have another runtime folder.
        for path in (self._state_endpoint, self.paths.endpoint):
            write_atomic(path, json.dumps(content, indent=1).encode() + b"\n")

    @property
    def _state_endpoint(self) -> Path:
        return self.paths.state_dir / SERVING

    def close(self) -> None:
        """Gives the folders back."""
        for path in (self.paths.endpoint, self.socket):
            path.unlink(missing_ok=True)
        # Else it is that of a daemon that was killed, and tells the next start that it was.
        if self._has_announced:
            self._state_endpoint.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks.clear()

    def _clear_socket(self) -> None:
        """Removes the socket of a daemon that is gone; told by connecting, never by its age."""
        path = self.socket
        if not os.path.lexists(path):
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(_CONNECT_SECONDS)
            try:
                probe.connect(os.fspath(path))
            except (BlockingIOError, TimeoutError):
                pass  # somebody listens, and is too busy to answer
            except OSError:
                path.unlink(missing_ok=True)
                return
        self._unlock()
        raise AlreadyServing(
            f"somebody serves on {path}, although the lock is free; a socket unit, perhaps: "
            "finetuned service status"
        )


def _describe(folder: Path, endpoint: Path) -> str:
    """Where the daemon serves that holds a folder; one that only begins has not said it yet."""
    import psutil

    deadline = time.monotonic() + _ANNOUNCE_SECONDS
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            content: Any = json.loads(endpoint.read_bytes())
            if psutil.pid_exists(content["pid"]):  # else it is left from one that was killed
                addresses = ", ".join(content["addresses"])
                return f"a daemon already serves on {addresses} (pid {content['pid']})"
        time.sleep(_LOOK_SECONDS)
    return f"a daemon already holds {folder}"

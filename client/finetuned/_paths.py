"""Where daemon and clients meet: state folder and runtime folder, in one place for both sides."""

from __future__ import annotations

import hashlib
import os
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path

import platformdirs

STATE_DIR_VARIABLE = "FINETUNED_STATE_DIR"
RUNTIME_DIR_VARIABLE = "FINETUNED_RUNTIME_DIR"

# sun_path holds 108 bytes on Linux and 104 on macOS, a closing NUL among them.
_LONGEST_SOCKET_PATH = 100


@dataclass(frozen=True)
class Paths:
    """The folders of one daemon and the files in them that both sides know."""

    state_dir: Path
    """Database, run folders, daemon log. Must not lie on a network file system."""
    runtime_dir: Path
    """Socket, lock, endpoint and token; of mode 0700. Its mode is the wall around the socket."""

    @property
    def socket(self) -> Path:
        """The unix socket, of mode 0600."""
        return self.runtime_dir / "finetuned.sock"

    @property
    def endpoint(self) -> Path:
        """JSON of the live daemon: `addresses`, `pid`, `version`, `state_dir`."""
        return self.runtime_dir / "daemon.json"

    @property
    def token(self) -> Path:
        """The token that TCP demands, of mode 0600."""
        return self.runtime_dir / "token"

    @property
    def read_only_token(self) -> Path:
        """The token that may read, of mode 0600; not there unless somebody has made one."""
        return self.runtime_dir / "token-read-only"

    @property
    def lock(self) -> Path:
        """Locked by the live daemon as long as it lives."""
        return self.runtime_dir / "lock"

    @property
    def log(self) -> Path:
        """Stderr of a daemon that a client started in the background: what comes before its log."""
        return self.state_dir / "daemon.log"

    @property
    def log_file(self) -> Path:
        """The daemon's log, JSON lines; older ones beside it, `daemon.jsonl.1` and so on."""
        return self.state_dir / "logs" / "daemon.jsonl"


def paths(state_dir: Path | None = None, runtime_dir: Path | None = None) -> Paths:
    """The folders in use: arguments, else environment, else the platform's own places.

    A state folder of one's own brings a runtime folder of its own, so that one variable sets two
    daemons apart.
    """
    state_dir = state_dir or _from_environment(STATE_DIR_VARIABLE)
    runtime_dir = runtime_dir or _from_environment(RUNTIME_DIR_VARIABLE)
    if runtime_dir is None:
        with warnings.catch_warnings():
            # Without XDG_RUNTIME_DIR it is a folder below /tmp, whose owner and mode the daemon
            # checks.
            warnings.simplefilter("ignore")
            runtime_dir = platformdirs.user_runtime_path("finetuned")
        if state_dir is not None:
            runtime_dir = runtime_dir / _digest(state_dir)
    if state_dir is None:
        state_dir = platformdirs.user_state_path("finetuned")
    result = Paths(state_dir.absolute(), runtime_dir.absolute())
    if len(os.fsencode(result.socket)) <= _LONGEST_SOCKET_PATH:
        return result
    # A long HOME: the same name for daemon and clients, in a folder that the daemon checks.
    owner = os.getuid() if hasattr(os, "getuid") else 0
    short = Path(tempfile.gettempdir()) / f"finetuned-{owner}-{_digest(result.runtime_dir)}"
    return Paths(result.state_dir, short)


def _from_environment(variable: str) -> Path | None:
    value = os.environ.get(variable)
    return Path(value) if value else None


def _digest(path: Path) -> str:
    return hashlib.sha256(os.fsencode(path.absolute())).hexdigest()[:12]

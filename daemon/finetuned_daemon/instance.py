"""One daemon a state folder and runtime folder: folders, locks, token, endpoint file."""

from __future__ import annotations

import contextlib
import fcntl
import grp
import json
import os
import pwd
import secrets
import socket
import stat
from pathlib import Path
from typing import Any

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE, Paths
from finetuned._version import __version__
from finetuned_daemon.runs.contract import write_atomic


class AlreadyServing(Exception):
    """Another daemon has these folders; the message says where it serves."""


class FolderUnsafe(Exception):
    """A folder can be reached by others, or is not ours; the message has the remedy."""


class Instance:
    """Holds the folders of one daemon from its start to its end."""

    def __init__(self, paths: Paths) -> None:
        """Takes the folders.

        Raises:
            FolderUnsafe: Another user could read or replace what lies in them.
            AlreadyServing: A live daemon has them.
            OSError: They can't be made.
        """
        self.paths = paths
        for folder in (paths.state_dir, paths.runtime_dir):
            _make_private(folder)
        self._locks: list[int] = []
        # A flock goes with its process, however that ends, so a lock that can be had is a lock that
        # nobody holds.
        for lock in (paths.lock, paths.state_dir / "lock"):
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                self._unlock()
                raise AlreadyServing(_describe(paths)) from None
            self._locks.append(descriptor)
        self._clear_socket()

    def token(self) -> str:
        """The token for TCP; made at the first use."""
        try:
            token = self.paths.token.read_text().strip()
        except FileNotFoundError:
            token = ""
        if not token:
            token = secrets.token_urlsafe(32)
            write_atomic(self.paths.token, token.encode() + b"\n")
            self.paths.token.chmod(0o600)
        return token

    def announce(self, addresses: list[str]) -> None:
        """Tells clients where this daemon serves."""
        content = {
            "addresses": addresses,
            "pid": os.getpid(),
            "version": __version__,
            "state_dir": str(self.paths.state_dir),
        }
        write_atomic(self.paths.endpoint, json.dumps(content, indent=1).encode() + b"\n")

    def close(self) -> None:
        """Gives the folders back."""
        for path in (self.paths.endpoint, self.paths.socket):
            path.unlink(missing_ok=True)
        self._unlock()

    def _unlock(self) -> None:
        for descriptor in self._locks:
            os.close(descriptor)
        self._locks.clear()

    def _clear_socket(self) -> None:
        """Removes the socket of a daemon that is gone; told by connecting, never by its age."""
        path = self.paths.socket
        if not path.exists():
            return
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            try:
                probe.connect(os.fspath(path))
            except OSError:
                path.unlink(missing_ok=True)
                return
        self._unlock()
        raise AlreadyServing(f"somebody serves on {path}, although the lock is free")


def _check_ancestors(folder: Path) -> None:
    """Whoever can write in a parent can put another folder in place of ours."""
    for parent in folder.resolve().parents:
        status = parent.stat()
        if status.st_uid not in (0, os.getuid()):
            raise FolderUnsafe(
                f"{parent} belongs to another user, so {folder} is not safe in it; choose another "
                f"folder by {STATE_DIR_VARIABLE} and {RUNTIME_DIR_VARIABLE}"
            )
        others = status.st_mode & (0o002 if _is_private_group(status.st_gid) else 0o022)
        if others and not status.st_mode & stat.S_ISVTX:
            raise FolderUnsafe(
                f"{parent} can be written by others, so {folder} is not safe in it; "
                f"run: chmod go-w {parent}"
            )


def _is_private_group(gid: int) -> bool:
    """Whether a group is its user's alone, as many distributions make one for each user."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        gid == user.pw_gid
        and group.gr_name == user.pw_name
        and not set(group.gr_mem) - {user.pw_name}
    )


def _make_private(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise FolderUnsafe(f"{folder} can't be a folder: there is a file in its place") from error
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode):
        # A link that we own is a user's choice; one of somebody else's is an attack in a shared
        # folder.
        if status.st_uid != os.getuid():
            raise FolderUnsafe(f"{folder} is a link of another user's; remove it")
        status = folder.stat()
    if status.st_uid != os.getuid():
        raise FolderUnsafe(f"{folder} belongs to another user; choose another folder")
    if status.st_mode & 0o077:
        raise FolderUnsafe(
            f"{folder} has mode {stat.S_IMODE(status.st_mode):04o}, so others can get at the "
            f"daemon; run: chmod 700 {folder}"
        )
    _check_ancestors(folder)


def _describe(paths: Paths) -> str:
    with contextlib.suppress(OSError, ValueError):
        content: Any = json.loads(paths.endpoint.read_bytes())
        addresses = ", ".join(content["addresses"])
        return f"a daemon already serves on {addresses} (pid {content['pid']})"
    return f"a daemon already holds {paths.state_dir} or {paths.runtime_dir}"

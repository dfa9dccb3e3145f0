"""Disks of a round's own: small file systems in memory, which nobody else on the machine sees."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import threading
from collections.abc import Callable
from pathlib import Path

from daemon_process import eventually
from faults.registry import Play, World

_CLONE_NEWNS = 0x00020000
_MS_RDONLY, _MS_REMOUNT, _MS_REC, _MS_PRIVATE = 1, 32, 16384, 1 << 18
_MNT_DETACH = 2
_CHUNK = 1 << 16
_ROOM = b"size=16g"

_libc = ctypes.CDLL(None, use_errno=True)


def with_mounts(play: Play) -> Play:
    """Plays a fault in a thread with mounts of its own, which the processes it starts share.

    They go when the last of these has ended, however that comes about.
    """

    @functools.wraps(play)
    def wrapped(world: World) -> None:
        if not sys.platform.startswith("linux") or os.geteuid() != 0:
            world.skip("needs Linux and root, for mounts")
        raised = list[BaseException]()

        def body() -> None:
            try:
                _leave_the_mounts(world)
                play(world)
            except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
                raised.append(error)

        thread = threading.Thread(target=body)
        thread.start()
        thread.join()
        if raised:
            raise raised[0]

    return wrapped


def _leave_the_mounts(world: World) -> None:
    try:
        _call(_libc.unshare, _CLONE_NEWNS)
        _call(_libc.mount, b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    except OSError as error:
        world.skip(f"no mounts of its own: {error}")


class Disk:
    """A disk in memory, with as much room as it takes to begin a run."""

    def __init__(self, path: Path) -> None:
        """Mounts it on a folder, which is made."""
        self.path = path
        self._filler = path / ".filler"
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        _call(_libc.mount, b"tmpfs", os.fsencode(path), b"tmpfs", 0, _ROOM + b",mode=0700")

    def fill(self) -> None:
        """Leaves not a byte."""
        status = os.statvfs(self.path)  # it shrinks to what is used: that takes no memory
        # A size of 0 would be no limit at all, and the file that fills it all the machine's memory.
        used = max(status.f_blocks - status.f_bfree, 1) * status.f_frsize
        self._remount(0, f"size={used}".encode())
        with contextlib.suppress(OSError), open(self._filler, "ab", buffering=0) as file:
            while True:
                file.write(bytes(_CHUNK))
        with contextlib.suppress(OSError), open(self._filler, "ab", buffering=0) as file:
            while True:
                file.write(b"\0")

    def make_room(self) -> None:
        """Takes away what it was filled with."""
        self._remount(0, _ROOM)
        self._filler.unlink(missing_ok=True)

    def protect(self) -> None:
        """Makes it read-only, once nobody has a file open for writing."""
        self._try(lambda: self._remount(_MS_RDONLY))

    def take_away(self) -> None:
        """Takes the disk away under whoever uses it."""
        _call(_libc.umount2, os.fsencode(self.path), _MNT_DETACH)

    def _remount(self, flags: int, options: bytes | None = None) -> None:
        _call(_libc.mount, b"none", os.fsencode(self.path), None, _MS_REMOUNT | flags, options)

    @staticmethod
    def _try(do: Callable[[], None]) -> None:
        def done() -> bool:
            try:
                do()
            except OSError:  # it is in use
                return False
            return True

        eventually(done, "the disk can be changed")


def _call(function: Callable[..., int], *arguments: object) -> None:
    if function(*arguments) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))

"""The files of a database: where they may lie, and how they are moved out of the way."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from finetuned_daemon.runs.contract import make_dirs, sync_dir

COMPANIONS = ("", "-wal", "-shm")
"""What belongs to a database file, by the end of its name. Apart they are worth nothing."""

SET_ASIDE = "set-aside"

SERVING = "serving.json"
"""Beside the database: who serves it, and in which boot. Left there by one that was killed."""

_NETWORK = frozenset(
    {
        *("nfs", "nfs4", "cifs", "smb", "smb2", "smb3", "smbfs", "9p", "afs", "afpfs", "webdav"),
        *("ncpfs", "coda", "ceph", "lustre", "glusterfs", "gfs2", "ocfs2", "beegfs", "gpfs"),
        *("fuse.sshfs", "fuse.rclone", "fuse.s3fs", "fuse.gcsfuse", "fuse.glusterfs", "fuse.ceph"),
        *("fuse.davfs", "davfs", "davfs2", "fuse.smbnetfs", "fuse.curlftpfs"),
    }
)


class FolderRemote(Exception):
    """A folder lies where SQLite's log does not work; the message has the remedy."""


def refuse_network(folder: Path) -> None:
    """Refuses a folder on a network file system; it need not exist yet.

    Raises:
        FolderRemote: It lies on one.
    """
    kind = file_system_of(folder.resolve(), _mounts())
    if kind in _NETWORK:
        raise FolderRemote(
            f"{folder} lies on a network file system ({kind}), where SQLite's write-ahead log "
            "does not work and data would be lost. Choose a folder on a local disk with "
            "--state-dir; the output folders of tasks may stay where they are"
        )


def file_system_of(path: Path, mounts: Iterable[tuple[str, str]]) -> str:
    """The kind of file system that a path lies on.

    `mounts`: mount points with their kinds, in the order in which they were mounted.
    """
    best, kind = -1, ""
    for point, mounted in mounts:
        parts = Path(point).parts
        # Of two at the same place the later one covers the other.
        if len(parts) >= best and path.parts[: len(parts)] == parts:
            best, kind = len(parts), mounted
    return kind


def parse_mountinfo(text: str) -> list[tuple[str, str]]:
    """Mount points and kinds of `/proc/self/mountinfo`."""
    mounts = list[tuple[str, str]]()
    for line in text.splitlines():
        left, separator, right = line.partition(" - ")
        if separator:
            point = re.sub(r"\\([0-7]{3})", lambda m: chr(int(m[1], 8)), left.split(" ")[4])
            mounts.append((point, right.split(" ")[0]))
    return mounts


def set_aside(database: Path, time: str) -> list[Path]:
    """Moves a database with all that belongs to it into a folder beside; nothing is deleted.

    The database itself goes first: what is cut short leaves none, which a start refuses, and
    never one without its log.
    """
    folder = database.parent / SET_ASIDE
    moved = list[Path]()
    for end in COMPANIONS:
        source = database.with_name(database.name + end)
        if not source.exists():
            continue
        make_dirs(folder, 0o700)
        target = folder / f"{database.stem}-{time}{database.suffix}{end}"
        source.rename(target)
        sync_dir(folder)
        sync_dir(database.parent)
        moved.append(target)
    return moved


def _mounts() -> list[tuple[str, str]]:
    mountinfo = Path("/proc/self/mountinfo")
    if mountinfo.exists():
        mounts = parse_mountinfo(mountinfo.read_text())
        # A sandbox's root may be served to it by 9p; it has no other disk, and nobody shares it.
        return [mount for mount in mounts if mount != ("/", "9p")]
    import psutil  # not on Linux, where a daemon starts sooner without it

    return [(part.mountpoint, part.fstype) for part in psutil.disk_partitions(all=True)]

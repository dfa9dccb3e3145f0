"""From a record of writes, syncs and names to the disks that a loss of power could leave.

Content that no completed fsync of its file covers, and names that no completed fsync of their
folder covers, may be there, in part, or not at all. A careful program has all that it promised on
each such disk.
"""

from __future__ import annotations

import bisect
import os
import random
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

_HEADER = struct.Struct("<IIIIQQqqqIIIIII")
_MAGIC = 0x464C5431
_SECTORS = (512, 4096)
_IGNORED_SUFFIXES = ("-shm",)
"""SQLite maps it into memory, and makes it anew after a crash."""


_DELETED = " (deleted)"


class Op(IntEnum):
    """What was done, as `machine.c` numbers it."""

    OPEN = 1
    WRITE = 2
    TRUNCATE = 3
    SYNC = 4
    RENAME = 5
    UNLINK = 6
    MKDIR = 7
    RMDIR = 8
    LINK = 9
    SYMLINK = 10
    SEND = 11
    UNKNOWN = 12


@dataclass(frozen=True)
class Record:
    """One call that was done."""

    at: int
    """Where it stands in the record, in bytes."""
    begin: int
    """Where the next record would have stood when the call began."""
    op: Op
    pid: int
    inode: int
    offset: int
    length: int
    mtime: int
    mode: int
    existed: bool
    path: str
    other: str
    data: bytes


def read(log: Path) -> list[Record]:
    """All records of a log."""
    content = log.read_bytes()
    records, at = list[Record](), 0
    while at + _HEADER.size <= len(content):
        (magic, size, op, pid, begin, inode, offset, length, mtime) = _HEADER.unpack_from(
            content, at
        )[:9]
        mode, existed, path, other, data, _ = _HEADER.unpack_from(content, at)[9:]
        if magic != _MAGIC:
            raise AssertionError(f"the record is garbled at {at}")
        body = content[at + _HEADER.size : at + size]
        records.append(
            Record(
                at=at,
                begin=begin,
                op=Op(op),
                pid=pid,
                inode=inode,
                offset=offset,
                length=length,
                mtime=mtime,
                mode=mode,
                existed=bool(existed),
                path=os.fsdecode(body[:path]),
                other=os.fsdecode(body[path : path + other]),
                data=body[path + other : path + other + data],
            )
        )
        at += size
    return records


def answered_by(records: list[Record], position: int) -> int:
    """Where the last message to a client ended that was sent before a position in the log."""
    sent = [record.at for record in records if record.op is Op.SEND]
    index = bisect.bisect_left(sent, position)
    return sent[index - 1] if index else 0


@dataclass(eq=False)
class Node:
    """A file, a folder or a link, as processes see it and as it would be after a crash."""

    kind: int
    """`stat.S_IFREG`, `S_IFDIR` or `S_IFLNK`."""
    mode: int
    mtime: int = 0
    content: bytearray = field(default_factory=bytearray)
    """Of a file, as written; the target of a link."""
    durable: bytes = b""
    """Of a file, as of its last sync."""
    pending: list[Record] = field(default_factory=list)
    """Writes and truncations since."""
    names: dict[str, Node] = field(default_factory=dict)
    """Of a folder, as seen."""
    kept: dict[str, Node] = field(default_factory=dict)
    """Of a folder, as of its last sync."""


@dataclass(eq=False)
class _Naming:
    """One change of names; both sides of a rename happen together or not at all."""

    at: int
    changes: list[tuple[Node, str, Node | None]]

    def apply(self) -> None:
        for folder, name, node in self.changes:
            if node is None:
                folder.kept.pop(name, None)
            else:
                folder.kept[name] = node

    def touches(self, others: set[tuple[int, str]]) -> bool:
        return any((id(folder), name) in others for folder, name, _ in self.changes)

    @property
    def keys(self) -> set[tuple[int, str]]:
        return {(id(folder), name) for folder, name, _ in self.changes}


class Disk:
    """A folder whose every change was recorded."""

    def __init__(self, root: Path, *, ordered: bool) -> None:
        """The folder as it is now; all in it is durable.

        Args:
            root: The folder, absolute.
            ordered: A sync of anything makes all earlier changes of names durable, as the journals
                of ext4 and XFS do; else each folder has to be synced for its own.
        """
        self._root = str(root)
        self._ordered = ordered
        self._numbers: dict[int, Node] = {}
        self._journal: list[_Naming] = []
        self.top = self._take(root)

    def _take(self, path: Path) -> Node:
        status = path.lstat()
        node = Node(stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode), status.st_mtime_ns)
        self._numbers[status.st_ino] = node
        if node.kind == stat.S_IFDIR:
            for entry in path.iterdir():
                node.names[entry.name] = node.kept[entry.name] = self._take(entry)
        elif node.kind == stat.S_IFREG:
            node.durable = path.read_bytes()
            node.content = bytearray(node.durable)
        else:
            raise AssertionError(f"{path} is neither file nor folder")
        return node

    # --- what was done

    def apply(self, record: Record) -> None:
        """Does one recorded call."""
        match record.op:
            case Op.OPEN:
                self._open(record)
            case Op.WRITE | Op.TRUNCATE:
                node = self._meet(record)
                _write(node.content, record)
                node.mtime = record.mtime
                node.pending.append(record)
            case Op.SYNC:
                self._sync(record)
            case Op.MKDIR:
                node = Node(stat.S_IFDIR, stat.S_IMODE(record.mode))
                self._numbers[record.inode] = node
                self._name(record, {record.path: node})
            case Op.SYMLINK:
                self._name(
                    record,
                    {
                        record.path: Node(
                            stat.S_IFLNK, 0o777, content=bytearray(record.other, "utf-8")
                        )
                    },
                )
            case Op.LINK:
                self._name(record, {record.other: self._find(record.path)})
            case Op.RENAME:
                if record.path != record.other:
                    moved = self._find(record.path)
                    self._name(record, {record.path: None, record.other: moved})
            case Op.UNLINK | Op.RMDIR:
                self._name(record, {record.path: None})
            case Op.UNKNOWN:
                raise AssertionError(f"{record.path} went in or out by {record.other}")
            case Op.SEND:
                pass

    def _meet(self, record: Record) -> Node:
        """The file that a record is of.

        Code that goes past the C library (Rust's `rustix`) names files without being seen; that is
        inferred when they are written or synced.
        """
        node = self._numbers.get(record.inode)
        if record.path.endswith(_DELETED):
            return node or Node(stat.S_IFREG, 0o600)
        named = self._look(record.path)
        if named is not None and named is node:
            return named
        old = next((name for name, other in self.files() if other is node), None)
        if node is None or old is None:
            node = Node(stat.S_IFREG, stat.S_IMODE(record.mode) or 0o600, record.mtime)
            self._numbers[record.inode] = node
            self._name(record, {record.path: node})
        else:
            self._name(record, {f"{self._root}/{old}": None, record.path: node})
        return node

    def _look(self, path: str) -> Node | None:
        try:
            return self._find(path)
        except KeyError:
            return None

    def _open(self, record: Record) -> None:
        if record.existed:  # and was emptied
            node = self._numbers[record.inode]
            if node.content:
                del node.content[:]
                node.pending.append(record)
            return
        node = Node(stat.S_IFREG, stat.S_IMODE(record.mode), record.mtime)
        self._numbers[record.inode] = node
        self._name(record, {record.path: node})

    def _find(self, path: str) -> Node:
        node = self.top
        for part in Path(path).relative_to(self._root).parts:
            node = node.names[part]
        return node

    def _name(self, record: Record, changes: dict[str, Node | None]) -> None:
        done = []
        for path, node in changes.items():
            parent, _, name = path.rpartition("/")
            folder = self._find(parent)
            if node is None:
                folder.names.pop(name)
            else:
                folder.names[name] = node
            done.append((folder, name, node))
        self._journal.append(_Naming(record.at, done))

    def _sync(self, record: Record) -> None:
        node = self._meet(record)
        if node.kind == stat.S_IFREG:
            covered = [one for one in node.pending if one.at < record.begin]
            content = bytearray(node.durable)
            for one in covered:
                _write(content, one)
            node.durable = bytes(content)
            node.pending = node.pending[len(covered) :]
        if self._ordered:
            while self._journal and self._journal[0].at < record.begin:
                self._journal.pop(0).apply()
        elif node.kind == stat.S_IFDIR:
            self._keep_names_of(node, record.begin)

    def _keep_names_of(self, folder: Node, begin: int) -> None:
        """What was named in a folder lasts, and whatever had to come before on the same names."""
        wanted: set[tuple[int, str]] = set()
        keep = list[_Naming]()
        for change in reversed([one for one in self._journal if one.at < begin]):
            if any(where is folder for where, _, _ in change.changes) or change.touches(wanted):
                keep.append(change)
                wanted |= change.keys
        for change in reversed(keep):
            change.apply()
            self._journal.remove(change)

    # --- what is there

    def files(self) -> Iterator[tuple[str, Node]]:
        """All that processes see, by path below the root."""
        yield from _walk(self.top, "")

    def compare(self) -> None:
        """Holds what the record makes of it against the folder as it is.

        Raises:
            AssertionError: The recorder missed something.
        """
        there = {
            str(path.relative_to(self._root)): path
            for path in Path(self._root).rglob("*")
            if not path.name.endswith(_IGNORED_SUFFIXES)
        }
        recorded = dict(self.files())
        names = set(there) ^ {name for name in recorded if not name.endswith(_IGNORED_SUFFIXES)}
        assert not names, f"the recorder missed names: {sorted(names)}"
        for name, path in there.items():
            if path.is_file() and not path.is_symlink():
                assert path.read_bytes() == bytes(recorded[name].content), (
                    f"the recorder missed what was written into {name}"
                )

    def lose_power(self, rng: random.Random, target: Path) -> None:
        """Writes a disk that may be left if power is lost now; the journal is used up."""
        self._keep_some_names(rng)
        target.mkdir(mode=self.top.mode)
        target.chmod(self.top.mode)
        mood = rng.choice(("nothing", "nothing", "all", "some", "some"))
        _build(self.top, target, rng, mood)

    def _keep_some_names(self, rng: random.Random) -> None:
        mood = rng.choice(("none", "none", "all", "some", "some"))
        count = {"none": 0, "all": len(self._journal)}.get(mood, rng.randint(0, len(self._journal)))
        if self._ordered or mood != "some":
            for change in self._journal[:count]:
                change.apply()
            return
        gone: set[tuple[int, str]] = set()
        for change in self._journal:
            if change.touches(gone) or rng.random() < 0.5:
                gone |= change.keys  # what comes later on these names can't be without it
            else:
                change.apply()


def _walk(folder: Node, prefix: str) -> Iterator[tuple[str, Node]]:
    for name, node in folder.names.items():
        yield prefix + name, node
        if node.kind == stat.S_IFDIR:
            yield from _walk(node, f"{prefix}{name}/")


def _write(content: bytearray, record: Record) -> None:
    if record.op is Op.WRITE:
        _put(content, record.offset, record.data)
    elif record.op is Op.OPEN:
        del content[:]
    else:
        _resize(content, record.length)


def _put(content: bytearray, offset: int, data: bytes) -> None:
    if offset > len(content):
        _resize(content, offset)
    content[offset : offset + len(data)] = data


def _resize(content: bytearray, length: int) -> None:
    if length < len(content):
        del content[length:]
    else:
        content.extend(bytes(length - len(content)))


def _build(folder: Node, target: Path, rng: random.Random, mood: str) -> None:
    for name, node in folder.kept.items():
        path = target / name
        if node.kind == stat.S_IFDIR:
            path.mkdir(exist_ok=True)
            path.chmod(node.mode)
            _build(node, path, rng, mood)
        elif node.kind == stat.S_IFLNK:
            path.symlink_to(node.content.decode())
        else:
            path.write_bytes(_left_of(node, rng, mood))
            path.chmod(node.mode)
            os.utime(path, ns=(node.mtime, node.mtime))


def _left_of(node: Node, rng: random.Random, mood: str) -> bytes:
    """What may be left of a file: its synced content, and some of what was written since."""
    content = bytearray(node.durable)
    if mood == "all":
        return bytes(node.content)
    if mood == "nothing" or not node.pending:
        return bytes(content)
    prefix = rng.randint(0, len(node.pending)) if rng.random() < 0.5 else None
    sector = rng.choice(_SECTORS)
    for number, record in enumerate(node.pending):
        if prefix is not None and number > prefix:
            break
        is_torn = number == prefix or (prefix is None and rng.random() < 0.5)
        if record.op is not Op.WRITE:
            if not is_torn:
                _write(content, record)
            continue
        for start, data in _sectors(record, sector):
            if not is_torn or rng.random() < 0.5:
                _put(content, start, data)
    if rng.random() < 0.3 and len(node.content) > len(content):
        _resize(content, len(node.content))  # the size got there, its data did not
    return bytes(content)


def _sectors(record: Record, sector: int) -> Iterator[tuple[int, bytes]]:
    """A write, cut where the disk's sectors begin."""
    at = 0
    while at < len(record.data):
        end = min(len(record.data), at + sector - (record.offset + at) % sector)
        yield record.offset + at, record.data[at:end]
        at = end

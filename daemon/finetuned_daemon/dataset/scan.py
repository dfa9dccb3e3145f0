"""Looks through a data file without a tokenizer, and remembers what it saw."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter, OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from finetuned_daemon.dataset.formats import DataFormat
from finetuned_daemon.dataset.reader import (
    BadLine,
    is_plain_text,
    read_chats,
    read_documents,
    read_plain_text,
)
from finetuned_daemon.dataset.report import MOST_BAD_LINES
from finetuned_daemon.runs.contract import TrainingType

_REMEMBERED = 64
_SETTLED_NS = 100_000_000
"""A file that changed a moment ago may change again within one tick of the file system's clock."""

_Key = tuple[str, int, int, int, int, TrainingType, int]


@dataclass(frozen=True)
class Scan:
    """What a data file holds, as a run would read it."""

    samples: int
    bad: list[BadLine]
    """The first bad lines, 100 at most."""
    bad_count: int
    formats: Counter[DataFormat] = field(default_factory=Counter[DataFormat])
    """Samples by format."""


_lock = threading.Lock()
_scans: OrderedDict[_Key, Future[Scan]] = OrderedDict()


def scan(path: Path, training_type: TrainingType, max_samples: int = 0) -> Scan:
    """Reads a file, or remembers it where it has not changed: front-ends ask at every keystroke.

    Safe in threads; who asks for what another thread is reading waits for it.

    Raises:
        OSError: The file can't be read.
    """
    status = path.stat()
    key = (
        str(path),
        status.st_size,
        status.st_mtime_ns,
        status.st_ino,
        status.st_dev,
        training_type,
        max_samples,
    )
    with _lock:
        known = _scans.get(key)
        future = known or Future[Scan]()
        _scans[key] = future
        _scans.move_to_end(key)
        if len(_scans) > _REMEMBERED:
            _scans.popitem(last=False)
    if known is not None:
        return known.result()
    try:
        seen = _read(path, training_type, max_samples)
    except BaseException as error:
        _forget(key, future)
        future.set_exception(error)
        raise
    future.set_result(seen)
    if time.time_ns() - status.st_mtime_ns < _SETTLED_NS or _changed(path, status):
        _forget(key, future)
    return seen


def _forget(key: _Key, future: Future[Scan]) -> None:
    with _lock:
        if _scans.get(key) is future:
            del _scans[key]


def _changed(path: Path, before: os.stat_result) -> bool:
    try:
        now = path.stat()
    except FileNotFoundError:
        return True
    return (now.st_size, now.st_mtime_ns) != (before.st_size, before.st_mtime_ns)


def _read(path: Path, training_type: TrainingType, max_samples: int) -> Scan:
    if training_type is TrainingType.PRETRAIN and is_plain_text(path):
        return _read_plain_text(path)
    items = read_chats(path) if training_type is TrainingType.SFT else read_documents(path)
    bad = list[BadLine]()
    bad_count = 0
    formats = Counter[DataFormat]()
    for item in islice(items, max_samples or None):
        if not isinstance(item, BadLine):
            formats[item.format] += 1
            continue
        bad_count += 1
        if len(bad) < MOST_BAD_LINES:
            bad.append(item)
    return Scan(formats.total(), bad, bad_count, formats)


def _read_plain_text(path: Path) -> Scan:
    """Looks at one document piece by piece: the daemon must not hold what may be gigabytes."""
    holds_text = False
    for piece in read_plain_text(path):
        if isinstance(piece, BadLine):
            return Scan(0, [piece], 1)
        holds_text = holds_text or bool(piece.strip())
    return Scan(1, [], 0, Counter([DataFormat.PLAIN_TEXT])) if holds_text else Scan(0, [], 0)

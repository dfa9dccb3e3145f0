"""Deletes what a run recorded writing into its output folder, and nothing else.

A record names folders and files; each is opened from its parent's descriptor and no link is
followed, so that nothing outside is reached, not even while somebody moves things about. A folder
that is not the one that the run wrote to (another inode) is left alone.
"""

from __future__ import annotations

import logging
import os
import re
import shutil
import stat
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from finetuned_daemon.runs.manifest import OUTPUT_NAMES, OUTPUTS, WrittenFolder

_log = logging.getLogger(__name__)

_STAGING_PREFIX = ".tmp-"
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


@dataclass
class Deleted:
    """What a deletion has done."""

    files: int = 0
    bytes: int = 0
    left: list[str] = field(default_factory=list[str])
    """Output folders that are still there."""


def delete_outputs(
    runs: Iterable[tuple[Path, Path]], *, only_look: bool = False, only: str = ""
) -> Deleted:
    """Deletes the recorded files of runs, given as (run folder, output folder).

    With `only_look` nothing is deleted, and what is there is told. With `only` it is the folder of
    this name alone, such as `checkpoint-100`.
    """
    result = Deleted()
    for run_dir, output_dir in runs:
        records = [] if only_look else read_records(run_dir)
        if only:
            records = [record for record in records if record.name == only]
        if records:
            _delete_run(output_dir, records, result)
        if os.path.lexists(output_dir):
            result.left.append(str(output_dir))
    return result


def read_records(run_dir: Path) -> list[WrittenFolder]:
    """What a run recorded writing, oldest first; a folder that was written again comes again.

    After a pause it records in a folder of its own, `attempt-2` and so on.
    """
    attempts = (folder for folder in run_dir.glob("attempt-*") if folder.name[8:].isdecimal())
    folders = [run_dir, *sorted(attempts, key=lambda folder: int(folder.name[8:]))]
    return [record for folder in folders for record in _read(folder / OUTPUTS)]


def _read(file: Path) -> list[WrittenFolder]:
    try:
        lines = file.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    records = list[WrittenFolder]()
    for line in lines:
        try:
            record = WrittenFolder.model_validate_json(line)
        except ValidationError:  # torn by a loss of power: what it names never appeared
            continue
        if re.fullmatch(OUTPUT_NAMES, record.name):
            records.append(record)
    return records


def _delete_run(output_dir: Path, records: list[WrittenFolder], result: Deleted) -> None:
    try:
        descriptor = os.open(output_dir, _FOLDER)
    except OSError as error:  # gone, or a link by now
        _log.info("%s: %s", output_dir, error)
        return
    is_its_own = False
    try:
        there = os.fstat(descriptor)
        path = os.path.realpath(output_dir)
        for record in records:
            if (record.path, record.device, record.inode) == (path, there.st_dev, there.st_ino):
                is_its_own = True
                _delete_folder(descriptor, record, result)
    finally:
        os.close(descriptor)
    if is_its_own:
        _remove_if_empty(output_dir.name, output_dir.parent)


def _delete_folder(parent: int, record: WrittenFolder, result: Deleted) -> None:
    """Deletes the files of one record, then the folders that are empty."""
    folders = {PurePosixPath()}
    for name, changed in record.files.items():
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
            continue
        folders.update(path.parents)
        _delete_file(parent, PurePosixPath(record.name, path), changed, result)
    for folder in sorted(folders, key=lambda path: len(path.parts), reverse=True):
        whole = PurePosixPath(record.name, folder)
        with _opened(parent, whole.parent) as above:
            if above is not None:
                _rmdir(above, whole.name)


def _delete_file(root: int, path: PurePosixPath, changed: int, result: Deleted) -> None:
    with _opened(root, path.parent) as folder:
        if folder is None:
            return
        try:
            status = os.stat(path.name, dir_fd=folder, follow_symlinks=False)
            # No run of ours writes links or devices, and none changes what it has written.
            if not stat.S_ISREG(status.st_mode) or status.st_mtime_ns != changed:
                return
            os.unlink(path.name, dir_fd=folder)
        except FileNotFoundError:  # pruned by save_total_limit, or by hand
            return
        except OSError as error:  # a disk that is read-only by now; what stays is told
            _log.warning("%s stays: %s", path, error)
            return
        result.files += 1
        result.bytes += status.st_size


class _opened:  # noqa: N801 - used as a function
    """Opens a folder below `root` step by step, following no link; None if it is not there."""

    def __init__(self, root: int, path: PurePosixPath) -> None:
        self._root = root
        self._path = path
        self._descriptor: int | None = None

    def __enter__(self) -> int | None:
        descriptor = os.dup(self._root)
        for part in self._path.parts:
            try:
                below = os.open(part, _FOLDER, dir_fd=descriptor)
            except OSError:
                os.close(descriptor)
                return None
            os.close(descriptor)
            descriptor = below
        self._descriptor = descriptor
        return descriptor

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)


def remove_leftovers(output_dir: Path, *, keep_folder: bool) -> None:
    """Removes what a killed runner was about to write, and its folder if there is nothing in it.

    Args:
        output_dir: Of the run; where it is a link by now, nothing is done.
        keep_folder: The run goes on: its folder, once gone, would be free for another's.
    """
    try:
        descriptor = os.open(output_dir, _FOLDER)
    except OSError as error:  # gone, or a link
        _log.warning("leftovers in %s stay: %s", output_dir, error)
        return
    try:
        for name in os.listdir(descriptor):  # noqa: PTH208 - of a descriptor
            if name.startswith(_STAGING_PREFIX):
                _remove_tree(descriptor, name)
        is_empty = not os.listdir(descriptor)  # noqa: PTH208
    except OSError as error:  # the output may be read-only by now; nothing depends on it
        _log.warning("leftovers in %s stay: %s", output_dir, error)
        return
    finally:
        os.close(descriptor)
    if is_empty and not keep_folder:
        _remove_if_empty(output_dir.name, output_dir.parent)


def _remove_tree(parent: int, name: str) -> None:
    """Removes a folder with all that is in it; no link is one, and none in it is followed."""
    if stat.S_ISDIR(os.stat(name, dir_fd=parent, follow_symlinks=False).st_mode):
        shutil.rmtree(name, dir_fd=parent)


def _remove_if_empty(name: str, parent: Path) -> None:
    try:
        descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        _rmdir(descriptor, name)
    finally:
        os.close(descriptor)


def _rmdir(parent: int, name: str) -> None:
    try:
        os.rmdir(name, dir_fd=parent)
    except OSError as error:  # holds what no run recorded: it stays
        _log.debug("%s stays: %s", name, error)

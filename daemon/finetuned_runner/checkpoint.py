"""Checkpoints and outputs that are whole or not there: written aside, made durable, then renamed.

A checkpoint carries `manifest.json` with the name, size and hash of every file: transformers
resumes without a word where the optimizer's or the random generators' state is missing, and trains
on to other results.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from pydantic import ValidationError

from finetuned_daemon.parameters.needs import effective_optimizer
from finetuned_daemon.runs.contract import Spec, sync_dir, write_record
from finetuned_daemon.runs.manifest import (
    MANIFEST,
    MANIFEST_VERSION,
    STATE_FILES,
    DataFile,
    FileEntry,
    Manifest,
    model_files,
    strange_names,
)
from finetuned_runner.report import Report

_NAME = re.compile(r"checkpoint-(\d+)")
_STAGING_PREFIX = ".tmp-"


class CheckpointBroken(Exception):
    """A folder is no whole checkpoint; the message says why."""


def checkpoint_path(output_dir: Path, step: int) -> Path:
    """Where the checkpoint of a step stands."""
    return output_dir / f"checkpoint-{step}"


def list_checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """The checkpoints in a folder by step, oldest first."""
    found = []
    for path in output_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), path))
    return sorted(found)


def made_with(spec: Spec, num_samples: int) -> Manifest:
    """What the manifests of all checkpoints of a run have in common."""
    data = spec.parameters.data
    named = {"data.train_file": data.train_file, "data.eval_file": data.eval_file}
    for field, folder, weights in (
        ("data.model_path", data.model_path, True),
        ("data.tokenizer_path", data.tokenizer_path, False),
    ):
        if folder:
            for path in model_files(Path(folder), weights=weights):
                named[f"{field}/{path.name}"] = str(path)
    files = {field: DataFile.of(path) for field, path in named.items() if path}
    return Manifest(
        step=0,
        optimizer=effective_optimizer(spec.parameters),
        parameters=spec.parameters.model_dump(mode="json"),
        data_files={field: file for field, file in files.items() if file is not None},
        num_samples=num_samples,
    )


def seal(folder: Path, manifest: Manifest) -> Manifest:
    """Makes all files of `folder` durable and lists them in its manifest, which is returned."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MANIFEST:
            files[path.relative_to(folder).as_posix()] = _entry(path, durable=True)
    manifest = manifest.model_copy(update={"files": files})
    write_record(folder / MANIFEST, manifest)
    return manifest


def verify_checkpoint(folder: Path) -> Manifest:
    """Reads a checkpoint's manifest and compares every file with it.

    Raises:
        CheckpointBroken: A file is missing or differs, or there is no manifest.
    """
    if not folder.is_dir():
        raise CheckpointBroken(f"{folder} is no folder")
    try:
        manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        raise CheckpointBroken(f"{folder} has no {MANIFEST}") from None
    except ValidationError as error:
        raise CheckpointBroken(f"{folder / MANIFEST} can't be read: {error}") from error
    if manifest.format_version > MANIFEST_VERSION:
        raise CheckpointBroken(f"{folder} has format {manifest.format_version}, which is newer")
    if strange := strange_names(folder, manifest.files):
        raise CheckpointBroken(f"{', '.join(strange)} in {folder} is no file of a checkpoint")
    for name in STATE_FILES:
        if name not in manifest.files:
            raise CheckpointBroken(f"{folder} lacks {name}")
    for name, entry in manifest.files.items():
        path = folder / name
        if not path.is_file():
            raise CheckpointBroken(f"{name} is missing in {folder}")
        if path.stat().st_size != entry.size or _entry(path, durable=False) != entry:
            raise CheckpointBroken(f"{name} in {folder} is not what was written")
    _check_state(folder, manifest)
    return manifest


def _check_state(folder: Path, manifest: Manifest) -> None:
    """Who makes a checkpoint of his own gives it the right hashes, too."""
    try:
        state = json.loads((folder / "trainer_state.json").read_bytes())
    except (ValueError, RecursionError):
        state = None
    if not isinstance(state, dict) or state.get("global_step") != manifest.step:
        raise CheckpointBroken(
            f"trainer_state.json in {folder} is not that of step {manifest.step}"
        )


def staging_folder(target: Path) -> Path:
    """An empty folder beside `target`, in which it is written before it takes its name."""
    staging = target.with_name(_STAGING_PREFIX + target.name)
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    return staging


def reseal(folder: Path, manifest: Manifest, report: Report) -> None:
    """Replaces the manifest of a checkpoint that stands; its files stay as they are.

    As in `commit`, the record of what the run wrote comes first: a manifest with another time than
    the recorded one would be taken for somebody else's.
    """
    staging = staging_folder(folder)
    try:
        write_record(staging / MANIFEST, manifest)
        report.record_output(folder, _times(folder) | _times(staging))
        os.replace(staging / MANIFEST, folder / MANIFEST)
        sync_dir(folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def commit(staging: Path, target: Path, report: Report) -> None:
    """Gives a sealed folder its name; what had it before goes.

    What is in it is recorded first: the record may name what is not there, never lack what is.
    """
    report.record_output(target, _times(staging))
    if target.exists():
        remove_folder(target)
    os.replace(staging, target)
    sync_dir(target.parent)


def write_folder(target: Path, write: Callable[[Path], None], report: Report) -> None:
    """Lets `write` fill a folder that becomes `target` when it is whole and durable."""
    staging = staging_folder(target)
    try:
        write(staging)
        for path in staging.rglob("*"):
            sync_dir(path)  # of a file, too, it makes the content durable
        sync_dir(staging)
        commit(staging, target, report)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def remove_folder(folder: Path) -> None:
    """Removes a folder so that half of it never bears its name; of a link the link alone."""
    if folder.is_symlink():
        folder.unlink()
        sync_dir(folder.parent)
        return
    doomed = folder.with_name(f"{_STAGING_PREFIX}removed-{folder.name}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    sync_dir(folder.parent)  # before its files go, or a loss of power may leave the name with half
    shutil.rmtree(doomed)


def _times(folder: Path) -> dict[str, int]:
    """When each file below a folder was last changed, in ns."""
    return {
        path.relative_to(folder).as_posix(): path.stat().st_mtime_ns
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _entry(path: Path, *, durable: bool) -> FileEntry:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
        if durable:
            os.fsync(file.fileno())
        return FileEntry(size=file.tell(), sha256=digest.hexdigest())

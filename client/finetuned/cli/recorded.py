"""Whether files are those of a run, by the hashes in its `training_record.json`."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from finetuned.cli.settings import say

if TYPE_CHECKING:
    from finetuned.cli.params import Draft, Wish


def warn_of_other_files(wish: Wish, draft: Draft) -> None:
    """Say on stderr which files are not the recorded ones; takes as long as reading them all."""
    if isinstance(wish.recorded_files, dict):
        for line in _differences(cast("dict[str, Any]", wish.recorded_files), draft):
            say(f"warning: {line}")


def _differences(recorded: dict[str, Any], draft: Draft) -> Iterator[str]:
    """A line for each file, in the record's order; what is no record of a file is passed over."""
    for parameter, files in recorded.items():
        section, _, name = parameter.partition(".")
        value = getattr(getattr(draft.parameters, section, None), name, "")
        if not value or not isinstance(files, list):
            continue
        entries: list[Any] = files
        for entry in entries:
            match entry:
                case {"name": str(file), "size": int(size), "sha256": str(sha256)}:
                    path = Path(value)
                    if path.is_dir():
                        path /= file
                    why = _difference(path, size, sha256)
                    if why:
                        yield f"{parameter} {path.name} is not the file of that run ({why})"
                case _:
                    pass


def _difference(path: Path, size: int, sha256: str) -> str:
    """How a file differs from what was recorded; empty where it is the same."""
    try:
        now = path.stat().st_size
        if now != size:
            return f"it has {now:,} bytes and had {size:,}"
        with path.open("rb") as file:
            same = hashlib.file_digest(file, "sha256").hexdigest() == sha256
    except OSError as error:
        return f"it can't be read: {error.strerror or error}"
    return "" if same else "SHA-256 differs"

"""The run folders of tasks that are deleted, whole or not at all.

A folder is renamed before its rows go, and removed after. Cut short in between, the next start
tells by the rows which of both it was: nobody finds the folder of a deleted task again, neither a
rebuilt database nor a new task of the same name.
"""

from __future__ import annotations

import logging
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from finetuned_daemon.runs.contract import sync_dir

_log = logging.getLogger(__name__)

_END = ".deleted"


def put_away(folder: Path) -> Path | None:
    """Renames the folder of a task that is about to be deleted; None: there is none.

    Raises:
        OSError: It has its name still.
    """
    aside = folder.with_name(f"{folder.name}.{secrets.token_hex(4)}{_END}")
    try:
        folder.rename(aside)
    except FileNotFoundError:
        return None
    sync_dir(folder.parent)
    return aside


def put_back(aside: Path) -> None:
    """Undoes it: the task is there still."""
    aside.rename(aside.with_name(aside.name.split(".")[0]))
    sync_dir(aside.parent)


def remove(folder: Path) -> None:
    """Removes a folder for good; no link is followed out of it. One that can't be is logged."""
    try:
        if folder.is_symlink() or folder.is_file():
            folder.unlink()
        else:
            shutil.rmtree(folder)
    except OSError as error:
        _log.warning("the run folders in %s are left: %s", folder, error)


def recover(runs_dir: Path, is_there: Callable[[str], bool]) -> None:
    """Ends what a killed daemon has begun; `is_there` says whether a task of that id exists."""
    for aside in sorted(runs_dir.glob(f"*{_END}")):
        task_id = aside.name.split(".")[0]
        if is_there(task_id) and not aside.with_name(task_id).exists():
            _log.info("tasks/%s was not deleted yet; its run folders are back", task_id)
            put_back(aside)
        else:
            remove(aside)

"""Holds the database against the run folders, and changes nothing; a daemon may be at work."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

from finetuned_daemon.config import Config
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.store.integrity import open_read_only
from finetuned_daemon.store.outline import RunOutline, outline
from finetuned_daemon.tasks import ENDED, ENDS, TaskState


def inspect(config: Config) -> tuple[list[str], list[str]]:
    """Problems, and what is only worth knowing."""
    problems, notes = list[str](), list[str]()
    with contextlib.closing(open_read_only(config.database)) as connection:
        tasks, runs = outline(connection)
        for run in runs:
            # Folders first, then whether the task is still there: it may be deleted meanwhile.
            found = _look(run)
            if found and _is_there(connection, run):
                problems += [f"{run.name}: {text}" for text in found]
    folders = config.runs_dir.iterdir() if config.runs_dir.is_dir() else ()
    unknown = sorted(folder.name for folder in folders if folder.name not in tasks)
    if unknown:
        with contextlib.closing(open_read_only(config.database)) as connection:
            tasks, _ = outline(connection)  # with those that were created since
    notes += [
        f"{config.runs_dir / name}: a folder of no task; finetuned db rebuild --add would add it"
        for name in unknown
        if name not in tasks
    ]
    return problems, notes


def _is_there(connection: sqlite3.Connection, run: RunOutline) -> bool:
    return any(other.name == run.name for other in outline(connection)[1])


def _look(run: RunOutline) -> list[str]:
    if not run.run_dir:
        return []
    bundle = Bundle(Path(run.attempt_dir))
    if not bundle.path.is_dir():
        return [f"its folder {bundle.path} is gone"]
    found = list[str]()
    if run.ingested_seq > (last := bundle.last_seq()):
        found.append(
            f"its folder has events to {last}, the database to {run.ingested_seq}: its end is lost"
        )
    result = bundle.read_result()
    state = TaskState(run.state)
    if result is not None and state in ENDED and state is not ENDS[result.end_reason].state:
        found.append(f"the database says {state}, and result.json {result.end_reason}")
    return found

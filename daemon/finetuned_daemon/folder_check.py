"""Holds the database against the run folders, and changes nothing; a daemon may be at work."""

from __future__ import annotations

import contextlib
import sqlite3

from finetuned_daemon.config import Config
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import EndReason
from finetuned_daemon.store.integrity import open_read_only
from finetuned_daemon.store.outline import RunOutline, outline
from finetuned_daemon.tasks import ENDED, ENDS, TaskState

_PAUSED_BY = frozenset({EndReason.STOPPED_BY_USER, EndReason.DISK_FULL})
"""How a process ends whose run is paused. One that is paused may be given up: it is STOPPED."""


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
    found = list[str]()
    for attempt in range(1, run.attempt + run.has_begun):
        bundle = Bundle(run.attempt_dir(attempt))
        if not bundle.path.is_dir():
            found.append(f"its folder {bundle.path} is gone")
            if attempt == 1:  # the others are in it
                break
            continue
        if attempt < run.attempt:
            # It ended in a pause. How many events of it the database has is known only until the
            # next one begins.
            result = bundle.read_result()
            if result is not None and result.end_reason not in _PAUSED_BY:
                found.append(
                    f"it went on after a pause, and {bundle.path} has a result {result.end_reason}"
                )
        else:
            found += _look_at_present(run, bundle)
    return found


def _look_at_present(run: RunOutline, bundle: Bundle) -> list[str]:
    found = list[str]()
    if run.ingested_seq > (last := bundle.last_seq()):
        found.append(
            f"its folder has events to {last}, the database to {run.ingested_seq}: its end is lost"
        )
    result = bundle.read_result()
    if result is not None and not _agrees(run, result.end_reason):
        found.append(f"the database says {run.state}, and result.json {result.end_reason}")
    return found


def _agrees(run: RunOutline, reason: EndReason) -> bool:
    """Whether a run whose process said this of its end can be what the database says."""
    state = TaskState(run.state)
    if state in (TaskState.PAUSED, TaskState.STOPPED) and reason in _PAUSED_BY:
        return True
    if run.end_reason == EndReason.RUNNER_HUNG and reason is EndReason.STOPPED_BY_USER:
        return True  # it woke up on the signal, and saved
    return state not in ENDED | {TaskState.PAUSED} or state is ENDS[reason].state

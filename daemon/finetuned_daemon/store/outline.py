"""What a check needs of tasks and runs, of a database of any version."""

from __future__ import annotations

import sqlite3
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class RunOutline:
    """A run, as far as its folder can be held against it."""

    name: str
    state: str
    end_reason: str
    run_dir: str
    attempt: int
    has_begun: bool
    """Its present process is known; before, there may be no folder for it."""
    ingested_seq: int

    def attempt_dir(self, attempt: int) -> Path:
        """As `Run.attempt_dir`, of any of its processes."""
        folder = Path(self.run_dir)
        return folder if attempt == 1 else folder / f"attempt-{attempt}"


def outline(connection: sqlite3.Connection) -> tuple[set[str], list[RunOutline]]:
    """The ids of all tasks, and their runs."""
    tasks = {row["task_id"] for row in connection.execute("SELECT task_id FROM tasks")}
    rows = connection.execute(
        "SELECT runs.*, tasks.task_id FROM runs JOIN tasks ON tasks.key = task_key"
    ).fetchall()
    return tasks, [
        RunOutline(
            name=f"tasks/{row['task_id']} run {row['number']}",
            state=row["state"],
            end_reason=row["end_reason"] or "",
            run_dir=row["run_dir"],
            attempt=row["attempt"] if "attempt" in row.keys() else 1,  # noqa: SIM118 - not a dict
            has_begun=row["identity"] is not None or row["ingested_seq"] > 0,
            ingested_seq=row["ingested_seq"],
        )
        for row in rows
    ]

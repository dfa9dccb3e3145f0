"""Settings of the daemon: one frozen dataclass, a sentence under each field."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from finetuned._paths import Paths


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one daemon runs; made from the command line in `main.py`."""

    paths: Paths
    """State folder and runtime folder."""
    listen: str = ""
    """Loopback address `127.0.0.1:PORT` to serve on beside the unix socket; empty: none."""
    runner_python: str = sys.executable
    """Python that runs train with."""
    runner_module: str = "finetuned_runner"
    """Module that Python runs as the runner."""
    save_deadline_seconds: float = 600.0
    """Time that a stop has for its checkpoint before the runner gets SIGTERM.

    Full weights on a slow disk take minutes.
    """
    discard_deadline_seconds: float = 20.0
    """The same for a stop that saves nothing."""
    kill_deadline_seconds: float = 60.0
    """Time between SIGTERM, on which a runner saves too, and SIGKILL."""
    heartbeat_seconds: float = 5.0
    """A watch stream that is quiet for so long sends a heartbeat."""
    ingest_seconds: float = 0.1
    """How often the event file of a live run is looked at: what a live display is behind."""
    training_quota: int | None = None
    """Checkpoints that all runs together may save; None: any number."""
    runner_umask: int = 0o022
    """The umask of whoever started the daemon.

    What runs write belongs to its user, not to the daemon's privacy.
    """

    @property
    def database(self) -> Path:
        """The database file."""
        return self.paths.state_dir / "finetuned.db"

    @property
    def runs_dir(self) -> Path:
        """Where run folders lie: `{task_id}/{number}`."""
        return self.paths.state_dir / "runs"

    @property
    def cache_dir(self) -> Path:
        """What runs keep to be faster next time; may be removed at any time."""
        return self.paths.state_dir / "cache"

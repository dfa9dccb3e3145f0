"""Settings of the daemon: one frozen dataclass, a sentence under each field."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from finetuned._paths import Paths
from finetuned_daemon.listen import Listen
from finetuned_daemon.notify.settings import NotifySettings
from finetuned_daemon.tls import TLSFiles


@dataclass(frozen=True, kw_only=True)
class Config:
    """How one daemon runs; made from the command line in `main.py`."""

    paths: Paths
    """State folder and runtime folder."""
    listen: tuple[Listen, ...] = ()
    """TCP addresses to serve on beside the unix socket."""
    tls: TLSFiles | None = None
    """Certificate and key for all of them; None: none has TLS, and all are loopback."""
    runner_python: str = sys.executable
    """Python that runs train with."""
    runner_module: str = "finetuned_runner"
    """Module that Python runs as the runner."""
    standby_idle_minutes: float = 15.0
    """Time without a start after which the standby is dropped; 0: there is none."""
    standby_spare: bool = False
    """The standby becomes a run itself, as where a fork is not safe, and forks none."""
    save_deadline_seconds: float = 600.0
    """Time that a stop has for its checkpoint before the runner gets SIGTERM.

    Full weights on a slow disk take minutes.
    """
    discard_deadline_seconds: float = 20.0
    """The same for a stop that saves nothing."""
    kill_deadline_seconds: float = 60.0
    """Time between SIGTERM, on which a runner saves too, and SIGKILL."""
    hang_notice_seconds: float = 60.0
    """Time without a sign of life after which a run's watchers are told."""
    hang_deadline_seconds: float = 1800.0
    """Time without a sign of life after which a runner is ended; 0: never."""
    start_deadline_seconds: float = 600.0
    """Time that a runner has to its first sign of life; 0: any."""
    restart_pause_seconds: float = 1.0
    """Time before a runner that ended before it had begun is started again.

    Four times as long before the next start.
    """
    heartbeat_seconds: float = 5.0
    """A watch stream that is quiet for so long sends a heartbeat."""
    ingest_seconds: float = 0.1
    """How often the event file of a live run is looked at: what a live display is behind."""
    disk_wait_seconds: float = 600.0
    """Time that a run holds everything in memory on a full disk before it is paused."""
    disk_look_seconds: float = 15.0
    """How often it is looked whether runs that are paused for want of space have room again."""
    training_quota: int | None = None
    """Checkpoints that all runs together may save; None: any number."""
    backup_hours: float = 24.0
    """Age of the newest backup of the database at which the next is made; 0: none is made."""
    backup_keep: int = 7
    """How many of those stay."""
    notify: NotifySettings = field(default_factory=NotifySettings)
    """Who is told when a run ends or needs somebody."""
    prometheus: Listen | None = None
    """Loopback address that metrics are served on for Prometheus; None: they are not."""
    may_be_new: bool = False
    """Begins with an empty database although there are run folders."""
    runner_umask: int = 0o022
    """The umask of whoever started the daemon.

    What runs write belongs to its user, not to the daemon's privacy.
    """
    log_level: str = "info"
    """The least that is shown on stderr; `debug` shows in the log file too."""
    limits: Mapping[str, int] = field(default_factory=dict[str, int])
    """Bounds in place of the defaults of `limits.py`, by name."""

    def __post_init__(self) -> None:
        """Raises ValueError where a setting is none."""
        if not (math.isfinite(self.standby_idle_minutes) and self.standby_idle_minutes >= 0):
            raise ValueError("standby_idle_minutes must be finite, and 0 or more")

    @property
    def database(self) -> Path:
        """The database file."""
        return self.paths.state_dir / "finetuned.db"

    @property
    def private(self) -> tuple[Path, ...]:
        """What must be its user's alone, besides the folders that it lies in."""
        database = self.database
        sides = (database.with_name(f"{database.name}-{side}") for side in ("wal", "shm"))
        return (database, *sides, self.runs_dir, self.backups_dir)

    @property
    def backups_dir(self) -> Path:
        """Where backups of the database lie."""
        return self.paths.state_dir / "backups"

    @property
    def runs_dir(self) -> Path:
        """Where run folders lie: `{task_id}/{number}`."""
        return self.paths.state_dir / "runs"

    @property
    def cache_dir(self) -> Path:
        """What runs keep to be faster next time; may be removed at any time."""
        return self.paths.state_dir / "cache"

"""A run is followed to its end, whatever goes wrong in the daemon on the way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from finetuned._paths import paths
from finetuned_daemon.config import Config
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs import supervisor
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import ProcessIdentity
from finetuned_daemon.runs.process import RunnerProcess
from finetuned_daemon.tasks import Run


class Faulty(supervisor.Supervisor):
    """One that fails at its first looks."""

    looks = 0

    async def _follow(self, live: Any) -> None:
        self.looks += 1
        if self.looks < 3:
            raise LookupError("a fault of ours")


async def test_a_fault_of_ours_does_not_leave_a_run_running_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(supervisor, "_FAULT_RETRY_SECONDS", 0.0)
    nobody: Any = None
    faulty = Faulty(Config(paths=paths(tmp_path, tmp_path)), nobody, nobody, lambda: None, nobody)
    identity = ProcessIdentity.of(os.getpid())
    assert identity is not None
    live = supervisor._Live(
        Run(key=1, task_key=1, number=1, device="cpu", parameters=Parameters()),
        Bundle(tmp_path),
        RunnerProcess(identity, None),
        was_alive=True,
    )
    faulty._watch(live)
    assert live.watcher is not None
    await live.watcher
    assert faulty.looks == 3

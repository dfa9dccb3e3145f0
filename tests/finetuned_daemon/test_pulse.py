"""Signs of life, as the daemon counts them: by its own looks, whatever clocks say."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from finetuned._paths import paths
from finetuned_daemon.config import Config
from finetuned_daemon.runs import pulse as module
from finetuned_daemon.runs.contract import HEARTBEAT, ProcessIdentity
from finetuned_daemon.runs.pulse import Pulse


class Watcher:
    """A process, its heartbeat, and a daemon's clock that a test sets."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch, **config: float) -> None:
        self.now = 1000.0
        monkeypatch.setattr(module.time, "monotonic", lambda: self.now)
        self.heartbeat = root / HEARTBEAT
        self.process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
        identity = ProcessIdentity.of(self.process.pid)
        assert identity is not None
        limits = {"hang_notice_seconds": 60.0, "hang_deadline_seconds": 100.0}
        limits |= {"kill_deadline_seconds": 10.0, "start_deadline_seconds": 30.0}
        settings = Config(paths=paths(root / "state", root / "run"), **limits | config)
        self.pulse = Pulse(settings, root, identity)

    def beat(self, time_ns: int) -> None:
        self.heartbeat.touch()
        os.utime(self.heartbeat, ns=(time_ns, time_ns))

    def pass_time(self, seconds: int, *, has_begun: bool = True) -> list[str]:
        """What is said while so much time passes, looked at each second."""
        said = []
        for _ in range(seconds):
            self.now += 1
            notice = self.pulse.look(has_begun=has_begun)
            said += [notice.reason] if notice else []
        return said


@pytest.fixture
def watcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Watcher]:
    watcher = Watcher(tmp_path, monkeypatch)
    yield watcher
    watcher.process.kill()
    watcher.process.communicate()


def test_silence_is_said_once_then_ended_step_by_step(watcher: Watcher) -> None:
    watcher.beat(1)
    assert watcher.pass_time(59) == []
    assert watcher.pass_time(40) == ["RUNNER_SILENT"]
    assert watcher.pulse.due is None
    watcher.pass_time(2)
    assert watcher.pulse.due is signal.SIGTERM
    watcher.pass_time(10)
    assert watcher.pulse.due is signal.SIGKILL
    watcher.beat(2)
    assert watcher.pass_time(1) == ["RUNNER_BACK"]
    assert watcher.pulse.due is None


def test_a_clock_that_jumps_back_is_a_sign_of_life_like_any_other(watcher: Watcher) -> None:
    """It is the change that counts."""
    for time_ns in (10**18, 5, 10**9, 4):
        watcher.beat(time_ns)
        assert watcher.pass_time(50) == []
    assert watcher.pulse.due is None


def test_time_in_which_the_daemon_did_not_look_is_not_the_runners(watcher: Watcher) -> None:
    """The daemon was stopped, or the machine slept, for an hour."""
    watcher.beat(1)
    watcher.pass_time(30)
    watcher.now += 3600
    assert watcher.pass_time(20) == []
    assert watcher.pulse.due is None


def test_a_stopped_process_is_named_and_never_due(watcher: Watcher) -> None:
    watcher.beat(1)
    os.kill(watcher.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, watcher.process.pid, os.WSTOPPED | os.WNOWAIT)
    assert watcher.pass_time(1000) == ["RUNNER_SILENT"]
    assert watcher.pulse.due is None


def test_one_that_never_begins_has_a_deadline_of_its_own(watcher: Watcher) -> None:
    watcher.pass_time(31, has_begun=False)
    assert watcher.pulse.due is signal.SIGTERM


def test_one_without_a_heartbeat_that_reports_is_let_alone(watcher: Watcher) -> None:
    """It is of an earlier version."""
    assert watcher.pass_time(1000) == []
    assert watcher.pulse.due is None


def test_a_deadline_of_0_never_ends_anything(tmp_path, monkeypatch) -> None:
    watcher = Watcher(tmp_path, monkeypatch, hang_deadline_seconds=0)
    watcher.beat(1)
    assert watcher.pass_time(5000) == ["RUNNER_SILENT"]
    assert watcher.pulse.due is None
    watcher.process.communicate()

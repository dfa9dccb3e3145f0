"""The runner's heartbeat: it beats from first to last, and only while the process runs Python."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from finetuned_daemon.runs.contract import HEARTBEAT, PhaseChange, Result, RunPhase, StopWish
from finetuned_runner import control
from finetuned_runner.control import Watch
from finetuned_runner.report import Report
from finetuned_runner.slow import SlowStep


def eventually(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.01)


def test_it_beats_until_the_result_is_written(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(control, "HEARTBEAT_SECONDS", 0.01)
    watch = Watch(tmp_path, Report(tmp_path))
    watch.start()
    path = tmp_path / HEARTBEAT
    first = path.stat().st_mtime_ns
    eventually(lambda: path.stat().st_mtime_ns != first, "a second beat")
    watch.end(Result(end_reason="FINISHED"))
    assert (tmp_path / "result.json").is_file()


def test_it_is_made_later_where_the_disk_is_full_at_first(tmp_path: Path, monkeypatch) -> None:
    """A run does not fail for want of room for an empty file."""
    monkeypatch.setattr(control, "HEARTBEAT_SECONDS", 0.01)
    original, is_full = os.open, True

    def full(path, *arguments, **options):
        if is_full and str(path).endswith(HEARTBEAT):
            raise OSError(28, "No space left on device")
        return original(path, *arguments, **options)

    monkeypatch.setattr(control.os, "open", full)
    watch = Watch(tmp_path, Report(tmp_path))
    watch.start()
    assert not (tmp_path / HEARTBEAT).exists()
    is_full = False
    eventually((tmp_path / HEARTBEAT).exists, "the heartbeat comes once there is room")
    watch.end(Result(end_reason="FINISHED"))


def test_a_process_has_it_from_its_start_and_it_goes_on(shop) -> None:
    """It stands before anything heavy is imported, and beats while the main thread works."""
    run = shop.start(shop.make(training={"num_train_epochs": 100, "save_strategy": "no"}))
    path = run.folder / HEARTBEAT
    run.wait_for(lambda _: path.exists())
    assert all(event.phase is RunPhase.STARTING for event in run.events(PhaseChange))
    first = path.stat().st_mtime_ns
    run.wait_for(lambda _: path.stat().st_mtime_ns != first)
    run.wish(StopWish.DISCARD)
    assert run.wait() == 0


def test_a_step_that_takes_far_too_long_is_said_once() -> None:
    """Not before it is certain, not for a freeze, and not while it saves or evaluates."""
    slow = SlowStep()
    for step in range(6):
        for _ in range(4):
            assert slow.look(0.5, step, is_training=True) is None
    for _ in range(10):
        assert slow.look(3600, 6, is_training=True) is None, "the process itself was stopped"
    for _ in range(3000):
        assert slow.look(0.5, 6, is_training=False) is None
    said = [slow.look(0.5, 6, is_training=True) for _ in range(3000)]
    assert sum(text is not None for text in said) == 1
    assert "Step 7" in next(text for text in said if text)
    assert slow.look(0.5, 7, is_training=True) is None

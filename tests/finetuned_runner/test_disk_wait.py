"""A full disk: the run waits for room with everything in memory, and goes on as if nothing was.

On a small file system that is really full.
"""

from __future__ import annotations

import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.runs.contract import (
    CONTROL,
    SPEC,
    CheckpointSaved,
    Control,
    EndReason,
    LogLine,
    Metrics,
    PhaseChange,
    RunPhase,
    Spec,
    StopWish,
    TrainingType,
    write_record,
)
from finetuned_runner import control, report, room
from finetuned_runner.checkpoint import verify_checkpoint
from finetuned_runner.control import Watch
from finetuned_runner.report import Report

TRAINING = {"save_steps": 2, "num_train_epochs": 1, "save_total_limit": 2}
WAITING = RunPhase.WAITING_FOR_SPACE
LONG = LogLine(level="info", text="x" * 5000)
"""Does not fit into the page that an event file has begun."""


class Disk:
    """A file system of 4 MiB that can be filled to the last byte."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ballast = folder / "ballast"

    def fill(self) -> None:
        with open(self.ballast, "ab", buffering=0) as file:
            for size in (1 << 16, 1 << 12, 1):
                try:
                    while True:
                        file.write(bytes(size))
                except OSError:
                    continue

    def free(self) -> None:
        self.ballast.unlink()


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    """A small disk, where this machine lets us mount one; looks come often."""
    monkeypatch.setattr(room, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(room, "_WISH_SECONDS", 0.01)
    monkeypatch.setattr(report, "_LOOK_SECONDS", 0.05)
    monkeypatch.setattr(control, "_ROOM_SECONDS", 0.05)
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
        pytest.skip("no right to mount a file system here")
    yield Disk(folder)
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


class Told(Report):
    """A report that somebody listens to."""

    hear: Callable[[Any], None]

    def emit(self, payload: Any) -> None:
        super().emit(payload)
        self.hear(payload)


def hearing(hear: Callable[[Any, Watch], None]) -> Any:
    """A watch whose run is listened to: `hear` is called with each event, as it is told."""

    def make(folder: Path, told: Report) -> Watch:
        watch = Watch(folder, told)
        spec = Spec.model_validate_json((folder / SPEC).read_bytes())
        watch.disk_wait_seconds = spec.disk_wait_seconds  # as the process does
        told.__class__ = Told
        told.hear = lambda payload: hear(payload, watch)
        watch.start()
        return watch

    return make


def patient(run: Any, output: Path | None = None, seconds: float = 60.0) -> Any:
    """The run, with its output elsewhere, and time to wait."""
    update: dict[str, Any] = {"disk_wait_seconds": seconds}
    if output is not None:
        update["output_dir"] = str(output)
    run.spec = run.spec.model_copy(update=update)
    write_record(run.folder / SPEC, run.spec)
    return run


def later(act: Callable[[], None]) -> None:
    threading.Timer(0.2, act).start()


@pytest.mark.parametrize("kind", list(TrainingType))
def test_a_checkpoint_waits_for_room_and_the_losses_are_those_of_a_run_without(
    shop, disk: Disk, kind: TrainingType
) -> None:
    """No step is lost or repeated, the checkpoint is whole, and its phases tell the story."""
    training = {**TRAINING, "save_steps": 2}
    plain = shop.here(shop.make("plain", kind=kind, training=training))

    def hear(payload: Any, _: Watch) -> None:
        if isinstance(payload, Metrics) and payload.step == 1:
            disk.fill()
        if isinstance(payload, PhaseChange) and payload.phase is WAITING:
            assert "No space is left" in payload.message
            assert str(disk.folder) in payload.message
            later(disk.free)

    run = patient(shop.make("run", kind=kind, training=training), disk.folder / "out")
    shop.here(run, hearing(hear))
    assert run.result.end_reason is EndReason.FINISHED, run.result
    assert run.losses() == plain.losses(), "to the bit"
    assert run.rates() == plain.rates()
    assert [c.step for c in run.checkpoints()] == [c.step for c in plain.checkpoints()]
    for path in run.output.glob("checkpoint-*"):
        verify_checkpoint(path)
    phases = run.phases()
    at = phases.index(WAITING)
    assert phases[at - 2 : at + 3] == ["TRAINING", "SAVING", WAITING, "SAVING", "TRAINING"]
    assert phases.count(WAITING) == 1
    assert not list(run.output.glob(".tmp*"))
    assert [line.seq for line in run.lines()] == list(range(1, len(run.lines()) + 1))


@pytest.mark.parametrize("merges", [False, True])
def test_the_final_save_and_the_merge_wait_too(shop, disk: Disk, merges: bool) -> None:
    wanted = RunPhase.MERGING if merges else RunPhase.SAVING

    def hear(payload: Any, _: Watch) -> None:
        if not isinstance(payload, PhaseChange):
            return
        if payload.phase is wanted and not disk.ballast.exists() and not freed:
            disk.fill()
        if payload.phase is WAITING:
            freed.append(True)
            later(disk.free)

    freed: list[bool] = []
    training = {"save_strategy": "no", "max_steps": 1}
    run = shop.make(training=training, lora={"merge_lora": merges})
    shop.here(patient(run, disk.folder / "out"), hearing(hear))
    assert run.result.end_reason is EndReason.STEP_LIMIT, run.result
    assert freed == [True]
    names = {path.name for path in run.output.iterdir()}
    assert names == ({"final", "merged"} if merges else {"final"})
    assert list((run.output / ("merged" if merges else "final")).glob("*.safetensors"))


def test_after_its_time_it_ends_with_the_newest_whole_checkpoint(shop, disk: Disk) -> None:
    def hear(payload: Any, _: Watch) -> None:
        if isinstance(payload, CheckpointSaved) and payload.step == 2:
            disk.fill()

    run = patient(shop.make(training=TRAINING), disk.folder / "out", seconds=0.3)
    shop.here(run, hearing(hear))
    assert run.result.end_reason is EndReason.DISK_FULL
    assert WAITING in run.phases()
    assert [path.name for path in run.output.iterdir()] == ["checkpoint-2"]
    verify_checkpoint(run.output / "checkpoint-2")


@pytest.mark.parametrize(
    ("wish", "frees", "reason"),
    [
        (StopWish.DISCARD, False, EndReason.STOPPED_BY_USER),
        (StopWish.SAVE, True, EndReason.STOPPED_BY_USER),
        (StopWish.SAVE, False, EndReason.DISK_FULL),
    ],
)
def test_a_stop_while_it_waits(
    shop, disk: Disk, wish: StopWish, frees: bool, reason: EndReason
) -> None:
    """One that discards ends at once; one that saves goes on trying until SIGTERM."""

    def hear(payload: Any, watch: Watch) -> None:
        if isinstance(payload, Metrics) and payload.step == 1:
            disk.fill()
        if isinstance(payload, PhaseChange) and payload.phase is WAITING:
            write_record(run.folder / CONTROL, Control(stop=wish))
        if isinstance(payload, PhaseChange) and payload.phase is RunPhase.STOPPING:
            if frees:
                later(disk.free)
            elif wish is StopWish.SAVE:
                later(lambda: watch._take(StopWish.SAVE, "signal"))

    run = patient(shop.make(training=TRAINING), disk.folder / "out")
    began = time.monotonic()
    shop.here(run, hearing(hear))
    assert run.result.end_reason is reason, run.result
    saved = [path.name for path in run.output.glob("checkpoint-*")]
    assert saved == (["checkpoint-2"] if frees else [])
    assert time.monotonic() - began < 50, "none of them waits for the whole time"


@pytest.mark.parametrize("strategy", ["steps", "no"])
def test_events_wait_for_room_in_the_run_folder(shop, disk: Disk, strategy: str) -> None:
    """Training stands still meanwhile; then every event is there once, with the same losses."""
    training = {**TRAINING, "save_strategy": strategy}
    plain = shop.here(shop.make("plain", training=training))
    freed: list[int] = []

    def hear(payload: Any, watch: Watch) -> None:
        if isinstance(payload, Metrics) and payload.step == 3:
            disk.fill()
            watch._report.emit(LONG)
        if isinstance(payload, PhaseChange) and payload.phase is WAITING:
            assert str(moved) in payload.message
            freed.append(watch._report.step)
            later(disk.free)

    run = shop.make("run", training=training)
    moved = disk.folder / "run"
    shutil.move(run.folder, moved)
    run.folder = moved
    shop.here(patient(run), hearing(hear))
    assert run.result.end_reason is EndReason.FINISHED, run.result
    assert len(freed) == 1
    assert run.losses() == plain.losses()
    lines = run.lines()
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert WAITING in run.phases()
    assert [c.step for c in run.checkpoints()] == [c.step for c in plain.checkpoints()]


def test_a_run_folder_that_stays_full_ends_the_run_with_a_checkpoint(shop, disk: Disk) -> None:
    """The output is on another disk: what was trained is saved there, and the end says why."""

    def hear(payload: Any, watch: Watch) -> None:
        if isinstance(payload, Metrics) and payload.step == 3:
            disk.fill()
            watch._report.emit(LONG)

    run = shop.make("run", training=TRAINING)
    moved = disk.folder / "run"
    shutil.move(run.folder, moved)
    run.folder = moved
    shop.here(patient(run, seconds=0.3), hearing(hear))
    assert run.result.end_reason is EndReason.DISK_FULL, run.result
    verify_checkpoint(run.output / f"checkpoint-{run.result.step}")
    assert run.result.step >= 3


def test_an_event_that_is_just_being_written_is_no_full_disk(tmp_path: Path, monkeypatch) -> None:
    """The watching thread may look at any moment; it would end the run."""
    told = Report(tmp_path)
    seen, write = [], report.os.write

    def look(*arguments: Any) -> int:
        seen.append(told.is_disk_full)
        return write(*arguments)

    monkeypatch.setattr(report.os, "write", look)
    told.emit(LONG)
    assert seen == [False]

"""What a run leaves on the disk: checkpoints that are whole, and what a full disk does."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.runs.contract import (
    EndReason,
    Progress,
    Result,
    StopWish,
)
from tiny import weights

# --- disk


def test_a_full_disk_ends_the_run_and_leaves_the_checkpoints_before_whole(shop, monkeypatch):
    from finetuned_runner import checkpoint

    original = checkpoint.seal

    def seal(folder: Path, manifest: Any) -> Any:
        if manifest.step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(folder, manifest)

    monkeypatch.setattr(checkpoint, "seal", seal)
    run = shop.here(shop.make(training={"save_steps": 2}))
    assert run.result.end_reason is EndReason.DISK_FULL
    assert run.result.step == 4
    assert [path.name for path in run.output.iterdir()] == ["checkpoint-2"]
    checkpoint.verify_checkpoint(run.output / "checkpoint-2")


def test_events_that_a_full_disk_does_not_take_follow_later_and_ask_for_the_end(
    tmp_path, monkeypatch
):
    from finetuned_runner import report as module
    from finetuned_runner.report import Report

    report = Report(tmp_path)
    report.notice("", "FIRST", "It fits.")
    write, is_full = os.write, True

    def write_a_little(descriptor: int, data: bytes) -> int:
        if is_full and data.startswith(b"{"):
            return write(descriptor, data[:5])
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(module.os, "write", write_a_little)
    for number in range(3):
        report.notice("", f"HELD_{number}", "It does not.")
    assert report.is_disk_full
    text = (tmp_path / "events.jsonl").read_text()
    assert text.count("\n") == 1
    assert text.endswith("\n"), "no torn line stays"
    is_full = False
    report.finish(Result(end_reason=EndReason.DISK_FULL))
    lines = (tmp_path / "events.jsonl").read_text().splitlines()
    assert [json.loads(line)["seq"] for line in lines] == [1, 2, 3, 4]
    assert not (tmp_path / ".reserve").exists()


# --- checkpoints


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"lora": {"lora_r": 4}}, "made with lora.lora_r 16, not 4"),
        ({"lora": {"lora_alpha": 4}}, "made with lora.lora_alpha 16, not 4"),
        ({"lora": {"use_lora": False}}, "set lora.use_lora to true"),
        ({"lora": {"lora_target_modules": ["q_proj"]}}, "other lora.lora_target_modules"),
        ({"hidden": 48}, "of another model"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_in_a_sentence(shop, change, says):
    done = shop.here(shop.make("done", training={"max_steps": 1}))
    hidden = change.pop("hidden", 32)
    again = shop.make(
        "again",
        training={"max_steps": 2},
        data={
            "resume_from_checkpoint": str(done.output / "checkpoint-1"),
            "model_path": str(shop.model(hidden=hidden)),
        },
        **change,
    )
    result = shop.here(again).result
    assert result.end_reason is EndReason.MODEL_UNLOADABLE
    assert says in result.message
    assert not again.losses()


def test_full_weights_of_another_model_are_refused_in_a_sentence(shop):
    full = {"use_lora": False}
    done = shop.here(shop.make("done", training={"max_steps": 1}, lora=full))
    again = shop.make(
        "again",
        lora=full,
        data={
            "resume_from_checkpoint": str(done.output / "checkpoint-1"),
            "model_path": str(shop.model(hidden=48)),
        },
    )
    result = shop.here(again).result
    assert result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "its weights are of another model" in result.message


def test_only_a_whole_checkpoint_is_resumed(shop):
    whole = shop.here(shop.make("whole", training={"save_steps": 3}))
    source = whole.output / "checkpoint-3"

    def resume(name: str) -> str:
        run = shop.make(name, data={"resume_from_checkpoint": str(shop.root / name / "copy")})
        shutil.copytree(source, run.folder / "copy")
        if name == "missing":
            (run.folder / "copy" / "rng_state.pth").unlink()
        elif name == "changed":
            path = run.folder / "copy" / "optimizer.pt"
            data = bytearray(path.read_bytes())
            data[len(data) // 2] ^= 1
            path.write_bytes(data)
        elif name == "unlisted":
            (run.folder / "copy" / "manifest.json").unlink()
        result = shop.here(run).result
        assert result.end_reason is EndReason.MODEL_UNLOADABLE, result
        assert not run.losses()
        return result.message

    assert "rng_state.pth is missing" in resume("missing")
    assert "optimizer.pt in" in resume("changed")
    assert "no manifest.json" in resume("unlisted")


def test_a_run_that_broke_off_after_its_last_step_is_brought_to_its_end(shop):
    done = shop.here(shop.make("done", training={"max_steps": 4}))
    again = shop.here(
        shop.make(
            "again",
            training={"max_steps": 4},
            data={"resume_from_checkpoint": str(done.output / "checkpoint-4")},
        )
    )
    assert again.result.end_reason is EndReason.STEP_LIMIT, again.result
    assert again.result.step == 4
    assert not again.losses()
    assert "NOTHING_LEFT_TO_TRAIN" in again.notices()
    assert again.events(Progress)[-1].step == 4
    first, second = weights(done.output / "final"), weights(again.output / "final")
    assert all((first[name] == second[name]).all() for name in first)


def test_the_clock_saves_beside_the_steps_unless_saving_is_off(shop, monkeypatch):
    from finetuned_runner import trainer

    now = 0.0

    class Clock:
        """A minute between any two looks."""

        @staticmethod
        def monotonic() -> float:
            nonlocal now
            now += 60.0
            return now

    monkeypatch.setattr(trainer, "time", Clock)
    training = {"save_interval_minutes": 1, "save_steps": 4}
    run = shop.here(shop.make(training=training))
    causes = {event.step: event.cause for event in run.checkpoints()}
    assert causes == {
        1: "interval",
        2: "interval",
        3: "interval",
        4: "steps",
        5: "interval",
        6: "end",
    }
    off = shop.here(shop.make("off", training=training | {"save_strategy": "no"}))
    assert not off.checkpoints()
    assert off.result.end_reason is EndReason.FINISHED
    epochs = shop.here(
        shop.make("epochs", training={"save_strategy": "epoch", "num_train_epochs": 2})
    )
    assert [(e.step, e.cause) for e in epochs.checkpoints()] == [(6, "epoch"), (12, "epoch")]


def test_discarding_saves_nothing(shop, monkeypatch):
    from finetuned_runner.control import Watch
    from finetuned_runner.trainer import RunTrainer

    watches: list[Watch] = []
    original = RunTrainer.training_step

    def step(trainer: Any, *arguments: Any) -> Any:
        if trainer.state.global_step == 3:
            watches[0]._take(StopWish.DISCARD, "stop")
            watches[0]._take(StopWish.SAVE, "signal")  # the daemon's second step
        return original(trainer, *arguments)

    monkeypatch.setattr(RunTrainer, "training_step", step)

    def watch(folder: Path, report: Any) -> Watch:
        watches.append(Watch(folder, report))
        return watches[0]

    run = shop.here(shop.make(training={"save_steps": 4}), watch)
    assert run.result.end_reason is EndReason.STOPPED_BY_USER
    assert "as wished, this step was not saved" in run.result.message
    assert not list(run.output.iterdir())


def test_a_wish_to_save_wins_over_one_to_discard(shop):
    from finetuned_runner.control import Watch
    from finetuned_runner.report import Report

    run = shop.make()
    watch = Watch(run.folder, Report(run.folder))
    watch.begin_training()
    watch._take(StopWish.DISCARD, "stop")
    assert watch.wish is StopWish.DISCARD
    watch._take(StopWish.SAVE, "stop")
    assert watch.wish is StopWish.SAVE
    watch._take(StopWish.DISCARD, "stop")
    assert watch.wish is StopWish.SAVE

"""What a run may save, and the record of what it has written."""

from __future__ import annotations

from pathlib import Path

import pytest

from finetuned_daemon.runs.contract import CONTROL, SPEC, Control, EndReason, write_record
from finetuned_daemon.runs.manifest import OUTPUTS, WrittenFolder


def allow(run, quota: int):
    """The run, with so many checkpoints allowed."""
    run.spec = run.spec.model_copy(update={"checkpoint_quota": quota})
    write_record(run.folder / SPEC, run.spec)
    return run


@pytest.mark.parametrize("strategy", ["steps", "epoch"])
def test_a_run_ends_cleanly_with_the_last_checkpoint_that_it_may_save(shop, strategy):
    from finetuned_runner.checkpoint import verify_checkpoint

    training = {"save_strategy": strategy, "save_steps": 1, "num_train_epochs": 3}
    run = shop.here(allow(shop.make(training=training), 2))
    assert run.result.end_reason is EndReason.QUOTA_USED_UP
    assert len(run.checkpoints()) == 2
    last = Path(run.checkpoints()[-1].path)
    assert verify_checkpoint(last).step == run.result.step
    assert str(last) in run.result.message
    assert not (run.output / "final").exists()


def test_a_run_that_is_done_with_its_last_one_is_finished(shop):
    run = shop.here(allow(shop.make(training={"save_steps": 100}), 1))
    assert run.result.end_reason is EndReason.FINISHED
    assert len(run.checkpoints()) == 1


def test_a_run_stopped_by_the_quota_goes_on_as_if_it_never_had_been(shop):
    training = {"save_steps": 3, "num_train_epochs": 2}
    whole = shop.here(shop.make("whole", training=training))
    first = shop.here(allow(shop.make("first", training=training), 1))
    resume = {"resume_from_checkpoint": first.checkpoints()[-1].path}
    second = shop.here(shop.make("second", training=training, data=resume))
    assert first.losses() | second.losses() == whole.losses()


def test_more_quota_reaches_a_run_that_is_under_way(shop):
    run = allow(shop.make(training={"save_steps": 1, "num_train_epochs": 1}), 1)
    # As the daemon writes it, when another run has given back what it was planned to save.
    write_record(run.folder / CONTROL, Control(checkpoint_quota=2))
    assert shop.start(run).wait() == 0
    assert len(run.checkpoints()) == 2
    assert run.result.end_reason is EndReason.QUOTA_USED_UP


def test_every_file_that_a_run_leaves_is_in_its_record(shop):
    run = shop.here(shop.make(training={"save_steps": 2}, lora={"merge_lora": True}))
    lines = (run.folder / OUTPUTS).read_text().splitlines()
    recorded = set[str]()
    for line in lines:
        record = WrittenFolder.model_validate_json(line)
        assert record.inode == run.output.stat().st_ino
        recorded |= {f"{record.name}/{file}" for file in record.files}
    there = {p.relative_to(run.output).as_posix() for p in run.output.rglob("*") if p.is_file()}
    assert there <= recorded
    assert {Path(name).parts[0] for name in there} >= {"final", "merged", "checkpoint-2"}

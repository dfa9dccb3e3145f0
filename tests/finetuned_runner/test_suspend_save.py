"""A checkpoint at once, as before a suspend, and one on SIGTERM: the training is not disturbed."""

from __future__ import annotations

import signal
from typing import Any

from finetuned_daemon.runs.contract import (
    CONTROL,
    CheckpointDeleted,
    Control,
    EndReason,
    Metrics,
    PhaseChange,
    RunPhase,
    write_record,
)
from finetuned_runner.checkpoint import verify_checkpoint
from finetuned_runner.control import Watch
from finetuned_runner.report import Report

TRAINING = {"save_steps": 4, "num_train_epochs": 2}


def asking(*steps: int, counts: tuple[int, ...] = ()) -> Any:
    """A watch that sees a new wish to save when the loss of these steps is told."""

    class Asked(Report):
        watch: Watch

        def emit(self, payload: Any) -> None:
            super().emit(payload)
            if isinstance(payload, Metrics) and payload.step in steps:
                self.watch.save_wishes += 1

    def make(folder: Any, report: Report) -> Watch:
        report.__class__ = Asked
        report.watch = Watch(folder, report)
        return report.watch

    return make


def test_a_wish_saves_at_the_end_of_the_next_step_and_disturbs_nothing(shop) -> None:
    plain = shop.here(shop.make("plain", training=TRAINING))
    asked = shop.here(shop.make("asked", training=TRAINING), asking(1, 5))
    assert asked.result.end_reason is EndReason.FINISHED, asked.result
    assert [(c.step, c.cause) for c in asked.checkpoints() if c.cause == "suspend"] == [
        (2, "suspend"),
        (6, "suspend"),
    ]
    assert asked.losses() == plain.losses(), "to the bit"
    assert asked.rates() == plain.rates()
    regular = [(c.step, c.cause) for c in plain.checkpoints()]
    assert [(c.step, c.cause) for c in asked.checkpoints() if c.cause != "suspend"] == regular
    verify_checkpoint(asked.output / "checkpoint-6")


def test_it_counts_within_the_limit_and_can_be_resumed_from(shop) -> None:
    training = {**TRAINING, "save_total_limit": 1}
    asked = shop.here(shop.make("asked", training=training), asking(4))
    gone = [event.step for event in asked.events(CheckpointDeleted)]
    assert 4 in gone
    assert 5 in gone
    kept = {**TRAINING, "save_total_limit": 9}
    whole = shop.here(shop.make("whole", training=kept), asking(4))
    begins = str(whole.output / "checkpoint-5")
    rest = shop.here(shop.make("rest", training=kept, data={"resume_from_checkpoint": begins}))
    assert rest.losses() == {s: loss for s, loss in whole.losses().items() if s > 5}


def test_a_wish_from_before_the_training_saves_nothing(shop) -> None:
    """There was nothing to save when it came, and it is not made up for."""

    def early(folder: Any, report: Report) -> Watch:
        watch = Watch(folder, report)
        watch.save_wishes = 3
        return watch

    run = shop.here(shop.make(training={"save_strategy": "no"}), early)
    assert run.checkpoints() == []


def test_it_does_not_use_up_the_quota(shop) -> None:
    """The last one belongs to a stop: a suspend must not end the run."""
    run = shop.make(training={"save_strategy": "no"})
    run.spec = run.spec.model_copy(update={"checkpoint_quota": 1})
    shop.here(run, asking(1))
    assert run.result.end_reason is EndReason.FINISHED
    assert run.checkpoints() == []


def test_a_process_reads_the_wish_and_saves_on_sigterm(shop) -> None:
    """As the daemon asks for it; and SIGTERM leaves a checkpoint to go on from, and says so."""
    run = shop.start(shop.make(training={"num_train_epochs": 100, "save_strategy": "no"}))
    run.wait_for(lambda r: any(e.phase is RunPhase.TRAINING for e in r.events(PhaseChange)))
    run.wait_for(lambda r: len(r.events(Metrics)) > 1)
    write_record(run.folder / CONTROL, Control(save=1))
    run.wait_for(lambda r: [c.cause for c in r.checkpoints()] == ["suspend"])
    step = run.checkpoints()[0].step
    run.wait_for(lambda r: max(r.losses()) > step)
    assert run.process is not None
    run.process.send_signal(signal.SIGTERM)
    assert run.wait() == 0
    last = run.checkpoints()[-1]
    assert last.cause == "signal"
    assert run.result.end_reason is EndReason.STOPPED_BY_USER
    assert "SIGTERM" in run.result.message
    assert last.path in run.result.message
    verify_checkpoint(run.output / f"checkpoint-{last.step}")

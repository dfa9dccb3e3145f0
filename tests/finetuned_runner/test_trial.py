"""A probe: what it measures is what a run takes, and nothing of it is left."""

from __future__ import annotations

import pytest

from finetuned_daemon.runs.contract import (
    SPEC,
    CheckpointSaved,
    EndReason,
    Evaluation,
    Metrics,
    ProbeReport,
    StopWish,
    TrainingType,
    write_record,
)
from finetuned_runner.control import Watch
from tiny import chats, write_jsonl

SFT = {
    "training": {
        "batch_size": 2,
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 2,
        "save_steps": 4,
        "eval_strategy": "epoch",
    },
    "data": {"eval_ratio": 0.2},
}


def probe(run):
    """The run as a probe."""
    run.spec = run.spec.model_copy(update={"probe": True})
    write_record(run.folder / SPEC, run.spec)
    return run


def test_a_probe_measures_the_longest_samples_and_leaves_nothing(shop):
    """Three steps are trained, and the checkpoint it has weighed is as large as a run's."""
    real = shop.here(shop.make("real", **SFT))
    run = shop.here(probe(shop.make("probe", **SFT)))
    assert run.result.end_reason is EndReason.PROBED, run.result
    assert list(run.output.iterdir()) == []
    assert not run.events(CheckpointSaved), "nobody is told of what is gone again"
    assert run.events(Metrics)[-1].step == 3
    assert len(run.events(Evaluation)) == 1
    (report,) = run.events(ProbeReport)
    saved = real.checkpoints()
    assert report.run_steps == real.result.step
    assert abs(report.checkpoint_bytes / saved[-1].size_bytes - 1) < 0.01
    left = sum(file.stat().st_size for file in real.output.rglob("*") if file.is_file())
    assert abs(report.disk_bytes / left - 1) < 0.05
    assert report.peak_memory_bytes > 100e6
    assert report.memory_total_bytes >= report.memory_available_bytes > 0
    assert min(report.tokens_per_second, report.evaluation_tokens_per_second) > 0
    assert 0 < report.seconds_per_step < report.duration_seconds
    # Of the longest samples, all that were asked for: 2 x 2 a step.
    longest = report.tokens_per_second * report.seconds_per_step
    assert 3 * report.longest_tokens < longest <= 4 * report.longest_tokens + 1


@pytest.mark.parametrize("packing", [True, False])
def test_a_probe_of_packed_or_padded_rows_has_the_longest(shop, packing):
    """The longest chat of all, wherever it stands, is in the steps of a probe."""
    (long,) = chats(1, turns=9)
    file = write_jsonl(shop.root / "long.jsonl", [*chats(20), long, *chats(20)])
    run = shop.make(
        "rows",
        data={"train_file": str(file)},
        training={"batch_size": 1, "gradient_accumulation_steps": 1},
        extensions={"packing": packing},
    )
    (report,) = shop.here(probe(run)).events(ProbeReport)
    assert report.longest_tokens > 100
    lengths = report.longest_lengths
    assert (len(lengths), lengths[0]) == (report.train_samples, report.longest_tokens)
    assert list(lengths) == sorted(lengths, reverse=True)
    assert 0.1 < report.learned_share < 0.9, "answers alone are learned"
    assert report.train_samples == 41 or packing
    assert report.tokens_per_second * report.seconds_per_step == pytest.approx(
        report.longest_tokens
    )


def test_a_probe_of_pretraining_counts_all_weights(shop):
    """Its checkpoint has the model and its optimizer, and without evaluation there is none."""
    run = shop.here(probe(shop.make("text", kind=TrainingType.PRETRAIN)))
    assert run.result.end_reason is EndReason.PROBED, run.result
    (report,) = run.events(ProbeReport)
    assert report.seconds_per_evaluation == 0
    assert report.learned_share == 1
    assert list(run.output.iterdir()) == []


def test_a_probe_can_be_stopped(shop):
    """As a run, at once, and it saves nothing."""

    class Stops(Watch):
        def begin_training(self) -> None:
            super().begin_training()
            self.wish = StopWish.SAVE

    run = shop.here(probe(shop.make("stopped")), watch=Stops)
    assert run.result.end_reason is EndReason.STOPPED_BY_USER
    assert list(run.output.iterdir()) == []
    assert not run.events(ProbeReport)

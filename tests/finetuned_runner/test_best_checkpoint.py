"""The checkpoint with the lowest evaluation loss: marked, reported, never pruned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.runs.contract import (
    BestCheckpoint,
    CheckpointDeleted,
    EndReason,
    Evaluation,
)
from finetuned_daemon.runs.manifest import OUTPUTS, Manifest
from tiny import chats, write_jsonl

# With all weights and this rate the run learns the contrary at once and ever more.
EAGER = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0}
WHOLE = {"use_lora": False}


def contrary(shop: Any) -> dict[str, Any]:
    """Evaluation data of which a run learns the contrary: its loss soon grows."""
    samples = chats(4)
    for number, sample in enumerate(samples):
        sample["messages"][1]["content"] = "xQ7zjK" * (8 + number)
    return {"eval_file": str(write_jsonl(shop.root / "contrary.jsonl", samples))}


def manifest(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / "manifest.json").read_bytes())


def losses(run: Any) -> dict[int, float]:
    """Evaluation loss by step, as reported."""
    return {event.step: event.values["eval_loss"] for event in run.events(Evaluation)}


def standing(run: Any) -> list[int]:
    """Steps of the checkpoints that stand."""
    folders = run.output.glob("checkpoint-*")
    return sorted(int(path.name.partition("-")[2]) for path in folders)


@pytest.fixture(scope="module")
def run(module_shop):
    """12 steps, an evaluation and a checkpoint at each even one, of which two are to be kept."""
    training = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}
    training |= {"num_train_epochs": 2}
    return module_shop.here(
        module_shop.make(training=training | EAGER, lora=WHOLE, data=contrary(module_shop))
    )


def test_the_best_checkpoint_is_never_pruned_and_counts_within_the_limit(run):
    found = losses(run)
    best = min(found, key=lambda step: (found[step], step))
    last = max(found)
    assert best < last - 2, "the best one is old enough to be pruned"
    assert standing(run) == [best, last]
    assert best not in [event.step for event in run.events(CheckpointDeleted)]


def test_a_new_best_is_reported_each_time_that_there_is_one(run):
    expected, lowest = list[tuple[int, float]](), float("inf")
    for step, loss in losses(run).items():
        if loss < lowest:
            lowest = loss
            expected.append((step, loss))
    assert [(event.step, event.eval_loss) for event in run.events(BestCheckpoint)] == expected


def test_a_manifest_says_what_its_checkpoint_was_made_with(run):
    found = losses(run)
    best = min(found, key=lambda step: (found[step], step))
    for step in standing(run):
        folder = run.output / f"checkpoint-{step}"
        made = manifest(folder)
        state = json.loads((folder / "trainer_state.json").read_bytes())
        assert (made.step, made.eval_loss, made.epoch) == (step, found[step], state["epoch"])
        assert made.best_checkpoint == str(run.output / f"checkpoint-{best}")
        assert made.best_checkpoint_loss == found[best]
        assert made.parameters == run.spec.parameters.model_dump(mode="json")
        assert made.num_samples == 24
        assert made.total_steps == max(found)
        train = Path(run.spec.parameters.data.train_file)
        assert made.data_files["data.train_file"].size == train.stat().st_size


def test_a_checkpoint_without_an_evaluation_at_its_step_is_no_candidate(shop):
    training = {"eval_strategy": "steps", "eval_steps": 4, "save_steps": 3, "save_total_limit": 1}
    run = shop.here(shop.make(training=training, data={"eval_ratio": 0.2}))
    assert sorted(losses(run)) == [4, 5]
    assert [event.step for event in run.events(BestCheckpoint)] == [5]
    assert standing(run) == [5], "nothing is kept beside the newest"


def test_a_step_that_was_saved_before_it_was_evaluated_is_marked_all_the_same(shop):
    """Saving by steps comes before an evaluation at the end of the epoch, at the same step."""
    from finetuned_daemon.runs.outputs import delete_outputs
    from finetuned_runner.checkpoint import verify_checkpoint

    training = {"eval_strategy": "epoch", "save_steps": 5, "early_stopping_patience": 1}
    run = shop.here(shop.make(training=training, data={"eval_ratio": 0.2}))
    folder = run.output / "checkpoint-5"
    made = verify_checkpoint(folder)
    assert made.eval_loss == losses(run)[5] == made.best_eval_loss
    assert [event.step for event in run.events(BestCheckpoint)] == [5]
    assert len((run.folder / OUTPUTS).read_bytes().splitlines()) == 3, "recorded once more"
    delete_outputs([(run.folder, run.output)])
    assert not run.output.exists(), "what was written last is the run's own too"


def test_early_stopping_says_where_the_best_checkpoint_is(shop):
    training = {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_steps": 1,
        "save_total_limit": 1,
        "early_stopping_patience": 2,
        "num_train_epochs": 8,
    }
    run = shop.here(shop.make(training=training | EAGER, lora=WHOLE, data=contrary(shop)))
    found = losses(run)
    best = min(found, key=lambda step: (found[step], step))
    assert run.result.end_reason is EndReason.EARLY_STOPPED
    assert str(run.output / f"checkpoint-{best}") in run.result.message
    assert f"{found[best]:.4f}" in run.result.message
    assert standing(run) == [best, max(found)], "with a limit of 1 the best is kept beside"


def test_a_resumed_run_compares_with_the_best_that_it_goes_on_from(shop):
    training = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "num_train_epochs": 2}
    data = contrary(shop)
    first = shop.here(shop.make("first", training=training | EAGER, lora=WHOLE, data=data))
    found = losses(first)
    best = min(found, key=lambda step: (found[step], step))
    source = first.output / f"checkpoint-{best}"
    data |= {"resume_from_checkpoint": str(source)}
    again = shop.here(shop.make("again", training=training | EAGER, lora=WHOLE, data=data))
    assert losses(again) == {step: loss for step, loss in found.items() if step > best}
    assert not again.events(BestCheckpoint), "none is better than the one it went on from"
    newest = manifest(again.output / f"checkpoint-{max(found)}")
    assert newest.best_checkpoint == str(source)


def test_a_changed_learning_rate_or_cadence_takes_effect_on_a_resume(shop):
    training = {"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0}
    done = shop.here(shop.make("done", training=training | {"max_steps": 2, "learning_rate": 1e-3}))
    changed = training | {"max_steps": 6, "learning_rate": 5e-4, "save_steps": 1}
    again = shop.here(
        shop.make(
            "again",
            training=changed,
            data={"resume_from_checkpoint": str(done.output / "checkpoint-2")},
            logging={"logging_steps": 2},
        )
    )
    assert again.rates() == {4: 5e-4, 6: 5e-4}
    assert standing(again) == [3, 4, 5, 6]

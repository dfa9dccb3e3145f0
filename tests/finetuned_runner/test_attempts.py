"""A later process of a run that was paused: it finds what the earlier ones have saved."""

from __future__ import annotations

from typing import Any

from finetuned_daemon.runs.contract import (
    SPEC,
    CheckpointDeleted,
    EndReason,
    Evaluation,
    write_record,
)
from finetuned_runner.record import RECORD, TrainingRecord
from tiny import chats, write_jsonl

# With all weights and this rate the run learns the contrary at once and ever more.
EAGER = {"learning_rate": 0.05, "lr_scheduler_type": "constant", "warmup_steps": 0}
OFTEN = {"eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "save_total_limit": 2}


def contrary(shop: Any) -> dict[str, Any]:
    """Evaluation data of which a run learns the contrary: its loss soon grows."""
    samples = chats(4)
    for number, sample in enumerate(samples):
        sample["messages"][1]["content"] = "xQ7zjK" * (8 + number)
    return {"eval_file": str(write_jsonl(shop.root / "contrary.jsonl", samples))}


def attempt(shop: Any, number: int, steps: int, output: str, resume: str | None) -> Any:
    """A process of one run, which goes on from `resume`, with this many steps in all."""
    training = {**OFTEN, **EAGER, "max_steps": steps}
    made = shop.make(
        f"attempt-{number}", training=training, lora={"use_lora": False}, data=contrary(shop)
    )
    own = made.spec.parameters
    data = own.data.model_copy(update={"resume_from_checkpoint": resume})
    made.spec = made.spec.model_copy(
        update={
            "attempt": number,
            "output_dir": output,
            "parameters": own.model_copy(update={"data": data}),
            "run_parameters": own if resume else None,
        }
    )
    write_record(made.folder / SPEC, made.spec)
    return shop.here(made)


def test_checkpoints_are_pruned_over_all_attempts_and_a_broken_later_one_counts_for_none(
    shop: Any,
) -> None:
    """The best of an earlier attempt stays, and what is saved now is the newest.

    Of what could not be gone on from nothing is deleted: it is replaced once its step is reached.
    """
    output = shop.root / "out" / "run-1"
    first = attempt(shop, 1, 6, str(output), None)
    losses = {event.step: event.values["eval_loss"] for event in first.events(Evaluation)}
    best = min(losses, key=lambda step: (losses[step], step))
    assert best < 6
    broken = output / "checkpoint-40"
    broken.mkdir()
    (broken / "half").write_text("of it")
    second = attempt(shop, 2, 12, str(output), str(output / "checkpoint-6"))
    assert second.result.end_reason is EndReason.STEP_LIMIT, second.result
    standing = {int(path.name.partition("-")[2]) for path in output.glob("checkpoint-*")}
    assert standing == {best, 12, 40}
    assert [event.step for event in second.events(CheckpointDeleted)] == [6, 8, 10]
    record = TrainingRecord.model_validate_json((output / "final" / RECORD).read_bytes())
    assert record.resumed_from is None, "the record is of the whole run"
    assert record.parameters == second.spec.run_parameters
    assert sorted(record.eval_losses) == [2, 4, 6, 8, 10, 12]

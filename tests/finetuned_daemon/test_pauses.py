"""Parts of a pause without a daemon: what is paused and what is over, and the room it needs."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from conftest import LLAMA_TENSORS, write_safetensors
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason, Result, StopWish, TrainingType
from finetuned_daemon.runs.outcome import pause_of, paused, waiting_for_room
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.runs.room import LEAST_BYTES, Need, needs_of
from finetuned_daemon.tasks import PauseReason, Run, TaskState

REQUESTED, FULL = PauseReason.REQUESTED, PauseReason.DISK_FULL
MIB = 1 << 20


def run(tmp_path: Path, **changes: object) -> Run:
    made = Run(
        task_key=1,
        number=1,
        state=TaskState.RUNNING,
        device="cpu",
        parameters=Parameters(),
        output_dir=str(tmp_path),
    )
    return replace(made, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason", "expected"),
    [
        ({}, EndReason.DISK_FULL, FULL),
        ({"is_probe": True}, EndReason.DISK_FULL, None),
        ({"stop": StopWish.SAVE}, EndReason.DISK_FULL, None),
        ({"stop": StopWish.SAVE, "pause": REQUESTED}, EndReason.DISK_FULL, REQUESTED),
        ({"stop": StopWish.SAVE, "pause": REQUESTED}, EndReason.STOPPED_BY_USER, REQUESTED),
        ({"stop": StopWish.SAVE, "pause": REQUESTED}, EndReason.FINISHED, None),
        ({"stop": StopWish.SAVE, "pause": REQUESTED}, EndReason.RUNNER_CRASHED, None),
        ({"stop": StopWish.SAVE, "pause": REQUESTED}, EndReason.QUOTA_USED_UP, None),
        ({"stop": StopWish.SAVE}, EndReason.STOPPED_BY_USER, None),
    ],
)
def test_only_what_was_to_be_paused_or_has_no_room_is_paused(
    tmp_path: Path, changes: dict[str, object], reason: EndReason, expected: PauseReason | None
) -> None:
    assert pause_of(run(tmp_path, **changes), Result(end_reason=reason)) is expected


def test_a_run_that_is_trained_is_not_trained_again_for_a_pause(tmp_path: Path) -> None:
    """A pause that comes before the merge: without a checkpoint of the last step it is over."""
    pausing = run(tmp_path, stop=StopWish.SAVE, pause=REQUESTED)
    outcome = Result(end_reason=EndReason.STOPPED_BY_USER, step=9, output_path=f"{tmp_path}/final")
    assert pause_of(pausing, outcome) is None
    (tmp_path / "checkpoint-9").mkdir()
    assert pause_of(pausing, outcome) is REQUESTED


def test_a_pause_says_from_where_it_goes_on(tmp_path: Path) -> None:
    outcome = Result(end_reason=EndReason.STOPPED_BY_USER, step=7)
    saved = run(tmp_path, last_checkpoint="/out/checkpoint-7")
    assert paused(saved, outcome, Exit()) == "Paused at step 7; it goes on from /out/checkpoint-7."
    assert "by force" in paused(saved, outcome, Exit(signal="SIGKILL"))
    assert "begins anew" in paused(run(tmp_path), outcome, Exit())


def test_room_is_that_of_the_newest_checkpoint_and_the_final_model(tmp_path: Path) -> None:
    """Without a checkpoint it is the planned one's; it is never less than 64 MiB."""
    model = tmp_path / "model"
    model.mkdir()
    config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
    (model / "config.json").write_text(json.dumps(config))
    (model / "tokenizer.json").write_text('{"model": {}}')
    parameters = Parameters.model_validate({"data": {"model_path": str(model)}})
    waiting = run(tmp_path / "out", parameters=parameters, output_dir=str(tmp_path / "out"))

    def needed(of: Run) -> int:
        (need,) = needs_of(of, TrainingType.PRETRAIN, tmp_path)
        assert need.folder == tmp_path / "out"
        return need.bytes

    write_safetensors(model / "model.safetensors", LLAMA_TENSORS)
    assert needed(waiting) == LEAST_BYTES, "a tiny model"
    write_safetensors(model / "model.safetensors", LLAMA_TENSORS, width=1024)
    weights = len(LLAMA_TENSORS) * 4 * MIB
    assert needed(waiting) > 3 * weights, "weights and two moments, and weights at the end"
    newest = tmp_path / "out" / "checkpoint-3"
    newest.mkdir(parents=True)
    with open(newest / "weights", "wb") as file:
        file.truncate(500 * MIB)
    assert 500 * MIB + weights < needed(replace(waiting, last_checkpoint=str(newest))) < 700 * MIB


def test_a_need_is_met_where_so_much_is_free(tmp_path: Path) -> None:
    assert Need(tmp_path / "not" / "made" / "yet", 1).is_met
    need = Need(tmp_path, 1 << 60)
    assert not need.is_met
    message = waiting_for_room(
        run(tmp_path), Result(end_reason=EndReason.DISK_FULL, message="No space is left."), [need]
    )
    assert message == (
        "No space is left. The run is paused; once 1,099,511,627,776 MiB are free in "
        f"{tmp_path}, it begins anew by itself."
    )

"""The runner as a process: how it starts, stops and ends, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from typing import Any

import pytest

from finetuned_daemon.runs.contract import (
    PROCESS,
    SPEC,
    CheckpointDeleted,
    EndReason,
    Evaluation,
    LogLine,
    Process,
    ProcessIdentity,
    Progress,
    Result,
    StopWish,
    TrainingType,
)
from tiny import chats, write_jsonl

LONG = {"num_train_epochs": 100, "save_steps": 1000}


@pytest.fixture(scope="module")
def finished(module_shop):
    """A run of 12 steps to its end, with all that a run can do on its way."""
    evaluation = write_jsonl(module_shop.root / "eval.jsonl", chats(6))
    return module_shop.start(
        module_shop.make(
            "finished",
            data={"eval_file": str(evaluation), "dataloader_num_workers": 1, "reshuffle": True},
            training={
                "num_train_epochs": 2,
                "learning_rate": 1e-2,
                "save_steps": 5,
                "save_total_limit": 2,
                "eval_strategy": "steps",
                "eval_steps": 5,
            },
            lora={"merge_lora": True, "lora_dropout": 0.1},
            optimization={"fp16": True, "gradient_checkpointing": True},
        )
    )


def test_a_run_to_the_end_tells_all_of_it_in_order(finished):
    assert finished.wait() == 0
    assert finished.result == Result(
        end_reason=EndReason.FINISHED,
        message="All 2 epochs are done.",
        step=12,
        output_path=str(finished.output / "final"),
    )
    lines = finished.lines()
    assert [line.seq for line in lines] == list(range(1, len(lines) + 1))
    assert finished.phases() == [
        *("STARTING", "LOADING_MODEL", "PREPARING_DATA", "TRAINING"),
        *("EVALUATING", "TRAINING", "SAVING", "TRAINING") * 2,
        *("EVALUATING", "TRAINING", "SAVING", "MERGING"),
    ]
    progress = finished.events(Progress)
    assert {event.total_steps for event in progress} == {12}
    assert [event.step for event in progress] == list(range(13))  # each step is logged here
    last = progress[-1]
    assert (last.epoch, last.eta_seconds) == (2.0, 0.0)
    assert last.tokens_per_second > 0
    assert last.num_tokens > progress[1].num_tokens > 0
    assert list(finished.losses()) == list(range(1, 13))
    assert [event.step for event in finished.events(Evaluation)] == [5, 10, 12]
    losses = [event.values["eval_loss"] for event in finished.events(Evaluation)]
    assert losses[-1] < losses[0]


def test_every_checkpoint_that_is_kept_is_whole_and_the_oldest_went(finished):
    from finetuned_runner.checkpoint import verify_checkpoint

    finished.wait()
    saved = finished.checkpoints()
    assert [(event.step, event.cause) for event in saved] == [
        (5, "steps"),
        (10, "steps"),
        (12, "end"),
    ]
    assert [event.step for event in finished.events(CheckpointDeleted)] == [5]
    assert sorted(path.name for path in finished.output.iterdir()) == [
        "checkpoint-10",
        "checkpoint-12",
        "final",
        "merged",
    ]
    for event in saved[1:]:
        manifest = verify_checkpoint(finished.output / f"checkpoint-{event.step}")
        assert manifest.step == event.step
        assert manifest.size_bytes == event.size_bytes > 0
        assert manifest.num_tokens > 0
    # No pickle of ours or the Trainer's own arguments: nothing in a checkpoint can run.
    assert not list(finished.output.rglob("training_args.bin"))


def test_the_process_said_who_it_was_and_what_it_changed(finished):
    finished.wait()
    process = Process.model_validate_json((finished.folder / PROCESS).read_bytes())
    assert process.identity.pid == finished.process.pid
    assert {"python", "torch", "transformers", "peft"} <= set(process.versions)
    notice = finished.notices()["FP16_UNAVAILABLE_ON_CPU"]
    assert notice.field == "optimization.fp16"
    assert any("Running training" in line.text for line in finished.events(LogLine))
    assert "Running training" in (finished.folder / "console.log").read_text()


def test_the_merged_model_answers_as_base_and_adapter_do(finished):
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    finished.wait()
    final = finished.output / "final"
    base = AutoModelForCausalLM.from_pretrained(finished.spec.parameters.data.model_path)
    adapter = json.loads((final / "adapter_config.json").read_text())
    assert adapter["base_model_name_or_path"] == finished.spec.parameters.data.model_path
    merged = AutoModelForCausalLM.from_pretrained(finished.output / "merged")
    assert merged.config.use_cache
    tokens = AutoTokenizer.from_pretrained(final)("How do I list files?", return_tensors="pt")
    with torch.no_grad():
        before = base(**tokens).logits
        adapted = PeftModel.from_pretrained(base, final)(**tokens).logits
        whole = merged(**tokens).logits
    assert (adapted - before).abs().max() > 1e-2
    assert torch.allclose(adapted, whole, atol=1e-5)


def test_a_new_process_resumes_to_the_same_losses(shop, finished):
    finished.wait()
    parameters = finished.spec.parameters.model_dump()
    parameters["data"]["resume_from_checkpoint"] = str(finished.output / "checkpoint-10")
    del parameters["data"]["output_dir"]
    resumed = shop.start(shop.make("resumed", **parameters))
    assert resumed.wait() == 0, resumed.result
    assert resumed.losses() == {step: finished.losses()[step] for step in (11, 12)}
    assert resumed.events(Progress)[-1].num_tokens == finished.events(Progress)[-1].num_tokens
    assert resumed.events(Progress)[0].step == 10


def test_a_wish_to_stop_leaves_a_whole_checkpoint_of_the_last_step(shop):
    from finetuned_runner.checkpoint import verify_checkpoint

    run = shop.start(shop.make(training=LONG))
    run.wait_for(lambda run: len(run.events(Progress)) > 3)
    run.wish(StopWish.SAVE)
    assert run.wait() == 0
    result = run.result
    assert result.end_reason is EndReason.STOPPED_BY_USER
    assert 3 <= result.step < 600
    (saved,) = run.checkpoints()
    assert (saved.step, saved.cause) == (result.step, "stop")
    assert verify_checkpoint(run.output / f"checkpoint-{result.step}").step == result.step
    assert saved.path in result.message
    assert run.phases()[-2:] == ["TRAINING", "STOPPING"]
    assert max(run.losses()) == result.step
    assert not (run.output / "final").exists()


def test_sigterm_to_the_group_saves_and_the_terminals_signals_do_nothing(shop):
    from finetuned_runner.checkpoint import verify_checkpoint

    run = shop.start(
        shop.make(kind=TrainingType.PRETRAIN, training=LONG, data={"dataloader_num_workers": 1})
    )
    run.wait_for(lambda run: len(run.events(Progress)) > 3)
    os.killpg(run.process.pid, signal.SIGINT)
    os.killpg(run.process.pid, signal.SIGHUP)
    step = run.events(Progress)[-1].step
    run.wait_for(lambda run: run.events(Progress)[-1].step > step)
    os.killpg(run.process.pid, signal.SIGTERM)
    assert run.wait() == 0
    assert run.result.end_reason is EndReason.STOPPED_BY_USER
    (saved,) = run.checkpoints()
    assert saved.cause == "signal"
    verify_checkpoint(run.output / f"checkpoint-{saved.step}")


def test_a_run_that_was_frozen_goes_on_and_a_discard_stays_one(shop):
    run = shop.start(shop.make(training=LONG))
    run.wait_for(lambda run: len(run.events(Progress)) > 3)
    for _ in range(5):
        os.kill(run.process.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, run.process.pid, os.WSTOPPED)
        os.kill(run.process.pid, signal.SIGCONT)
        step = run.events(Progress)[-1].step
        run.wait_for(lambda run, step=step: run.events(Progress)[-1].step > step)
    os.kill(run.process.pid, signal.SIGSTOP)
    os.waitid(os.P_PID, run.process.pid, os.WSTOPPED)
    run.wish(StopWish.DISCARD)
    os.kill(run.process.pid, signal.SIGCONT)
    assert run.wait() == 0
    assert run.result.end_reason is EndReason.STOPPED_BY_USER
    assert run.checkpoints() == []


def test_a_wish_during_start_or_preparation_ends_the_run_at_once(shop):
    waiting = shop.make("waiting")
    waiting.wish(StopWish.SAVE)
    # It isn't certain that such a question leaves room for an answer: all are made before a step.
    question = {"role": "user", "content": "How far did you come? " * 20}
    answer = {"role": "assistant", "content": "Not far. " * 60}
    many = shop.root / "many.jsonl"
    write_jsonl(many, [{"messages": [question, answer]}] * 20_000)
    reading = shop.make("reading", data={"train_file": str(many)})
    shop.start(waiting)
    shop.start(reading)
    reading.wait_for(lambda run: "PREPARING_DATA" in run.phases())
    reading.wish(StopWish.DISCARD)
    for run, phases in (
        (waiting, ["STARTING", "STOPPING"]),
        (reading, ["STARTING", "LOADING_MODEL", "PREPARING_DATA", "STOPPING"]),
    ):
        assert run.wait() == 0
        assert run.result.end_reason is EndReason.STOPPED_BY_USER
        assert "before training began" in run.result.message
        assert run.phases() == phases


def test_a_folder_is_claimed_once(shop):
    run = shop.make()
    identity = ProcessIdentity.of(os.getpid())
    owner = Process(identity=identity).model_dump_json()
    (run.folder / PROCESS).write_text(owner)
    before = sorted(path.name for path in run.folder.iterdir())
    assert shop.start(run).wait() == 75
    after = sorted(path.name for path in run.folder.iterdir() if path.name != "console.log")
    assert after == before
    assert (run.folder / PROCESS).read_text() == owner


@pytest.mark.parametrize("says", ["ValidationError", "format 99"])
def test_a_spec_that_cant_be_read_is_a_crash_that_is_told(shop, says):
    run = shop.make()
    newer: Any = json.loads((run.folder / SPEC).read_text()) | {"format_version": 99}
    (run.folder / SPEC).write_text(json.dumps(newer) if says == "format 99" else "{")
    assert shop.start(run).wait() == 1
    assert run.result.end_reason is EndReason.RUNNER_CRASHED
    assert says in run.result.message
    assert "Traceback" in run.result.detail
    assert "Traceback" in (run.folder / "console.log").read_text()


def test_usage_is_told_without_a_run_folder(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "finetuned_runner", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage:")

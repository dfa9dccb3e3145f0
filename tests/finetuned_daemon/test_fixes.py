"""What would mend a failed run, and the policy that tries it: tables without a daemon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from finetuned.v1 import event_pb2
from finetuned_daemon.environment.model import Capability
from finetuned_daemon.explain import gather
from finetuned_daemon.fixes import Failure, advice_of, fix_of, patched
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.retries import next_run, retry_fix
from finetuned_daemon.runs.contract import EndReason, Progress, Result, RunPhase, TrainingType
from finetuned_daemon.runs.oom import oom_kills
from finetuned_daemon.runs.outcome import Evidence, decide
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.tasks import ENDS, Run, TaskState

ALL = Capability(bf16=True, fp16=True, tf32=True, four_bit=True, eight_bit_optimizer=True)
FAILED = [reason for reason, end in ENDS.items() if end.state is TaskState.FAILED]
OOM = EndReason.DEVICE_OUT_OF_MEMORY
HOST = EndReason.HOST_OUT_OF_MEMORY
LOSS = EndReason.LOSS_NOT_FINITE
KEEP = {"training": {"batch_size": 1}, "optimization": {"gradient_checkpointing": True}}


def failure(reason: EndReason, sections: dict[str, Any] | None = None, **fields: Any) -> Failure:
    """A failed run in the middle of its training on a GPU that can do everything."""
    values: dict[str, Any] = {
        "training_type": TrainingType.SFT,
        "device": "cuda:0",
        "phase": RunPhase.TRAINING,
        "step": 5,
        "can": ALL,
        **fields,
    }
    return Failure(reason=reason, parameters=Parameters.model_validate(sections or {}), **values)


@pytest.mark.parametrize(
    ("found", "values"),
    [
        # batch_size and gradient_accumulation_steps: the product stays.
        (failure(OOM, {"training": {"batch_size": 4}}), (2, 8)),
        (failure(OOM, {"training": {"batch_size": 5}}), (2, 10)),
        (failure(OOM, {"training": {"batch_size": 7, "gradient_accumulation_steps": 1}}), (1, 7)),
        (failure(HOST, {"training": {"batch_size": 3}}, device="cpu"), (1, 12)),
        # 256 is the most that can be accumulated.
        (
            failure(OOM, {"training": {"batch_size": 8, "gradient_accumulation_steps": 256}}),
            None,
        ),
        # In these phases no batch is there.
        (failure(OOM, {"training": {"batch_size": 4}}, phase=RunPhase.LOADING_MODEL), None),
        (failure(OOM, {"training": {"batch_size": 4}}, phase=RunPhase.MERGING), None),
    ],
)
def test_half_the_batch_keeps_the_samples_of_a_step(
    found: Failure, values: tuple[int, int] | None
) -> None:
    """A smaller divisor where the half is none, and never a value out of its range."""
    fix = fix_of(found)
    names = ("training.batch_size", "training.gradient_accumulation_steps")
    if values is None:
        assert fix is None or names[0] not in fix.values
        return
    assert fix is not None
    assert fix.values == dict(zip(names, values, strict=True))
    assert fix.resumes


@pytest.mark.parametrize(
    ("found", "values"),
    [
        (
            failure(OOM, {**KEEP, "optimization": {"gradient_checkpointing": False}}),
            {"optimization.gradient_checkpointing": True},
        ),
        (failure(OOM, KEEP), {"optimization.use_qlora": True}),
        (failure(OOM, phase=RunPhase.LOADING_MODEL), {"optimization.use_qlora": True}),
        (
            failure(OOM, {**KEEP, "lora": {"use_lora": False}}),
            {"optimization.use_8bit_optimizer": True},
        ),
        (failure(OOM, KEEP, can=None), {"training.max_seq_length": 256}),
        (
            failure(OOM, {**KEEP, "training": {"batch_size": 1, "max_seq_length": 136}}, can=None),
            {"training.max_seq_length": 128},
        ),
        (
            failure(OOM, {"lora": {"merge_lora": True}}, phase=RunPhase.MERGING),
            {"lora.merge_lora": False},
        ),
        (failure(HOST), {"data.dataloader_num_workers": 0}),
        (failure(HOST, KEEP, device="cpu"), {"training.max_seq_length": 256}),
        (failure(LOSS), {"optimization.bf16": True, "optimization.fp16": False}),
        (failure(LOSS, device="cpu"), {"training.learning_rate": 1e-4}),
        (
            failure(LOSS, {"training": {"learning_rate": 0.1}}, device="cpu"),
            {"training.learning_rate": 0.01},
        ),
        (
            failure(LOSS, {"lora": {"use_lora": False}}, device="cpu"),
            {"training.learning_rate": 2e-5},
        ),
        (
            failure(EndReason.DISK_FULL, saved_checkpoints=7),
            {"training.save_total_limit": 3},
        ),
        (
            failure(
                EndReason.MODEL_UNLOADABLE,
                {"optimization": {"use_qlora": True}, "lora": {"use_lora": False}},
            ),
            {"lora.use_lora": True},
        ),
        (
            failure(
                EndReason.MODEL_UNLOADABLE, hint={"lora.lora_target_modules": ("c_attn", "c_proj")}
            ),
            {"lora.lora_target_modules": ("c_attn", "c_proj")},
        ),
        (
            failure(EndReason.DATASET_INVALID, hint={"training.max_seq_length": 640}),
            {"training.max_seq_length": 640},
        ),
        (
            failure(EndReason.RUNNER_KILLED, device="cpu", may_be_memory=True),
            {"training.batch_size": 1, "training.gradient_accumulation_steps": 8},
        ),
        (failure(EndReason.RUNNER_KILLED, was_killed=True), {}),
    ],
)
def test_the_mildest_fix_that_applies_is_chosen(found: Failure, values: dict[str, Any]) -> None:
    """Each reason has its ladder; a step that is taken already, or impossible, is passed over."""
    fix = fix_of(found)
    assert fix is not None
    assert fix.values == values
    assert patched(found.parameters, fix.values) is not None
    assert fix.why.en
    assert fix.why.zh


@pytest.mark.parametrize(
    "found",
    [
        failure(OOM, {**KEEP, "training": {"batch_size": 1, "max_seq_length": 128}}, can=None),
        failure(OOM, phase=RunPhase.LOADING_MODEL, can=None),
        failure(LOSS, device="cpu", step=0),
        failure(LOSS, {"training": {"learning_rate": 1e-6}}, device="cpu"),
        failure(EndReason.DISK_FULL, saved_checkpoints=1),
        failure(EndReason.DATASET_INVALID, hint={"training.max_seq_length": 10_000}),
        failure(EndReason.MODEL_UNLOADABLE, hint={"lora.no_such": True}),
        failure(EndReason.RUNNER_KILLED),
        failure(EndReason.RUNNER_CRASHED),
        failure(EndReason.DEVICE_LOST),
    ],
)
def test_where_nothing_is_known_no_fix_is_invented(found: Failure) -> None:
    """There is a sentence on what to do by hand instead."""
    assert fix_of(found) is None
    assert advice_of(found.reason).zh


def test_advice_on_a_template_is_not_to_mend_the_data() -> None:
    """The run names the parameter, whatever the reason; another one changes nothing."""
    template, data = (
        advice_of(EndReason.DATASET_INVALID, field=field)
        for field in ("data.tokenizer_path", "data.train_file")
    )
    assert "data.tokenizer_path" in template.en
    assert "data.tokenizer_path" in template.zh
    assert "Mend" not in template.en
    assert data.en.startswith("Mend the data file")


def test_advice_on_precision_is_for_runs_in_fp16_alone() -> None:
    """The CPU computes in float32 whatever is asked for, and weights and samples are left."""
    in_fp16, in_float32 = (
        advice_of(LOSS, in_fp16=failure(LOSS, device=device).in_fp16)
        for device in ("cuda:0", "cpu")
    )
    assert "optimization.fp16" in in_fp16.en
    assert "weights" in in_float32.en
    assert not any("16" in text for text in (in_float32.en, in_float32.zh))


def test_every_fix_is_within_the_ranges_until_none_is_left() -> None:
    """Applied again and again, the ladders end, and never with a value that is not allowed."""
    for reason in FAILED:
        assert advice_of(reason).en.endswith(".")
        found = failure(reason, {"training": {"batch_size": 128}}, saved_checkpoints=100)
        for _ in range(60):
            fix = fix_of(found)
            if fix is None or not fix.values:  # the parameters will do as they are
                break
            parameters = patched(found.parameters, fix.values)
            assert parameters is not None
            assert parameters != found.parameters
            found = replace(found, parameters=parameters, saved_checkpoints=1)
        else:
            raise AssertionError(f"{reason} is never done")


def run(**fields: Any) -> Run:
    """A run with the policy on."""
    parameters = Parameters.model_validate(
        {"training": {"batch_size": 8}, "extensions": {"retry_out_of_memory": True}}
    )
    return Run(**{"task_key": 1, "number": 4, "device": "cpu", "parameters": parameters, **fields})


def test_the_policy_retries_three_times_in_a_row_and_only_what_it_is_for() -> None:
    """Off by default; not after a stop, another reason, or where the batch has no part in it."""
    found = failure(HOST, {"training": {"batch_size": 8}})
    assert retry_fix(run(retry=2), found) is not None
    assert retry_fix(run(retry=3), found) is None
    assert retry_fix(run(parameters=Parameters()), found) is None
    assert retry_fix(run(stop="SAVE"), found) is None
    assert retry_fix(run(), replace(found, reason=LOSS)) is None
    assert retry_fix(run(), replace(found, phase=RunPhase.LOADING_MODEL)) is None


@pytest.mark.parametrize(("planned", "saved", "left"), [(0, 3, 0), (9, 3, 6), (3, 3, 1)])
def test_a_retry_takes_what_was_reserved_for_its_run(planned: int, saved: int, left: int) -> None:
    """Of the training quota, with one at least, and nothing where there is no quota."""
    fix = retry_fix(run(), failure(HOST, {"training": {"batch_size": 8}}))
    assert fix is not None
    new = next_run(run(planned_checkpoints=planned, saved_checkpoints=saved), fix.values)
    assert new.planned_checkpoints == left
    assert (new.number, new.retry) == (5, 1)


def test_evidence_is_bounded() -> None:
    """The last metrics and lines alone, however long the log was."""
    text = "\n".join(f"{n} " + "x" * 300 for n in range(100))
    events = [
        event_pb2.Event(metrics=event_pb2.Metrics(step=1, values={"loss": 2.0})),
        event_pb2.Event(log_line=event_pb2.LogLine(level="error", text=text)),
    ]
    result = Result(end_reason=LOSS, samples=tuple(range(1, 5000)), excerpt="y" * 9000)
    evidence = gather(run(progress=Progress(step=3, loss=9.0)), result, events)
    assert (evidence.last_metrics_step, evidence.last_metrics) == (1, {"loss": 2.0})
    assert 5 < len(evidence.log_lines) <= 20
    assert sum(map(len, evidence.log_lines)) <= 4000
    assert evidence.log_lines[-1].startswith("error: 99 ")
    assert (len(evidence.sample_lines), len(evidence.sample_excerpt)) == (1000, 500)
    of_progress = gather(run(progress=Progress(step=3, loss=9.0)), result, [])
    assert (of_progress.last_metrics_step, of_progress.last_metrics) == (3, {"loss": 9.0})


# --- the kernel's out-of-memory killer


def test_kills_are_counted_where_the_daemon_lives(tmp_path: Path) -> None:
    """Of the own cgroup in version 2, then 1; else of the machine; else nobody knows."""
    own, vmstat = tmp_path / "own", tmp_path / "vmstat"
    assert oom_kills(own, tmp_path, vmstat) is None
    vmstat.write_text("oom_kill_x 9\noom_kill 1\n")
    assert oom_kills(own, tmp_path, vmstat) == 1
    own.write_text("4:memory:/a/b\n2:cpu,cpuacct:/\n0::/c\n")
    assert oom_kills(own, tmp_path, vmstat) == 1
    (tmp_path / "memory/a/b").mkdir(parents=True)
    (tmp_path / "memory/a/b/memory.oom_control").write_text("under_oom 0\noom_kill 2\n")
    assert oom_kills(own, tmp_path, vmstat) == 2
    (tmp_path / "c").mkdir()
    (tmp_path / "c/memory.events").write_text("max 7\noom 4\noom_kill 3\n")
    assert oom_kills(own, tmp_path, vmstat) == 3


@pytest.mark.parametrize(
    ("ended", "reason", "says"),
    [
        (Exit(signal="SIGKILL", oom_kills=1), HOST, "ran out of memory"),
        (Exit(oom_kills=1), HOST, "ran out of memory"),
        (Exit(signal="SIGKILL", oom_kills=0), EndReason.RUNNER_KILLED, "did not"),
        (Exit(signal="SIGKILL"), EndReason.RUNNER_KILLED, "or the system was out of memory"),
        (Exit(signal="SIGSEGV", oom_kills=1), EndReason.RUNNER_KILLED, "SIGSEGV"),
    ],
)
def test_a_kill_for_want_of_memory_is_told_from_others(
    ended: Exit, reason: EndReason, says: str
) -> None:
    """Where the kernel's count rose while the runner was watched; "or" where nobody can know."""
    outcome = decide(
        Evidence(
            result=None,
            exit=ended,
            was_watched=True,
            stop=None,
            was_forced=False,
            step=1,
            last_checkpoint="",
            console_tail="",
        )
    )
    assert outcome.end_reason is reason
    assert says in outcome.message

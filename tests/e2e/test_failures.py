"""Failures explain themselves: evidence, fix, `task fix`, and the retry after memory ran out."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conftest import LLAMA_TENSORS, Scene, write_safetensors
from daemon_process import Daemon, eventually
from finetuned import Client, Event
from finetuned.v1 import event_pb2, parameters_pb2, task_pb2, task_service_pb2
from terminal import CTL
from tiny import chats, make_model, write_jsonl

DEVICE_OUT_OF_MEMORY = task_pb2.END_REASON_DEVICE_OUT_OF_MEMORY


def policy(
    parameters: parameters_pb2.Parameters, batch_size: int, accumulation: int
) -> parameters_pb2.Parameters:
    """The parameters, retried when memory runs out."""
    parameters.training.batch_size = batch_size
    parameters.training.gradient_accumulation_steps = accumulation
    parameters.extensions.retry_out_of_memory = True
    return parameters


def runs_of(daemon: Daemon, name: str) -> list[task_pb2.Run]:
    """Oldest first."""
    answer = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name))
    return list(reversed(answer.runs))


def result_of(daemon: Daemon, name: str) -> event_pb2.Result:
    return [e.result for e in daemon.events(name) if e.HasField("result")][-1]


def sizes(run: task_pb2.Run) -> tuple[int, int]:
    training = run.parameters.training
    return training.batch_size, training.gradient_accumulation_steps


def test_a_run_out_of_memory_goes_on_with_half_the_batch_until_it_fits(
    daemon: Daemon, scene: Scene
) -> None:
    """Each retry has half the batch and the newest checkpoint; the task keeps what it had."""
    fail = {"step": 2, "reason": "DEVICE_OUT_OF_MEMORY", "above": 2}
    task = daemon.create(policy(scene.play(steps=3, save_steps=1, fail=fail), 8, 1), start=True)
    with Client(daemon.address) as client:
        events = [
            item for item in client.watch(task.name, until_end=True) if isinstance(item, Event)
        ]
    runs = runs_of(daemon, task.name)
    assert [sizes(run) for run in runs] == [(8, 1), (4, 2), (2, 4)]
    assert [run.retry for run in runs] == [0, 1, 2]
    assert [run.end_reason for run in runs[:2]] == [DEVICE_OUT_OF_MEMORY] * 2
    for before, run in itertools.pairwise(runs):
        begins = run.parameters.data.resume_from_checkpoint
        assert begins == before.last_checkpoint == f"{before.output_dir}/checkpoint-2"
    done = daemon.get(task.name)
    assert done.state == task_pb2.TASK_STATE_COMPLETED
    assert (done.run, done.parameters.training.batch_size) == (3, 8)
    assert not done.parameters.data.resume_from_checkpoint
    states = [e.state_change.new_state for e in events if e.HasField("state_change")]
    assert task_pb2.TASK_STATE_FAILED not in states, "one watch sees it all, and no end between"
    assert states[-1] == task_pb2.TASK_STATE_COMPLETED
    notices = [e for e in events if e.notice.reason == "RETRIED_OUT_OF_MEMORY"]
    assert [e.run for e in notices] == [2, 3]
    assert "batch_size 8 -> 4" in notices[0].notice.message
    assert "checkpoint-2" in notices[0].notice.message


def test_no_more_than_three_retries_in_a_row_and_then_a_fix(daemon: Daemon, scene: Scene) -> None:
    """After the third the task fails, with a fix that builds on what the retries had changed."""
    fail = {"step": 1, "reason": "DEVICE_OUT_OF_MEMORY"}
    task = daemon.create(policy(scene.play(fail=fail), 32, 1), start=True)
    daemon.wait(task.name, "FAILED")
    runs = runs_of(daemon, task.name)
    assert [sizes(run) for run in runs] == [(32, 1), (16, 2), (8, 4), (4, 8)]
    assert not any(run.parameters.data.resume_from_checkpoint for run in runs), "none was saved"
    fix = result_of(daemon, task.name).fix.training
    assert (fix.batch_size, fix.gradient_accumulation_steps) == (2, 16)
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    daemon.wait(task.name, "FAILED")
    assert [run.retry for run in runs_of(daemon, task.name)[4:]] == [0, 1, 2, 3], "counted anew"


def test_a_retry_is_neither_forgotten_nor_repeated_when_the_daemon_is_killed(
    daemon: Daemon, scene: Scene
) -> None:
    """A run that failed unseen is retried by the next daemon, once; the count outlives both."""
    fail = {"step": 1, "reason": "HOST_OUT_OF_MEMORY", "above": 2}
    task = daemon.create(policy(scene.play(gated=True, steps=2, fail=fail), 8, 1), start=True)
    run = eventually(
        lambda: next((r for r in runs_of(daemon, task.name) if r.pid), None), "it runs"
    )
    daemon.kill()
    scene.let_pass(1)
    eventually((Path(run.run_dir) / "result.json").exists, "it ended unseen")
    daemon.start()
    eventually(lambda: runs_of(daemon, task.name)[-1].pid, "the retry runs")
    daemon.kill()
    daemon.start()
    assert [r.retry for r in runs_of(daemon, task.name)] == [0, 1]
    scene.let_pass(1)
    eventually(lambda: len(runs_of(daemon, task.name)) == 3, "it is retried again")
    scene.let_pass(2)
    daemon.wait(task.name, "COMPLETED")
    assert [sizes(r) for r in runs_of(daemon, task.name)] == [(8, 1), (4, 2), (2, 4)]


def test_without_the_policy_a_run_out_of_memory_fails_with_evidence_and_a_fix(
    daemon: Daemon, scene: Scene
) -> None:
    """The end has the last metrics, the end of the log, the samples, a patch and its reason."""
    parameters = scene.play(
        save_steps=1,
        fail={
            "step": 2,
            "reason": "DEVICE_OUT_OF_MEMORY",
            "samples": [3, 5],
            "excerpt": "a sample",
        },
    )
    task = daemon.create(parameters, start=True)
    ended = daemon.wait(task.name, "FAILED")
    assert len(runs_of(daemon, task.name)) == 1
    result = result_of(daemon, task.name)
    evidence = result.evidence
    assert (evidence.last_metrics_step, dict(evidence.last_metrics)) == (2, {"loss": 0.5})
    assert list(evidence.log_lines) == ["info: ends: DEVICE_OUT_OF_MEMORY"]
    assert (list(evidence.sample_lines), evidence.sample_excerpt) == ([3, 5], "a sample")
    assert result.fix == parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(resume_from_checkpoint=ended.last_checkpoint),
        training=parameters_pb2.TrainingParameters(batch_size=1, gradient_accumulation_steps=8),
    )
    assert result.advice.en
    assert result.advice.zh


# --- finetunectl task fix


@pytest.fixture
def ctl(daemon: Daemon, tmp_path: Path) -> Callable[..., Any]:
    """Runs a command to its end."""
    own = {
        "FINETUNED_STATE_DIR": str(daemon.paths.state_dir),
        "FINETUNED_RUNTIME_DIR": str(daemon.paths.runtime_dir),
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
    }
    environment = {**os.environ, **own}
    environment.pop("FINETUNED_ADDRESS", None)

    def run(*arguments: str, **changes: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CTL, *arguments],
            capture_output=True,
            text=True,
            env={**environment, **changes},
            cwd=tmp_path,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run


def test_fix_shows_asks_changes_starts_and_can_be_undone(
    daemon: Daemon, scene: Scene, ctl: Callable[..., Any]
) -> None:
    """From the failed run's summary to the completed one, by what each command says to type."""
    fail = {
        "step": 2,
        "reason": "DEVICE_OUT_OF_MEMORY",
        "above": 1,
        "samples": [1],
        "sample_file": "/data/chats.jsonl",
    }
    parameters = scene.play(steps=3, save_steps=1, fail=fail)
    task = daemon.create(parameters, start=True)
    before = daemon.wait(task.name, "FAILED")
    name = before.display_name
    watched = ctl("task", "watch", name)
    assert watched.returncode == 1
    for shown in ("device out of memory", "step 2  loss 0.5", "line 1 of chats.jsonl"):
        assert shown in watched.stdout
    assert f"finetunectl task fix {name} --start" in watched.stderr

    unasked = ctl("task", "fix", name)
    assert unasked.returncode == 2
    assert f"finetunectl task fix {name} --yes" in unasked.stderr
    assert "training.batch_size                   2 -> 1" in unasked.stdout
    assert "training.gradient_accumulation_steps  4 -> 8" in unasked.stdout
    assert "(none) -> " in unasked.stdout
    assert "a step trains on as many" in unasked.stdout
    assert daemon.get(task.name) == before, "nothing was changed"
    assert "每步训练的样本数不变" in ctl("task", "fix", name, LC_ALL="zh_CN.UTF-8").stdout

    fixed = ctl("task", "fix", name, "--watch", "--yes")
    assert fixed.returncode == 0, fixed.stderr
    after = daemon.get(task.name)
    assert after.state == task_pb2.TASK_STATE_COMPLETED
    assert after.parameters.training.batch_size == 1
    assert after.parameters.data.resume_from_checkpoint == before.last_checkpoint
    assert ctl("task", "fix", name, "--yes").returncode == 1, "there is nothing to mend"

    undo = next(line for line in fixed.stderr.splitlines() if "undo it: " in line)
    words = undo.partition("finetunectl ")[2].split()
    assert ctl(*words).returncode == 0
    assert daemon.get(task.name).parameters == before.parameters


def test_without_a_fix_it_says_what_to_do_by_hand(
    daemon: Daemon, scene: Scene, ctl: Callable[..., Any]
) -> None:
    """Exit status 1, JSON or not, and the task is as it was."""
    task = daemon.create(scene.play(fail={"step": 1, "reason": "DEVICE_LOST"}), start=True)
    failed = daemon.wait(task.name, "FAILED")
    answer = ctl("task", "fix", failed.display_name, "--start", "--yes")
    assert answer.returncode == 1
    assert "no fix is known: Look at the device" in answer.stderr
    answer = ctl("task", "fix", failed.display_name, "--json", "--yes")
    assert answer.returncode == 1
    assert answer.stdout == ""
    error = json.loads(answer.stderr)["error"]
    assert error["reason"] == "NO_FIX"
    assert error["message"].startswith("no fix is known: Look at the device")
    assert daemon.get(task.name) == failed


def test_a_fix_never_turns_back_what_was_changed_since(
    daemon: Daemon, scene: Scene, ctl: Callable[..., Any]
) -> None:
    """Whoever has set a smaller batch by hand keeps it."""
    fail = {"step": 1, "reason": "DEVICE_OUT_OF_MEMORY", "above": 2}
    parameters = scene.play(steps=1, fail=fail)
    parameters.training.batch_size = 8
    task = daemon.create(parameters, start=True)
    name = daemon.wait(task.name, "FAILED").display_name
    assert ctl("task", "edit", name, "--set", "training.batch_size=1").returncode == 0
    answer = ctl("task", "fix", name, "--yes", "--start")
    assert answer.returncode == 0, answer.stderr
    assert "training.batch_size was changed since" in answer.stdout
    assert daemon.wait(task.name, "COMPLETED").parameters.training.batch_size == 1


def test_a_killed_runs_fix_is_its_newest_checkpoint_with_the_same_settings(
    daemon: Daemon, scene: Scene, ctl: Callable[..., Any]
) -> None:
    """The kernel counted no kill for want of memory; without a checkpoint nothing has to change."""
    for save_steps in (1, 0):
        parameters = scene.play(steps=9, gated=True, save_steps=save_steps)
        task = daemon.create(parameters, start=True)
        with daemon.watch(task.name) as watch:
            scene.let_pass(1)
            watch.until_step(1)
            os.kill(runs_of(daemon, task.name)[0].pid, signal.SIGKILL)
            watch.until_end()
        failed = daemon.get(task.name)
        name, saved = failed.display_name, failed.last_checkpoint
        assert bool(saved) == bool(save_steps)
        command = f"finetunectl task start {name} --resume newest"
        assert (command in ctl("task", "watch", name).stderr) == bool(saved)
        content = json.loads(ctl("task", "fix", name, "--yes", "--json").stdout)
        assert content["changes"] == (
            [{"field": "data.resume_from_checkpoint", "old": None, "new": saved}] if saved else []
        )
        assert content["why"].startswith("the kernel had not run out of memory")
        again = ctl("task", "fix", name, "--yes")
        assert again.returncode == 0, again
        assert "nothing to change" in again.stdout
        assert ("the same settings will do" in again.stdout) == (not saved), "only what holds"


def test_what_the_check_suggests_is_a_fix_of_a_task_that_can_not_be_started(
    daemon: Daemon, scene: Scene, ctl: Callable[..., Any]
) -> None:
    """The model lost a module since: no run has failed yet, and the task can be mended."""
    task = daemon.create(scene.play())
    names = [name for name in LLAMA_TENSORS if "gate_proj" not in name]
    write_safetensors(scene.model / "model.safetensors", names)
    answer = ctl("task", "fix", task.display_name, "--yes", "--json")
    assert answer.returncode == 0, answer.stderr
    (change,) = json.loads(answer.stdout)["changes"]
    assert change["field"] == "lora.lora_target_modules"
    targets = list(daemon.get(task.name).parameters.lora.lora_target_modules.values)
    assert targets == change["new"]
    assert "gate_proj" not in targets
    assert ctl("task", "fix", task.display_name).returncode == 1, "there is nothing to mend"


# --- for real


def test_a_real_run_that_gets_no_more_memory_is_retried_from_its_checkpoint(
    tmp_path: Path,
) -> None:
    """It fails for want of the machine's memory, and half the batch does the rest of the steps."""
    make_model(tmp_path / "model", layers=1, hidden=256, positions=1024)
    settings = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(write_jsonl(tmp_path / "chats.jsonl", chats(64))),
            # Long ones: the evaluation needs more than there was before it.
            eval_file=str(write_jsonl(tmp_path / "eval.jsonl", chats(16, turns=60))),
            model_path=str(tmp_path / "model"),
            output_dir=str(tmp_path / "out"),
            dataloader_num_workers=0,
        ),
        training=parameters_pb2.TrainingParameters(
            max_steps=13, save_steps=1, eval_strategy="steps", eval_steps=12, max_seq_length=1024
        ),
    )
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    try:
        task = daemon.create(policy(settings, 16, 1), start=True)
        with daemon.watch(task.name) as watch:
            watch.until(lambda e: e.HasField("checkpoint_saved"))
            pid = runs_of(daemon, task.name)[0].pid
            status = Path(f"/proc/{pid}/status").read_text()
            in_use = int(status.partition("VmSize:")[2].split()[0]) << 10
            resource.prlimit(pid, resource.RLIMIT_AS, (in_use, in_use))
            watch.until_end()
        runs = runs_of(daemon, task.name)
    finally:
        daemon.close()
    assert [run.end_reason for run in runs] == [
        task_pb2.END_REASON_HOST_OUT_OF_MEMORY,
        task_pb2.END_REASON_STEP_LIMIT,
    ], runs
    assert "ran out of memory: DefaultCPUAllocator: can't allocate" in runs[0].end_message
    assert sizes(runs[1]) == (8, 2)
    begins = runs[1].parameters.data.resume_from_checkpoint
    assert begins == runs[0].last_checkpoint
    assert Path(begins).parent == Path(runs[0].output_dir)
    assert runs[1].progress.step == 13

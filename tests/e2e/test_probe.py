"""Probes: they measure, correct estimates, and leave task, quota and disk as they were."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned import Client, ProbeFailed, TaskState
from finetuned.v1 import parameter_service_pb2, parameters_pb2, task_pb2, task_service_pb2
from terminal import CTL
from tiny import chats, make_model, write_jsonl


def estimate(daemon: Daemon, name: str) -> parameter_service_pb2.EstimateTaskResponse:
    return daemon.parameters.EstimateTask(parameter_service_pb2.EstimateTaskRequest(task=name))


def ctl(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [CTL, "--address", daemon.address, *arguments], capture_output=True, text=True, check=False
    )


def shown(task: task_pb2.Task) -> list[Any]:
    """What a user sees of a task's latest run."""
    return [
        *(task.state, task.end_reason, task.end_message, task.run, task.last_checkpoint),
        *(task.progress, task.start_time, task.end_time, task.phase, task.probing),
    ]


def test_a_task_is_after_a_probe_what_it_was_before(daemon: Daemon, scene: Scene) -> None:
    """Pending or completed, with result and checkpoint; the next run has a number of its own."""
    task = daemon.create(scene.play(save_steps=1))
    with Client(daemon.address) as client:
        assert client.probe_task(task.name).tokens_per_second == 100
        assert shown(daemon.get(task.name)) == shown(task)
        client.start_task(task.name)
        done = client.wait(task.name)
        assert (done.state, done.run) == (TaskState.TASK_STATE_COMPLETED, 2)
        client.probe_task(task.name)
        assert shown(daemon.get(task.name)) == shown(done)
        runs = list(client.list_runs(task.name))
        assert [(r.number, r.probe, r.output_dir == "") for r in runs] == [
            (3, True, True),
            (2, False, False),
            (1, True, True),
        ]
        assert runs[0].end_reason == task_pb2.END_REASON_PROBED
        assert len(list(client.list_checkpoints(task.name))) == 3, "the probes have none"
    assert [path.name for path in scene.output.iterdir()] == ["run-2"]
    assert not list(scene.root.rglob(".finetuned-*")), "nor has it left its folder"


def test_a_probe_makes_no_folder_and_uses_no_quota(tmp_path: Path, scene: Scene) -> None:
    """Nor is it refused where none is left, for it saves nothing."""
    daemon = Daemon(tmp_path, "--training-quota", "0").start()
    try:
        task = daemon.create(scene.play(save_steps=1))
        with Client(daemon.address) as client:
            client.probe_task(task.name)
            assert client.quota().used == 0
        assert not scene.output.exists(), "which nobody had made before"
    finally:
        daemon.close()


def test_a_stopped_probe_is_none(daemon: Daemon, scene: Scene) -> None:
    """Running or in the queue, it ends, and its task is what it was before."""
    parameters = scene.play(gated=True)
    first, second = daemon.create(parameters), daemon.create(parameters)
    with Client(daemon.address) as client:
        client.start_probe(first.name)
        assert client.start_probe(second.name).state == TaskState.TASK_STATE_QUEUED
        assert daemon.get(second.name).probing
        client.stop_task(second.name)
        assert shown(daemon.get(second.name)) == shown(second)
        with daemon.watch(first.name) as watch:
            watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)
            client.stop_task(first.name)
            end = watch.until(lambda e: bool(e.state_change.end_reason)).state_change
        assert end.end_reason == task_pb2.END_REASON_STOPPED_BY_USER
        assert end.new_state == TaskState.TASK_STATE_PENDING
        assert shown(daemon.get(first.name)) == shown(first)
    assert not list(scene.root.rglob(".finetuned-*"))


def test_a_probe_out_of_memory_fails_with_the_fix_and_no_retry(
    daemon: Daemon, scene: Scene
) -> None:
    """That is what it is for; the policy of retries is for runs alone."""
    fail = {"step": 2, "reason": "DEVICE_OUT_OF_MEMORY"}
    parameters = scene.play(fail=fail)
    parameters.training.batch_size = 4
    parameters.extensions.retry_out_of_memory = True
    task = daemon.create(parameters)
    with Client(daemon.address) as client, pytest.raises(ProbeFailed) as failed:
        client.probe_task(task.name)
    assert failed.value.reason == "DEVICE_OUT_OF_MEMORY"
    assert daemon.get(task.name).state == task_pb2.TASK_STATE_FAILED
    assert not list(scene.root.rglob(".finetuned-*"))
    name = task.name.removeprefix("tasks/")
    again = ctl(daemon, "probe", name)
    assert again.returncode == 1
    assert f" task fix {task.display_name}\n" in again.stderr, again
    fixed = ctl(daemon, "task", "fix", name, "--yes")
    assert fixed.returncode == 0, fixed
    assert daemon.get(task.name).parameters.training.batch_size == 2


def test_a_probe_outlives_its_daemon(daemon: Daemon, scene: Scene) -> None:
    """The next one takes its report over, and puts the task back."""
    task = daemon.create(scene.play(gated=True))
    with Client(daemon.address) as client:
        client.start_probe(task.name)
        with daemon.watch(task.name) as watch:
            watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)
        daemon.kill()
        daemon.start()
        scene.let_pass(3)
        eventually(lambda: not daemon.get(task.name).probing, "the probe ends")
    assert shown(daemon.get(task.name)) == shown(task)
    reports = [e.probe_report for e in daemon.events(task.name) if e.HasField("probe_report")]
    assert len(reports) == 1
    assert not list(scene.root.rglob(".finetuned-*"))


def test_the_command_tells_what_a_file_would_take_and_forgets_its_task(
    daemon: Daemon, scene: Scene
) -> None:
    """A table, or with --json one object; and no task where nobody wanted one."""
    scene.play()
    file = scene.root / "run.json"
    content = {
        "device": "cpu",
        "data": {
            "train_file": str(scene.data),
            "model_path": str(scene.model),
            "output_dir": str(scene.output),
        },
    }
    file.write_text(json.dumps(content))
    table = ctl(daemon, "probe", str(file))
    assert table.returncode == 0, table
    for words in ("3.0 GiB at the peak of 8.0 GiB", "100 tokens/s", "1:00 for 20 steps"):
        assert words in table.stdout, table.stdout
    answer = ctl(daemon, "probe", str(file), "--json")
    assert json.loads(answer.stdout)["report"]["checkpoint_bytes"] == 1 << 20
    with Client(daemon.address) as client:
        assert list(client.list_tasks()) == []


@pytest.fixture
def studio(tmp_path: Path) -> Path:
    """A folder with a model and data."""
    make_model(tmp_path / "model", hidden=64)
    write_jsonl(tmp_path / "chats.jsonl", chats(48))
    return tmp_path


def test_an_estimate_is_what_a_probe_has_measured(studio: Path) -> None:
    """With its very settings; with others it is corrected, and says so."""
    daemon = Daemon(studio, runner_module="finetuned_runner").start()
    try:
        data = parameters_pb2.DataParameters(
            train_file=str(studio / "chats.jsonl"),
            model_path=str(studio / "model"),
            output_dir=str(studio / "deep" / "out"),
            eval_ratio=0.1,
            dataloader_num_workers=0,
        )
        training = parameters_pb2.TrainingParameters(
            batch_size=4, num_train_epochs=2, eval_strategy="epoch"
        )
        task = daemon.create(parameters_pb2.Parameters(data=data, training=training))
        before = estimate(daemon, task.name)
        assert not before.HasField("duration")
        assert not before.HasField("calibration")
        with Client(daemon.address) as client:
            report = client.probe_task(task.name)
            assert not (studio / "deep").exists()
            after = client.estimate(task=task.name)
            near = client.estimate(task=task.name, parameters={"training": {"batch_size": 8}})
        assert after.calibration.measured
        assert after.calibration.planned_peak_memory_bytes == before.peak_memory_bytes
        assert after.peak_memory_bytes == report.peak_memory_bytes
        assert sum(p.bytes for p in after.memory_parts) == after.peak_memory_bytes
        assert abs(after.peak_memory_bytes / before.peak_memory_bytes - 1) < 0.2, "plausible"
        assert abs(after.checkpoint_bytes / before.checkpoint_bytes - 1) < 0.03
        assert after.run_steps == report.run_steps
        seconds = after.duration.ToTimedelta().total_seconds()
        assert seconds == pytest.approx(report.duration_seconds, rel=0.05)
        assert near.HasField("calibration")
        assert not near.calibration.measured
        assert near.HasField("duration")
        assert near.peak_memory_bytes > 0.9 * after.peak_memory_bytes
        request = task_service_pb2.ListRunsRequest(parent=task.name)
        (run,) = daemon.tasks.ListRuns(request).runs
        assert run.probe
        assert run.state == task_pb2.TASK_STATE_COMPLETED
    finally:
        daemon.close()

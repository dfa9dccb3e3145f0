"""What tests of pauses have in common."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon, Watch
from finetuned.v1 import event_pb2, parameters_pb2, task_pb2, task_service_pb2

PAUSED = task_pb2.TASK_STATE_PAUSED
QUEUED = task_pb2.TASK_STATE_QUEUED
REQUESTED = task_pb2.PAUSE_REASON_REQUESTED
FULL = task_pb2.PAUSE_REASON_DISK_FULL


def pause(daemon: Daemon, name: str) -> task_pb2.Task:
    return daemon.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=name)).task


def resume(daemon: Daemon, name: str, **asked: Any) -> task_pb2.Task:
    return daemon.tasks.ResumeTask(task_service_pb2.ResumeTaskRequest(name=name, **asked)).task


def stop(daemon: Daemon, name: str, *, discard: bool = False) -> task_pb2.Task:
    request = task_service_pb2.StopTaskRequest(name=name, discard=discard)
    return daemon.tasks.StopTask(request).task


def runs(daemon: Daemon, name: str) -> list[task_pb2.Run]:
    return list(daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs)


def only_run(daemon: Daemon, name: str) -> task_pb2.Run:
    (run,) = runs(daemon, name)
    return run


def checkpoints(daemon: Daemon, name: str, **asked: Any) -> list[task_pb2.Checkpoint]:
    request = task_service_pb2.ListCheckpointsRequest(parent=name, **asked)
    return list(daemon.tasks.ListCheckpoints(request).checkpoints)


def spec_of(run: task_pb2.Run) -> dict[str, Any]:
    folder = Path(run.run_dir, f"attempt-{run.attempt}" if run.attempt > 1 else "")
    spec: dict[str, Any] = json.loads((folder / "spec.json").read_text())
    return spec


def results(daemon: Daemon, name: str) -> list[event_pb2.Result]:
    return [event.result for event in daemon.events(name) if event.HasField("result")]


def refused(call: Any, *arguments: Any, **named: Any) -> tuple[grpc.StatusCode, str]:
    """Status code and stable reason of a call that is refused; of wrong fields the first one's."""
    with pytest.raises(grpc.RpcError) as caught:
        call(*arguments, **named)
    status = rpc_status.from_call(caught.value)
    assert status is not None
    info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
    for detail in status.details:
        detail.Unpack(info)
        detail.Unpack(bad)
    reason = bad.field_violations[0].reason if bad.field_violations else info.reason
    return caught.value.code(), reason


def change_to(watch: Watch, state: task_pb2.TaskState.ValueType) -> event_pb2.StateChange:
    return watch.until(lambda e: e.state_change.new_state == state).state_change


def begun(daemon: Daemon, scene: Scene, taken: int, **scenario: Any) -> task_pb2.Task:
    """A task whose run has taken so many of its steps, and waits before the next."""
    task = daemon.create(scene.play(**{"steps": 9, "gated": True, **scenario}), start=True)
    with daemon.watch(task.name) as watch:
        scene.let_pass(taken)
        watch.until_step(taken)
    return task


def paused(daemon: Daemon, scene: Scene, taken: int = 2, **scenario: Any) -> task_pb2.Task:
    task = begun(daemon, scene, taken, **scenario)
    pause(daemon, task.name)
    return daemon.wait(task.name, "PAUSED")


def real_parameters(root: Path, output: str, **training: Any) -> parameters_pb2.Parameters:
    return parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(root / "chats.jsonl"),
            model_path=str(root / "model"),
            output_dir=str(root / output),
            dataloader_num_workers=0,
            eval_ratio=0.25,
        ),
        training=parameters_pb2.TrainingParameters(
            **{
                "batch_size": 2,
                "gradient_accumulation_steps": 1,
                "max_seq_length": 128,
                "max_steps": 40,
                "save_steps": 4,
                "save_total_limit": 2,
                "eval_strategy": "steps",
                "eval_steps": 4,
                "learning_rate": 1e-3,
                **training,
            }
        ),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
    )

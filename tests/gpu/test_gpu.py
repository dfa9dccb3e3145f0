"""Runs on an NVIDIA GPU, in the precisions that it has; skipped where there is none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2
from finetuned_daemon.devices import DeviceType, list_devices
from tiny import chats, make_model, write_jsonl

GPUS = [device for device in list_devices() if device.type is DeviceType.CUDA]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="NVML lists no NVIDIA GPU on this machine"),
]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    yield daemon
    daemon.close()


@pytest.mark.parametrize("precision", ["fp16", "bf16", "float32"])
@pytest.mark.parametrize("use_lora", [True, False])
def test_a_run_on_the_gpu_learns(
    daemon: Daemon, tmp_path: Path, precision: str, use_lora: bool
) -> None:
    parameters = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(write_jsonl(tmp_path / "chats.jsonl", chats(64))),
            model_path=str(make_model(tmp_path / "model")),
            output_dir=str(tmp_path / "out"),
        ),
        training=parameters_pb2.TrainingParameters(
            max_steps=40, batch_size=8, gradient_accumulation_steps=1, learning_rate=1e-2
        ),
        lora=parameters_pb2.LoraParameters(use_lora=use_lora),
        optimization=parameters_pb2.OptimizationParameters(
            fp16=precision == "fp16", bf16=precision == "bf16"
        ),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
    )
    task = daemon.tasks.CreateTask(
        task_service_pb2.CreateTaskRequest(
            task=task_pb2.Task(
                training_type=task_pb2.TRAINING_TYPE_SFT, parameters=parameters, device=GPUS[0].id
            ),
            start=True,
        )
    ).task
    ended = daemon.wait(task.name, "COMPLETED", "FAILED")
    assert ended.state == task_pb2.TASK_STATE_COMPLETED, ended.end_message
    losses = [e.metrics.values["loss"] for e in daemon.events(task.name) if e.HasField("metrics")]
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])

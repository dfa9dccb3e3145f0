"""Runs on an NVIDIA GPU, in the precisions that it has; skipped where there is none."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2, task_service_pb2
from finetuned_daemon.devices import DeviceType, list_devices
from finetuned_daemon.environment.capability import device_capability
from tiny import chats, make_model, weights, write_jsonl

GPUS = [device for device in list_devices() if device.type is DeviceType.CUDA]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="NVML lists no NVIDIA GPU on this machine"),
]

low_bit = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None
    or not all(device_capability(gpu).four_bit for gpu in GPUS[:1]),
    reason="4 and 8 bits take bitsandbytes, and a GPU of the Ampere generation or newer",
)


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    yield daemon
    daemon.close()


def train(
    daemon: Daemon,
    folder: Path,
    *,
    lora: dict[str, Any] | None = None,
    training: dict[str, Any] | None = None,
    optimization: dict[str, Any] | None = None,
) -> list[float]:
    """Trains 40 steps on the first GPU, in float32 unless told otherwise; returns the losses."""
    parameters = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(write_jsonl(folder / "chats.jsonl", chats(64))),
            model_path=str(make_model(folder / "model", hidden=64)),
            output_dir=str(folder / "out"),
        ),
        training=parameters_pb2.TrainingParameters(
            max_steps=40,
            batch_size=8,
            gradient_accumulation_steps=1,
            learning_rate=1e-2,
            **(training or {}),
        ),
        lora=parameters_pb2.LoraParameters(**(lora or {})),
        optimization=parameters_pb2.OptimizationParameters(
            **{"fp16": False, **(optimization or {})}
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
    return losses


@pytest.mark.proves("optimization.fp16", "optimization.bf16")
@pytest.mark.parametrize("precision", ["fp16", "bf16", "float32"])
@pytest.mark.parametrize("use_lora", [True, False])
def test_a_run_on_the_gpu_learns(
    daemon: Daemon, tmp_path: Path, precision: str, use_lora: bool
) -> None:
    optimization = {} if precision == "float32" else {precision: True}
    train(daemon, tmp_path, lora={"use_lora": use_lora}, optimization=optimization)


@pytest.mark.proves("optimization.use_qlora")
@low_bit
@pytest.mark.parametrize("precision", ["fp16", "bf16", "float32"])
def test_qlora_on_the_gpu_learns_and_merges(daemon: Daemon, tmp_path: Path, precision: str) -> None:
    optimization = {"use_qlora": True}
    optimization |= {} if precision == "float32" else {precision: True}
    train(daemon, tmp_path, lora={"merge_lora": True}, optimization=optimization)
    (merged,) = (tmp_path / "out").glob("*/merged")
    there, here = weights(tmp_path / "model"), weights(merged)
    assert {n: a.shape for n, a in there.items()} == {n: a.shape for n, a in here.items()}


@pytest.mark.proves("training.optimizer")
@low_bit
@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_8_bit_optimizer_on_the_gpu_learns_and_saves_less(
    daemon: Daemon, tmp_path: Path, optimizer: str
) -> None:
    for name in ("adamw_torch", optimizer):
        folder = tmp_path / name
        folder.mkdir()
        training = {"optimizer": name, "save_steps": 20}
        train(daemon, folder, lora={"use_lora": False}, training=training)
    plain, eight = (
        next((tmp_path / name).glob("out/*/checkpoint-20/optimizer.pt")).stat().st_size
        for name in ("adamw_torch", optimizer)
    )
    assert eight < 0.5 * plain

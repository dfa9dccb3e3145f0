"""A probe on an NVIDIA GPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import pytest

from daemon_process import Daemon
from finetuned import Client
from finetuned_daemon.devices import DeviceType, list_devices
from tiny import chats, make_model, write_jsonl

GPUS = [device for device in list_devices() if device.type is DeviceType.CUDA]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="NVML lists no NVIDIA GPU on this machine"),
]


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_probe_measures_the_memory_of_the_gpu(tmp_path: Path, precision: str) -> None:
    """Of the GPU, not of the process; and estimates go by it."""
    daemon = Daemon(tmp_path, runner_module="finetuned_runner").start()
    try:
        parameters = {
            "data": {
                "train_file": str(write_jsonl(tmp_path / "chats.jsonl", chats(64))),
                "model_path": str(make_model(tmp_path / "model", hidden=64)),
                "output_dir": str(tmp_path / "out"),
                "eval_ratio": 0.1,
            },
            "training": {"batch_size": 8, "eval_strategy": "epoch"},
            "optimization": {"fp16": precision == "fp16", "bf16": precision == "bf16"},
        }
        with Client(daemon.address) as client:
            task = client.create_task("sft", parameters, device=GPUS[0].id)
            report = client.probe_task(task.name)
            estimate = client.estimate(task=task.name)
        assert 0 < report.peak_memory_bytes < report.memory_total_bytes
        assert report.memory_total_bytes == pytest.approx(GPUS[0].memory_total_bytes, rel=0.05)
        assert estimate.calibration.measured
        assert estimate.peak_memory_bytes == report.peak_memory_bytes
        assert not (tmp_path / "out").exists()
    finally:
        daemon.close()

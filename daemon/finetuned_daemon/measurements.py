"""What probes have measured on this machine, and of which other runs it says something."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuned_daemon.devices import Device, list_devices
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import effective_optimizer
from finetuned_daemon.runs.contract import ProbeReport, TrainingType
from finetuned_daemon.tasks import Run, now_us

_WEIGHTS = (".safetensors", ".bin")
_KERNELS = ("attn_implementation", "use_liger_kernel", "torch_compile")
_ALIKE: dict[str, tuple[str, ...]] = {
    "optimization": ("use_qlora", "fp16", "bf16", "tf32", "gradient_checkpointing"),
    "lora": ("use_lora",),
    "extensions": _KERNELS,
}
"""What has to be the same for a probe to say anything of a run: what is computed, and how."""
_EQUAL: dict[str, tuple[str, ...]] = {
    "training": ("batch_size", "gradient_accumulation_steps", "max_seq_length"),
    "optimization": _ALIKE["optimization"],
    "lora": ("use_lora", "lora_r", "lora_dropout", "lora_target_modules", "peft_config_path"),
    "extensions": (*_KERNELS, "packing", "neftune_noise_alpha", "use_dora", "lora_init"),
}
"""What has to be the same, too, for memory and speed to be those that it measured."""
_LENGTH_TOLERANCE = 0.05
"""Of the longest sample: which ones are split off for evaluation the run alone knows."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """A probe, kept for the estimates of this machine."""

    time: int
    """Microseconds since the epoch."""
    model: str
    device: str
    training_type: TrainingType
    parameters: Parameters
    report: ProbeReport


def measured_by(run: Run, training_type: TrainingType, report: ProbeReport) -> Measurement | None:
    """What a probe's report is to later estimates; None where it can't be told what of."""
    from finetuned_daemon.planning.model_files import ModelUnreadable, base_folder

    path = Path(run.parameters.data.model_path or "")
    devices = [device for device in list_devices() if device.id == run.device]
    try:
        model = model_key(base_folder(path))
    except (OSError, ModelUnreadable):
        return None
    if not devices:  # it has gone meanwhile
        return None
    return Measurement(
        time=now_us(),
        model=model,
        device=device_key(devices[0]),
        training_type=training_type,
        parameters=run.parameters,
        report=report,
    )


def model_key(folder: Path) -> str:
    """Tells models of another shape apart: their configuration, and how much their weights are.

    Raises:
        OSError: There is no such model.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    size = sum(file.stat().st_size for file in folder.iterdir() if file.suffix in _WEIGHTS)
    return f"{digest.hexdigest()[:32]}-{size}"


def device_key(device: Device) -> str:
    """Tells devices of another kind apart; two GPUs of one product are the same."""
    return f"{device.type} {device.product_name} {device.cores}".strip()


@dataclass(frozen=True)
class Found:
    """A measurement that says something of a run."""

    measurement: Measurement
    is_equal: bool
    """It had the run's own settings, with samples about as long."""


def find(
    measurements: Sequence[Measurement],
    parameters: Parameters,
    training_type: TrainingType,
    longest_tokens: int,
    samples: int,
) -> Found | None:
    """The best of the measurements of a model on a device, given newest first.

    Args:
        measurements: To choose from.
        parameters: Of the run.
        training_type: Of the run.
        longest_tokens: Tokens of its longest sample, as cut.
        samples: That it trains on.
    """
    alike = [m for m in measurements if _agree(m.parameters, parameters, training_type, _ALIKE)]
    if not alike:
        return None
    batch = min(parameters.training.batch_size, samples)

    def is_equal(known: Measurement) -> bool:
        packed = parameters.extensions.packing
        length = known.report.longest_tokens
        return (
            _agree(known.parameters, parameters, training_type, _EQUAL)
            and effective_optimizer(known.parameters) == effective_optimizer(parameters)
            and (packed or _batch(known) == batch)
            and (packed or abs(length - longest_tokens) <= _LENGTH_TOLERANCE * longest_tokens)
        )

    for known in alike:
        if is_equal(known):
            return Found(known, is_equal=True)
    wanted = max(1, batch * longest_tokens)

    def distance(known: Measurement) -> float:
        tokens = max(1, _batch(known) * known.report.longest_tokens)
        return abs(math.log(tokens / wanted))

    return Found(min(alike, key=distance), is_equal=False)


def _batch(known: Measurement) -> int:
    return min(known.parameters.training.batch_size, known.report.train_samples)


def _agree(
    a: Parameters, b: Parameters, training_type: TrainingType, fields: dict[str, tuple[str, ...]]
) -> bool:
    return _values(a, training_type, fields) == _values(b, training_type, fields)


def _values(
    parameters: Parameters, training_type: TrainingType, fields: dict[str, tuple[str, ...]]
) -> list[Any]:
    return [
        getattr(getattr(parameters, section), name)
        for section, names in fields.items()
        if training_type is TrainingType.SFT or section != "lora"
        for name in names
    ]

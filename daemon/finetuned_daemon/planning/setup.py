"""What parameters come to on a device: which weights are trained, in which formats, how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from finetuned_daemon.devices import Device, DeviceType
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.planning.adapter import Adapter, plan_adapter
from finetuned_daemon.planning.model_files import ModelFiles
from finetuned_daemon.runs.contract import TrainingType

OptimizerKind = Literal["adam", "adam_8bit", "adafactor", "sgd"]

_AMPERE = (8, 0)
"""Compute capability from which on a GPU has bf16."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """A run's model, as the runner sets it up."""

    model: ModelFiles
    adapter: Adapter | None
    """None: all weights are trained."""
    on_gpu: bool
    compute_bytes: int
    """Of a number in matrix products."""
    weight_bytes: int
    """Of a number in the base model's weights, those in 4 bits apart."""
    four_bit: bool
    """Frozen matrices are held in 4 bits (QLoRA)."""
    checkpointing: bool
    """Activations are computed twice rather than kept."""
    optimizer: OptimizerKind

    @property
    def trained(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors that are trained, by name."""
        if self.adapter is not None:
            return dict(self.adapter.trained)
        return {name: tensor.shape for name, tensor in self.model.weights.items()}

    @property
    def trained_parameters(self) -> int:
        """Number of values that are trained."""
        return self.model.parameters if self.adapter is None else self.adapter.parameters

    @property
    def total_parameters(self) -> int:
        """Number of values, those of the adapter included."""
        return self.model.parameters + (self.adapter.parameters if self.adapter else 0)


def plan_setup(
    parameters: Parameters, training_type: TrainingType, device: Device, model: ModelFiles
) -> Setup:
    """How the runner sets up a model on a device.

    Raises:
        ModelUnreadable: The LoRA configuration file can't be used.
    """
    optimization = parameters.optimization
    on_gpu = device.type is not DeviceType.CPU
    has_bf16 = not on_gpu or _capability(device) >= _AMPERE
    is_half = (optimization.bf16 and has_bf16) or (optimization.fp16 and on_gpu)
    uses_lora = training_type is TrainingType.SFT and parameters.lora.use_lora
    return Setup(
        model=model,
        adapter=plan_adapter(parameters, model) if uses_lora else None,
        on_gpu=on_gpu,
        compute_bytes=2 if is_half else 4,
        weight_bytes=2 if is_half and uses_lora and on_gpu else 4,
        four_bit=uses_lora and optimization.use_qlora,
        checkpointing=optimization.gradient_checkpointing,
        optimizer=_optimizer(parameters),
    )


def _optimizer(parameters: Parameters) -> OptimizerKind:
    name = parameters.training.optimizer
    if name == "adafactor" or name == "sgd":
        return name
    if name.endswith("8bit") or parameters.optimization.use_8bit_optimizer:
        return "adam_8bit"
    return "adam"


def _capability(device: Device) -> tuple[int, ...]:
    return tuple(int(part) for part in device.compute_capability.split(".") if part.isdigit())

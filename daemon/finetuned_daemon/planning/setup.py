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
_PADDED = frozenset(
    {
        *("bloom", "codegen", "deepseek_v2", "deepseek_v3", "gemma2", "gptj", "gpt_oss"),
        *("minimax", "mpt", "xglm"),
        # Convolutions and recurrences see across documents.
        *("bamba", "falcon_h1", "falcon_mamba", "granitemoehybrid", "jamba", "lfm2", "mamba"),
        *("mamba2", "nemotron_h", "qwen3_next", "recurrent_gemma", "rwkv", "zamba", "zamba2"),
    }
)
"""Types of models that the runner does not compute in rows of documents; it tries each."""
_SCALED_LOGITS = frozenset(("cohere", "cohere2", "granite", "granitemoe"))
"""Types of models that make more of their head's output."""


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
    in_rows: bool
    """A micro-batch is one row of documents, without padding."""
    has_plain_head: bool
    """Logits are made a few at a time, and of learned positions only."""
    is_fused: bool
    """LoRA layers compute in one piece, and not as PEFT does."""

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
    adapter = plan_adapter(parameters, model) if uses_lora else None
    four_bit = uses_lora and optimization.use_qlora
    is_left_alone = _is_left_alone(parameters)
    in_rows = (
        not is_left_alone
        and parameters.extensions.attn_implementation != "eager"
        and model.model_type not in _PADDED
    )
    return Setup(
        model=model,
        adapter=adapter,
        on_gpu=on_gpu,
        compute_bytes=2 if is_half else 4,
        weight_bytes=2 if is_half and uses_lora and on_gpu else 4,
        four_bit=four_bit,
        checkpointing=optimization.gradient_checkpointing,
        optimizer=_optimizer(parameters),
        in_rows=in_rows,
        # In fp16 a gradient has to be scaled before it is computed.
        has_plain_head=in_rows
        and not (optimization.fp16 and on_gpu)
        and model.model_type not in _SCALED_LOGITS
        and (adapter is None or model.output_embedding not in adapter.ranks),
        is_fused=adapter is not None
        and not (is_left_alone or is_half or four_bit)
        and not (adapter.dropout or adapter.has_magnitudes),
    )


def _is_left_alone(parameters: Parameters) -> bool:
    """Whether an extension has changed the model's forward pass, which the runner then keeps."""
    extensions = parameters.extensions
    return bool(
        extensions.use_liger_kernel or extensions.torch_compile or extensions.neftune_noise_alpha
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

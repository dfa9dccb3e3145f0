"""Parameters to arguments: the one module that knows our names and the libraries'."""

from __future__ import annotations

import importlib.util
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from transformers import TrainingArguments

from finetuned_daemon.parameters.models import Parameters, TrainingParameters
from finetuned_daemon.parameters.needs import effective_optimizer
from finetuned_daemon.runs.contract import EndReason
from finetuned_runner.failures import RunFailed
from finetuned_runner.report import Report

# An older transformers 5 calls it by the second name, which newer ones deprecate.
_CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)

_PAGED = "paged_adamw_8bit"


# --- precision


@dataclass(frozen=True)
class Precision:
    """Number formats that the device can compute with."""

    fp16: bool
    bf16: bool
    tf32: bool

    @property
    def compute_dtype(self) -> torch.dtype:
        """Format of matrix products."""
        if self.bf16:
            return torch.bfloat16
        return torch.float16 if self.fp16 else torch.float32


def plan_precision(parameters: Parameters, device: str, report: Report) -> Precision:
    """What is asked for, as far as `device` (`cpu`, `cuda:N`) can; a notice says what it can't.

    Raises:
        RunFailed: DEVICE_LOST, if a GPU is asked for and none is to be had.
    """
    wanted = parameters.optimization
    on_gpu = device != "cpu"
    if on_gpu and not torch.cuda.is_available():
        raise RunFailed(
            EndReason.DEVICE_LOST,
            f"{device} can't be used: torch finds no GPU; check its driver, or choose cpu.",
        )
    # Compute capability 8.0 is Ampere.
    ampere = on_gpu and torch.cuda.get_device_capability(0) >= (8, 0)
    if wanted.fp16 and not on_gpu:
        report.notice(
            "optimization.fp16",
            "FP16_UNAVAILABLE_ON_CPU",
            "fp16 is not available on the CPU; the run computes in float32.",
        )
    if wanted.bf16 and on_gpu and not ampere:
        report.notice(
            "optimization.bf16",
            "BF16_UNAVAILABLE",
            "This GPU has no bf16; the run computes in float32.",
        )
    if wanted.tf32 and not ampere:
        report.notice(
            "optimization.tf32",
            "TF32_UNAVAILABLE",
            "TF32 needs an NVIDIA GPU, Ampere or newer; it is off.",
        )
    return Precision(
        fp16=wanted.fp16 and on_gpu,
        bf16=wanted.bf16 and (ampere or not on_gpu),
        tf32=wanted.tf32 and ampere,
    )


# --- transformers


def training_arguments(
    parameters: Parameters,
    output_dir: str,
    device: str,
    precision: Precision,
    *,
    evaluates: bool,
    report: Report,
) -> TrainingArguments:
    """The arguments of transformers' Trainer."""
    data, training, extensions = parameters.data, parameters.training, parameters.extensions
    on_gpu = device != "cpu"
    if data.dataloader_pin_memory and not on_gpu:
        report.notice(
            "data.dataloader_pin_memory",
            "PIN_MEMORY_WITHOUT_GPU",
            "Locked page memory is of use with a GPU only; it is off.",
        )
    arguments: dict[str, Any] = {
        "output_dir": output_dir,
        "use_cpu": not on_gpu,
        "fp16": precision.fp16,
        "bf16": precision.bf16,
        "tf32": precision.tf32 or None,  # False would be refused where there is no such GPU
        # the loop
        "per_device_train_batch_size": training.batch_size,
        "per_device_eval_batch_size": training.batch_size,
        "gradient_accumulation_steps": training.gradient_accumulation_steps,
        "num_train_epochs": training.num_train_epochs,
        "max_steps": training.max_steps if training.max_steps > 0 else -1,
        "seed": parameters.general.seed,
        "data_seed": parameters.general.seed,
        _CHECKPOINTING: parameters.optimization.gradient_checkpointing,
        f"{_CHECKPOINTING}_kwargs": {"use_reentrant": False},
        # optimizer and schedule
        "optim": _optimizer(parameters, device, report),
        "learning_rate": training.learning_rate,
        "weight_decay": training.weight_decay,
        "max_grad_norm": training.max_grad_norm,
        "lr_scheduler_type": training.lr_scheduler_type,
        "lr_scheduler_kwargs": scheduler_options(training),
        "warmup_steps": warmup(training),
        # saving and evaluation; old checkpoints are removed by our own trainer, which says so
        "save_strategy": training.save_strategy,
        "save_steps": training.save_steps,
        "save_total_limit": None,
        "eval_strategy": training.eval_strategy if evaluates else "no",
        "eval_steps": training.eval_steps,
        "prediction_loss_only": True,
        # data
        "dataloader_num_workers": data.dataloader_num_workers,
        "dataloader_pin_memory": data.dataloader_pin_memory and on_gpu,
        "remove_unused_columns": False,
        # reports
        "logging_steps": parameters.logging.logging_steps,
        "logging_nan_inf_filter": False,  # it would hide a loss that is not finite
        "log_level": parameters.logging.log_level,
        "disable_tqdm": True,
        # extensions
        "neftune_noise_alpha": extensions.neftune_noise_alpha or None,
        "use_liger_kernel": extensions.use_liger_kernel,
        "torch_compile": extensions.torch_compile,
        "report_to": "none",  # `reporting` does it
    }
    return TrainingArguments(**arguments)


def warmup(training: TrainingParameters) -> float:
    """Warm-up as transformers 5 takes it: from 1 on a number of steps, below a share of them."""
    if training.warmup_steps > 0:
        return training.warmup_steps
    # 1 would be one step; the largest number below it is all of them.
    return min(training.warmup_ratio, math.nextafter(1.0, 0.0))


def scheduler_options(training: TrainingParameters) -> dict[str, int]:
    """Options of the scheduler; other types refuse `num_cycles`, and only when training begins."""
    if training.lr_scheduler_type == "cosine_with_restarts":
        return {"num_cycles": training.lr_num_cycles}
    return {}


def _optimizer(parameters: Parameters, device: str, report: Report) -> str:
    name = effective_optimizer(parameters)
    if parameters.optimization.use_8bit_optimizer and not name.endswith("8bit"):
        report.notice(
            "optimization.use_8bit_optimizer",
            "NO_8BIT_OPTIMIZER",
            f"There is no 8-bit {name}; it runs in full precision.",
        )
    if name.endswith("8bit"):
        need_bitsandbytes(f"The optimizer {name}", EndReason.RUNNER_CRASHED)
    if name == _PAGED and device == "cpu":
        report.notice(
            "training.optimizer",
            "PAGED_OPTIMIZER_WITHOUT_GPU",
            "The state of the optimizer is paged between GPU and host; without a GPU there is "
            "nothing to page, and it runs as adamw_8bit.",
        )
        return "adamw_8bit"
    return name


def need_bitsandbytes(what: str, reason: EndReason) -> None:
    """Raises RunFailed before the work begins, where transformers would find out in the middle."""
    if importlib.util.find_spec("bitsandbytes") is None:
        raise RunFailed(
            reason,
            f"{what} needs bitsandbytes, which is not installed; install it or turn this off.",
        )


# --- peft


def lora_config(parameters: Parameters, report: Report) -> LoraConfig:
    """The LoRA configuration: the file's, if one is given, else the parameters'.

    Raises:
        RunFailed: MODEL_UNLOADABLE, if the file is no LoRA configuration.
    """
    lora, extensions = parameters.lora, parameters.extensions
    if lora.peft_config_path:
        report.notice(
            "lora.peft_config_path",
            "PEFT_CONFIG_WINS",
            "The LoRA settings come from the PEFT configuration file; those of the task are not "
            "used.",
        )
        return _lora_config_of(Path(lora.peft_config_path))
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=lora.lora_r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        target_modules=list(lora.lora_target_modules),
        use_rslora=extensions.use_rslora,
        use_dora=extensions.use_dora,
        init_lora_weights="pissa" if extensions.lora_init == "pissa" else True,
    )


def _lora_config_of(path: Path) -> LoraConfig:
    try:
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict) or values.get("peft_type", "LORA") != "LORA":
            raise ValueError("it is no LoRA configuration")
        unknown = set(values) - set(LoraConfig.__dataclass_fields__)
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(unknown))}")
        own = {
            "peft_type",
            "base_model_name_or_path",
            "revision",
            "inference_mode",
            "auto_mapping",
            "peft_version",
        }
        values = {key: value for key, value in values.items() if key not in own}
        return LoraConfig(**{**values, "task_type": "CAUSAL_LM", "inference_mode": False})
    except (OSError, ValueError, TypeError) as error:
        raise RunFailed(
            EndReason.MODEL_UNLOADABLE, f"lora.peft_config_path {path} can't be used: {error}."
        ) from error

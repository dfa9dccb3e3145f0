"""The 49 parameters of a task as pydantic models.

The one source of default, range, choices, label and fold.

Field names and types are those of `finetuned/v1/parameters.proto`; a test compares. Imported by
daemon and runner.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.config import JsonDict

Fold = Literal["common", "optional", "advanced", "optimization", "saving", "evaluation"]


def _parameter(
    default: Any,
    zh: str,
    en: str,
    fold: Fold,
    *,
    required: bool = False,
    path: Literal["file", "directory"] | None = None,
    choices: tuple[str, ...] | None = None,
    discouraged: bool = False,
    **constraints: Any,
) -> Any:
    """One parameter.

    Its default, labels, fold, and pydantic's own constraints (`ge`, `le`, `multiple_of`).

    `required` says that the user must see and confirm it; one with the default None must also be
    filled before a start.
    """
    extra: JsonDict = {
        "zh": zh,
        "en": en,
        "fold": fold,
        "required": required,
        "discouraged": discouraged,
    }
    if path:
        extra["path"] = path
    if choices:
        extra["choices"] = list(choices)
    return Field(default, json_schema_extra=extra, **constraints)


class _Section(BaseModel):
    # Strict: a bool is no int and a string no number; clients that read text convert it themselves.
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class DataParameters(_Section):
    """Files and folders, samples, loading."""

    train_file: str | None = _parameter(
        None, "训练数据文件路径", "Training data file path", "common", required=True, path="file"
    )
    eval_file: str | None = _parameter(
        None, "评估数据文件路径", "Evaluation data file path", "optional", path="file"
    )
    output_dir: str | None = _parameter(
        None, "训练输出目录", "Training output directory", "common", required=True, path="directory"
    )
    model_path: str | None = _parameter(
        None, "训练模型目录", "Training model path", "common", required=True, path="directory"
    )
    tokenizer_path: str | None = _parameter(
        None, "分词器路径", "Tokenizer path", "optional", path="directory"
    )
    resume_from_checkpoint: str | None = _parameter(
        None, "恢复训练检查点路径", "Checkpoint path for resume", "optional", path="directory"
    )
    attach_lora: bool = _parameter(
        False, "附加LoRA权重", "Attach LoRA weights", "optional", discouraged=True
    )
    max_samples: int = _parameter(
        0, "最大样本数", "Maximum samples", "optimization", ge=0, le=100_000
    )
    eval_ratio: float = _parameter(
        0.0, "评估集采样比例", "Evaluation sampling ratio", "optimization", ge=0, le=1
    )
    reshuffle: bool = _parameter(False, "是否重新打乱数据", "Reshuffle data", "optional")
    dataloader_num_workers: int = _parameter(
        1, "数据加载器线程数", "Data loader threads", "optimization", ge=0, le=16
    )
    dataloader_pin_memory: bool = _parameter(
        False, "是否使用锁页内存", "Use locked page memory", "optimization"
    )


Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]
SchedulerType = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts"
]
IntervalStrategy = Literal["steps", "epoch", "no"]


class TrainingParameters(_Section):
    """The training loop: batches, learning rate, schedule, saving, evaluation."""

    batch_size: int = _parameter(2, "批次大小", "Batch size", "common", required=True, ge=1, le=128)
    gradient_accumulation_steps: int = _parameter(
        4, "梯度累积步数", "Gradient accumulation steps", "common", required=True, ge=1, le=256
    )
    max_seq_length: int = _parameter(
        512,
        "最大序列长度",
        "Max sequence length",
        "common",
        required=True,
        ge=128,
        le=8192,
        multiple_of=8,
    )
    learning_rate: float = _parameter(
        2e-4, "学习率", "Learning rate", "common", required=True, ge=1e-6, le=1e-1
    )
    optimizer: Optimizer = _parameter("adamw_torch", "优化器", "Optimizer", "common", required=True)
    lr_scheduler_type: SchedulerType = _parameter(
        "cosine", "学习率调度器", "LR scheduler type", "common", required=True
    )
    num_train_epochs: int = _parameter(
        2, "训练轮数", "Training epochs", "common", required=True, ge=1, le=100
    )
    weight_decay: float = _parameter(0.01, "权重衰减", "Weight decay", "advanced", ge=0, le=1)
    warmup_ratio: float = _parameter(0.1, "预热比例", "Warmup ratio", "optional", ge=0, le=1)
    warmup_steps: int = _parameter(0, "预热步数", "Warmup steps", "optional", ge=0, le=10_000)
    max_grad_norm: float = _parameter(
        1.0, "最大梯度范数", "Max gradient norm", "advanced", ge=0.1, le=10
    )
    max_steps: int = _parameter(
        -1,
        "最大训练步数(-1为不限制)",
        "Max training steps (-1=unlimited)",
        "optional",
        ge=-1,
        le=100_000,
    )
    lr_num_cycles: int = _parameter(
        2, "学习率余弦退火周期", "LR cosine annealing cycles", "advanced", ge=1, le=10
    )
    save_strategy: IntervalStrategy = _parameter("steps", "保存策略", "Save strategy", "saving")
    save_steps: int = _parameter(100, "保存步数", "Save steps", "saving", ge=1, le=10_000)
    eval_strategy: IntervalStrategy = _parameter(
        "no", "评估策略", "Evaluation strategy", "evaluation"
    )
    eval_steps: int = _parameter(100, "评估步数", "Evaluation steps", "evaluation", ge=1, le=10_000)
    save_total_limit: int = _parameter(
        100, "最大保存检查点", "Max saved checkpoints", "saving", ge=1, le=1000
    )
    save_interval_minutes: int = _parameter(
        30, "保存间隔分钟", "Save interval (minutes)", "saving", ge=1, le=1440
    )
    early_stopping_patience: int = _parameter(
        0, "早停步数", "Early stopping patience", "optional", ge=0, le=100
    )
    early_stopping_threshold: float = _parameter(
        0.005, "早停阈值", "Early stopping threshold", "optional", ge=0.001, le=1
    )


TARGET_MODULES = (
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "embed_tokens",
    "lm_head",
)


class LoraParameters(_Section):
    """Low-rank adaptation (LoRA, https://arxiv.org/abs/2106.09685). Supervised fine-tuning only."""

    use_lora: bool = _parameter(
        True, "使用LoRA微调", "Use LoRA fine-tuning", "common", required=True
    )
    lora_r: int = _parameter(
        16, "LoRA的r参数", "LoRA r parameter", "common", required=True, ge=1, le=512
    )
    lora_alpha: int = _parameter(
        16, "LoRA的alpha参数", "LoRA alpha parameter", "common", required=True, ge=1, le=512
    )
    lora_dropout: float = _parameter(0.0, "LoRA的dropout", "LoRA dropout", "advanced", ge=0, le=1)
    # Any module name is accepted: the model at hand decides, and `choices` are those of the usual
    # architectures.
    lora_target_modules: list[str] = _parameter(
        list(TARGET_MODULES[:7]),
        "LoRA目标模块",
        "LoRA target modules",
        "advanced",
        choices=TARGET_MODULES,
        min_length=1,
        max_length=256,
    )
    merge_lora: bool = _parameter(
        False, "训练后合并LoRA权重", "Merge LoRA weights after training", "optional"
    )
    peft_config_path: str | None = _parameter(
        None, "PEFT配置路径", "PEFT config path", "optional", path="file"
    )


class OptimizationParameters(_Section):
    """Precision and memory."""

    use_qlora: bool = _parameter(False, "使用 QLoRA", "Use QLoRA", "common")
    use_8bit_optimizer: bool = _parameter(
        False, "使用8-bit优化器", "Use 8-bit optimizers", "common"
    )
    fp16: bool = _parameter(
        True, "使用FP16混合精度", "Use FP16 mixed precision", "common", required=True
    )
    bf16: bool = _parameter(
        False, "使用BF16混合精度(NVIDIA GPU)", "Use BF16 mixed precision (NVIDIA GPU)", "common"
    )
    tf32: bool = _parameter(False, "使用TF32(NVIDIA GPU)", "Use TF32 (NVIDIA GPU)", "common")
    gradient_checkpointing: bool = _parameter(
        True, "梯度检查点", "Gradient checkpointing", "common", required=True
    )


LogLevel = Literal["debug", "info", "warning", "error"]


class LoggingParameters(_Section):
    """How much the run reports."""

    log_level: LogLevel = _parameter("info", "日志级别", "Log level", "common", required=True)
    logging_steps: int = _parameter(
        10, "日志记录步数", "Logging steps", "common", required=True, ge=1, le=1000
    )


class GeneralParameters(_Section):
    """What belongs to no other section."""

    seed: int = _parameter(42, "随机种子", "Random seed", "common", required=True, ge=0, le=999_999)


class Parameters(_Section):
    """All parameters, in their six sections. An absent field has its default."""

    data: DataParameters = Field(default_factory=DataParameters)
    training: TrainingParameters = Field(default_factory=TrainingParameters)
    lora: LoraParameters = Field(default_factory=LoraParameters)
    optimization: OptimizationParameters = Field(default_factory=OptimizationParameters)
    logging: LoggingParameters = Field(default_factory=LoggingParameters)
    general: GeneralParameters = Field(default_factory=GeneralParameters)


SECTIONS: dict[str, type[_Section]] = {
    "data": DataParameters,
    "training": TrainingParameters,
    "lora": LoraParameters,
    "optimization": OptimizationParameters,
    "logging": LoggingParameters,
    "general": GeneralParameters,
}
"""Sections in the order of the form, by their name in the API."""

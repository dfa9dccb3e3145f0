"""Rules across fields, and between fields and the device. No file is read here."""

from __future__ import annotations

import math
from collections.abc import Iterator

from finetuned_daemon.devices import CPU
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.models import Parameters, TrainingParameters
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.extensions import check_extensions, check_means
from finetuned_daemon.validation.surroundings import Surroundings

_8BIT = ("adamw_8bit", "paged_adamw_8bit")
_HAS_8BIT_FORM = ("adamw_torch", *_8BIT)


def check_across(p: Parameters, training_type: TrainingType) -> Iterator[Violation]:
    """What fields say of one another."""
    yield from _check_precision(p)
    yield from _check_evaluation(p)
    yield from _check_loop(p)
    yield from _check_lora(p, training_type)
    yield from check_extensions(p, training_type)


def _check_precision(p: Parameters) -> Iterator[Violation]:
    if p.optimization.fp16 and p.optimization.bf16:
        yield Violation(
            "optimization.bf16",
            Text(
                "excludes fp16; set optimization.fp16 to false",
                "与 fp16 互斥；请将 optimization.fp16 设为 false",
            ),
            "FP16_WITH_BF16",
            suggested=False,
            suggested_field="optimization.fp16",
        )
    optimizer = p.training.optimizer
    if p.optimization.use_8bit_optimizer and optimizer not in _HAS_8BIT_FORM:
        yield Violation(
            "optimization.use_8bit_optimizer",
            Text(
                f"{optimizer} has no 8-bit form; adamw_torch has",
                f"{optimizer} 没有 8-bit 版本；adamw_torch 有",
            ),
            "NO_8BIT_OPTIMIZER",
            suggested=False,
        )


def _check_evaluation(p: Parameters) -> Iterator[Violation]:
    data, training = p.data, p.training
    if data.eval_file and data.eval_file == data.train_file:
        yield Violation(
            "data.eval_file",
            Text(
                "is the training data itself: its loss says nothing about anything else",
                "就是训练数据本身：其损失无法说明任何泛化能力",
            ),
            "EVALUATION_ON_TRAINING_DATA",
            Severity.WARNING,
        )
    has_data = bool(data.eval_file or data.eval_ratio)
    if data.eval_file and data.eval_ratio:
        yield Violation(
            "data.eval_ratio",
            Text(
                "must be 0 where data.eval_file is given",
                "已指定 data.eval_file 时必须为 0",
            ),
            "EVALUATION_FILE_WITH_RATIO",
            suggested=0.0,
        )
    if data.eval_ratio == 1:
        yield Violation(
            "data.eval_ratio",
            Text(
                "must be less than 1, or nothing is left to train on",
                "必须小于 1，否则没有数据可用于训练",
            ),
            "SPLIT_LEAVES_NONE",
            suggested=0.1,
        )
    if training.eval_strategy != "no" and not has_data:
        yield Violation(
            "training.eval_strategy",
            Text(
                "needs evaluation data: give data.eval_file or data.eval_ratio, or set it to no",
                "需要评估数据：请提供 data.eval_file 或 data.eval_ratio，或设为 no",
            ),
            "EVALUATION_DATA_MISSING",
            suggested="no",
        )
    if training.early_stopping_patience and training.eval_strategy == "no":
        yield Violation(
            "training.early_stopping_patience",
            Text(
                "counts evaluations: set training.eval_strategy to steps or epoch, or this to 0",
                "按评估次数计数：请将 training.eval_strategy 设为 steps 或 epoch，或将此项设为 0",
            ),
            "EARLY_STOPPING_WITHOUT_EVALUATION",
            suggested="epoch" if has_data else 0,
            suggested_field="training.eval_strategy" if has_data else "",
        )
    if has_data and training.eval_strategy == "no":
        yield Violation(
            "data.eval_file" if data.eval_file else "data.eval_ratio",
            Text(
                "the evaluation data has no effect: training.eval_strategy is no",
                "评估数据不会被使用：training.eval_strategy 为 no",
            ),
            "EVALUATION_OFF",
            # A share that is split off is lost to the training as long as nothing evaluates it.
            Severity.NOTICE,
            suggested="epoch",
            suggested_field="training.eval_strategy",
        )


def _check_loop(p: Parameters) -> Iterator[Violation]:
    training = p.training
    if training.max_steps == 0:
        yield Violation(
            "training.max_steps",
            Text(
                "must be -1 (unlimited) or at least 1, not 0",
                "必须为 -1（不限制）或至少为 1，不能为 0",
            ),
            "OUT_OF_RANGE",
            suggested=-1,
        )
    if training.max_steps > 0:
        yield from check_warmup(training, training.max_steps)


def check_warmup(training: TrainingParameters, total_steps: int) -> Iterator[Violation]:
    """Whether the warm-up ends before a run of so many steps; the constant schedule has none."""
    warmup_steps = training.warmup_steps
    if training.lr_scheduler_type == "constant" or warmup_steps < total_steps:
        return
    yield Violation(
        "training.warmup_steps",
        Text(
            f"the warm-up takes {warmup_steps} steps and the run {total_steps}: the learning rate "
            "is never reached, or only at the end",
            f"预热需要 {warmup_steps} 步，而训练共 {total_steps} 步："
            "学习率始终达不到设定值，或到最后才达到",
        ),
        "WARMUP_LONGER_THAN_RUN",
        Severity.WARNING,
        suggested=total_steps // 10,
    )


def split_leaves_none(samples: int) -> Violation:
    """A share for evaluation that is all there is."""
    # The largest share, in steps of the form, that leaves one.
    good = math.floor((samples - 1) / samples * 100) / 100
    return Violation(
        "data.eval_ratio",
        Text(
            f"takes all of the {samples} samples and leaves none to train on",
            f"会占用全部 {samples} 个样本，没有数据可用于训练",
        ),
        "SPLIT_LEAVES_NONE",
        suggested=good or None,
    )


def check_evaluations(training: TrainingParameters, total_steps: int) -> Iterator[Violation]:
    """Whether a run of so many steps is ever evaluated."""
    if training.eval_strategy != "steps" or training.eval_steps <= total_steps:
        return
    yield Violation(
        "training.eval_steps",
        Text(
            f"the run has {total_steps} steps: it is evaluated at its end alone",
            f"训练共 {total_steps} 步：只会在结束时评估一次",
        ),
        "EVALUATION_AT_END_ONLY",
        Severity.WARNING,
        suggested=max(1, total_steps // 5),
    )


def _check_lora(p: Parameters, training_type: TrainingType) -> Iterator[Violation]:
    is_sft = training_type is TrainingType.SFT
    if is_sft and p.lora.use_lora and p.lora.lora_dropout == 1:
        yield Violation(
            "lora.lora_dropout",
            Text("leaves out everything: nothing is learned", "会丢弃全部输入：学不到任何内容"),
            "NOTHING_TO_LEARN",
            Severity.WARNING,
            suggested=0.05,
        )
    if p.optimization.use_qlora and not (is_sft and p.lora.use_lora):
        yield Violation(
            "optimization.use_qlora",
            Text(
                "needs lora.use_lora: weights in 4 bits can't be trained themselves",
                "需要启用 lora.use_lora：4-bit 权重本身无法训练",
            )
            if is_sft
            else Text(
                "is for LoRA, and pretraining trains all weights",
                "仅用于 LoRA，而预训练会训练全部权重",
            ),
            "QLORA_WITHOUT_LORA",
            suggested=is_sft,
            suggested_field="lora.use_lora" if is_sft else "",
        )
    without_effect = {
        "data.attach_lora": p.data.attach_lora,
        "lora.merge_lora": p.lora.merge_lora,
        "lora.peft_config_path": bool(p.lora.peft_config_path),
    }
    for field, is_set in without_effect.items():
        if not is_set or (not is_sft and not field.startswith("data.")):
            continue
        if not is_sft:
            yield Violation(
                field,
                Text("has no effect: pretraining trains all weights", "无效：预训练会训练全部权重"),
                "NOT_FOR_PRETRAINING",
                Severity.NOTICE,
            )
        elif not p.lora.use_lora:
            yield Violation(
                field,
                Text("has no effect: lora.use_lora is off", "无效：lora.use_lora 已关闭"),
                "LORA_OFF",
                Severity.NOTICE,
            )
    if is_sft and p.lora.use_lora and p.lora.peft_config_path and p.data.attach_lora:
        yield Violation(
            "lora.peft_config_path",
            Text(
                "has no effect: the weights of data.attach_lora have their own configuration",
                "无效：data.attach_lora 的权重自带配置",
            ),
            "ATTACHED_LORA_WINS",
            Severity.NOTICE,
        )
    elif is_sft and p.lora.use_lora and p.lora.peft_config_path:
        yield Violation(
            "lora.peft_config_path",
            Text(
                "the file decides: r, alpha, dropout and target modules of the form have no effect",
                "以该文件为准：表单中的 r、alpha、dropout 和目标模块不生效",
            ),
            "PEFT_CONFIG_WINS",
            Severity.NOTICE,
        )


# --- the device


def check_device(
    p: Parameters, training_type: TrainingType, surroundings: Surroundings
) -> Iterator[Violation]:
    """What the device can't do."""
    yield from check_means(p, surroundings)
    can, device = surroundings.capability, surroundings.device
    optimization = p.optimization
    if not surroundings.has_bitsandbytes:
        yield from _check_bitsandbytes(p, training_type)
    if optimization.use_qlora and training_type is TrainingType.SFT and not can.four_bit:
        yield _lacks("optimization.use_qlora", "4-bit weights", "4-bit 权重", device, False)
    if optimization.use_8bit_optimizer and not can.eight_bit_optimizer:
        yield _lacks(
            "optimization.use_8bit_optimizer", "8-bit optimizers", "8-bit 优化器", device, False
        )
    if p.training.optimizer in _8BIT and not can.eight_bit_optimizer:
        yield _lacks(
            "training.optimizer",
            f"{p.training.optimizer}; there are adamw_torch, adafactor and sgd",
            f"{p.training.optimizer}；可用 adamw_torch、adafactor 和 sgd",
            device,
            "adamw_torch",
        )
    if optimization.bf16 and not can.bf16:
        yield _lacks("optimization.bf16", "bf16", "bf16", device, False)
    if optimization.tf32 and not can.tf32:
        yield _lacks("optimization.tf32", "TF32", "TF32", device, False)
    if optimization.fp16 and not optimization.bf16 and not can.fp16:
        yield Violation(
            "optimization.fp16",
            Text(
                f"{device} doesn't train in fp16: the run computes in float32",
                f"{device} 不支持 fp16 训练：将以 float32 计算",
            ),
            "FP16_UNAVAILABLE_ON_CPU",
            # It is the default: whoever has never looked at it can start all the same.
            Severity.NOTICE,
            suggested=False,
        )
    if p.training.optimizer == "paged_adamw_8bit" and device == CPU:
        yield Violation(
            "training.optimizer",
            Text(
                "without a GPU there is nothing to page: it runs as adamw_8bit",
                "没有 GPU 时无需分页：将按 adamw_8bit 运行",
            ),
            "PAGED_OPTIMIZER_WITHOUT_GPU",
            Severity.NOTICE,
            suggested="adamw_8bit",
        )
    if p.data.dataloader_pin_memory and device == CPU:
        yield Violation(
            "data.dataloader_pin_memory",
            Text("has no effect without a GPU", "没有 GPU 时无效"),
            "PIN_MEMORY_WITHOUT_GPU",
            Severity.NOTICE,
            suggested=False,
        )


def _check_bitsandbytes(p: Parameters, training_type: TrainingType) -> Iterator[Violation]:
    """Each field that needs the package where it is missing; a start is refused for it."""
    fields = {
        "optimization.use_qlora": p.optimization.use_qlora and training_type is TrainingType.SFT,
        "optimization.use_8bit_optimizer": p.optimization.use_8bit_optimizer,
        "training.optimizer": p.training.optimizer in _8BIT,
    }
    for field in (field for field, needs in fields.items() if needs):
        yield Violation(
            field,
            Text(
                "needs the package bitsandbytes, which the training environment lacks; it comes "
                "with finetuned[qlora]",
                "需要 bitsandbytes，而训练环境中没有安装；安装 finetuned[qlora] 即可",
            ),
            "BITSANDBYTES_MISSING",
            Severity.WARNING,
        )


def _lacks(field: str, en: str, zh: str, device: str, suggested: bool | str) -> Violation:
    if device == CPU:
        text = Text(
            f"needs an NVIDIA GPU: the CPU has no {en}", f"需要 NVIDIA GPU：CPU 不支持 {zh}"
        )
    else:
        text = Text(
            f"{device} has no {en}: it takes an NVIDIA GPU of the Ampere generation or newer",
            f"{device} 不支持 {zh}：需要 NVIDIA Ampere 或更新架构的 GPU",
        )
    return Violation(field, text, "DEVICE_LACKS_IT", suggested=suggested)

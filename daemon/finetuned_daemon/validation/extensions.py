"""Rules for the section `extensions`: what can't be combined, and what it takes to run them."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

from finetuned_daemon.devices import CPU
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.extensions import ExtensionParameters
from finetuned_daemon.parameters.field import SFT_ONLY, info_of
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import extra_packages
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import Manifest
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.surroundings import Surroundings

_SHAPES = ("use_rslora", "use_dora", "lora_init")
"""What decides how the adapter is made; with a configuration of its own it is made otherwise."""

_EMBEDDINGS = ("embed_tokens", "lm_head")


def check_extensions(p: Parameters, training_type: TrainingType) -> Iterator[Violation]:
    """What extensions say of one another and of other fields."""
    ratio = p.extensions.loraplus_lr_ratio
    if 0 < ratio < 1:
        yield Violation(
            "extensions.loraplus_lr_ratio",
            Text(
                f"must be 0 (off) or from 1 to 64, not {ratio}",
                f"必须为 0（关闭）或在 1 到 64 之间，而不是 {ratio}",
            ),
            "OUT_OF_RANGE",
            suggested=0.0,
        )
    if training_type is not TrainingType.SFT:
        yield from _without_effect(
            (name for name in _set(p.extensions) if _is_for_sft(name)),
            Text("has no effect: it is for fine-tuning", "无效：仅用于微调"),
            "NOT_FOR_PRETRAINING",
        )
    elif not p.lora.use_lora:
        yield from _without_effect(
            (name for name in _set(p.extensions) if name in (*_SHAPES, "loraplus_lr_ratio")),
            Text("has no effect: lora.use_lora is off", "无效：lora.use_lora 已关闭"),
            "LORA_OFF",
        )
    elif p.data.attach_lora:
        yield from _without_effect(
            (name for name in _set(p.extensions) if name in _SHAPES),
            Text(
                "has no effect: the weights of data.attach_lora have their own configuration",
                "无效：data.attach_lora 的权重自带配置",
            ),
            "ATTACHED_LORA_WINS",
        )
    elif p.lora.peft_config_path:
        yield from _without_effect(
            (name for name in _set(p.extensions) if name in _SHAPES),
            Text("has no effect: the PEFT file decides", "无效：以 PEFT 文件为准"),
            "PEFT_CONFIG_WINS",
        )
    elif p.extensions.lora_init == "pissa":
        yield from _check_pissa(p)


def _set(extensions: ExtensionParameters) -> Iterator[str]:
    """Names of those that have another value than their default, which is off."""
    for name, field in ExtensionParameters.model_fields.items():
        if getattr(extensions, name) != field.get_default():
            yield name


def _is_for_sft(name: str) -> bool:
    return SFT_ONLY in info_of(ExtensionParameters.model_fields[name]).visible_when


def _without_effect(names: Iterator[str], text: Text, reason: str) -> Iterator[Violation]:
    for name in names:
        default = ExtensionParameters.model_fields[name].get_default()
        yield Violation(f"extensions.{name}", text, reason, Severity.NOTICE, suggested=default)


def _check_pissa(p: Parameters) -> Iterator[Violation]:
    embeddings = [name for name in p.lora.lora_target_modules if name in _EMBEDDINGS]
    if p.optimization.use_qlora:
        text = Text(
            "changes the frozen weights, which QLoRA keeps in 4 bits: choose one of the two",
            "会改动冻结的权重，而 QLoRA 以 4-bit 保存它们：两者只能选其一",
        )
        reason = "PISSA_WITH_QLORA"
    elif p.extensions.use_dora:
        text = Text(
            "can't be turned into an adapter for the original model with DoRA: choose one of the "
            "two",
            "与 DoRA 同用时无法转换为可用于原模型的适配器：两者只能选其一",
        )
        reason = "PISSA_WITH_DORA"
    elif embeddings:
        names = ", ".join(embeddings)
        text = Text(
            f"is for the layers between: leave {names} out of lora.lora_target_modules",
            f"仅适用于中间层：请从 lora.lora_target_modules 中去掉 {names}",
        )
        reason = "PISSA_ON_EMBEDDINGS"
    else:
        return
    yield Violation("extensions.lora_init", text, reason, suggested="default")


# --- what it takes


def check_means(p: Parameters, surroundings: Surroundings) -> Iterator[Violation]:
    """What device, training environment and machine lack for them."""
    extensions, on_cpu = p.extensions, surroundings.device == CPU
    lacking = dict[str, Violation]()
    if extensions.attn_implementation == "flash_attention_2":
        lacking |= _by_field(_check_flash_attention(p, surroundings))
    if extensions.use_liger_kernel and on_cpu:
        text = Text("needs a GPU: the CPU has no such kernels", "需要 GPU：CPU 没有此类内核")
        field = "extensions.use_liger_kernel"
        lacking[field] = Violation(field, text, "DEVICE_LACKS_IT", suggested=False)
    yield from lacking.values()
    for field, package in extra_packages(p).items():
        there = surroundings.packages
        if field in lacking or there is None or any(n in there for n in package.distributions):
            continue
        name = field.partition(".")[2]
        yield Violation(
            field,
            Text(
                f"needs the package {package.name}, which the training environment lacks; "
                f"run there: pip install {package.name}",
                f"需要软件包 {package.name}，而训练环境中没有安装；"
                f"请在其中运行：pip install {package.name}",
            ),
            "PACKAGE_MISSING",
            suggested=ExtensionParameters.model_fields[name].get_default(),
        )
    if extensions.torch_compile:
        yield from _check_compile(on_cpu=on_cpu)


def _by_field(violations: Iterator[Violation]) -> dict[str, Violation]:
    return {violation.field: violation for violation in violations}


def _check_flash_attention(p: Parameters, surroundings: Surroundings) -> Iterator[Violation]:
    field, device = "extensions.attn_implementation", surroundings.device
    if device == CPU or not surroundings.capability.bf16:
        yield Violation(
            field,
            Text(
                f"flash_attention_2 needs an NVIDIA GPU, Ampere or newer; {device} is none",
                f"flash_attention_2 需要 NVIDIA Ampere 或更新的 GPU，而 {device} 不是",
            ),
            "DEVICE_LACKS_IT",
            suggested="auto",
        )
    elif not (p.optimization.fp16 or p.optimization.bf16):
        yield Violation(
            field,
            Text(
                "flash_attention_2 computes in 16 bits alone: set optimization.bf16",
                "flash_attention_2 只支持 16 位计算：请启用 optimization.bf16",
            ),
            "FLASH_ATTENTION_IN_FLOAT32",
            suggested=True,
            suggested_field="optimization.bf16",
        )


def _check_compile(*, on_cpu: bool) -> Iterator[Violation]:
    field = "extensions.torch_compile"
    variable, names = ("CXX", ("g++", "clang++")) if on_cpu else ("CC", ("gcc", "clang"))
    chosen = os.environ.get(variable)
    if not any(map(shutil.which, [chosen] if chosen else names)):
        yield Violation(
            field,
            Text(
                f"needs a compiler, and {chosen or ' or '.join(names)} is not on the daemon's PATH",
                f"需要编译器，而守护进程的 PATH 中没有 {chosen or ' 或 '.join(names)}",
            ),
            "COMPILER_MISSING",
            suggested=False,
        )
    elif on_cpu:
        yield Violation(
            field,
            Text(
                "hardly ever pays on the CPU: the first step alone takes a minute or more",
                "在 CPU 上几乎没有益处：仅第一步就需要一分钟以上",
            ),
            "COMPILED_ON_CPU",
            Severity.WARNING,
            suggested=False,
        )


# --- a checkpoint to resume


def as_begun(made: Mapping[str, Any], manifest: Manifest) -> Mapping[str, Any]:
    """The configuration that the adapter of a checkpoint had while it was trained.

    One that began with PiSSA is saved with twice the rank, for the original model.
    """
    if manifest.parameters.get("extensions", {}).get("lora_init") != "pissa":
        return made
    rank, alpha = made.get("r"), made.get("lora_alpha")
    if not isinstance(rank, int) or not isinstance(alpha, int | float):
        return made
    factor = math.sqrt(2) if made.get("use_rslora") else 2
    return {**made, "r": rank // 2, "lora_alpha": round(alpha / factor)}


def check_resumed(
    field: str, p: Parameters, made: Mapping[str, Any], manifest: Manifest
) -> Iterator[Violation]:
    """What a checkpoint with LoRA weights was trained with and the task says otherwise.

    Args:
        field: Where to say it.
        p: Of the task.
        made: The configuration of the checkpoint's adapter.
        manifest: Of the checkpoint.
    """
    extensions = p.extensions
    then: Mapping[str, Any] = manifest.parameters.get("extensions", {})
    pairs: dict[str, tuple[Any, Any]] = {
        "lora_init": (then.get("lora_init", "default"), extensions.lora_init)
    }
    ratio = then.get("loraplus_lr_ratio", 0.0)
    if bool(ratio) != bool(extensions.loraplus_lr_ratio):  # another one than before is taken over
        pairs["loraplus_lr_ratio"] = (ratio, extensions.loraplus_lr_ratio)
    if not p.lora.peft_config_path:
        pairs["use_rslora"] = (bool(made.get("use_rslora")), extensions.use_rslora)
        pairs["use_dora"] = (bool(made.get("use_dora")), extensions.use_dora)
    for name, (there, here) in pairs.items():
        if there != here:
            shown = str(there).lower() if isinstance(there, bool) else there
            yield Violation(
                field,
                Text(
                    f"was made with extensions.{name} {shown}; to resume it, set the same",
                    f"是以 extensions.{name} 为 {shown} 训练的；要恢复训练请设为相同的值",
                ),
                "CHECKPOINT_OF_OTHER_LORA",
                suggested=there,
                suggested_field=f"extensions.{name}",
            )

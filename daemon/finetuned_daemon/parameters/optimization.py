"""Section `optimization`: precision and memory."""

from __future__ import annotations

from finetuned_daemon.parameters.field import SFT_ONLY, Section, one_of, parameter
from finetuned_daemon.texts import Text


class OptimizationParameters(Section):
    """Precision and memory."""

    use_qlora: bool = parameter(
        False,
        "使用 QLoRA",
        "Use QLoRA",
        "common",
        help=Text(
            "Loads the frozen weights in 4 bits (NF4) and trains LoRA matrices on them: a quarter "
            "of the memory of 16-bit weights, at some cost of speed. It needs bitsandbytes, and an "
            "NVIDIA GPU, Ampere or newer, or the CPU; the model on disk stays as it is.",
            "以 4-bit（NF4）加载冻结的权重，在其上训练 LoRA 矩阵：显存约为 16 位权重的四分之一，速"
            "度略慢。需要 bitsandbytes，以及 NVIDIA Ampere 或更新的 GPU 或 CPU；磁盘上的模型不变。",
        ),
        enabled_when=(SFT_ONLY, one_of("lora.use_lora", True)),
    )
    use_8bit_optimizer: bool = parameter(
        False,
        "使用8-bit优化器",
        "Use 8-bit optimizers",
        "common",
        help=Text(
            "Keeps the state of AdamW in 8 bits: a quarter of its memory, which matters when all "
            "weights are trained and hardly at all with LoRA. Other optimizers have no such form. "
            "It needs bitsandbytes, and an NVIDIA GPU, Ampere or newer, or the CPU.",
            "以 8-bit 保存 AdamW 的状态，占用约为四分之一；全量训练时效果明显，LoRA 时差别很小。"
            "其他优化器没有 8-bit 版本。需要 bitsandbytes，以及 NVIDIA Ampere 或更新的 GPU，"
            "或 CPU。",
        ),
    )
    fp16: bool = parameter(
        True,
        "使用FP16混合精度",
        "Use FP16 mixed precision",
        "common",
        required=True,
        help=Text(
            "Computes in 16-bit floating point where that is safe: about half the memory and twice "
            "the speed on a GPU. The CPU can't and computes in float32 instead, which the run "
            "notes. Excludes bf16.",
            "在安全的地方使用 16 位浮点计算：GPU 上显存约减半，速度约加倍。"
            "CPU 不支持，将改用 float32 并在运行中注明。与 bf16 互斥。",
        ),
    )
    bf16: bool = parameter(
        False,
        "使用BF16混合精度(NVIDIA GPU)",
        "Use BF16 mixed precision (NVIDIA GPU)",
        "common",
        help=Text(
            "16-bit floating point with the range of 32 bits: as fast as fp16 and never "
            "overflowing, so the better choice where the GPU has it (Ampere or newer). The CPU has "
            "it too, seldom faster than float32. Turn fp16 off with it.",
            "具有 32 位数值范围的 16 位浮点：与 fp16 一样快且不会溢出，GPU 支持时（Ampere 或更新）"
            "是更好的选择。CPU 也支持，但很少比 float32 更快。启用时请关闭 fp16。",
        ),
    )
    tf32: bool = parameter(
        False,
        "使用TF32(NVIDIA GPU)",
        "Use TF32 (NVIDIA GPU)",
        "common",
        help=Text(
            "Lets matrix products in float32 run on the tensor cores with a shorter mantissa: "
            "several times faster, hardly less exact. With fp16 or bf16 little is left in float32, "
            "and it matters little. It needs an NVIDIA GPU, Ampere or newer.",
            "让 float32 矩阵乘法以较短的尾数在张量核心上运行：速度快数倍，精度几乎不变。启用 fp16 "
            "或 bf16 后仍用 float32 的计算不多，作用有限。需要 NVIDIA Ampere 或更新的 GPU。",
        ),
    )
    gradient_checkpointing: bool = parameter(
        True,
        "梯度检查点",
        "Gradient checkpointing",
        "common",
        required=True,
        help=Text(
            "Forgets intermediate results on the way forward and computes them again on the way "
            "back: much less memory for about a third more time. Turn it off when memory is "
            "plenty. It has nothing to do with the checkpoints that are saved.",
            "前向时不保留中间结果，反向时重新计算：以约三分之一的额外时间换取大量显存。"
            "显存充裕时可关闭。与保存到磁盘的检查点无关。",
        ),
    )

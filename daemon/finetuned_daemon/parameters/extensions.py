"""Section `extensions`: what goes beyond the specification of the form; everything off by default.

A run with the defaults is the same as one without this section.
"""

from __future__ import annotations

from typing import Literal

from finetuned_daemon.parameters.field import SFT_ONLY, Section, one_of, parameter
from finetuned_daemon.texts import Text

LoraInit = Literal["default", "pissa"]
AttnImplementation = Literal["auto", "sdpa", "eager", "flash_attention_2"]
ReportTo = Literal["none", "tensorboard", "wandb", "mlflow", "trackio", "swanlab"]

_OFF = Text("0: off", "0：关闭")
_WITH_LORA = (one_of("lora.use_lora", True),)
# Attached weights, and a PEFT file, bring a shape of their own.
_SHAPED_HERE = (
    *_WITH_LORA,
    one_of("data.attach_lora", False),
    one_of("lora.peft_config_path", None),
)


class ExtensionParameters(Section):
    """Extensions, all off by default."""

    packing: bool = parameter(
        False,
        "样本打包",
        "Packing",
        "optimization",
        visible_when=(SFT_ONLY,),
        help=Text(
            "Lays several short chats into one row up to the max sequence length, so that no "
            "computation goes to padding. Chats do not see each other. A batch then holds more "
            "chats, and an epoch has fewer steps.",
            "将多个较短的对话拼入同一行，直至最大序列长度，避免在填充上浪费计算。对话之间互不可见。"
            "每个批次将包含更多对话，每轮的步数随之减少。",
        ),
    )
    neftune_noise_alpha: float = parameter(
        0.0,
        "NEFTune 噪声强度",
        "NEFTune noise alpha",
        "advanced",
        ge=0,
        le=50,
        step=1,
        note=_OFF,
        help=Text(
            "Adds random noise of this strength to the token embeddings while training, and never "
            "while evaluating (NEFTune, arXiv 2310.05914). 5 is usual; answers tend to become "
            "longer and follow the training data less closely.",
            "训练时在词嵌入上加入该强度的随机噪声，评估时不加（NEFTune，arXiv 2310.05914）。"
            "常用值为 5；回答通常会更长，也不会过于贴近训练数据。",
        ),
    )
    use_rslora: bool = parameter(
        False,
        "使用 rsLoRA",
        "Use rsLoRA",
        "advanced",
        visible_when=(SFT_ONLY,),
        enabled_when=_SHAPED_HERE,
        help=Text(
            "Scales what LoRA adds by alpha divided by the square root of r, instead of by r, so "
            "that high ranks learn as strongly as low ones (rank-stabilized LoRA, arXiv "
            "2312.03732). With r 16 and alpha 16 it is four times as strong.",
            "LoRA 的缩放系数改为 alpha 除以 r 的平方根，使高秩与低秩的学习强度一致（rsLoRA，arXiv "
            "2312.03732）。r 为 16、alpha 为 16 时强度是原来的四倍。",
        ),
    )
    use_dora: bool = parameter(
        False,
        "使用 DoRA",
        "Use DoRA",
        "advanced",
        visible_when=(SFT_ONLY,),
        enabled_when=_SHAPED_HERE,
        help=Text(
            "Also trains the magnitude of each row of the weights, apart from its direction (DoRA, "
            "arXiv 2402.09353). It often learns better at low ranks, and takes markedly more time "
            "and memory than LoRA alone.",
            "除方向外，还单独训练权重每一行的幅度（DoRA，arXiv 2402.09353）。秩较低时效果往往更好，"
            "但耗时和显存明显多于普通 LoRA。",
        ),
    )
    lora_init: LoraInit = parameter(
        "default",
        "LoRA 初始化方式",
        "LoRA initialization",
        "advanced",
        choices={
            "default": Text("Random, adding nothing at first", "随机（起初不改变模型）"),
            "pissa": Text("PiSSA: principal components", "PiSSA：主奇异成分"),
        },
        visible_when=(SFT_ONLY,),
        enabled_when=_SHAPED_HERE,
        help=Text(
            "PiSSA begins with the largest singular components of the weights themselves (arXiv "
            "2404.02948), and often learns faster. The adapter that is left is converted for the "
            "original model; it then has twice the rank.",
            "PiSSA 以权重自身最大的奇异成分作为起点（arXiv 2404.02948），学习往往更快。最终的适配器"
            "会转换为可用于原模型的形式，其秩为设定值的两倍。",
        ),
    )
    loraplus_lr_ratio: float = parameter(
        0.0,
        "LoRA+ 学习率倍数",
        "LoRA+ learning rate ratio",
        "advanced",
        ge=0,
        le=64,
        step=1,
        note=Text("0: off; else from 1 on", "0：关闭；否则从 1 起"),
        visible_when=(SFT_ONLY,),
        enabled_when=_WITH_LORA,
        help=Text(
            "Trains the B matrices of LoRA with the learning rate times this number (LoRA+, arXiv "
            "2402.12354). 16 is usual, with a lower learning rate than otherwise; 1 changes "
            "nothing.",
            "以学习率乘以该倍数训练 LoRA 的 B 矩阵（LoRA+，arXiv 2402.12354）。常用值为 16，"
            "此时应适当降低学习率；1 表示不变。",
        ),
    )
    attn_implementation: AttnImplementation = parameter(
        "auto",
        "注意力实现",
        "Attention implementation",
        "optimization",
        choices={
            "auto": Text("As the model is made", "由模型决定"),
            "sdpa": Text("SDPA of PyTorch", "PyTorch SDPA"),
            "eager": Text("Eager", "eager（逐步计算）"),
            "flash_attention_2": Text("Flash Attention 2", "Flash Attention 2"),
        },
        help=Text(
            "The code that computes attention. SDPA is fast everywhere; eager takes more memory, "
            "and is for comparison; Flash Attention 2 needs an NVIDIA GPU, Ampere or newer, fp16 "
            "or bf16, and the package flash-attn.",
            "计算注意力的代码。SDPA 在各种设备上都很快；eager 占用更多内存，用于对照；"
            "Flash Attention 2 需要 NVIDIA Ampere 或更新的 GPU、fp16 或 bf16，以及 flash-attn。",
        ),
    )
    use_liger_kernel: bool = parameter(
        False,
        "使用 Liger 内核",
        "Use Liger kernels",
        "optimization",
        help=Text(
            "Replaces parts of the model by fused kernels that take less memory and time; the "
            "result differs by rounding alone. It needs a GPU and the package liger-kernel, which "
            "knows the usual architectures.",
            "用融合内核替换模型的部分计算，节省显存和时间，结果仅有舍入差异。需要 GPU 和软件包 "
            "liger-kernel，支持常见架构。",
        ),
    )
    torch_compile: bool = parameter(
        False,
        "使用 torch.compile",
        "Use torch.compile",
        "optimization",
        help=Text(
            "Compiles the model before it computes. The first steps take minutes, and every new "
            "batch shape compiles again; worth it for long runs on a GPU, hardly ever on the CPU.",
            "计算前先编译模型。最初几步需要数分钟，遇到新的批次形状会重新编译；适合 GPU 上的长时间"
            "训练，在 CPU 上几乎没有益处。",
        ),
    )
    report_to: ReportTo = parameter(
        "none",
        "指标同步到",
        "Report metrics to",
        "optional",
        choices={
            "none": Text("Nowhere else", "不同步"),
            "tensorboard": Text("TensorBoard", "TensorBoard"),
            "wandb": Text("Weights & Biases", "Weights & Biases"),
            "mlflow": Text("MLflow", "MLflow"),
            "trackio": Text("Trackio", "Trackio"),
            "swanlab": Text("SwanLab", "SwanLab"),
        },
        help=Text(
            "Also writes the metrics for another tool, into a folder of the run's output that "
            "bears its name. Nothing is uploaded, unless the daemon's environment says so with "
            "the tool's own variables. The tool's package has to be installed.",
            "同时为其他工具写出指标，存放在运行输出目录下以该工具命名的文件夹中。除非守护进程的环境用"
            "该工具自己的变量另行指定，否则不会上传。需要安装该工具的软件包。",
        ),
    )
    retry_out_of_memory: bool = parameter(
        False,
        "内存不足时自动重试",
        "Retry when out of memory",
        "optional",
        help=Text(
            "After running out of memory, halves the batch size, doubles the accumulation, so that "
            "a step trains on as many samples as before, and goes on from the newest checkpoint; "
            "three times at most.",
            "内存或显存不足时，将批次大小减半、梯度累积加倍，使每步的样本数不变，并从最新的检查点"
            "继续训练；最多三次。",
        ),
    )

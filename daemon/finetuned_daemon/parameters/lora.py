"""Section `lora`: low-rank adaptation (LoRA, https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from finetuned_daemon.parameters.field import SFT_ONLY, Section, one_of, parameter
from finetuned_daemon.texts import Text

TARGET_MODULES = {
    "q_proj": Text("query projection", "Query 投影"),
    "k_proj": Text("key projection", "Key 投影"),
    "v_proj": Text("value projection", "Value 投影"),
    "o_proj": Text("output projection", "Output 投影"),
    "gate_proj": Text("gate of the MLP", "MLP 门控投影"),
    "up_proj": Text("up projection of the MLP", "MLP 上投影"),
    "down_proj": Text("down projection of the MLP", "MLP 下投影"),
    "embed_tokens": Text("token embeddings", "词嵌入层"),
    "lm_head": Text("output layer", "语言模型头"),
}

_VISIBLE = (SFT_ONLY,)
_WITH_LORA = (one_of("lora.use_lora", True),)
# Attached weights, and a PEFT file, bring a shape of their own.
_IS_FRESH = one_of("data.attach_lora", False)
_SHAPED_HERE = (*_WITH_LORA, _IS_FRESH, one_of("lora.peft_config_path", None))


class LoraParameters(Section):
    """Low-rank adaptation. Supervised fine-tuning only."""

    use_lora: bool = parameter(
        True,
        "使用LoRA微调",
        "Use LoRA fine-tuning",
        "common",
        required=True,
        visible_when=_VISIBLE,
        help=Text(
            "Trains small matrices beside the frozen weights instead of the weights themselves: "
            "about a hundredth of the parameters, a fraction of the memory, and a result of a few "
            "megabytes. Off, all weights are trained; the learning rate should then be some ten "
            "times lower.",
            "不改动原有权重，只训练附加的小矩阵：可训练参数约为百分之一，显存大幅减少，结果只有几"
            "兆字节。关闭则训练全部权重，此时学习率应低约十倍。",
        ),
    )
    lora_r: int = parameter(
        16,
        "LoRA的r参数",
        "LoRA r parameter",
        "common",
        required=True,
        ge=1,
        le=512,
        visible_when=_VISIBLE,
        enabled_when=_SHAPED_HERE,
        help=Text(
            "Rank of the added matrices. More rank can learn more and takes more memory; 4 to 8 "
            "will do for a narrow task, 16 is a good start, 32 to 64 is for large and varied data.",
            "附加矩阵的秩。秩越大可学习的内容越多，占用也越多；单一任务 4 到 8 即可，16 是不错的起"
            "点，数据量大且多样时用 32 到 64。",
        ),
    )
    lora_alpha: int = parameter(
        16,
        "LoRA的alpha参数",
        "LoRA alpha parameter",
        "common",
        required=True,
        ge=1,
        le=512,
        visible_when=_VISIBLE,
        enabled_when=_SHAPED_HERE,
        help=Text(
            "Scale of what LoRA adds: alpha divided by r. With alpha equal to r the scale is 1; "
            "twice r makes its influence stronger. If you change r and want the same behaviour, "
            "change alpha with it.",
            "LoRA 的缩放系数为 alpha 除以 r。alpha 等于 r 时为 1，取 r 的两倍则影响更强。"
            "调整 r 后若想保持相同效果，请同步调整 alpha。",
        ),
    )
    lora_dropout: float = parameter(
        0.0,
        "LoRA的dropout",
        "LoRA dropout",
        "advanced",
        ge=0,
        le=1,
        step=0.01,
        visible_when=_VISIBLE,
        enabled_when=_SHAPED_HERE,
        help=Text(
            "Share of the inputs of each LoRA layer that is left out at random while training, "
            "against learning by heart. 0.05 to 0.1 helps with little data; with much, leave it "
            "at 0.",
            "训练时随机丢弃 LoRA 层输入的比例，用于防止死记硬背。数据较少时 0.05 到 0.1 有帮助，"
            "数据较多时保持 0。",
        ),
    )
    # Any module name is accepted: the model at hand decides, and the choices are those of the usual
    # architectures.
    lora_target_modules: list[str] = parameter(
        list(TARGET_MODULES)[:7],
        "LoRA目标模块",
        "LoRA target modules",
        "advanced",
        choices=TARGET_MODULES,
        min_length=1,
        max_length=256,
        visible_when=_VISIBLE,
        enabled_when=_SHAPED_HERE,
        help=Text(
            "The layers that get LoRA matrices, by their name in the model. All seven projections "
            "learn best; the four of the attention alone save memory. Other architectures have "
            "other names: the check lists those that the model has.",
            "为哪些层添加 LoRA 矩阵，按其在模型中的名称填写。七个投影层全选效果最好；只选注意力的"
            "四个可节省显存。其他架构的名称可能不同，检查时会列出模型实际拥有的模块。",
        ),
    )
    merge_lora: bool = parameter(
        False,
        "训练后合并LoRA权重",
        "Merge LoRA weights after training",
        "optional",
        visible_when=_VISIBLE,
        enabled_when=_WITH_LORA,
        help=Text(
            "Also writes the whole model with the LoRA weights worked in, into the folder merged; "
            "it is used without any adapter. It takes the room of all weights in the precision of "
            "the run, four bytes each on the CPU. The adapter is kept in any case.",
            "训练结束后，额外在 merged 目录写出并入 LoRA 权重的完整模型，使用时无需适配器。其大小为"
            "全部权重按运行精度存储所需的空间，在 CPU 上每个权重占四字节。适配器本身总会保留。",
        ),
    )
    peft_config_path: str | None = parameter(
        None,
        "PEFT配置路径",
        "PEFT config path",
        "optional",
        path="file",
        visible_when=_VISIBLE,
        enabled_when=(*_WITH_LORA, _IS_FRESH),
        help=Text(
            "A JSON file with a PEFT configuration of the type LORA, such as the "
            "adapter_config.json of an earlier training. It decides instead of r, alpha, dropout "
            "and target modules above.",
            "类型为 LORA 的 PEFT 配置 JSON 文件，例如早先训练得到的 adapter_config.json。它将取代"
            "上面的 r、alpha、dropout 和目标模块。",
        ),
        note=Text("empty: the form decides", "留空：以表单为准"),
    )

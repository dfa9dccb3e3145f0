"""Section `training`: batches, learning rate, schedule, saving, evaluation."""

from __future__ import annotations

from typing import Literal

from finetuned_daemon.parameters.field import (
    SAMPLES,
    STEPS,
    TOKENS,
    Section,
    none_of,
    one_of,
    parameter,
)
from finetuned_daemon.texts import Text

Optimizer = Literal["adamw_torch", "adamw_8bit", "paged_adamw_8bit", "adafactor", "sgd"]
SchedulerType = Literal[
    "cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts"
]
IntervalStrategy = Literal["steps", "epoch", "no"]

# transformers gives this one no warm-up at all.
_WARMS_UP = none_of("training.lr_scheduler_type", "constant")
_SAVES = none_of("training.save_strategy", "no")
_EVALUATES = none_of("training.eval_strategy", "no")


class TrainingParameters(Section):
    """The training loop: batches, learning rate, schedule, saving, evaluation."""

    batch_size: int = parameter(
        2,
        "批次大小",
        "Batch size",
        "common",
        required=True,
        ge=1,
        le=128,
        unit=SAMPLES,
        help=Text(
            "Samples that the device computes at once. Larger is faster as long as memory lasts: "
            "with LoRA about 2 on 4 GB, 4 on 8 GB, 8 on 16 GB. When memory runs out, halve it and "
            "double the gradient accumulation: the result stays the same.",
            "设备一次计算的样本数。显存足够时越大越快：LoRA 训练 4 GB 约为 2，8 GB 约为 4，16 GB "
            "约为 8。显存不足时将其减半并把梯度累积加倍，结果不变。",
        ),
    )
    gradient_accumulation_steps: int = parameter(
        4,
        "梯度累积步数",
        "Gradient accumulation steps",
        "common",
        required=True,
        ge=1,
        le=256,
        unit=Text("batches", "个批次"),
        help=Text(
            "Batches whose gradients are added up before the weights change once. Batch size "
            "times this is the number of samples in a step, 8 by default. It costs time, not "
            "memory.",
            "累积多少个批次的梯度后才更新一次权重。批次大小乘以此数即每步的样本数，默认为 8。只增"
            "加时间，不增加显存。",
        ),
    )
    max_seq_length: int = parameter(
        512,
        "最大序列长度",
        "Max sequence length",
        "common",
        required=True,
        ge=128,
        le=8192,
        multiple_of=8,
        unit=TOKENS,
        help=Text(
            "Longest sample. A longer chat is cut at its end, and left out where no answer stands "
            "before the cut; pretraining joins its texts, cuts them into blocks of this length and "
            "loses nothing. Memory grows with it: inspecting the dataset shows what is needed.",
            "样本的最大长度。更长的对话从末尾截断，截断后不含回答的会被剔除；预训练则将文本相连后"
            "切成这样长的块，不会丢失内容。显存随长度增长，数据集检查会显示数据实际需要的长度。",
        ),
    )
    learning_rate: float = parameter(
        2e-4,
        "学习率",
        "Learning rate",
        "common",
        required=True,
        ge=1e-6,
        le=1e-1,
        widget="SCIENTIFIC",
        help=Text(
            "How far each step moves the weights. Usual are 1e-4 to 5e-4 with LoRA, 1e-5 to 5e-5 "
            "for all weights, 1e-4 to 1e-3 for pretraining a small model from nothing. Too high "
            "and the loss jumps or grows, too low and it hardly falls.",
            "每一步改变权重的幅度。LoRA 常用 1e-4 到 5e-4，全量微调 1e-5 到 5e-5，从零预训练小模型"
            " 1e-4 到 1e-3。过高会使损失震荡或上升，过低则几乎不下降。",
        ),
    )
    optimizer: Optimizer = parameter(
        "adamw_torch",
        "优化器",
        "Optimizer",
        "common",
        required=True,
        choices={
            "adamw_torch": Text("AdamW", "AdamW"),
            "adamw_8bit": Text("AdamW in 8 bits (bitsandbytes)", "8-bit AdamW（bitsandbytes）"),
            "paged_adamw_8bit": Text(
                "AdamW in 8 bits, paged (bitsandbytes)", "分页 8-bit AdamW（bitsandbytes）"
            ),
            "adafactor": Text("Adafactor", "Adafactor"),
            "sgd": Text("SGD", "随机梯度下降（SGD）"),
        },
        help=Text(
            "How gradients become changes of the weights. AdamW is right in nearly all cases; its "
            "8-bit forms and Adafactor keep less in memory, which counts when all weights are "
            "trained. SGD keeps nothing, and needs a much higher learning rate.",
            "如何由梯度得到权重的更新。AdamW 适合绝大多数情况；其 8-bit 版本和 Adafactor 占用显存"
            "更少，在全量训练时尤其有用。SGD 不占额外显存，但需要高得多的学习率。",
        ),
    )
    lr_scheduler_type: SchedulerType = parameter(
        "cosine",
        "学习率调度器",
        "LR scheduler type",
        "common",
        required=True,
        choices={
            "cosine": Text("Cosine", "余弦退火"),
            "linear": Text("Linear", "线性下降"),
            "constant": Text("Constant", "恒定"),
            "constant_with_warmup": Text("Constant after the warm-up", "预热后恒定"),
            "cosine_with_restarts": Text("Cosine with restarts", "带重启的余弦退火"),
        },
        help=Text(
            "How the learning rate goes over the run. Cosine and linear fall to 0 at the end, "
            "which suits most runs. Constant has no warm-up at all; choose it where you don't "
            "know yet when to stop.",
            "学习率在训练过程中的变化方式。余弦和线性在结束时降到 0，适合多数训练。恒定没有预热，"
            "适合尚不确定何时停止的情况。",
        ),
    )
    num_train_epochs: int = parameter(
        2,
        "训练轮数",
        "Training epochs",
        "common",
        required=True,
        ge=1,
        le=100,
        unit=Text("epochs", "轮"),
        help=Text(
            "Passes over the training data. Below 1000 samples 3 to 10 are usual, above 10,000 one "
            "to three. If the evaluation loss rises while the training loss falls, there were too "
            "many.",
            "遍历训练数据的次数。少于 1000 条时常用 3 到 10 轮，超过 10000 条时 1 到 3 轮。"
            "若训练损失下降而评估损失上升，说明轮数过多。",
        ),
        enabled_when=(one_of("training.max_steps", -1),),
    )
    weight_decay: float = parameter(
        0.01,
        "权重衰减",
        "Weight decay",
        "advanced",
        ge=0,
        le=1,
        step=0.01,
        help=Text(
            "Pulls weights a little towards 0 at each step, against overfitting. The default is "
            "right nearly always.",
            "每步将权重略微拉向 0，以防过拟合。默认值几乎总是合适的。",
        ),
    )
    warmup_ratio: float = parameter(
        0.1,
        "预热比例",
        "Warmup ratio",
        "optional",
        ge=0,
        le=1,
        step=0.01,
        widget="SLIDER",
        help=Text(
            "Share of all steps in which the learning rate rises from 0 to its value, so that the "
            "first gradients do no harm. 0.03 to 0.1 is usual.",
            "学习率从 0 升到设定值所用步数占总步数的比例，避免最初的梯度造成破坏。常用 0.03 到 "
            "0.1。",
        ),
        note=Text("no effect where warm-up steps are given", "设置预热步数后不生效"),
        enabled_when=(_WARMS_UP, one_of("training.warmup_steps", 0)),
    )
    warmup_steps: int = parameter(
        0,
        "预热步数",
        "Warmup steps",
        "optional",
        ge=0,
        le=10_000,
        unit=STEPS,
        help=Text(
            "The same as the warm-up ratio, as a number of steps; above 0 it decides. It should be "
            "well below the steps of the whole run.",
            "与预热比例相同，但以步数表示；大于 0 时以此为准。应远小于总步数。",
        ),
        note=Text("0: the ratio decides", "0：以预热比例为准"),
        enabled_when=(_WARMS_UP,),
    )
    max_grad_norm: float = parameter(
        1.0,
        "最大梯度范数",
        "Max gradient norm",
        "advanced",
        ge=0.1,
        le=10,
        step=0.1,
        help=Text(
            "Gradients longer than this are scaled down to it, so that one odd batch can't ruin "
            "the weights. Leave it at 1 unless you know why not.",
            "梯度长度超过该值时按比例缩小，避免个别异常批次破坏权重。没有特别理由请保持 1。",
        ),
    )
    max_steps: int = parameter(
        -1,
        "最大训练步数(-1为不限制)",
        "Max training steps (-1=unlimited)",
        "optional",
        ge=-1,
        le=100_000,
        unit=STEPS,
        help=Text(
            "Ends the training after so many steps, whatever the number of epochs: the data is "
            "gone through as often as that takes. A small number is good for a trial.",
            "达到该步数即结束训练，与轮数无关：数据会按需要重复遍历。设为较小的数适合试运行。",
        ),
        note=Text("-1: the epochs decide", "-1：以轮数为准"),
    )
    lr_num_cycles: int = parameter(
        2,
        "学习率余弦退火周期",
        "LR cosine annealing cycles",
        "advanced",
        ge=1,
        le=10,
        unit=Text("cycles", "个周期"),
        help=Text(
            "How often the learning rate falls and starts again at its full value, with the "
            "scheduler cosine with restarts.",
            "使用带重启的余弦退火时，学习率下降并重新回到最大值的次数。",
        ),
        enabled_when=(one_of("training.lr_scheduler_type", "cosine_with_restarts"),),
    )
    save_strategy: IntervalStrategy = parameter(
        "steps",
        "保存策略",
        "Save strategy",
        "saving",
        choices={
            "steps": Text("Every so many steps", "每隔若干步"),
            "epoch": Text("After each epoch", "每轮结束"),
            "no": Text("None on the way", "不保存中间检查点"),
        },
        help=Text(
            "When checkpoints are saved, from which a run can be resumed. Each uses one of the "
            "training quota where there is one. With none on the way, a crash loses everything "
            "since the start; a stop saves one all the same, unless you ask it not to.",
            "何时保存可用于恢复训练的检查点。若设有训练配额，每个检查点消耗一个。"
            "不保存时，一旦崩溃将丢失全部进度；主动停止仍会保存一个，除非要求不保存。",
        ),
    )
    save_steps: int = parameter(
        100,
        "保存步数",
        "Save steps",
        "saving",
        ge=1,
        le=10_000,
        unit=STEPS,
        help=Text(
            "Steps from one checkpoint to the next; the last step always makes one. All steps "
            "divided by this, rounded up, is the number of checkpoints.",
            "相邻检查点之间的步数；最后一步总会保存。总步数除以该值向上取整即检查点数量。",
        ),
        enabled_when=(one_of("training.save_strategy", "steps"),),
    )
    eval_strategy: IntervalStrategy = parameter(
        "no",
        "评估策略",
        "Evaluation strategy",
        "evaluation",
        choices={
            "steps": Text("Every so many steps", "每隔若干步"),
            "epoch": Text("After each epoch", "每轮结束"),
            "no": Text("Never", "不评估"),
        },
        help=Text(
            "When the loss on the evaluation data is measured. It needs an evaluation file or an "
            "evaluation ratio, and takes the time of going through that data once.",
            "何时计算评估数据上的损失。需要评估文件或评估比例，每次评估会完整遍历一遍评估数据。",
        ),
    )
    eval_steps: int = parameter(
        100,
        "评估步数",
        "Evaluation steps",
        "evaluation",
        ge=1,
        le=10_000,
        unit=STEPS,
        help=Text(
            "Steps from one evaluation to the next. Each goes through the evaluation data once, so "
            "that a low number makes the run longer.",
            "相邻两次评估之间的步数。每次评估都会遍历一遍评估数据，数值过小会延长训练。",
        ),
        enabled_when=(one_of("training.eval_strategy", "steps"),),
    )
    save_total_limit: int = parameter(
        100,
        "最大保存检查点",
        "Max saved checkpoints",
        "saving",
        ge=1,
        le=1000,
        unit=Text("checkpoints", "个检查点"),
        help=Text(
            "How many checkpoints are kept; of more, the oldest are deleted, but never the one "
            "with the lowest evaluation loss. With all weights trained a checkpoint is about three "
            "times the size of the model in float32: mind the disk.",
            "保留的检查点数量，超出时删除最旧的，但评估损失最低的始终保留。训练全部权重时，一个"
            "检查点约为 float32 模型的三倍大小，请留意磁盘空间。",
        ),
        enabled_when=(_SAVES,),
    )
    save_interval_minutes: int = parameter(
        30,
        "保存间隔分钟",
        "Save interval (minutes)",
        "saving",
        ge=1,
        le=1440,
        unit=Text("minutes", "分钟"),
        help=Text(
            "Saves one by the clock as well, at the first step after so many minutes without any: "
            "hardly more work than this is ever lost.",
            "除上述策略外，若这么多分钟内没有保存过，会在下一步结束时按时间保存一个：丢失的工作基本"
            "不会超过这段时间。",
        ),
        enabled_when=(_SAVES,),
    )
    early_stopping_patience: int = parameter(
        0,
        "早停步数",
        "Early stopping patience",
        "optional",
        ge=0,
        le=100,
        unit=Text("evaluations", "次评估"),
        help=Text(
            "Ends the training once the evaluation loss has not improved for so many evaluations "
            "in a row. It counts evaluations, not steps, and so needs an evaluation strategy.",
            "评估损失连续这么多次没有改善时提前结束训练。按评估次数而非步数计算，因此需要选择评估"
            "策略。",
        ),
        note=Text("0: off", "0：关闭"),
        enabled_when=(_EVALUATES,),
    )
    early_stopping_threshold: float = parameter(
        0.005,
        "早停阈值",
        "Early stopping threshold",
        "optional",
        ge=0.001,
        le=1,
        step=0.001,
        help=Text(
            "How much lower the evaluation loss must be than the best so far to count as an "
            "improvement.",
            "评估损失比此前最佳值至少低多少才算有改善。",
        ),
        enabled_when=(_EVALUATES, none_of("training.early_stopping_patience", 0)),
    )

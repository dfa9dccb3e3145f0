"""Section `data`: files and folders, samples, loading."""

from __future__ import annotations

from finetuned_daemon.parameters.field import (
    SAMPLES,
    SFT_ONLY,
    Section,
    one_of,
    parameter,
)
from finetuned_daemon.texts import Text


class DataParameters(Section):
    """Files and folders, samples, loading."""

    train_file: str | None = parameter(
        None,
        "训练数据文件路径",
        "Training data file path",
        "common",
        required=True,
        path="file",
        help=Text(
            "The data to learn from. For fine-tuning a JSONL file with a chat a line: messages, "
            "ShareGPT, Alpaca or prompt and completion; for pretraining a .txt file, or JSONL with "
            "a text a line. A run refuses a file with a line that it can't read; inspect the "
            "dataset to see each of them.",
            "用于学习的数据。微调使用 JSONL 文件，每行一段对话：messages、ShareGPT、Alpaca 或 "
            "prompt/completion 格式；预训练使用 .txt 文件，或每行一段文本的 JSONL。"
            "文件中只要有一行无法读取，训练就不会启动；可用数据集检查查看每一处问题。",
        ),
    )
    eval_file: str | None = parameter(
        None,
        "评估数据文件路径",
        "Evaluation data file path",
        "optional",
        path="file",
        help=Text(
            "Samples that are never trained on, in the same formats as the training data. Their "
            "loss shows whether the model learns something general or only repeats its data. It "
            "is used once an evaluation strategy is chosen.",
            "不参与训练的样本，格式与训练数据相同。其损失可以看出模型学到的是普遍规律，还是只在背"
            "诵数据。选择评估策略后才会使用。",
        ),
    )
    output_dir: str | None = parameter(
        None,
        "训练输出目录",
        "Training output directory",
        "common",
        required=True,
        path="directory",
        help=Text(
            "Where results go. It is made if it is not there; each run writes into a folder of its "
            "own in it (run-1, run-2 ...), so that nothing is ever overwritten. There you find the "
            "checkpoints and, at the end, the final model or adapter.",
            "结果的存放位置，不存在时会自动创建。每次运行都写入其中各自的文件夹（run-1、run-2……），"
            "不会覆盖已有内容。检查点和最终的模型或适配器都在其中。",
        ),
    )
    model_path: str | None = parameter(
        None,
        "训练模型目录",
        "Training model path",
        "common",
        required=True,
        path="directory",
        help=Text(
            "The model to start from: a folder in Hugging Face format with config.json and "
            "safetensors weights. GGUF files are made for inference and can't be trained. Code "
            "that such a folder brings is never run.",
            "作为起点的模型：Hugging Face 格式的目录，包含 config.json 和 safetensors 权重。GGUF "
            "文件只用于推理，不能训练。目录自带的代码不会被执行。",
        ),
    )
    tokenizer_path: str | None = parameter(
        None,
        "分词器路径",
        "Tokenizer path",
        "optional",
        path="directory",
        help=Text(
            "A tokenizer other than the one in the model's folder, for instance that of the chat "
            "version of a base model, with its chat template. Its tokens must fit the model's "
            "embeddings.",
            "使用模型目录之外的分词器，例如为基础模型选用其对话版本的分词器（含对话模板）。"
            "其词表必须与模型的嵌入层相符。",
        ),
        note=Text("empty: the model's own", "留空：使用模型自带的分词器"),
    )
    resume_from_checkpoint: str | None = parameter(
        None,
        "恢复训练检查点路径",
        "Checkpoint path for resume",
        "optional",
        path="directory",
        help=Text(
            "A checkpoint-N folder of an earlier run to go on from: weights, optimizer, schedule, "
            "random numbers and place in the data are restored, and steps count on. Model, LoRA "
            "shape and data must be those of that run. Leave it empty to start anew.",
            "从早先某次运行的 checkpoint-N 目录继续：权重、优化器、学习率调度、随机数和数据位置都"
            "会恢复，步数接着计算。模型、LoRA 结构和数据须与当时一致。留空则重新开始。",
        ),
    )
    attach_lora: bool = parameter(
        False,
        "附加LoRA权重",
        "Attach LoRA weights",
        "optional",
        discouraged=True,
        help=Text(
            "Begins a new training from existing LoRA weights, those of the checkpoint above or "
            "else of the model's folder; optimizer and schedule start afresh, and rank, alpha and "
            "modules are those of the weights. Meant for training in stages; to continue an "
            "interrupted run, resume from its checkpoint instead.",
            "以已有的 LoRA 权重开始新的训练，取自上面的检查点，否则取自模型目录；优化器和调度重新"
            "开始，秩、alpha 和模块以这些权重为准。用于多阶段训练；若要继续中断的训练，请改用检查"
            "点恢复。",
        ),
        enabled_when=(SFT_ONLY, one_of("lora.use_lora", True)),
    )
    max_samples: int = parameter(
        0,
        "最大样本数",
        "Maximum samples",
        "optimization",
        ge=0,
        le=100_000,
        unit=SAMPLES,
        help=Text(
            "Uses only the first samples of the training file. A small number such as 100 shows "
            "in minutes whether everything works before a long run.",
            "只使用训练文件开头的若干样本。先设为 100 这样的小数，几分钟内即可确认流程无误，再进行"
            "长时间训练。",
        ),
        note=Text("0: all of them", "0：使用全部样本"),
    )
    eval_ratio: float = parameter(
        0.0,
        "评估集采样比例",
        "Evaluation sampling ratio",
        "optimization",
        ge=0,
        le=1,
        step=0.01,
        widget="SLIDER",
        help=Text(
            "Share of the training samples, drawn by the seed, that is set aside for evaluation "
            "and not trained on. With fewer than 1000 samples 0.1 to 0.2 is usual, with many "
            "0.05. It takes effect together with an evaluation strategy.",
            "按随机种子从训练样本中抽取一部分用于评估，不参与训练。样本少于 1000 条时常用 0.1 到 "
            "0.2，样本很多时用 0.05。需同时选择评估策略才会生效。",
        ),
        note=Text("0: none", "0：不划分"),
        enabled_when=(one_of("data.eval_file", None),),
    )
    reshuffle: bool = parameter(
        False,
        "是否重新打乱数据",
        "Reshuffle data",
        "optional",
        help=Text(
            "Off, samples are shuffled once by the seed and come in that order in every epoch. On, "
            "each epoch has a new order, which helps with small datasets. Both can be repeated "
            "exactly with the same seed.",
            "关闭时，样本按随机种子打乱一次，每轮顺序相同。开启时每轮都有新的顺序，对小数据集有益。"
            "两种方式在种子相同时都可精确复现。",
        ),
    )
    dataloader_num_workers: int = parameter(
        1,
        "数据加载器线程数",
        "Data loader threads",
        "optimization",
        ge=0,
        le=16,
        unit=Text("workers", "个"),
        help=Text(
            "Processes that put batches together while the device computes. Samples are tokenized "
            "beforehand, so that one is nearly always enough; more take memory.",
            "在设备计算时负责组装批次的进程数。样本已提前分词，通常 1 个就够；更多会占用内存。",
        ),
        note=Text("0: in the training process itself", "0：在训练进程内完成"),
    )
    dataloader_pin_memory: bool = parameter(
        False,
        "是否使用锁页内存",
        "Use locked page memory",
        "optimization",
        help=Text(
            "Keeps batches in memory that is never swapped out, from which a GPU copies faster. "
            "Without a GPU it has no effect.",
            "将批次放在不会被换出的内存中，GPU 从中拷贝更快。没有 GPU 时无效。",
        ),
    )

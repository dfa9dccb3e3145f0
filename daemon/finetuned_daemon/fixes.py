"""What would mend a failed run: from end reason and parameters to a patch and a sentence.

The one table. The runner judges why a run ended; the fix is found here, so that a run whose runner
was killed gets one too. Pure: no files, no database.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from finetuned_daemon.devices import CPU
from finetuned_daemon.environment.model import Capability
from finetuned_daemon.parameters.field import limits_of
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.parameters.needs import effective_optimizer
from finetuned_daemon.runs.contract import EndReason, FixValue, RunPhase, TrainingType
from finetuned_daemon.texts import Text

_SHORTEST_SEQUENCE = 128
_SEQUENCE_STEP = 8
_LOWEST_RATE = 1e-6
_USUAL_RATES = {"lora": 5e-4, "full": 5e-5, "pretrain": 1e-3}
"""The highest that are usual, as the help of the parameter says; above, a tenth is tried first."""

_WITHOUT_BATCHES = frozenset(
    {RunPhase.STARTING, RunPhase.LOADING_MODEL, RunPhase.PREPARING_DATA, RunPhase.MERGING}
)


@dataclass(frozen=True, kw_only=True)
class Failure:
    """A failed run, as far as a fix depends on it."""

    reason: EndReason
    training_type: TrainingType
    parameters: Parameters
    """Those of the run."""
    device: str
    phase: RunPhase | None = None
    """The last that it was in."""
    step: int = 0
    """Optimizer steps done."""
    saved_checkpoints: int = 0
    can: Capability | None = None
    """What the device can do; None: that is not known, and nothing is expected of it."""
    may_be_memory: bool = False
    """It was killed, and nobody can know whether for want of memory."""
    was_killed: bool = False
    """It was killed, and the kernel had not run out of memory."""
    hint: Mapping[str, FixValue] = field(default_factory=dict[str, FixValue])
    """What the runner found that would fit, by path."""

    @property
    def was_training(self) -> bool:
        """Whether batches went through the model when it failed."""
        return self.phase not in _WITHOUT_BATCHES

    @property
    def in_fp16(self) -> bool:
        """Whether it computed in fp16; the CPU computes in float32 in its place."""
        optimization = self.parameters.optimization
        return optimization.fp16 and not optimization.bf16 and self.device != CPU

    @property
    def trains_lora(self) -> bool:
        """Whether it trains LoRA weights alone."""
        return self.training_type is TrainingType.SFT and self.parameters.lora.use_lora


@dataclass(frozen=True)
class Fix:
    """A patch of parameters that would likely mend a failed run."""

    values: Mapping[str, FixValue]
    """New values by path, such as `training.batch_size`; an empty text clears.

    Empty: the parameters will do as they are.
    """
    why: Text
    resumes: bool | None = None
    """True: the run can go on from its newest checkpoint; False: it has to begin anew.

    None: there is nothing to go on from.
    """


def fix_of(failure: Failure) -> Fix | None:
    """The first fix of the reason's ladder that applies; None where none is known."""
    if failure.hint and patched(failure.parameters, failure.hint) is not None:
        why = Text("this is what the run found to fit", "这是训练过程中得知的可用取值")
        return Fix(failure.hint, why)
    for rung in _LADDERS.get(failure.reason, ()):
        fix = rung(failure)
        if fix is not None and patched(failure.parameters, fix.values) is not None:
            return fix
    return None


def advice_of(reason: EndReason, *, field: str = "", in_fp16: bool = False) -> Text:
    """What to do by hand about a failure without a fix.

    Args:
        reason: Why it failed.
        field: The parameter that is to blame, where the run named one.
        in_fp16: Whether it computed in fp16.
    """
    if reason is EndReason.LOSS_NOT_FINITE and in_fp16:
        return _NOT_FINITE_IN_FP16
    return _BY_HAND_OF_FIELD.get(field, _BY_HAND[reason])


def patched(parameters: Parameters, values: Mapping[str, FixValue]) -> Parameters | None:
    """The parameters with new values in; None where one is unknown, or not allowed."""
    new: dict[str, dict[str, Any]] = parameters.model_dump()
    for path, value in values.items():
        section, _, name = path.partition(".")
        if section not in SECTIONS or name not in SECTIONS[section].model_fields:
            return None
        new[section][name] = list(value) if isinstance(value, tuple) else value
    try:
        return Parameters.model_validate(new)
    except ValidationError:
        return None


# --- memory


def smaller_batch(failure: Failure) -> Fix | None:
    """Half the batch, and as much more accumulation: a step trains on as many samples as before."""
    if not failure.was_training:
        return None
    training = failure.parameters.training
    samples = training.batch_size * training.gradient_accumulation_steps
    most = limits_of(type(training).model_fields["gradient_accumulation_steps"])["le"]
    for size in range(training.batch_size // 2, 0, -1):
        if samples % size == 0 and samples // size <= most:
            return Fix(
                {
                    "training.batch_size": size,
                    "training.gradient_accumulation_steps": samples // size,
                },
                Text(
                    "fewer samples at once take less memory, and a step trains on as many as "
                    "before",
                    "同时计算的样本更少，占用更少，而每步训练的样本数不变",
                ),
                resumes=True,
            )
    return None


def _gradient_checkpointing(failure: Failure) -> Fix | None:
    optimization = failure.parameters.optimization
    if optimization.gradient_checkpointing or not failure.was_training:
        return None
    return Fix(
        {"optimization.gradient_checkpointing": True},
        Text(
            "computes intermediate results again instead of keeping them: much less memory for "
            "about a third more time",
            "重新计算中间结果而不保留：以约三分之一的额外时间换取大量内存",
        ),
        resumes=True,
    )


def _four_bits(failure: Failure) -> Fix | None:
    if not failure.trains_lora or failure.can is None or not failure.can.four_bit:
        return None
    if failure.parameters.optimization.use_qlora:
        return None
    return Fix(
        {"optimization.use_qlora": True},
        Text(
            "the frozen weights in 4 bits take a quarter of the memory of 16-bit ones",
            "以 4-bit 加载冻结的权重，占用约为 16 位的四分之一",
        ),
        resumes=True,
    )


def _eight_bit_optimizer(failure: Failure) -> Fix | None:
    # With LoRA it would save next to nothing.
    if failure.trains_lora or failure.can is None or not failure.can.eight_bit_optimizer:
        return None
    if effective_optimizer(failure.parameters) != "adamw_torch":
        return None
    return Fix(
        {"optimization.use_8bit_optimizer": True},
        Text(
            "the optimizer's state in 8 bits takes a quarter of its memory",
            "以 8-bit 保存优化器状态，占用约为四分之一",
        ),
        resumes=False,
    )


def _shorter(failure: Failure) -> Fix | None:
    longest: int = failure.parameters.training.max_seq_length
    if longest <= _SHORTEST_SEQUENCE or not failure.was_training:
        return None
    half = longest // 2 // _SEQUENCE_STEP * _SEQUENCE_STEP
    return Fix(
        {"training.max_seq_length": max(_SHORTEST_SEQUENCE, half)},
        Text(
            "shorter sequences take less memory; longer samples are cut, and what is cut off is "
            "not learned",
            "更短的序列占用更少；超出的样本会被截断，截去的部分不会被学习",
        ),
        resumes=False,
    )


def _no_merge(failure: Failure) -> Fix | None:
    if failure.phase is not RunPhase.MERGING or not failure.parameters.lora.merge_lora:
        return None
    return Fix(
        {"lora.merge_lora": False},
        Text(
            "the adapter alone takes little memory; it can be merged later, where there is more",
            "仅保存适配器占用很少；可以之后在内存更大的机器上合并",
        ),
        resumes=True,
    )


def _no_workers(failure: Failure) -> Fix | None:
    data = failure.parameters.data
    if failure.device == CPU or not failure.was_training:
        return None  # on the CPU the batches take the memory
    if not data.dataloader_num_workers and not data.dataloader_pin_memory:
        return None
    values: dict[str, FixValue] = {}
    if data.dataloader_num_workers:
        values["data.dataloader_num_workers"] = 0
    if data.dataloader_pin_memory:
        values["data.dataloader_pin_memory"] = False
    return Fix(
        values,
        Text(
            "processes that load data, and page-locked memory, take the machine's memory",
            "数据加载进程和锁页内存会占用主机内存",
        ),
        resumes=True,
    )


# --- loss, disk, model


def _bf16(failure: Failure) -> Fix | None:
    if not failure.in_fp16 or failure.can is None or not failure.can.bf16:
        return None
    return Fix(
        {"optimization.bf16": True, "optimization.fp16": False},
        Text(
            "bf16 holds the large numbers that fp16 overflows with",
            "bf16 能表示会使 fp16 溢出的大数",
        ),
        resumes=True,
    )


def _lower_rate(failure: Failure) -> Fix | None:
    # Before the first step no rate has had any effect yet.
    rate: float = failure.parameters.training.learning_rate
    if failure.step < 1 or rate <= _LOWEST_RATE:
        return None
    kind = "pretrain" if failure.training_type is TrainingType.PRETRAIN else "full"
    usual = _USUAL_RATES["lora" if failure.trains_lora else kind]
    lower = max(_LOWEST_RATE, float(f"{rate / (10 if rate > usual else 2):.3g}"))
    return Fix(
        {"training.learning_rate": lower},
        Text(
            "smaller steps keep the weights from running away; look at the samples too, one of "
            "them may be odd",
            "更小的步长可避免权重发散；也请检查这些样本，其中可能有异常",
        ),
        # A checkpoint takes the new rate at once, and all that it was saved with was finite.
        resumes=True,
    )


def _fewer_checkpoints(failure: Failure) -> Fix | None:
    training = failure.parameters.training
    kept = min(training.save_total_limit, failure.saved_checkpoints)
    if training.save_strategy == "no" or kept < 2:
        return None
    return Fix(
        {"training.save_total_limit": kept // 2},
        Text(
            f"{kept} checkpoints were there when the disk was full, and fewer are kept with this; "
            "those of the earlier run stay: make room first",
            f"磁盘写满时已有 {kept} 个检查点，此设置会减少保留的数量；之前训练的检查点"
            "不会自动删除，请先腾出空间",
        ),
        resumes=True,
    )


def _lora_for_qlora(failure: Failure) -> Fix | None:
    is_sft = failure.training_type is TrainingType.SFT
    parameters = failure.parameters
    if not is_sft or not parameters.optimization.use_qlora or parameters.lora.use_lora:
        return None
    return Fix(
        {"lora.use_lora": True},
        Text(
            "weights in 4 bits can't be trained themselves, LoRA matrices on them can",
            "4-bit 权重本身无法训练，但可以在其上训练 LoRA 矩阵",
        ),
    )


def _again(failure: Failure) -> Fix | None:
    if not failure.was_killed:
        return None
    return Fix(
        {},
        Text(
            "the kernel had not run out of memory, so the same settings will do; find out who "
            "killed it, or it may happen again",
            "内核并未耗尽内存，因此无需更改设置；请查明是谁终止了它，否则可能再次发生",
        ),
        resumes=True,
    )


def _go_on(_: Failure) -> Fix | None:
    return Fix(
        {},
        Text(
            "nothing shows that the settings are to blame; look at the driver and at the disks, "
            "which a process can wait for without end",
            "没有迹象表明设置有问题；请检查驱动程序和磁盘，进程可能会无限期地等待它们",
        ),
        resumes=True,
    )


def _if_it_was_memory(rung: Callable[[Failure], Fix | None]) -> Callable[[Failure], Fix | None]:
    def of(failure: Failure) -> Fix | None:
        fix = rung(failure) if failure.may_be_memory else None
        if fix is None:
            return None
        why = Text(
            f"if the system killed it for want of memory: {fix.why.en}",
            f"如果是系统因内存不足而终止：{fix.why.zh}",
        )
        return Fix(fix.values, why, fix.resumes)

    return of


_HOST_MEMORY = (_no_merge, _no_workers, smaller_batch, _gradient_checkpointing, _shorter)

_LADDERS: dict[EndReason, tuple[Callable[[Failure], Fix | None], ...]] = {
    EndReason.DEVICE_OUT_OF_MEMORY: (
        _no_merge,
        smaller_batch,
        _gradient_checkpointing,
        _four_bits,
        _eight_bit_optimizer,
        _shorter,
    ),
    EndReason.HOST_OUT_OF_MEMORY: _HOST_MEMORY,
    EndReason.RUNNER_KILLED: (_again, *map(_if_it_was_memory, _HOST_MEMORY)),
    EndReason.LOSS_NOT_FINITE: (_bf16, _lower_rate),
    EndReason.DISK_FULL: (_fewer_checkpoints,),
    EndReason.MODEL_UNLOADABLE: (_lora_for_qlora,),
    EndReason.RUNNER_HUNG: (_go_on,),
}
"""What to try, mildest first."""

_NOT_FINITE_IN_FP16 = Text(
    "No step was to blame but the model or the data: look at the samples, and try the model "
    "without optimization.fp16, whose largest number is 65504.",
    "问题出在模型或数据，而不是训练步长：请检查这些样本，并尝试关闭 optimization.fp16（其最大"
    "可表示的数为 65504）。",
)

_BY_HAND_OF_FIELD: dict[str, Text] = {
    "data.tokenizer_path": Text(
        "Set data.tokenizer_path to a tokenizer with another chat template; the data may stay as "
        "it is. finetunectl dataset inspect with --tokenizer shows what would be learned.",
        "请将 data.tokenizer_path 设为使用其他对话模板的分词器；数据无需修改。"
        "finetunectl dataset inspect 加上 --tokenizer 可查看会学习哪些内容。",
    ),
}
"""Where the run named the parameter that is to blame, whatever the reason."""

_BY_HAND: dict[EndReason, Text] = {
    EndReason.DEVICE_OUT_OF_MEMORY: Text(
        "End other programs that use the device, or take a smaller model or a larger device.",
        "请结束占用该设备的其他程序，或改用更小的模型或更大的设备。",
    ),
    EndReason.HOST_OUT_OF_MEMORY: Text(
        "End other programs, or take a smaller model or a machine with more memory.",
        "请结束其他程序，或改用更小的模型或内存更大的机器。",
    ),
    EndReason.DISK_FULL: Text(
        "Make room on the disk of data.output_dir: a paused run goes on by itself then, a failed "
        "one once it is started again. Or choose another folder.",
        "请在 data.output_dir 所在磁盘腾出空间：已暂停的运行会自动继续，已失败的请重新启动；"
        "也可以换一个目录。",
    ),
    EndReason.DATASET_INVALID: Text(
        "Mend the data file; finetunectl dataset inspect shows every bad line, and what of it is "
        "learned.",
        "请修正数据文件；finetunectl dataset inspect 会列出所有错误行以及会被学习的内容。",
    ),
    EndReason.MODEL_UNLOADABLE: Text(
        "Choose another model folder or mend this one; finetunectl check says what is wrong "
        "with it.",
        "请选择其他模型目录或修复该目录；finetunectl check 会说明问题所在。",
    ),
    EndReason.LOSS_NOT_FINITE: Text(
        "No step was to blame but the model or the data: look at the model's weights, and at the "
        "samples.",
        "问题出在模型或数据，而不是训练步长：请检查模型权重和这些样本。",
    ),
    EndReason.DEVICE_LOST: Text(
        "Look at the device with its driver's tools, such as nvidia-smi, and go on from the "
        "newest checkpoint.",
        "请用驱动工具（例如 nvidia-smi）检查设备，然后从最新的检查点继续。",
    ),
    EndReason.RUNNER_KILLED: Text(
        "Find out who ended it, and go on from the newest checkpoint.",
        "请查明是谁终止了它，然后从最新的检查点继续。",
    ),
    EndReason.RUNNER_CRASHED: Text(
        "Read the traceback and the log; finetunectl doctor says whether the environment is whole.",
        "请查看错误堆栈和日志；finetunectl doctor 会检查环境是否完好。",
    ),
    EndReason.RUNNER_HUNG: Text(
        "Look at the driver and at the disks, and go on from the newest checkpoint.",
        "请检查驱动程序和磁盘，然后从最新的检查点继续。",
    ),
    EndReason.INTERRUPTED: Text(
        "Start it again, from the newest checkpoint where there is one.",
        "请重新启动；若有检查点，可从最新的检查点继续。",
    ),
}

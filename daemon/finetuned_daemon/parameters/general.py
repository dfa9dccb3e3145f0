"""Sections `logging` and `general`: what the run reports, and what belongs nowhere else."""

from __future__ import annotations

from typing import Literal

from finetuned_daemon.parameters.field import STEPS, Section, parameter
from finetuned_daemon.texts import Text

LogLevel = Literal["debug", "info", "warning", "error"]


class LoggingParameters(Section):
    """How much the run reports."""

    log_level: LogLevel = parameter(
        "info",
        "日志级别",
        "Log level",
        "common",
        required=True,
        choices={
            "debug": Text("Debug: everything", "debug：全部"),
            "info": Text("Info", "info：常规"),
            "warning": Text("Warnings and errors", "warning：警告和错误"),
            "error": Text("Errors alone", "error：仅错误"),
        },
        help=Text(
            "Which lines of the log are kept with the run. Debug helps to find out why something "
            "goes wrong; progress and metrics come at every level.",
            "运行中保留哪些日志。排查问题时用 debug；进度和指标在任何级别都会上报。",
        ),
    )
    logging_steps: int = parameter(
        10,
        "日志记录步数",
        "Logging steps",
        "common",
        required=True,
        ge=1,
        le=1000,
        unit=STEPS,
        help=Text(
            "Steps over which the reported loss is averaged. A lower number gives a finer curve "
            "with more noise; progress comes up to twice a second in any case.",
            "上报的损失是多少步的平均值。数值越小曲线越细、噪声越大；进度不受影响，每秒最多更新两次。",
        ),
    )


class GeneralParameters(Section):
    """What belongs to no other section."""

    seed: int = parameter(
        42,
        "随机种子",
        "Random seed",
        "common",
        required=True,
        ge=0,
        le=999_999,
        help=Text(
            "Decides all that is random: order of samples, the split for evaluation, the first "
            "LoRA weights, dropout. The same seed with the same settings gives the same run; "
            "another one shows how much of a result is luck.",
            "决定一切随机因素：样本顺序、评估划分、LoRA 初始权重、dropout。种子和设置相同则结果相"
            "同；换一个种子可以看出结果中有多少是偶然。",
        ),
    )

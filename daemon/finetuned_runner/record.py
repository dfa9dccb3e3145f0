"""The record of a run that came to its end: what it takes to repeat it, and what came of it.

`finetunectl train training_record.json` does the same run again. With the same versions, device and
number of threads, its weights are the same to the bit.
"""

from __future__ import annotations

from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason

RECORD = "training_record.json"


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class RecordedFile(_Record):
    """A file as it was read."""

    name: str
    size: int
    sha256: str


class Machine(_Record):
    """What a run was computed on."""

    system: str
    cpu: str
    gpu: str = ""
    num_threads: int


class ResumedFrom(_Record):
    """The checkpoint that a run went on from."""

    checkpoint: str
    """Name of its folder."""
    step: int
    data_files: dict[str, str] = Field(default_factory=dict[str, str])
    """Names of the data files that its run had and this one has not, or has changed since.

    By the parameter that names them.
    """


class TrainingRecord(_Record):
    """A run that came to its end, to be repeated and judged."""

    kind: Literal["training_record"] = "training_record"
    format_version: int = 1
    task: str
    run: int
    training_type: str
    """`sft` or `pretrain`."""
    device: str
    """`cpu` or `cuda:N`."""
    parameters: Parameters
    """As they were asked for, defaults included."""
    precision: str
    """Format of matrix products: `float32`, `fp16` or `bf16`."""
    optimizer: str
    """As transformers calls it."""
    trained_parameters: int
    total_parameters: int
    num_samples: int
    """Chats, or blocks of text, of the training data."""
    num_eval_samples: int = 0
    num_tokens: int
    """Tokens trained on in all epochs, without padding; a checkpoint's included."""
    files: dict[str, list[RecordedFile]] = Field(default_factory=dict[str, list[RecordedFile]])
    """What was read, by parameter, such as `data.train_file`."""
    resumed_from: ResumedFrom | None = None
    chat_template_sha256: str = ""
    versions: dict[str, str]
    machine: Machine
    start_time: datetime
    end_time: datetime
    end_reason: EndReason
    step: int
    """Optimizer steps done, a checkpoint's included."""
    epoch: float
    train_losses: dict[int, float]
    """By step: the mean over the steps since the one before; of a checkpoint's run, too."""
    eval_losses: dict[int, float] = Field(default_factory=dict[int, float])
    """By step."""

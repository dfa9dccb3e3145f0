"""Tasks and runs: what they are, the state machine, and the table of ends. No gRPC, no SQL."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    EndReason,
    ProcessIdentity,
    Progress,
    RunPhase,
    StopWish,
    TrainingType,
)
from finetuned_daemon.texts import Text


class TaskState(StrEnum):
    """Where a task stands; names as in `finetuned.v1.TaskState`."""

    PENDING = "PENDING"
    QUEUED = "QUEUED"
    RUNNING = "RUNNING"
    COMPLETED = "COMPLETED"
    STOPPED = "STOPPED"
    FAILED = "FAILED"
    PAUSED = "PAUSED"


class PauseReason(StrEnum):
    """Why a run is paused; names as in `finetuned.v1.PauseReason`."""

    REQUESTED = "REQUESTED"
    DISK_FULL = "DISK_FULL"


ENDED = frozenset({TaskState.COMPLETED, TaskState.STOPPED, TaskState.FAILED})
ACTIVE = frozenset({TaskState.QUEUED, TaskState.RUNNING})
UNDER_WAY = ACTIVE | {TaskState.PAUSED}
"""Has a run that is not over: no edit, no other start, no deletion."""

TRANSITIONS: dict[TaskState, frozenset[TaskState]] = {
    TaskState.PENDING: frozenset({TaskState.QUEUED}),
    # A queued task is stopped at once; one that can't be started any more fails.
    # A probe leads back to what was before it.
    TaskState.QUEUED: ENDED | {TaskState.RUNNING, TaskState.PENDING, TaskState.PAUSED},
    # To the queue at once where running out of memory is retried: watchers see no end between.
    TaskState.RUNNING: ENDED | {TaskState.QUEUED, TaskState.PENDING, TaskState.PAUSED},
    TaskState.COMPLETED: frozenset({TaskState.QUEUED}),
    TaskState.STOPPED: frozenset({TaskState.QUEUED}),
    TaskState.FAILED: frozenset({TaskState.QUEUED}),
    # The same run goes on, or is given up.
    TaskState.PAUSED: frozenset({TaskState.QUEUED, TaskState.STOPPED}),
}


@dataclass(frozen=True)
class Look:
    """How a state is shown to users."""

    label: Text
    color: str


LABELS: dict[TaskState, Look] = {
    TaskState.PENDING: Look(Text("Pending", "等待中"), "blue"),
    # For a user it waits all the same.
    TaskState.QUEUED: Look(Text("Pending", "等待中"), "blue"),
    TaskState.RUNNING: Look(Text("Running", "运行中"), "green"),
    TaskState.COMPLETED: Look(Text("Completed", "已完成"), "green"),
    TaskState.STOPPED: Look(Text("Stopped", "已停止"), "orange"),
    TaskState.FAILED: Look(Text("Failed", "失败"), "red"),
    TaskState.PAUSED: Look(Text("Paused", "已暂停"), "orange"),
}


@dataclass(frozen=True)
class End:
    """What an end reason means."""

    state: TaskState
    sentence: Text
    """What a user reads where the runner has no better one."""


ENDS: dict[EndReason, End] = {
    EndReason.FINISHED: End(TaskState.COMPLETED, Text("All epochs are done.", "已完成全部轮数。")),
    EndReason.EARLY_STOPPED: End(
        TaskState.COMPLETED, Text("The evaluation loss improved no more.", "评估损失不再改善。")
    ),
    EndReason.STEP_LIMIT: End(
        TaskState.COMPLETED, Text("max_steps is reached.", "已达到 max_steps。")
    ),
    EndReason.STOPPED_BY_USER: End(
        TaskState.STOPPED, Text("Stopped on request.", "已按请求停止。")
    ),
    EndReason.DEVICE_OUT_OF_MEMORY: End(
        TaskState.FAILED, Text("The device ran out of memory.", "设备内存（显存）不足。")
    ),
    EndReason.HOST_OUT_OF_MEMORY: End(
        TaskState.FAILED, Text("The machine ran out of memory.", "主机内存不足。")
    ),
    EndReason.DISK_FULL: End(
        TaskState.FAILED,
        Text(
            "No space is left on the disk; a checkpoint that was saved is whole.",
            "磁盘空间已用尽；已保存的检查点是完整的。",
        ),
    ),
    EndReason.DATASET_INVALID: End(
        TaskState.FAILED, Text("The data can't be used.", "数据无法使用。")
    ),
    EndReason.MODEL_UNLOADABLE: End(
        TaskState.FAILED, Text("The model can't be loaded.", "模型无法加载。")
    ),
    EndReason.LOSS_NOT_FINITE: End(
        TaskState.FAILED, Text("The loss is not a number any more.", "损失已不是有限的数值。")
    ),
    EndReason.DEVICE_LOST: End(TaskState.FAILED, Text("The device went away.", "设备已丢失。")),
    EndReason.RUNNER_KILLED: End(
        TaskState.FAILED, Text("A signal ended the runner.", "训练进程被信号终止。")
    ),
    EndReason.RUNNER_CRASHED: End(
        TaskState.FAILED, Text("The runner ended with an error.", "训练进程因错误退出。")
    ),
    EndReason.INTERRUPTED: End(
        TaskState.FAILED,
        Text(
            "The runner ended while no daemon watched, and left no result; start the task again.",
            "训练进程在没有守护进程监视时结束，且没有留下结果；请重新启动任务。",
        ),
    ),
    EndReason.QUOTA_USED_UP: End(
        TaskState.STOPPED, Text("The training quota is used up.", "训练配额已用尽。")
    ),
    EndReason.RUNNER_HUNG: End(
        TaskState.FAILED,
        Text(
            "The runner gave no sign of life any more, and was ended.",
            "训练进程不再有任何响应，已被终止。",
        ),
    ),
    EndReason.PROBED: End(
        TaskState.COMPLETED,
        Text(
            "What a run takes was measured; nothing was trained.",
            "已测量运行所需资源；未进行训练。",
        ),
    ),
}


class Standing(BaseModel):
    """What a task shows of its latest run; fields as in `Task`."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    state: TaskState
    end_reason: EndReason | None
    end_message: str
    run: int
    progress: Progress
    last_checkpoint: str
    start_time: int
    end_time: int

    @classmethod
    def of(cls, task: Task) -> Standing:
        """What `task` shows now."""
        return cls(**{name: getattr(task, name) for name in cls.model_fields})

    def shown(self) -> dict[str, Any]:
        """What becomes of a task that shows it again."""
        return {name: getattr(self, name) for name in Standing.model_fields}


@dataclass(frozen=True, kw_only=True)
class Task:
    """One fine-tuning task. Times are microseconds since the epoch; 0: not yet."""

    key: int = 0
    """Row of the database, in order of creation; never used again."""
    task_id: str
    display_name: str
    training_type: TrainingType
    parameters: Parameters
    device: str = ""
    """As asked for; empty: the first GPU, else the CPU."""
    template: str = ""
    """Resource name of the template that it was made from."""
    state: TaskState = TaskState.PENDING
    phase: RunPhase | None = None
    end_reason: EndReason | None = None
    end_message: str = ""
    run: int = 0
    progress: Progress = field(default_factory=Progress)
    last_checkpoint: str = ""
    create_time: int = 0
    update_time: int = 0
    start_time: int = 0
    end_time: int = 0
    last_seq: int = 0
    revision: int = 1
    pause_reason: PauseReason | None = None
    """Why it is paused, where it is."""
    before_probe: Standing | None = None
    """While a probe of it is queued or runs: what it was before."""

    @property
    def name(self) -> str:
        """Resource name."""
        return f"tasks/{self.task_id}"

    @property
    def etag(self) -> str:
        """Changes with every change but progress."""
        return f'"{self.key}-{self.revision}"'


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run of a task: one runner process. Times as in `Task`."""

    key: int = 0
    """Row of the database."""
    place: int = 0
    """Its order is the order of the queue."""
    task_key: int
    number: int
    state: TaskState = TaskState.QUEUED
    device: str
    parameters: Parameters
    end_reason: EndReason | None = None
    end_message: str = ""
    create_time: int = 0
    start_time: int = 0
    end_time: int = 0
    identity: ProcessIdentity | None = None
    """The runner's process, once it is known."""
    exit_code: int | None = None
    signal: str = ""
    progress: Progress = field(default_factory=Progress)
    last_checkpoint: str = ""
    run_dir: str = ""
    output_dir: str = ""
    stop: StopWish | None = None
    """The wish to stop; durable before anything is sent to the runner."""
    stop_time: int = 0
    planned_checkpoints: int = 0
    """Checkpoints that its present process was expected to save; 0 where nobody asked."""
    saved_checkpoints: int = 0
    """Checkpoints that its present process has saved."""
    retry: int = 0
    """How many runs in a row were started by themselves after memory ran out, this one included.

    0: somebody started it.
    """
    is_probe: bool = False
    """It only measures what a run takes."""
    attempt: int = 1
    """Number of its process: one more after each pause."""
    starts: int = 0
    """How often this process was started; more than once where it crashed at once."""
    pause: PauseReason | None = None
    """It is to be paused, or is; durable before anything is sent to the runner."""
    resume_path: str = ""
    """Checkpoint of its own that its present process goes on from, after a pause.

    Empty: as its parameters say.
    """
    request_id: str = ""
    """The call that started it, or that resumed it last, for logs."""
    wish_request_id: str = ""
    """The call that wished last for a stop or a pause that is not there yet."""
    ingested_bytes: int = 0
    """How far the `events.jsonl` of its attempt has been taken over."""
    ingested_seq: int = 0

    @property
    def attempt_dir(self) -> Path:
        """The folder of its present process: the run folder, or one in it after a pause."""
        folder = Path(self.run_dir)
        return folder if self.attempt == 1 else folder / f"attempt-{self.attempt}"


def check_transition(old: TaskState, new: TaskState) -> None:
    """Holds the state machine; a violation is a bug of ours, never bad input."""
    if new not in TRANSITIONS[old]:
        raise AssertionError(f"no way from {old} to {new}")


def now_us() -> int:
    """The present in microseconds since the epoch."""
    return time.time_ns() // 1000


# --- names

TASK_ID = re.compile(r"[a-z][a-z0-9-]{2,61}[a-z0-9]")
LONGEST_DISPLAY_NAME = BY_NAME["display_name_characters"].default


def default_display_name(
    training_type: TrainingType, moment: datetime, is_taken: Callable[[str], bool]
) -> str:
    """`{sft|pretrain}_{YYYYMMDD_HHmmss}`; a second one in the same second gets `_2`, and so on."""
    base = f"{training_type.lower()}_{moment:%Y%m%d_%H%M%S}"
    name, number = base, 1
    while is_taken(name):
        number += 1
        name = f"{base}_{number}"
    return name


def new_task_id(training_type: TrainingType) -> str:
    """An id that nobody has: 40 random bits."""
    return f"{training_type.lower()}-{secrets.token_hex(5)}"

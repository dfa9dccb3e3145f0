"""What somebody is told of, in one table."""

from __future__ import annotations

from dataclasses import dataclass

from finetuned_daemon.texts import Text


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of notification."""

    name: str
    """As `--notify-on` takes it."""
    says: str
    """When it is sent, in a few words."""
    label: Text
    """What the title says of the task."""
    next_command: str
    """What can be typed then, `{task}` in it."""
    is_urgent: bool = False
    """Whether somebody has to do something."""
    is_default: bool = True
    """Whether it is sent where nobody has said what is."""

    @property
    def type(self) -> str:
        """As the notification has it."""
        return f"run.{self.name}"


COMPLETED = Kind(
    name="completed",
    says="a run has completed",
    label=Text("completed", "已完成"),
    next_command="finetunectl task checkpoints {task}",
)
FAILED = Kind(
    name="failed",
    says="a run or a probe has failed, or was ended because it hung",
    label=Text("failed", "失败"),
    next_command="finetunectl task fix {task}",
    is_urgent=True,
)
PAUSED = Kind(
    name="paused",
    says="the daemon has paused a run for want of space",
    label=Text("paused, the disk is full", "已暂停，磁盘已满"),
    next_command="finetunectl task show {task}",
    is_urgent=True,
)
NEEDS_ATTENTION = Kind(
    name="needs_attention",
    says="a run waits for space on the disk, gives no sign of life, or can't go on by itself",
    label=Text("needs attention", "需要处理"),
    next_command="finetunectl task logs {task}",
    is_urgent=True,
)
QUOTA_USED_UP = Kind(
    name="quota_used_up",
    says="a run was ended because the training quota is used up",
    label=Text("stopped, the training quota is used up", "已停止，训练配额已用尽"),
    next_command="finetunectl task checkpoints {task}",
    is_urgent=True,
)
STOPPED = Kind(
    name="stopped",
    says="somebody has stopped a run",
    label=Text("stopped", "已停止"),
    next_command="finetunectl task start {task} --resume newest",
    is_default=False,
)

KINDS = (COMPLETED, FAILED, PAUSED, NEEDS_ATTENTION, QUOTA_USED_UP, STOPPED)
BY_NAME = {kind.name: kind for kind in KINDS}

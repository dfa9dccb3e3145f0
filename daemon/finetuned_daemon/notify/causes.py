"""Which events somebody is told of."""

from __future__ import annotations

from dataclasses import dataclass

from finetuned.v1 import event_pb2, task_pb2
from finetuned_daemon.notify.kinds import (
    COMPLETED,
    FAILED,
    NEEDS_ATTENTION,
    PAUSED,
    QUOTA_USED_UP,
    STOPPED,
    Kind,
)
from finetuned_daemon.tasks import ENDS, PauseReason, Run
from finetuned_daemon.texts import NOTHING, Text

_ATTENTION = {
    "RUNNER_SILENT": Text("The runner gives no sign of life.", "训练进程没有任何响应。"),
    "RESUME_REFUSED": Text(
        "There is room again, but the run can't go on by itself.",
        "磁盘已有空间，但运行无法自行继续。",
    ),
    "WAITING_FOR_SPACE": Text(
        "No space is left; the run waits in memory.", "磁盘空间已用尽；运行正在内存中等待。"
    ),
}
"""Notices, and the phase, with which a run needs somebody."""


@dataclass(frozen=True)
class Cause:
    """An event that somebody is told of."""

    kind: Kind
    reason: str
    """End reason, reason of a notice, or a phase; stable."""
    sentence: Text
    """What is known of it in both languages; empty where there is nothing in Chinese."""
    message: str
    """What the event itself says."""


def is_candidate(event: event_pb2.Event) -> bool:
    """Whether `cause_of` may find anything; it takes the run, which has to be read."""
    match event.WhichOneof("payload"):
        case "state_change":
            return event.state_change.new_state in _LEAVES
        case "notice":
            return event.notice.reason in _ATTENTION
        case "phase_change":
            return event.phase_change.phase == task_pb2.RUN_PHASE_WAITING_FOR_SPACE
        case _:
            return False


def cause_of(event: event_pb2.Event, run: Run) -> Cause | None:
    """What somebody is to be told of, of a candidate and its run as it stands now."""
    match event.WhichOneof("payload"):
        case "notice":
            reason, message = event.notice.reason, event.notice.message
            return Cause(NEEDS_ATTENTION, reason, _ATTENTION[reason], message)
        case "phase_change":
            reason, message = "WAITING_FOR_SPACE", event.phase_change.message
            return Cause(NEEDS_ATTENTION, reason, _ATTENTION[reason], message)
        case _:
            kind = _kind_of_end(event.state_change, run)
    if kind is None:
        return None
    reason = run.end_reason.value if run.end_reason else ""
    sentence = ENDS[run.end_reason].sentence if run.end_reason else NOTHING
    return Cause(kind, reason, sentence, event.state_change.message)


_LEAVES = frozenset(
    {
        task_pb2.TASK_STATE_COMPLETED,
        task_pb2.TASK_STATE_STOPPED,
        task_pb2.TASK_STATE_FAILED,
        task_pb2.TASK_STATE_PAUSED,
    }
)


def _kind_of_end(change: event_pb2.StateChange, run: Run) -> Kind | None:
    state = change.new_state
    if state == task_pb2.TASK_STATE_FAILED:
        return FAILED
    if run.is_probe:  # whoever asked waits for it, and the task is again what it was before
        return None
    if state == task_pb2.TASK_STATE_COMPLETED:
        return COMPLETED
    if state == task_pb2.TASK_STATE_PAUSED:
        return PAUSED if run.pause is PauseReason.DISK_FULL else None
    if change.end_reason == task_pb2.END_REASON_QUOTA_USED_UP:
        return QUOTA_USED_UP
    return STOPPED

"""Words for enums, numbers and times, for people."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from finetuned.v1.task_pb2 import EndReason, RunPhase, TaskState

STATE_COLORS = {
    "pending": "blue",
    "queued": "blue",
    "running": "green",
    "completed": "green",
    "stopped": "orange",
    "failed": "red",
    "paused": "orange",
}
"""As the daemon's form has them for every front-end."""


def state_word(state: TaskState.ValueType) -> str:
    """Such as `running`."""
    return _word(TaskState, "TASK_STATE_", state)


def phase_word(phase: RunPhase.ValueType) -> str:
    """Such as `loading model`; empty where there is none."""
    return _word(RunPhase, "RUN_PHASE_", phase)


def reason_word(reason: EndReason.ValueType) -> str:
    """Such as `out of memory`; empty where there is none."""
    return _word(EndReason, "END_REASON_", reason)


def enum_name(enum: Any, value: int) -> str:
    """The name of an enum's value; its number where a later daemon sends one unknown here."""
    known = enum.DESCRIPTOR.values_by_number.get(value)
    return str(known.name if known is not None else value)


def _word(enum: Any, prefix: str, value: int) -> str:
    name = enum_name(enum, value) if value else ""
    return name.removeprefix(prefix).lower().replace("_", " ")


def local(moment: Timestamp) -> datetime:
    """The moment in local time."""
    return datetime.fromtimestamp(moment.seconds + moment.nanos / 1e9).astimezone()


def duration_text(seconds: float) -> str:
    """Such as `1:02:03` or `2:03`."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"


NOTES = {
    TaskState.TASK_STATE_PENDING: "not started; start it: task.start()",
    TaskState.TASK_STATE_QUEUED: "the run waits in the queue, and starts by itself",
    TaskState.TASK_STATE_PAUSED: "the run is paused; let it go on: task.resume()",
}
"""What is to be known of a task of which more was awaited; of others, that the run goes on."""

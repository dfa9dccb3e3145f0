"""Words for enums, numbers and times, for people."""

from __future__ import annotations

from datetime import datetime

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


def _word(enum: type[TaskState] | type[RunPhase] | type[EndReason], prefix: str, value: int) -> str:
    if not value:
        return ""
    # A later daemon may send one that this client does not know.
    known = enum.DESCRIPTOR.values_by_number.get(value)
    name = known.name if known is not None else str(value)
    return name.removeprefix(prefix).lower().replace("_", " ")


def local(moment: Timestamp) -> datetime:
    """The moment in local time."""
    return datetime.fromtimestamp(moment.seconds + moment.nanos / 1e9).astimezone()


def duration_text(seconds: float) -> str:
    """Such as `1:02:03` or `2:03`."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"

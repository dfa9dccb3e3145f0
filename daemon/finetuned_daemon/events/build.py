"""Makes events: from what a runner reports, and for what the daemon itself decides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp

from finetuned.v1 import event_pb2, task_pb2
from finetuned_daemon.parameters import protos
from finetuned_daemon.runs.contract import (
    KINDS,
    EndReason,
    Payload,
    PhaseChange,
    Result,
    RunPhase,
)
from finetuned_daemon.tasks import PauseReason, TaskState
from finetuned_daemon.texts import NOTHING

if TYPE_CHECKING:
    from finetuned_daemon.explain import Explanation


def timestamp(microseconds: int) -> Timestamp:
    """A proto timestamp of microseconds since the epoch."""
    result = Timestamp()
    result.FromMicroseconds(microseconds)
    return result


def reported(time_us: int, run: int, payload: Payload) -> event_pb2.Event:
    """The event of what a runner has reported; payloads and messages have the same fields."""
    event = event_pb2.Event(time=timestamp(time_us), run=run)
    if isinstance(payload, PhaseChange):
        event.phase_change.CopyFrom(
            event_pb2.PhaseChange(
                phase=phase_value(payload.phase),
                message=payload.message,
                deadline_seconds=payload.deadline_seconds,
            )
        )
    else:
        json_format.ParseDict(
            payload.model_dump(mode="json", exclude_none=True),
            getattr(event, KINDS[type(payload)]),
        )
    return event


def state_change(
    time_us: int,
    run: int,
    old: TaskState,
    new: TaskState,
    *,
    end_reason: EndReason | None = None,
    message: str = "",
) -> event_pb2.Event:
    """The event of a new state."""
    return event_pb2.Event(
        time=timestamp(time_us),
        run=run,
        state_change=event_pb2.StateChange(
            old_state=state_value(old),
            new_state=state_value(new),
            end_reason=end_reason_value(end_reason),
            message=message,
        ),
    )


def result(
    time_us: int,
    run: int,
    outcome: Result,
    *,
    exit_code: int | None,
    signal: str,
    explanation: Explanation,
) -> event_pb2.Event:
    """The event of a run's end."""
    message = event_pb2.Result(
        end_reason=end_reason_value(outcome.end_reason),
        message=outcome.message,
        step=outcome.step,
        output_path=outcome.output_path,
        exit_code=exit_code,
        signal=signal,
        detail=outcome.detail,
    )
    if explanation.evidence is not None:
        message.evidence.CopyFrom(event_pb2.Evidence(**vars(explanation.evidence)))
    if explanation.fix is not None:
        message.fix.CopyFrom(protos.patch_to_proto(explanation.fix))
    if explanation.advice != NOTHING:
        message.advice.en, message.advice.zh = explanation.advice.en, explanation.advice.zh
    return event_pb2.Event(time=timestamp(time_us), run=run, result=message)


def task_edited(time_us: int, fields: Sequence[str]) -> event_pb2.Event:
    """The event of a change of the task itself."""
    return event_pb2.Event(time=timestamp(time_us), task_edited=event_pb2.TaskEdited(fields=fields))


def state_value(state: TaskState) -> task_pb2.TaskState.ValueType:
    """The proto value of a state."""
    return task_pb2.TaskState.Value(f"TASK_STATE_{state.value}")


def phase_value(phase: RunPhase | None) -> task_pb2.RunPhase.ValueType:
    """The proto value of a phase; None: unspecified."""
    return task_pb2.RunPhase.Value(f"RUN_PHASE_{phase.value if phase else 'UNSPECIFIED'}")


def end_reason_value(reason: EndReason | None) -> task_pb2.EndReason.ValueType:
    """The proto value of an end reason; None: unspecified."""
    return task_pb2.EndReason.Value(f"END_REASON_{reason.value if reason else 'UNSPECIFIED'}")


def pause_reason_value(reason: PauseReason | None) -> task_pb2.PauseReason.ValueType:
    """The proto value of a pause's reason; None: unspecified."""
    return task_pb2.PauseReason.Value(f"PAUSE_REASON_{reason.value if reason else 'UNSPECIFIED'}")

"""What a runner has reported, as clients are to see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from google.protobuf import json_format
from pydantic import ValidationError

from finetuned.v1 import event_pb2
from finetuned_daemon.events import build
from finetuned_daemon.runs.contract import (
    CheckpointSaved,
    EventLine,
    Payload,
    PhaseChange,
    Progress,
    RunPhase,
)
from finetuned_daemon.tasks import Run

_WIDEST_GAP = 10_000
"""A number that is further away, with nothing behind it, is no number of ours."""


class Ahead:
    """The lines of one look, and what comes behind each of them."""

    def __init__(self, lines: Sequence[EventLine]) -> None:
        self._lines = lines
        self._last = {line.seq: number for number, line in enumerate(lines)}

    def is_out_of_place(self, number: int, seq: int) -> bool:
        """Whether a line is damage, and no gap: `seq` is the event before it.

        Else one wrong number would make all that follows look as if it had been taken over.
        """
        line = self._lines[number]
        if self._last.get(seq + 1, -1) > number:
            return True
        is_last = number + 1 == len(self._lines)
        return is_last and line.seq - seq > _WIDEST_GAP


class Unreadable(Exception):
    """A line is no event; the message says what is wrong, without the values."""


def read(line: EventLine, run: Run) -> tuple[Payload, event_pb2.Event] | None:
    """What a line says, and its event; None for a kind that this version does not know.

    Raises:
        Unreadable: It can't be an event.
    """
    try:
        payload = line.parse()
    except ValidationError as error:
        raise Unreadable(_wrong(error)) from error
    if payload is None:
        return None
    if run.pause and isinstance(payload, PhaseChange):
        payload = _pausing(payload)
    try:
        return payload, build.reported(int(line.time * 1e6), run.number, payload)
    except (ValueError, OverflowError, json_format.ParseError) as error:
        # JSON has numbers, times and characters that events have not.
        raise Unreadable("it is out of all bounds") from error


def changes(payload: Payload, run: Run) -> dict[str, Any]:
    """What an event changes in its task."""
    if isinstance(payload, Progress):
        return {"progress": payload}
    if isinstance(payload, CheckpointSaved):
        return {"last_checkpoint": payload.path}
    if isinstance(payload, PhaseChange):
        # Once a stop is under way, saving is part of it.
        if run.stop:
            return {"phase": RunPhase.PAUSING if run.pause else RunPhase.STOPPING}
        return {"phase": payload.phase}
    return {}


def _wrong(error: ValidationError) -> str:
    """What is wrong, without the values, which have no business in the daemon's log."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_input=False)
    )


def _pausing(change: PhaseChange) -> PhaseChange:
    """What a runner says of its stop, as clients are to see it: the runner knows of no pause."""
    if change.phase is not RunPhase.STOPPING:
        return change
    return change.model_copy(update={"phase": RunPhase.PAUSING})

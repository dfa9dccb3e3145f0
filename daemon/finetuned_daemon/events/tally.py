"""Counts events and the ends of runs, since the daemon began."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from finetuned.v1 import event_pb2, task_pb2


class Tally:
    """What has gone into the logs of all tasks."""

    def __init__(self) -> None:
        self.events = Counter[str]()
        """By kind, as the fields of `Event` are named."""
        self.ends = Counter[str]()
        """Runs that ended, by the name of the end reason without its prefix."""

    def note(self, events: Sequence[event_pb2.Event]) -> None:
        """Counts what was written together."""
        # A process that ended for want of room has a result, and its run is paused.
        is_over = not any(
            event.state_change.new_state == task_pb2.TASK_STATE_PAUSED for event in events
        )
        for event in events:
            self.events[str(event.WhichOneof("payload"))] += 1
            if is_over and event.HasField("result"):
                reason = task_pb2.EndReason.Name(event.result.end_reason)
                self.ends[reason.removeprefix("END_REASON_")] += 1

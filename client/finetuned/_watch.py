"""Where a watcher stands in a task's event log: what to ask for, what to pass on, when it ends.

Like `_calls.py` this does no input or output, so that both clients share it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from finetuned import _calls
from finetuned._checks import check_numbers, check_texts
from finetuned._errors import DaemonUnavailable, EventsLost, FinetunedError, OutOfRange
from finetuned._outage import Outage
from finetuned.v1.event_pb2 import Event
from finetuned.v1.task_pb2 import EndReason, TaskState
from finetuned.v1.task_service_pb2 import Snapshot, WatchTaskRequest, WatchTaskResponse

ENDED = frozenset(
    {TaskState.TASK_STATE_COMPLETED, TaskState.TASK_STATE_STOPPED, TaskState.TASK_STATE_FAILED}
)
"""The states in which no run is going on or waiting."""

_REPLACED = frozenset({"LOG_EPOCH_CHANGED", "LOG_REPLACED", "SEQ_BEYOND_LAST"})
"""Reasons why a place that was good is none any more."""


@dataclass(frozen=True)
class ConnectionLost:
    """The connection broke; the watch goes on by itself and misses nothing."""

    error: DaemonUnavailable
    """What happened."""
    after_seq: int = 0
    """Last `seq` seen before; 0 where the items watched are no events."""


@dataclass(frozen=True)
class LogReplaced:
    """There is another log now, and the watch goes on in it.

    After a restore or a loss of power, or where the task was deleted and made again under its id.
    A `Snapshot` comes next, and then the events of the new log from its first on: what was made of
    those before is to be thrown away.
    """

    after_seq: int
    """Last `seq` seen of the log before."""


WatchItem: TypeAlias = Snapshot | Event | ConnectionLost | LogReplaced
"""What a watch yields: the task first and after each reconnection, then events by `seq`."""


class Cursor:
    """The place of one watcher in one task's log."""

    service = _calls.TASK_SERVICE
    rpc = "WatchTask"
    interval = 0.0

    def __init__(
        self,
        name: str,
        after_seq: int,
        log_epoch: str,
        until_end: bool,
        reconnect_timeout: float | None,
    ) -> None:
        check_numbers(64, after_seq=after_seq)
        check_texts(log_epoch=log_epoch)
        self.is_done = False
        self._name = name
        self._seq = after_seq
        self._log_epoch = log_epoch
        self._created = b""
        self._until_end = until_end
        self._outage = Outage(reconnect_timeout)
        self._end_seq: int | None = None
        self._history_seq = 0
        self._was_followed = False

    def request(self) -> WatchTaskRequest:
        """What to ask for on a new stream."""
        return WatchTaskRequest(
            name=self._name, after_seq=self._seq, log_epoch=self._log_epoch, allow_batches=True
        )

    def accept(self, response: WatchTaskResponse) -> tuple[Snapshot | Event, ...]:
        """Take a message of the stream; returns what is to be yielded.

        Raises:
            EventsLost: The events have a gap or a repeat.
            OutOfRange: The log is not the one that was watched.
        """
        self._outage.over()
        match response.WhichOneof("response"):
            case "snapshot":
                self._accept_snapshot(response.snapshot)
                return (response.snapshot,)
            case "event":
                self._accept_event(response.event)
                return (response.event,)
            case "events":
                return self._accept_events(response.events.events)
            case _:  # a heartbeat, or what a later daemon may send
                return ()

    def lost(self, error: FinetunedError | None) -> ConnectionLost | LogReplaced | None:
        """Take the end of a stream; returns what is to be yielded, once an outage.

        Args:
            error: How it ended; None where it just ended, as the stream has no end of its own.

        Raises:
            FinetunedError: The error, where watching again cannot mend it.
        """
        if isinstance(error, OutOfRange) and error.reason in _REPLACED and self._was_followed:
            replaced = LogReplaced(self._seq)
            self._seq, self._log_epoch, self._created = 0, "", b""
            return replaced
        told = self._outage.take(error)
        return ConnectionLost(told, self._seq) if told is not None else None

    def delay(self) -> float:
        """Seconds to wait before the next stream."""
        return self._outage.delay()

    def _accept_snapshot(self, snapshot: Snapshot) -> None:
        task = snapshot.task
        if self._log_epoch not in ("", snapshot.log_epoch) or task.last_seq < self._seq:
            raise OutOfRange(
                f"the event log of {self._name} was restored; watch again from 0",
                reason="LOG_REPLACED",
            )
        created = task.create_time.SerializeToString()  # one id may be given to two tasks in turn
        if self._created not in (b"", created):
            raise OutOfRange(
                f"{self._name} was deleted and made again; watch again from 0",
                reason="LOG_REPLACED",
            )
        self._log_epoch, self._created = snapshot.log_epoch, created
        self._was_followed = True
        # Up to here it is history: ends of earlier runs among it end no watch.
        self._history_seq = task.last_seq
        if task.state == TaskState.TASK_STATE_PENDING and self._seq:
            # What has ended since is a probe of a task that was never started otherwise.
            self._history_seq = self._seq
        if not self._seq:  # the log begins with the oldest event that the daemon has kept
            self._seq = max(snapshot.first_seq - 1, 0)
        self._end_seq = task.last_seq if task.state in ENDED else None
        self._finish_at_end()

    def _accept_events(self, events: Iterable[Event]) -> tuple[Event, ...]:
        accepted = list[Event]()
        for event in events:
            if self.is_done:  # the end of the run need not be the last of the batch
                break
            self._accept_event(event)
            accepted.append(event)
        return tuple(accepted)

    def _accept_event(self, event: Event) -> None:
        if event.seq != self._seq + 1:
            raise EventsLost(
                f"event {event.seq} of {self._name} came where {self._seq + 1} was due",
                reason="SEQ_NOT_DENSE",
            )
        self._seq = event.seq
        if event.seq > self._history_seq and _is_end(event):
            self._end_seq = event.seq
        self._finish_at_end()

    def _finish_at_end(self) -> None:
        if self._until_end and self._end_seq is not None and self._seq >= self._end_seq:
            self.is_done = True


def _is_end(event: Event) -> bool:
    """Whether a run has ended, be it a probe after which its task is what it was before."""
    change = event.state_change
    if change.new_state == TaskState.TASK_STATE_PAUSED:  # for want of space, say: it goes on
        return False
    return change.new_state in ENDED or change.end_reason != EndReason.END_REASON_UNSPECIFIED

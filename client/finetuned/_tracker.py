"""What a watcher knows of a run, from the items of a watch; no output."""

from __future__ import annotations

from finetuned._watch import ENDED, ConnectionLost, LogReplaced, WatchItem
from finetuned.v1.event_pb2 import Event, Result, StateChange
from finetuned.v1.task_pb2 import EndReason, PauseReason, Progress, RunPhase, Task, TaskState
from finetuned.v1.task_service_pb2 import Snapshot

_FOR_ROOM = "it goes on by itself once there is room on the disk"


class Tracker:
    """The latest run of a task, as far as it has been watched."""

    def __init__(self, task: Task) -> None:
        self.task = task
        """As last seen whole; what changes since is below."""
        self.state: TaskState.ValueType = task.state
        self.phase: RunPhase.ValueType = task.phase
        self.progress: Progress = task.progress
        self.checkpoint = task.last_checkpoint
        self.losses: list[tuple[int, float]] = []
        self.result: Result | None = None
        self.pause = _pause_of(task)
        """What a paused run waits for; empty where it is not paused, or waits for somebody."""
        self.is_connected = True
        self._history_seq = 0

    def apply(self, item: WatchItem) -> bool:
        """Take an item; returns whether it belongs to the latest run, and so is to be shown."""
        if isinstance(item, ConnectionLost):
            self.is_connected = False
            return True
        if isinstance(item, LogReplaced):
            self.losses.clear()
            self.result = None
            return True
        if isinstance(item, Snapshot):
            self.is_connected = True
            self.task = item.task
            self.state, self.phase = item.task.state, item.task.phase
            self.progress, self.checkpoint = item.task.progress, item.task.last_checkpoint
            self.pause = _pause_of(item.task)
            self._history_seq = item.task.last_seq
            return True
        return self._apply_event(item)

    @property
    def has_ended(self) -> bool:
        """Whether the run is over."""
        return self.state in ENDED

    def is_history(self, event: Event) -> bool:
        """Whether the snapshot already knew it."""
        return event.seq <= self._history_seq

    def _change_state(self, change: StateChange) -> None:
        self.state = change.new_state
        self.phase = RunPhase.RUN_PHASE_UNSPECIFIED
        # A run that goes on has not ended yet, whatever was said of its pause.
        if self.state in (TaskState.TASK_STATE_QUEUED, TaskState.TASK_STATE_RUNNING):
            self.result = None
        is_full = change.end_reason == EndReason.END_REASON_DISK_FULL
        is_paused = change.new_state == TaskState.TASK_STATE_PAUSED
        self.pause = _FOR_ROOM if is_paused and is_full else ""

    def _apply_event(self, event: Event) -> bool:
        if event.run and event.run < self.task.run:
            return False
        if event.run > self.task.run:
            # Started again while watched: what is known is of the run before.
            self.task.run = event.run
            self.progress, self.checkpoint, self.result = Progress(), "", None
            self.losses.clear()
        # The snapshot is newer than history: replayed states are shown, but change nothing.
        is_new = not self.is_history(event)
        match event.WhichOneof("payload"):
            case "state_change" if is_new:
                self._change_state(event.state_change)
            case "phase_change" if is_new:
                self.phase = event.phase_change.phase
            case "progress" if is_new:
                self.progress = event.progress
            case "metrics":
                if "loss" in event.metrics.values:
                    self.losses.append((event.metrics.step, event.metrics.values["loss"]))
            case "checkpoint_saved" if is_new:
                self.checkpoint = event.checkpoint_saved.path
            case "result":
                self.result = event.result
            case _:
                pass
        return True


def _pause_of(task: Task) -> str:
    is_full = task.pause_reason == PauseReason.PAUSE_REASON_DISK_FULL
    return _FOR_ROOM if is_full else ""

"""A task as it was last seen: what the handles of both clients show of it."""

from __future__ import annotations

from typing import NoReturn

from finetuned._html import card
from finetuned._tracker import Tracker
from finetuned._watch import ENDED, WatchItem
from finetuned._words import phase_word, reason_word, state_word
from finetuned.v1.event_pb2 import Event
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.task_pb2 import EndReason, Progress, RunPhase, Task, TaskState, TrainingType
from finetuned.v1.task_service_pb2 import Snapshot


class SeenTask:
    """A task as it was last seen; `refresh` looks again, and so does every verb."""

    def __init__(self, message: Task) -> None:
        self._message = message

    @property
    def message(self) -> Task:
        """The whole message."""
        return self._message

    @property
    def name(self) -> str:
        """Resource name, `tasks/{task_id}`; never changes."""
        return self._message.name

    @property
    def id(self) -> str:
        """The id within `name`."""
        return self._message.name.removeprefix("tasks/")

    @property
    def display_name(self) -> str:
        """What a user sees."""
        return self._message.display_name

    @property
    def training_type(self) -> TrainingType.ValueType:
        """What is trained."""
        return self._message.training_type

    @property
    def parameters(self) -> Parameters:
        """All parameters."""
        return self._message.parameters

    @property
    def state(self) -> TaskState.ValueType:
        """Where it stands."""
        return self._message.state

    @property
    def state_name(self) -> str:
        """Where it stands, such as `running`."""
        return state_word(self._message.state)

    @property
    def phase(self) -> RunPhase.ValueType:
        """What the latest run is doing, while it runs."""
        return self._message.phase

    @property
    def phase_name(self) -> str:
        """What the latest run is doing, such as `loading model`; empty where it does nothing."""
        return phase_word(self._message.phase)

    @property
    def progress(self) -> Progress:
        """Latest progress of the latest run."""
        return self._message.progress

    @property
    def run(self) -> int:
        """Number of the latest run, from 1; 0 before the first start."""
        return self._message.run

    @property
    def has_ended(self) -> bool:
        """Whether no run of it waits, goes on or is paused, and one was there."""
        return self._message.state in ENDED

    @property
    def end_reason(self) -> EndReason.ValueType:
        """Why the latest run ended."""
        return self._message.end_reason

    @property
    def end_reason_name(self) -> str:
        """Why the latest run ended, such as `finished`; empty while it has not."""
        return reason_word(self._message.end_reason)

    @property
    def end_message(self) -> str:
        """One sentence for `end_reason`."""
        return self._message.end_message

    @property
    def last_checkpoint(self) -> str:
        """Folder of the newest checkpoint of the latest run. Empty: none."""
        return self._message.last_checkpoint

    def __eq__(self, other: object) -> bool:
        return isinstance(other, type(self)) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self._message.name)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied.

        Raises:
            TypeError: Always.
        """
        raise TypeError(
            f"a {type(self).__name__} holds a connection, and can't be pickled or copied; "
            "keep task.name, and make one by client.task(name)"
        )

    def __repr__(self) -> str:
        progress = self.progress
        parts = [repr(self.id), repr(self.display_name), self.state_name]
        if self.end_reason_name:
            parts.append(f"({self.end_reason_name})")
        elif self.phase_name:
            parts.append(f"({self.phase_name})")
        if progress.step:
            parts.append(f"{progress.step}/{progress.total_steps or '?'} steps")
        if progress.HasField("loss"):
            parts.append(f"loss {progress.loss:.4f}")
        return f"<{type(self).__name__} {' '.join(parts)}>"

    def _repr_html_(self) -> str:
        """What notebooks show."""
        return card(Tracker(self._message))

    def _see(self, item: WatchItem) -> None:
        """Take what a watch has told."""
        if isinstance(item, Snapshot):
            self._message = _copy(item.task)
            return
        seen = self._message
        if not isinstance(item, Event) or item.seq <= seen.last_seq:
            return
        seen.last_seq = item.seq
        if item.run > seen.run:
            seen.run = item.run
            for field in ("progress", "end_reason", "end_message", "last_checkpoint"):
                seen.ClearField(field)
        match item.WhichOneof("payload"):
            case "state_change":
                change = item.state_change
                seen.state, seen.phase = change.new_state, RunPhase.RUN_PHASE_UNSPECIFIED
                seen.end_reason, seen.end_message = change.end_reason, change.message
            case "phase_change":
                seen.phase = item.phase_change.phase
            case "progress":
                seen.progress.CopyFrom(item.progress)
            case "checkpoint_saved":
                seen.last_checkpoint = item.checkpoint_saved.path
            case _:
                pass


def _copy(task: Task) -> Task:
    result = Task()
    result.CopyFrom(task)
    return result

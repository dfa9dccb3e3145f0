"""What is known of the task that is shown, from the items of its watch. No widget."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from rich.text import Text

from finetuned._watch import ConnectionLost, LogReplaced, WatchItem
from finetuned.cli.output import local, phase_word, state_word
from finetuned.cli.tracker import Tracker
from finetuned.cli.ui.curves import Curves
from finetuned.cli.view import event_line
from finetuned.v1.event_pb2 import Event
from finetuned.v1.task_pb2 import RunPhase, Task, TaskState

LEVELS = ("debug", "info", "warning", "error")
LEVEL_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "red"}

KEPT_LINES = 5000
"""Of log and events each; older ones are in `task logs`."""
HISTORY_EVENTS = 3000
"""Read of what was before the task was chosen; the curves come whole, by GetMetrics."""


@dataclass(frozen=True)
class Line:
    """A line of the log, or something that happened."""

    time: str
    level: str
    text: str

    def shown(self) -> Text:
        """With its colour."""
        line = Text(f"{self.time}  ", style="dim")
        return line.append(self.text, style=LEVEL_STYLES.get(self.level, ""))


class Watched:
    """One task, its latest run, and what they said."""

    def __init__(self, task: Task) -> None:
        self.tracker = Tracker(task)
        self.curves = Curves()
        self.log: deque[Line] = deque(maxlen=KEPT_LINES)
        self.events: deque[Line] = deque(maxlen=KEPT_LINES)
        self.runs_changed = True
        """Whether runs or checkpoints have to be asked for again."""
        self.task_changed = False
        """Whether the task itself has to be."""
        self.curves_seq = 0
        """Metrics up to this event are in the curves already."""

    @property
    def task(self) -> Task:
        """As last seen whole."""
        return self.tracker.task

    def apply(self, item: WatchItem) -> None:
        """Take an item of the watch."""
        if isinstance(item, LogReplaced):
            self.log.clear()
            self.events.clear()
            self.curves.clear()
            self.curves_seq = 0
        is_latest = self.tracker.apply(item)
        if isinstance(item, ConnectionLost | LogReplaced):
            return
        self.runs_changed |= not isinstance(item, Event)
        if isinstance(item, Event) and is_latest:
            self._take(item)

    def _take(self, event: Event) -> None:
        kind = event.WhichOneof("payload")
        if event.run > self.curves.run:
            self.curves.clear(event.run)
        at = f"{local(event.time):%H:%M:%S}"
        match kind:
            case "log_line":
                level = event.log_line.level if event.log_line.level in LEVELS else "info"
                for text in event.log_line.text.splitlines() or [""]:
                    self.log.append(Line(at, level, text))
                return
            case "metrics":
                if event.seq > self.curves_seq:
                    self.curves.add(event.metrics.step, event.metrics.values)
                return
            case "evaluation":
                if event.seq > self.curves_seq:
                    self.curves.add(event.evaluation.step, event.evaluation.values)
            case "task_edited":
                self.task_changed = True
                fields = ", ".join(event.task_edited.fields)
                self.events.append(Line(at, "info", f"edited: {fields}"))
                return
            case "state_change" | "checkpoint_saved" | "checkpoint_deleted" | "best_checkpoint":
                self.runs_changed = True
            case _:
                pass
        line = _result_line(event) or event_line(event, self.tracker)
        if line:
            self.events.append(Line(at, _level(event), line))


def activity(state: TaskState.ValueType, phase: RunPhase.ValueType) -> str:
    """What a run does, in a word or two: its phase while it has one, else its state."""
    if state == TaskState.TASK_STATE_RUNNING and phase:
        return phase_word(phase)
    return state_word(state)


def _result_line(event: Event) -> str:
    if event.WhichOneof("payload") != "result":
        return ""
    result = event.result
    return result.message + (f" ({result.output_path})" if result.output_path else "")


def _level(event: Event) -> str:
    match event.WhichOneof("payload"):
        case "notice":
            return "warning"
        case "state_change":
            failed = event.state_change.new_state == TaskState.TASK_STATE_FAILED
            return "error" if failed else "info"
        case _:
            return "info"

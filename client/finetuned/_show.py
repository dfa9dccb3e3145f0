"""The live display of a run: a panel in notebooks, lines elsewhere."""

from __future__ import annotations

import asyncio
import importlib
import sys
import time
from collections import deque
from types import TracebackType
from typing import Any, Self

from finetuned._html import card, figures
from finetuned._logs import log_entry
from finetuned._metrics import Metrics
from finetuned._tracker import Tracker
from finetuned._watch import ConnectionLost, LogReplaced, WatchItem
from finetuned._words import NOTES, local, phase_word, reason_word, state_word
from finetuned.v1.event_pb2 import Event
from finetuned.v1.task_pb2 import Task, TaskState

_LOSS, _EVAL_LOSS = "loss", "eval_loss"
_LOG_LINES = 8
_HISTORY = 200
"""Events before the present that are looked through for the last log lines and the end."""

_REDRAWS = 4.0
"""A second at most, beside what happens once."""

_GOES_ON = "the run goes on; show it again: task.show()"


class Display:
    """What is shown of a run while it is watched."""

    POINTS = 500
    """Of each curve at most."""

    def __init__(self, task: Task) -> None:
        """Nothing is shown yet.

        Args:
            task: As last seen.
        """
        seen = Task()
        seen.CopyFrom(task)
        self.tracker = Tracker(seen)
        self.curves: dict[str, dict[int, float]] = {_LOSS: {}, _EVAL_LOSS: {}}
        self.lines = deque[str](maxlen=_LOG_LINES)
        self.note = ""
        self.after_seq = max(task.last_seq - _HISTORY, 0)
        self._run = task.run

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Show the last state; Ctrl-C comes out without the frames of what was waited in."""
        if isinstance(error, KeyboardInterrupt | asyncio.CancelledError):
            is_over = self.tracker.has_ended
            self.note = "" if is_over else NOTES.get(self.tracker.state, _GOES_ON)
        self.draw()
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(self.note) from None

    def begin(self, metrics: Metrics) -> None:
        """Take the curves so far, and show them."""
        if metrics.run == self._run:
            for name, points in self.curves.items():
                series = metrics.series.get(name)
                if series is not None:
                    points.update(zip(series.steps, series.values, strict=True))
        self.draw()

    def show(self, item: WatchItem) -> None:
        """Take an item of the watch, and show what it changes."""
        if not self.tracker.apply(item):
            return
        if isinstance(item, LogReplaced) or self.tracker.task.run != self._run:
            self._run = self.tracker.task.run
            self.lines.clear()
            for points in self.curves.values():
                points.clear()
        if isinstance(item, Event):
            self._take(item)
        self.tell(item)

    def tell(self, item: WatchItem) -> None:
        """Show an item that was taken."""
        raise NotImplementedError

    def draw(self) -> None:
        """Show everything."""

    def _take(self, event: Event) -> None:
        match event.WhichOneof("payload"):
            case "metrics" if _LOSS in event.metrics.values:
                self._add(_LOSS, event.metrics.step, event.metrics.values[_LOSS])
            case "evaluation" if _EVAL_LOSS in event.evaluation.values:
                self._add(_EVAL_LOSS, event.evaluation.step, event.evaluation.values[_EVAL_LOSS])
            case "log_line" if event.log_line.level != "debug":
                self.lines.append(str(log_entry(event)))
            case _:
                pass

    def _add(self, name: str, step: int, value: float) -> None:
        points = self.curves[name]
        points[step] = value
        if len(points) > 2 * self.POINTS:
            # Every other one, and the last: a curve that is looked at needs no more.
            steps = sorted(points)
            for one in steps[1:-1:2]:
                del points[one]


class Panel(Display):
    """A panel of HTML that changes in place."""

    def __init__(self, task: Task) -> None:
        """Needs IPython.

        Raises:
            ImportError: It is not installed.
        """
        super().__init__(task)
        self._ipython = _ipython_display()
        self._handle: Any = None
        self._credit = _REDRAWS
        self._drawn_at = time.monotonic()

    def tell(self, item: WatchItem) -> None:
        """Draw anew, but not for each of many steps a second, and not for history."""
        now = time.monotonic()
        self._credit = min(self._credit + (now - self._drawn_at) * _REDRAWS, _REDRAWS)
        self._drawn_at = now
        if isinstance(item, Event):
            if self.tracker.is_history(item):
                return
            if item.WhichOneof("payload") in ("progress", "metrics", "log_line"):
                if self._credit < 1:
                    return
                self._credit -= 1
        self.draw()

    def draw(self) -> None:
        """The panel as it is to be now."""
        html = self._ipython.HTML(card(self.tracker, self.curves, self.lines, self.note))
        if self._handle is None:
            self._handle = self._ipython.display(html, display_id=True)
        else:
            self._handle.update(html)


class Lines(Display):
    """A line for each thing that matters."""

    def tell(self, item: WatchItem) -> None:
        """A line, where the item is worth one."""
        if isinstance(item, Event):
            text = self._text(item)
            if text:
                _print(f"{local(item.time):%H:%M:%S}  {text}")
        elif isinstance(item, ConnectionLost):
            _print("daemon connection lost, waiting ... the run goes on")
        elif isinstance(item, LogReplaced):
            _print("the daemon's log was restored: its events follow from the first on")

    def draw(self) -> None:
        """What is to be said at the end, if anything."""
        if self.note:
            _print(self.note)

    def _text(self, event: Event) -> str:
        match event.WhichOneof("payload"):
            case "state_change":
                change = event.state_change
                why = reason_word(change.end_reason)
                word = state_word(change.new_state) + (f" ({why})" if why else "")
                is_paused = change.new_state == TaskState.TASK_STATE_PAUSED
                return f"{word}: {change.message}" if is_paused and change.message else word
            case "phase_change":
                entered = event.phase_change
                return ": ".join(filter(None, (phase_word(entered.phase), entered.message)))
            case "metrics":
                at = f"step {event.metrics.step}"
                values = sorted(event.metrics.values.items())
                left = [text for text in figures(self.tracker) if text.endswith("left")]
                return "  ".join((at, *(f"{n} {v:.4g}" for n, v in values), *left))
            case "evaluation":
                values = sorted(event.evaluation.values.items())
                at = f"evaluation at step {event.evaluation.step}"
                return "  ".join((at, *(f"{name} {value:.4g}" for name, value in values)))
            case "checkpoint_saved":
                return f"checkpoint {event.checkpoint_saved.path}"
            case "notice":
                return f"notice: {event.notice.message}"
            case "log_line" if event.log_line.level in ("warning", "error"):
                return f"{event.log_line.level}: {event.log_line.text}"
            case "result":
                end = event.result
                return "  ".join(filter(None, (end.message, end.output_path)))
            case _:
                return ""


def display(task: Task, html: bool | None) -> Display:
    """The display for where this runs, or the one that is asked for."""
    return Panel(task) if (is_notebook() if html is None else html) else Lines(task)


def is_notebook() -> bool:
    """Whether this is the process behind a notebook, which shows HTML."""
    # IPython is never imported for this: who is in a notebook has it.
    ipython: Any = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    # A terminal's has none.
    return getattr(shell, "kernel", None) is not None


def _print(text: str) -> None:
    """A line, without what a text in it would have the terminal do."""
    shown = "".join(c if c.isprintable() or c == "\n" else "\ufffd" for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    print(shown.encode(encoding, "replace").decode(encoding), flush=True)


def _ipython_display() -> Any:
    try:
        return importlib.import_module("IPython.display")
    except ModuleNotFoundError as error:
        if error.name not in ("IPython", "IPython.display"):
            raise
        raise ImportError(
            "the panel needs IPython: pip install 'finetuned[notebook]'", name="IPython"
        ) from error

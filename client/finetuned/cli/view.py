"""Views of a watched run: a live one for terminals, plain lines, JSON lines."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import TracebackType
from typing import Self

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from finetuned._watch import ConnectionLost, LogReplaced, WatchItem
from finetuned.cli.live import LiveDisplay, is_interactive
from finetuned.cli.output import (
    bytes_text,
    console,
    duration_text,
    local,
    phase_word,
    print_json_line,
    reason_word,
    state_text,
    state_word,
    to_dict,
)
from finetuned.cli.settings import say, task_command, visible
from finetuned.cli.tracker import Tracker
from finetuned.v1.event_pb2 import Event
from finetuned.v1.task_pb2 import TaskState
from finetuned.v1.task_service_pb2 import Snapshot

RECONNECTING = (
    "daemon connection lost, waiting ... the run goes on; "
    "if nothing brings the daemon back: finetunectl daemon start"
)
RECONNECTED = "daemon connection is back"
_REPLACED = "the daemon's log was restored: its events follow from the first on"


class View:
    """Shows a run while it is watched."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal in order."""

    def show(self, item: WatchItem, tracker: Tracker) -> None:
        """Show an item that the tracker has taken."""
        raise NotImplementedError


class JsonView(View):
    """A line of JSON for each item, as `WatchTaskResponse` names them."""

    def show(self, item: WatchItem, tracker: Tracker) -> None:
        """One line."""
        match item:
            case Snapshot():
                print_json_line({"snapshot": to_dict(item)})
            case Event():
                print_json_line({"event": to_dict(item)})
            case ConnectionLost():
                print_json_line(
                    {
                        "connection_lost": {
                            "message": item.error.message,
                            "after_seq": item.after_seq,
                        }
                    }
                )
            case LogReplaced():
                print_json_line({"log_replaced": {"after_seq": item.after_seq}})


class PlainView(View):
    """A line of text for each thing that matters, for pipes and files."""

    def __init__(self) -> None:
        self._was_lost = False

    def show(self, item: WatchItem, tracker: Tracker) -> None:
        """A line, where the item is worth one."""
        if isinstance(item, Event):
            line = event_line(item, tracker)
            if line:
                print(f"{local(item.time):%H:%M:%S}  {visible(line)}", flush=True)
        elif isinstance(item, ConnectionLost):
            self._was_lost = True
            say(RECONNECTING)
        elif isinstance(item, LogReplaced):
            say(_REPLACED)
        elif self._was_lost:
            self._was_lost = False
            say(RECONNECTED)


class LiveView(View):
    """Bar and figures that stay in place; what happens once scrolls by above."""

    def __init__(self) -> None:
        self._console = console()
        self._tracker: Tracker | None = None
        self._was_lost = False
        self._seen_at = time.monotonic()
        self._display = LiveDisplay(self._console, self._render)

    def __enter__(self) -> Self:
        self._display.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal in order."""
        self._display.__exit__(kind, error, traceback)

    def show(self, item: WatchItem, tracker: Tracker) -> None:
        """Take the new figures; print what happens once."""
        self._tracker = tracker
        self._seen_at = time.monotonic()
        if isinstance(item, Event):
            if item.WhichOneof("payload") in ("progress", "metrics"):
                return  # the bar and the figures show them
            line = event_line(item, tracker)
            if line:
                self._console.print(
                    Text(f"{local(item.time):%H:%M:%S}  ", style="dim").append(
                        line, style=_event_style(item)
                    )
                )
        elif isinstance(item, ConnectionLost):
            self._was_lost = True
            self._console.print(Text(RECONNECTING, style="yellow"))
        elif isinstance(item, LogReplaced):
            self._console.print(Text(_REPLACED, style="yellow"))
        elif self._was_lost:
            self._was_lost = False
            self._console.print(Text(RECONNECTED, style="green"))

    def _render(self) -> RenderableType:
        tracker = self._tracker
        if tracker is None:
            return Text("connecting ...", style="dim")
        head = Text.assemble((tracker.task.display_name, "bold"), "  ", state_text(tracker.state))
        if tracker.state == TaskState.TASK_STATE_PENDING:
            head.append(f"  start it: {task_command('start', tracker.task)}", style="dim")
        elif tracker.state == TaskState.TASK_STATE_PAUSED:
            head.append(f"  {tracker.pause or 'it goes on once it is resumed'}", style="dim")
        elif tracker.phase:
            head.append(f"  {phase_word(tracker.phase)}")
        elif tracker.task.queue_position and tracker.state == TaskState.TASK_STATE_QUEUED:
            head.append(f"  place {tracker.task.queue_position} in the queue")
        if not tracker.is_connected:
            head.append("  daemon connection lost, waiting ...", style="yellow")
        progress = tracker.progress
        if not progress.total_steps:
            return head
        bar = Table.grid(padding=(0, 2))
        bar.add_row(
            ProgressBar(total=progress.total_steps, completed=progress.step, width=40),
            f"{progress.step}/{progress.total_steps} steps",
            f"{progress.step / progress.total_steps:.0%}",
            f"epoch {progress.epoch:.2f}",
        )
        figures: list[str] = []
        if progress.HasField("loss"):
            figures.append(f"loss {progress.loss:.4f}")
        if progress.HasField("learning_rate"):
            figures.append(f"lr {progress.learning_rate:.2e}")
        if progress.tokens_per_second:
            figures.append(f"{progress.tokens_per_second:,.0f} tokens/s")
        is_running = tracker.state == TaskState.TASK_STATE_RUNNING
        if progress.HasField("eta_seconds") and tracker.is_connected and is_running:
            # It counts down between reports.
            left = progress.eta_seconds - (time.monotonic() - self._seen_at)
            figures.append(f"{duration_text(left)} left")
        lines: list[RenderableType] = [head, bar]
        if figures:
            lines.append(Text("   ".join(figures), overflow="ellipsis", no_wrap=True))
        if tracker.checkpoint:
            lines.append(Text(f"last checkpoint {tracker.checkpoint}", "dim", overflow="fold"))
        return Group(*lines)


def choose(as_json: bool) -> View:
    """The view for this stdout."""
    if as_json:
        return JsonView()
    return LiveView() if is_interactive(console()) else PlainView()


def event_line(event: Event, tracker: Tracker) -> str:
    """The event in one line; empty where it is not worth one."""
    match event.WhichOneof("payload"):
        case "state_change":
            change = event.state_change
            why = reason_word(change.end_reason)
            line = state_word(change.new_state) + (f" ({why})" if why else "")
            # What a run's end says comes with its summary.
            is_paused = change.new_state == TaskState.TASK_STATE_PAUSED
            return f"{line}: {change.message}" if is_paused and change.message else line
        case "phase_change":
            entered = event.phase_change
            line = phase_word(entered.phase) + (f": {entered.message}" if entered.message else "")
            if entered.HasField("deadline_seconds"):
                line += f" (within {entered.deadline_seconds:g} s)"
            return line
        case "metrics":
            return _metrics_line(event, tracker)
        case "checkpoint_saved":
            saved = event.checkpoint_saved
            size = f" ({bytes_text(saved.size_bytes)})" if saved.size_bytes else ""
            return f"checkpoint at step {saved.step}: {saved.path}{size}"
        case "best_checkpoint":
            best = event.best_checkpoint
            return f"best checkpoint so far: step {best.step} (eval_loss {best.eval_loss:.4g})"
        case "evaluation":
            # How fast the losses were had is among the curves.
            losses = {
                name: value
                for name, value in event.evaluation.values.items()
                if not name.endswith(("_runtime", "_per_second"))
            }
            return f"evaluation at step {event.evaluation.step}  {_values(losses)}"
        case "probe_report":
            report = event.probe_report
            return (
                f"measured: {bytes_text(report.peak_memory_bytes)} at the peak, "
                f"{report.tokens_per_second:,.0f} tokens/s, "
                f"about {duration_text(report.duration_seconds)} for the run"
            )
        case "notice":
            field = event.notice.field
            return "notice: " + (f"{field}: " if field else "") + event.notice.message
        case "log_line" if event.log_line.level in ("warning", "error"):
            return f"{event.log_line.level}: {event.log_line.text}"
        case _:  # progress comes with the metrics, the result with the end
            return ""


def _metrics_line(event: Event, tracker: Tracker) -> str:
    metrics, progress = event.metrics, tracker.progress
    total = progress.total_steps
    parts = [
        f"step {metrics.step}/{total} ({metrics.step / total:.0%})"
        if total
        else f"step {metrics.step}"
    ]
    values = dict(metrics.values)
    if progress.tokens_per_second:
        values.setdefault("tokens_per_second", progress.tokens_per_second)
    for name, label, form in (
        ("loss", "loss", ".4f"),
        ("learning_rate", "lr", ".2e"),
        ("tokens_per_second", "tokens/s", ",.0f"),
    ):
        if name in values:
            parts.append(f"{label} {values[name]:{form}}")
    if progress.HasField("eta_seconds"):
        parts.append(f"{duration_text(progress.eta_seconds)} left")
    return "  ".join(parts)


def _values(values: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {values[name]:.4g}" for name in sorted(values))


def _event_style(event: Event) -> str:
    match event.WhichOneof("payload"):
        case "notice":
            return "yellow"
        case "log_line":
            return "red" if event.log_line.level == "error" else "yellow"
        case _:
            return ""

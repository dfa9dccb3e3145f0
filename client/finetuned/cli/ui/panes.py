"""What is shown of the chosen task: its head, and a pane for each tab."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import ClassVar

from rich.console import RenderableType
from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.events import Resize
from textual.geometry import Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip
from textual.widget import Widget
from textual.widgets import DataTable, Static

from finetuned._parameters import flatten
from finetuned.cli.output import (
    STATE_STYLES,
    bytes_text,
    duration_text,
    phase_word,
    reason_word,
    state_word,
    time_text,
    value_text,
)
from finetuned.cli.settings import visible
from finetuned.cli.ui.curves import SMOOTHINGS, Curves, draw, legend
from finetuned.cli.ui.keys import TABS
from finetuned.cli.ui.text import bar, figure, folded, lines_of, one_line
from finetuned.cli.ui.watched import LEVEL_STYLES, LEVELS, Line, Watched
from finetuned.v1.task_pb2 import Checkpoint, Run, Task, TaskState


class Head(Static):
    """Name, state, progress and figures of the task."""

    def __init__(self) -> None:
        super().__init__("", id="head", markup=False)

    def show(self, listed: Task | None, watched: Watched | None) -> None:
        """Draw it anew, by what the list says of it and by what its watch does."""
        if listed is None or watched is None:
            self.update(Text("no task is chosen", style="dim"))
            return
        tracker = watched.tracker
        task = tracker.task
        word = state_word(tracker.state)
        style = STATE_STYLES.get(word, "")
        head = Text(no_wrap=True, overflow="ellipsis")
        head.append(one_line(task.display_name or task.name), style="bold")
        head.append("  ").append("probing" if task.probing else word, style=style)
        if tracker.phase:
            head.append(f": {phase_word(tracker.phase)}", style=style)
        if listed.queue_position and tracker.state == TaskState.TASK_STATE_QUEUED:
            head.append(f", place {listed.queue_position}")
        if task.run:
            head.append(f"  run {task.run}", style="dim")
        if listed.device:
            head.append(f" on {one_line(listed.device)}", style="dim")
        model = one_line(task.parameters.data.model_path).rstrip("/").rpartition("/")[2]
        if model:
            head.append(f"  {model}", style="dim")
        lines = [head, *self._figures(watched, style)]
        why = self._why(watched)
        if why:
            lines.append(Text(one_line(why), style=style, no_wrap=True, overflow="ellipsis"))
        self.update(lines_of(lines))

    def _figures(self, watched: Watched, style: str) -> list[Text]:
        tracker = watched.tracker
        progress = tracker.progress
        if not progress.total_steps:
            return []
        width = 14 if self.size.width < 100 else 30
        share = min(progress.step / progress.total_steps, 1.0)
        line = Text(no_wrap=True, overflow="ellipsis").append_text(bar(share, width, style))
        parts = [f"{share:.0%}", f"{progress.step}/{progress.total_steps}"]
        parts.append(f"epoch {progress.epoch:.2f}")
        if progress.HasField("loss"):
            parts.append(f"loss {figure(progress.loss)}")
        if progress.HasField("learning_rate") and self.size.width >= 100:
            parts.append(f"lr {figure(progress.learning_rate)}")
        if progress.tokens_per_second:
            parts.append(f"{progress.tokens_per_second:,.0f} tok/s")
        is_running = tracker.state == TaskState.TASK_STATE_RUNNING
        if progress.HasField("eta_seconds") and is_running:
            parts.append(f"{duration_text(progress.eta_seconds)} left")
        return [line.append("  " + "  ".join(parts))]

    def _why(self, watched: Watched) -> str:
        tracker = watched.tracker
        if tracker.pause:
            return tracker.pause
        if not tracker.has_ended:
            return ""
        result = tracker.result
        reason = reason_word(result.end_reason if result else tracker.task.end_reason)
        message = (result.message if result else "") or tracker.task.end_message
        return f"{reason}: {message}" if message else reason


class TabBar(Horizontal):
    """The tabs in one line; a click chooses."""

    class Chosen(Message):
        """A tab was clicked."""

        def __init__(self, name: str) -> None:
            super().__init__()
            self.name = name

    class Tab(Static):
        """One of them."""

        def on_click(self) -> None:
            """It is chosen."""
            self.post_message(TabBar.Chosen((self.id or "").removeprefix("tab-")))

    def compose(self) -> ComposeResult:
        """Number and name of each."""
        for at, (name, label) in enumerate(TABS, 1):
            yield TabBar.Tab(f"{at} {label}", id=f"tab-{name}", markup=False)

    def show(self, name: str) -> None:
        """Mark the tab that is shown."""
        for tab in self.query(TabBar.Tab):
            tab.set_class(tab.id == f"tab-{name}", "-shown")


class CurvesPane(Widget, can_focus=True):
    """Curves of a run."""

    def __init__(self) -> None:
        super().__init__(id="curves")
        self.curves = Curves()
        self.metric = "loss"
        self.smoothing = SMOOTHINGS[0]
        self.log_scale = False

    def show(self, curves: Curves) -> None:
        """Draw them anew."""
        self.curves = curves
        self.refresh()

    def next_metric(self) -> None:
        """Show the next curve."""
        names = self.curves.names
        if names:
            at = names.index(self.metric) + 1 if self.metric in names else 0
            self.metric = names[at % len(names)]
            self.refresh()

    def next_smoothing(self) -> None:
        """Smooth weakly, strongly, not at all."""
        at = SMOOTHINGS.index(self.smoothing) + 1
        self.smoothing = SMOOTHINGS[at % len(SMOOTHINGS)]
        self.refresh()

    def toggle_log_scale(self) -> None:
        """By the logarithm, or not."""
        self.log_scale = not self.log_scale
        self.refresh()

    def render(self) -> RenderableType:
        """Legend and plot."""
        names = self.curves.names
        if not names:
            return Text("no values yet", style="dim")
        name = self.metric if self.metric in names else names[0]
        group = self.curves.group(name)
        width, height = self.content_size
        title = legend(group)
        notes = [f"run {self.curves.run}"] if self.curves.run else []
        if self.smoothing:
            notes.append(f"smoothed {self.smoothing:g}")
        if self.log_scale:
            notes.append("log scale")
        if len(names) > 1:
            notes.append(f"m: next of {len(names)}")
        title.append("   " + ", ".join(notes), style="dim")
        plot = draw(group, width, height - 1, smoothing=self.smoothing, log_scale=self.log_scale)
        return lines_of([title, *plot])


class LinesPane(ScrollView, can_focus=True):
    """Lines of text that come below each other; only those in sight are drawn."""

    INDENT: ClassVar[int] = 10
    """Cells before the text, where the time stands."""
    FOLLOWS: ClassVar[bool] = True
    """Whether the end is what is of interest."""

    def __init__(self, name: str, empty: str) -> None:
        super().__init__(id=name)
        self.level = LEVELS[0]
        self.filter = ""
        self.is_following = self.FOLLOWS
        """Whether new lines come into sight by themselves: until somebody scrolls up."""
        self.shown: list[tuple[str, str, str]] = []
        """Time, text and style of each line on the screen."""
        self._lines: Sequence[Line] = ()
        self._empty = empty

    def show(self, lines: Iterable[Line]) -> None:
        """Take all lines; the end stays in sight where it was."""
        follows = self.is_following
        self._lines = tuple(lines)
        self._fold()
        if follows:
            self.scroll_to(y=len(self.shown), animate=False, immediate=True)
            self.is_following = True
        self.refresh()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Whoever is at the end follows."""
        super().watch_scroll_y(old_value, new_value)
        self.is_following = self.FOLLOWS and self.is_vertical_scroll_end

    def next_level(self) -> None:
        """Show less, and after the least all."""
        self.level = LEVELS[(LEVELS.index(self.level) + 1) % len(LEVELS)]
        self.show(self._lines)

    def search(self, text: str) -> None:
        """Show only lines with this text."""
        self.filter = text
        self.show(self._lines)

    def _fold(self) -> None:
        """Break lines where the pane ends."""
        width = max(self.scrollable_content_region.width - self.INDENT, 10)
        least = LEVELS.index(self.level)
        wanted = self.filter.casefold()
        self.shown = []
        for line in self._lines:
            if LEVELS.index(line.level) < least or wanted not in line.text.casefold():
                continue
            text = visible(line.text.replace("\t", "    ")).replace("\n", " ")
            style = LEVEL_STYLES[line.level]
            for at, part in enumerate(folded(text, width)):
                self.shown.append(("" if at else line.time, part, style))
        self.virtual_size = Size(self.scrollable_content_region.width, len(self.shown))

    def on_resize(self, event: Resize) -> None:
        """Lines break elsewhere."""
        self.show(self._lines)

    def render_line(self, y: int) -> Strip:
        """One line on the screen."""
        width, base = self.size.width, self.rich_style
        row = y + self.scroll_offset.y
        if row >= len(self.shown):
            if y == 0 and not self.shown:
                empty = Segment(self._empty, Style(dim=True))
                return Strip([empty]).adjust_cell_length(width).apply_style(base)
            return Strip.blank(width, base)
        time, text, style = self.shown[row]
        start = Segment(f"{time:<{self.INDENT}}", Style(dim=True))
        segments = [start, Segment(text, Style.parse(style))]
        return Strip(segments).adjust_cell_length(width).apply_style(base)


class RunsPane(DataTable[Text]):
    """The runs of the task, newest first."""

    def __init__(self) -> None:
        super().__init__(id="runs", cursor_type="row", zebra_stripes=False)
        self.runs: Sequence[Run] = ()

    def show(self, runs: Sequence[Run]) -> None:
        """Draw them anew; the cursor stays."""
        self.runs = runs
        row = self.cursor_row
        self.clear(columns=True)
        self.add_columns("run", "state", "why", "steps", "loss", "device", "started", "took")
        for run in runs:
            word = state_word(run.state)
            progress = run.progress
            took = run.end_time.seconds - run.start_time.seconds if run.end_time.seconds else None
            self.add_row(
                Text(f"{run.number}{' probe' if run.probe else ''}"),
                Text(word, style=STATE_STYLES.get(word, "")),
                Text(reason_word(run.end_reason)),
                Text(f"{progress.step}/{progress.total_steps}" if progress.total_steps else ""),
                Text(figure(progress.loss) if progress.HasField("loss") else ""),
                Text(run.device),
                Text(time_text(run.start_time)),
                Text("" if took is None else duration_text(took)),
            )
        self.move_cursor(row=min(row, max(len(runs) - 1, 0)))

    @property
    def chosen(self) -> Run | None:
        """The run under the cursor."""
        at = self.cursor_row
        return self.runs[at] if 0 <= at < len(self.runs) else None


class CheckpointsPane(DataTable[Text]):
    """The checkpoints of the task, newest first."""

    def __init__(self) -> None:
        super().__init__(id="checkpoints", cursor_type="row", zebra_stripes=False)
        self.checkpoints: Sequence[Checkpoint] = ()

    def show(self, checkpoints: Sequence[Checkpoint]) -> None:
        """Draw them anew; the cursor stays."""
        self.checkpoints = checkpoints
        row = self.cursor_row
        self.clear(columns=True)
        self.add_columns("run", "step", "epoch", "eval loss", "size", "", "saved", "folder")
        for one in checkpoints:
            marks = [word for word, on in (("newest", one.is_newest), ("best", one.is_best)) if on]
            if not one.is_whole:
                marks = ["broken"]
            self.add_row(
                Text(str(one.run)),
                Text(str(one.step)),
                Text(f"{one.epoch:.2f}"),
                Text(figure(one.eval_loss) if one.HasField("eval_loss") else ""),
                Text(bytes_text(one.size_bytes)),
                Text(" ".join(marks), style="green" if one.is_whole else "red"),
                Text(time_text(one.create_time)),
                Text(one_line("/".join(one.path.split("/")[-2:]))),
            )
        self.move_cursor(row=min(row, max(len(checkpoints) - 1, 0)))

    @property
    def chosen(self) -> Checkpoint | None:
        """The checkpoint under the cursor."""
        at = self.cursor_row
        return self.checkpoints[at] if 0 <= at < len(self.checkpoints) else None


class ParametersPane(LinesPane):
    """The parameters of the task, one a line."""

    INDENT: ClassVar[int] = 0
    FOLLOWS: ClassVar[bool] = False

    def __init__(self) -> None:
        super().__init__("parameters", "no parameters")

    def show_parameters(self, watched: Watched) -> None:
        """Take what the task has."""
        values = flatten(watched.task.parameters)
        width = max((len(path) for path in values), default=0)
        self.show(
            Line("", "info", f"{path:<{width}}  {value_text(value)}")
            for path, value in values.items()
        )

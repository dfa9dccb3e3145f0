"""The table of tasks: however many there are, only the rows in sight are drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.binding import Binding, BindingType
from textual.events import Click, MouseDown, Resize
from textual.geometry import Region, Size
from textual.message import Message
from textual.scroll_view import ScrollView
from textual.strip import Strip

from finetuned.cli.output import STATE_STYLES, duration_text, state_word, time_text, type_word
from finetuned.cli.ui.text import bar, cell, figure, one_line
from finetuned.cli.ui.watched import activity
from finetuned.v1.task_pb2 import Task, TaskState

# Above what has ended or never began: what is going on, and what waits to.
_ORDER = ("running", "queued", "paused", "pending", "failed", "stopped", "completed")
_LAST = len(_ORDER)


@dataclass(frozen=True)
class Column:
    """A column: what it shows, and what it is sorted by."""

    name: str
    title: str
    width: int
    shown: Callable[[Task, int], Text]
    key: Callable[[Task], tuple[float | str, ...]]
    is_right: bool = False
    from_width: int = 0
    """Columns of the table from which on it is shown."""


def _name(task: Task, width: int) -> Text:
    return Text(cell(one_line(task.display_name or task.name), width))


def _state(task: Task, width: int) -> Text:
    word = state_word(task.state)
    text = "probing" if task.probing and word == "running" else activity(task.state, task.phase)
    if task.queue_position:
        text += f" #{task.queue_position}"
    return Text.assemble((cell(text, width), STATE_STYLES.get(word, "")))


def _progress(task: Task, width: int) -> Text:
    progress = task.progress
    if not progress.total_steps:
        return Text(" " * width)
    share = progress.step / progress.total_steps
    style = STATE_STYLES.get(state_word(task.state), "")
    return bar(share, width - 5, style).append(f"{min(share, 1):>5.0%}")


def _loss(task: Task, width: int) -> Text:
    progress = task.progress
    return Text(cell(figure(progress.loss) if progress.HasField("loss") else "", width, right=True))


def _left(task: Task, width: int) -> Text:
    is_running = task.state == TaskState.TASK_STATE_RUNNING
    known = is_running and task.progress.HasField("eta_seconds")
    return Text(cell(duration_text(task.progress.eta_seconds) if known else "", width, right=True))


def _age(task: Task) -> float:
    return -task.create_time.ToNanoseconds()


def _activity_key(task: Task) -> tuple[float | str, ...]:
    word = state_word(task.state)
    order = _ORDER.index(word) if word in _ORDER[:4] else _LAST
    return order, task.queue_position, _age(task)


def _eta_key(task: Task) -> tuple[float | str, ...]:
    known = task.progress.HasField("eta_seconds") and task.state == TaskState.TASK_STATE_RUNNING
    return not known, task.progress.eta_seconds, _age(task)


def _loss_key(task: Task) -> tuple[float | str, ...]:
    return not task.progress.HasField("loss"), task.progress.loss, _age(task)


def _share_key(task: Task) -> tuple[float | str, ...]:
    total = task.progress.total_steps
    return -(task.progress.step / total if total else -1), _age(task)


COLUMNS = (
    Column("name", "NAME", 0, _name, lambda task: (task.display_name.casefold(), task.name)),
    Column("state", "STATE", 14, _state, _activity_key),
    Column("progress", "PROGRESS", 14, _progress, _share_key),
    Column("loss", "LOSS", 7, _loss, _loss_key, is_right=True),
    Column("left", "LEFT", 7, _left, _eta_key, is_right=True),
    Column(
        "device",
        "DEVICE",
        7,
        lambda task, width: Text(cell(one_line(task.device) or "auto", width)),
        lambda task: (task.device, *_activity_key(task)),
    ),
    Column(
        "type",
        "TYPE",
        8,
        lambda task, width: Text(cell(type_word(task.training_type), width)),
        lambda task: (task.training_type, _age(task)),
        from_width=100,
    ),
    Column(
        "created",
        "CREATED",
        19,
        lambda task, width: Text.assemble((cell(time_text(task.create_time), width), "dim")),
        lambda task: (_age(task),),
        from_width=120,
    ),
)


class TaskTable(ScrollView, can_focus=True):
    """Tasks, one a row. The daemon says what is in it; the user, what is shown of that."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up,k", "move(-1)", "Up", show=False),
        Binding("down,j", "move(1)", "Down", show=False),
        Binding("pageup", "move_page(-1)", "Page up", show=False),
        Binding("pagedown", "move_page(1)", "Page down", show=False),
        Binding("home", "move_to(0)", "First", show=False),
        Binding("end", "move_to(-1)", "Last", show=False),
    ]

    COMPONENT_CLASSES: ClassVar[set[str]] = {
        "task-table--head",
        "task-table--cursor",
        "task-table--blurred",
    }

    @dataclass
    class Chosen(Message):
        """Another task is under the cursor; empty: none is."""

        name: str

    def __init__(self) -> None:
        super().__init__(id="tasks")
        self.tasks: dict[str, Task] = {}
        """All there are, by name; the owner fills it and calls `renew`."""
        self.rows: list[Task] = []
        """Those that are shown, in order."""
        self.chosen = ""
        self.filter = ""
        self.sort_by = "state"
        self.is_reversed = False

    def renew(self) -> None:
        """Show what `tasks` holds now, with the cursor on the task that it was on."""
        column = next(column for column in COLUMNS if column.name == self.sort_by)
        words = self.filter.casefold().split()
        found = [task for task in self.tasks.values() if _fits(task, words)]
        self.rows = sorted(found, key=column.key, reverse=self.is_reversed)
        self._keep_cursor()
        self._fit()
        self.refresh()

    @property
    def cursor(self) -> int:
        """Row of the chosen task; -1: there is none."""
        names = (at for at, task in enumerate(self.rows) if task.name == self.chosen)
        return next(names, -1)

    @property
    def current(self) -> Task | None:
        """The chosen task."""
        return self.tasks.get(self.chosen)

    def choose(self, name: str) -> None:
        """Move the cursor to a task."""
        if name != self.chosen:
            self.chosen = name
            self.post_message(self.Chosen(name))
        self._scroll_to_cursor()
        self.refresh()

    def sort(self, name: str) -> None:
        """Sort by a column; a second time the other way round."""
        self.is_reversed = not self.is_reversed if name == self.sort_by else False
        self.sort_by = name
        self.renew()
        self._scroll_to_cursor()

    def action_move(self, by: int) -> None:
        """Up or down."""
        self.action_move_to(min(max(self.cursor + by, 0), len(self.rows) - 1))

    def action_move_page(self, by: int) -> None:
        """A screenful up or down."""
        self.action_move(by * max(self.size.height - 2, 1))

    def action_move_to(self, row: int) -> None:
        """To a row; -1: the last."""
        if self.rows:
            self.choose(self.rows[row].name)

    def render_line(self, y: int) -> Strip:
        """One line on the screen; the first is the headings and stays."""
        width = self.size.width
        if y == 0:
            return self._head(width)
        row = y - 1 + self.scroll_offset.y
        if row >= len(self.rows):
            return Strip.blank(width, self.rich_style)
        task = self.rows[row]
        is_chosen = task.name == self.chosen
        segments: list[Segment] = [Segment("▌" if is_chosen else " ")]
        for column, size in self._layout(width):
            segments += column.shown(task, size).render(self.app.console)
            segments.append(Segment(" "))
        style = self.rich_style
        if is_chosen:
            name = "task-table--cursor" if self.has_focus else "task-table--blurred"
            style = self.get_component_rich_style(name)
        return _strip(segments, width, style)

    def _head(self, width: int) -> Strip:
        segments = [Segment(" ")]
        for column, size in self._layout(width):
            mark = ("▲" if self.is_reversed else "▼") if column.name == self.sort_by else ""
            title = cell(column.title + mark, size, right=column.is_right)
            segments += [Segment(title), Segment(" ")]
        return _strip(segments, width, self.get_component_rich_style("task-table--head"))

    def _layout(self, width: int) -> list[tuple[Column, int]]:
        shown = [column for column in COLUMNS if column.from_width <= width]
        taken = 1 + sum(column.width + 1 for column in shown)
        return [(column, column.width or max(width - taken, 10)) for column in shown]

    def _keep_cursor(self) -> None:
        if self.rows and self.cursor < 0:
            self.choose(self.rows[0].name)
        elif not self.rows and self.chosen:
            self.chosen = ""
            self.post_message(self.Chosen(""))

    def _fit(self) -> None:
        self.virtual_size = Size(self.size.width, len(self.rows) + 1)

    def _scroll_to_cursor(self) -> None:
        row = self.cursor
        if row >= 0:
            # The headings cover the first line.
            height = max(self.size.height - 1, 1)
            top = self.scroll_offset.y
            if row < top:
                self.scroll_to(y=row, animate=False)
            elif row >= top + height:
                self.scroll_to(y=row - height + 1, animate=False)

    def on_resize(self, event: Resize) -> None:
        """The name takes what the other columns leave."""
        self._fit()
        self.refresh()
        self.call_after_refresh(self._scroll_to_cursor)

    def on_mouse_down(self, event: MouseDown) -> None:
        """A row is chosen as soon as the button is pressed."""
        row = event.y - 1 + self.scroll_offset.y
        if event.y > 0 and row < len(self.rows):
            self.choose(self.rows[row].name)

    def on_click(self, event: Click) -> None:
        """A heading sorts."""
        if event.y:
            return
        at = 1
        for column, size in self._layout(self.size.width):
            if at <= event.x < at + size:
                self.sort(column.name)
                return
            at += size + 1

    def on_focus(self) -> None:
        """The cursor has another colour."""
        self.refresh()

    def on_blur(self) -> None:
        """The cursor has another colour."""
        self.refresh(Region(0, 0, *self.size))


def _fits(task: Task, words: Iterable[str]) -> bool:
    if not words:
        return True
    what = f"{task.display_name} {task.name} {state_word(task.state)} {task.device}"
    what = f"{what} {type_word(task.training_type)}".casefold()
    return all(word in what for word in words)


def _strip(segments: Iterable[Segment], width: int, style: Style) -> Strip:
    return Strip(segments).adjust_cell_length(width).apply_style(style)

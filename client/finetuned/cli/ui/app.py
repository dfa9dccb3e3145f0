"""The full-screen view: follows the daemon, and draws what has changed ten times a second."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import ClassVar, TypeVar, cast

from rich.text import Text
from textual import on, work
from textual.app import ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Container, Vertical
from textual.screen import Screen
from textual.widgets import ContentSwitcher, DataTable, Footer, Input, Static

from finetuned._aio import AsyncClient
from finetuned._errors import DaemonUnavailable, FinetunedError, NotFound, OutOfRange
from finetuned._launch import start_daemon
from finetuned._overview import TaskDeleted, TasksSynced
from finetuned._watch import ConnectionLost
from finetuned.cli.output import state_word
from finetuned.cli.settings import Settings, visible
from finetuned.cli.ui.acts import UNDER_WAY, WAITING, Acts
from finetuned.cli.ui.curves import Curves
from finetuned.cli.ui.devices import Devices
from finetuned.cli.ui.dialogs import Choice, Help
from finetuned.cli.ui.keys import GROUPS
from finetuned.cli.ui.panes import (
    CheckpointsPane,
    CurvesPane,
    Head,
    LinesPane,
    ParametersPane,
    RunsPane,
    TabBar,
)
from finetuned.cli.ui.style import CSS
from finetuned.cli.ui.table import COLUMNS, TaskTable
from finetuned.cli.ui.text import one_line
from finetuned.cli.ui.watched import HISTORY_EVENTS, Watched
from finetuned.v1.system_service_pb2 import WatchDevicesResponse
from finetuned.v1.task_pb2 import Task, TaskState

T = TypeVar("T")

DRAW_SECONDS = 0.1
"""Between two drawings of what has changed."""
CURVE_POINTS = 2000
"""Of each curve, asked for when a task is chosen."""
_RETRY_SECONDS = 1.0
_CHOOSE_SECONDS = 0.15
"""Before a task under the cursor is watched: whoever scrolls by opens no streams."""
_LIST_LIMIT = 500
"""Checkpoints and runs that are shown."""
_ACTIONS = {key.action.partition("(")[0] for _, keys in GROUPS for key in keys}
_AWAY = "no daemon answers; runs go on, this waits for it. S starts it"
_NOT_IN_PALETTE = {"command_palette", "enter", "leave", "interrupt"}
_THEMES = ("textual-dark", "textual-light")


class FinetunedApp(Acts):
    """All tasks, the chosen one in detail, the devices."""

    TITLE = "finetuned"
    CSS = CSS
    ENABLE_COMMAND_PALETTE = True
    HORIZONTAL_BREAKPOINTS = [(0, "-narrow"), (110, "-wide")]  # noqa: RUF012
    VERTICAL_BREAKPOINTS = [(0, "-low"), (34, "-tall"), (56, "-very-tall")]  # noqa: RUF012
    BINDINGS: ClassVar[list[BindingType]] = [
        *(key.binding for _, keys in GROUPS for key in keys if key.action != "command_palette"),
        Binding("tab", "app.focus_next", "Next", show=False),
    ]

    def __init__(self, options: Settings, *, light: bool = False) -> None:
        super().__init__()
        self.options = options
        self.client = AsyncClient(options.address)
        self.table = TaskTable()
        # By name, as a query would look in the dialog that is open.
        self.status = Static(id="status", markup=False)
        self.banner = Static(id="banner", markup=False)
        self.devices = Devices()
        self.head = Head()
        self.tabs = TabBar()
        self.switcher = ContentSwitcher(initial="curves")
        self.curves = CurvesPane()
        self.log_lines = LinesPane("log", "no log lines")
        self.events = LinesPane("events", "nothing has happened yet")
        self.checkpoints = CheckpointsPane()
        self.runs = RunsPane()
        self.parameters = ParametersPane()
        self.filter_line = Input(id="filter")
        self.watched: Watched | None = None
        self.lost = ""
        """Why the daemon can't be asked; empty while it can."""
        self.is_synced = False
        """Whether all tasks have come."""
        self._placed: dict[str, str] = {}
        self._other_curves: Curves | None = None
        self._changed = {"tasks", "details"}
        self._could_do: tuple[TaskState.ValueType | None, bool] | None = None
        self._filtering: LinesPane | None = None
        self._was_asked = False
        self._is_starting = False
        self.theme = _THEMES[light]

    @property
    def runs_left(self) -> int:
        """Runs that go on, wait or are paused."""
        return sum(task.state in UNDER_WAY for task in self.table.tasks.values())

    def compose(self) -> ComposeResult:
        """Status, tasks and devices, the chosen task, keys."""
        yield self.status
        yield self.banner
        with Container(id="upper"):
            yield self.table
            yield self.devices
        with Vertical(id="details"):
            yield self.head
            yield self.tabs
            with self.switcher:
                yield self.curves
                yield self.log_lines
                yield self.events
                yield self.checkpoints
                yield self.runs
                yield self.parameters
        yield self.filter_line
        yield Footer(show_command_palette=False, compact=True)

    def on_mount(self) -> None:
        """Follow the daemon from now on."""
        self.tabs.show("curves")
        self.table.focus()
        self.set_interval(DRAW_SECONDS, self._draw)
        self.follow_tasks()
        self.follow_devices()
        if not self.is_headless and sys.platform != "win32":
            # Their own action would leave the terminal as it is.
            loop = asyncio.get_running_loop()
            for number in (signal.SIGTERM, signal.SIGHUP):
                if signal.getsignal(number) == signal.SIG_DFL:
                    loop.add_signal_handler(number, self.exit, 128 + number)

    async def on_unmount(self) -> None:
        """Streams end here; runs do not."""
        await self.client.close()

    @work(group="tasks", exclusive=True)
    async def follow_tasks(self) -> None:
        """The list of tasks, for as long as the view is open."""
        while True:
            stream = self.client.watch_tasks()
            async with _closing(stream):
                try:
                    async for item in stream:
                        self._take(item)
                except FinetunedError as error:
                    self._lose(error)
            await asyncio.sleep(_RETRY_SECONDS)

    @work(group="devices", exclusive=True)
    async def follow_devices(self) -> None:
        """The devices; of an outage the list of tasks tells."""
        while True:
            stream = self.client.watch_devices()
            async with _closing(stream):
                with contextlib.suppress(FinetunedError):
                    async for item in stream:
                        if isinstance(item, WatchDevicesResponse):
                            self.devices.take(item.devices, self.table.tasks)
                            self._changed.add("devices")
                            self._place(item)
            await asyncio.sleep(_RETRY_SECONDS)

    @work(group="details", exclusive=True)
    async def follow_details(self, name: str) -> None:
        """One task: its curves, then everything that happens."""
        await asyncio.sleep(_CHOOSE_SECONDS)
        after = -1
        while True:
            try:
                task = await self.client.get_task(name)
                watched = Watched(task)
                found = await self.client.metrics(name, max_points=CURVE_POINTS)
                watched.curves.clear(found.run)
                for series in found.series.values():
                    watched.curves.fill(series.name, series.steps, series.values)
                watched.curves_seq = task.last_seq
                self.watched = watched
                self._changed.add("details")
                after = max(task.last_seq - HISTORY_EVENTS, 0) if after < 0 else after
                stream = self.client.watch(name, after)
                async with _closing(stream):
                    async for item in stream:
                        watched.apply(item)
                        self._changed.add("details")
            except NotFound:
                return  # it was deleted; the table knows, too
            except OutOfRange:
                after = 0  # the oldest events are not kept
            except DaemonUnavailable:
                after = -1
            except FinetunedError as error:
                self.show_error(error)
                return
            await asyncio.sleep(_RETRY_SECONDS)

    def _take(self, item: Task | TaskDeleted | TasksSynced | ConnectionLost) -> None:
        tasks = self.table.tasks
        match item:
            case Task():
                item.device = item.device or self._placed.get(item.name, "")
                tasks[item.name] = item
            case TaskDeleted():
                tasks.pop(item.name, None)
            case TasksSynced():
                self.is_synced = True
            case ConnectionLost():
                self.lost = _AWAY
        if not isinstance(item, ConnectionLost) and self.lost:
            self.lost = ""
        self._changed.add("tasks")

    def _place(self, item: WatchDevicesResponse) -> None:
        """Tell of tasks that asked for no device which one they have."""
        placed = {one.running_task: one.id for one in item.devices if one.running_task}
        if placed != self._placed:
            self._placed = placed
            for task in filter(None, map(self.table.tasks.get, placed)):
                self._take(task)

    def _lose(self, error: FinetunedError) -> None:
        is_away = isinstance(error, DaemonUnavailable)
        if not is_away and error.message != self.lost:
            self.show_error(error)
        self.lost = _AWAY if is_away else error.message
        self._changed.add("tasks")
        if is_away and not self._was_asked:
            self._was_asked = True
            self._offer_start()

    @work(group="offer")
    async def _offer_start(self) -> None:
        answers = [("start", "Start the daemon"), ("wait", "Wait for it")]
        question = "No daemon runs. It keeps the tasks and trains them."
        answer = await self.push_screen_wait(Choice(question, answers))
        if answer == "start":
            self.action_start_daemon()

    @work(group="offer")
    async def action_start_daemon(self) -> None:
        """Start the daemon, where none answers."""
        if self._is_starting:
            return
        self._is_starting = True
        try:
            call = asyncio.to_thread(start_daemon, self.options.address)
            await self.attempt(call, "the daemon serves")
        finally:
            self._is_starting = False

    def _draw(self) -> None:
        """Draw what has changed since the last time."""
        if not self.devices.is_attached:
            return  # the view is closing
        changed, self._changed = self._changed, set()
        if "tasks" in changed:
            self.table.renew()
            self.devices.redraw()
            self._draw_status()
            self._draw_keys()
            self._draw_head()
        elif "devices" in changed:
            self.devices.redraw()
        if "details" in changed:
            self._draw_head()
            self._draw_details()

    def _draw_status(self) -> None:
        tasks = self.table.tasks.values()
        parts = [f"{len(tasks)} task{'' if len(tasks) == 1 else 's'}"]
        for state in (*sorted(WAITING, reverse=True), TaskState.TASK_STATE_PAUSED):
            count = sum(task.state == state for task in tasks)
            if count:
                parts.append(f"{count} {state_word(state)}")
        if self.table.filter:
            parts.append(f"filter: {visible(self.table.filter)} ({len(self.table.rows)})")
        text = Text("finetuned", style="bold", no_wrap=True, overflow="ellipsis")
        self.status.update(text.append("  " + "   ".join(parts), "not bold"))
        banner = self.banner
        banner.set_class(bool(self.lost), "-shown")
        if self.lost:
            banner.update(one_line(self.lost))

    def _draw_keys(self) -> None:
        """The footer anew, where something else can be done now: it is made of widgets."""
        task = self.table.current
        can_do = (task.state if task is not None else None, bool(self.lost))
        if can_do != self._could_do:
            self._could_do = can_do
            self.refresh_bindings()

    def _draw_head(self) -> None:
        task = self.table.current
        if task is None:
            self.head.show(None, None)
            return
        watched = self.watched
        is_known = watched is not None and watched.task.name == task.name
        self.head.show(task, watched if is_known else Watched(task))

    def _draw_details(self) -> None:
        watched = self.watched
        if watched is None or watched.task.name != self.table.chosen:
            return
        if watched.runs_changed or watched.task_changed:
            self._ask_again(watched)
        match self.switcher.current:
            case "curves":
                self.curves.show(self._other_curves or watched.curves)
            case "log":
                self.log_lines.show(watched.log)
            case "events":
                self.events.show(watched.events)
            case "parameters":
                self.parameters.show_parameters(watched)
            case _:
                pass  # they are drawn when they were asked for

    @work(group="lists", exclusive=True)
    async def _ask_again(self, watched: Watched) -> None:
        """Runs and checkpoints, and the task where it was edited."""
        watched.runs_changed = False
        name = watched.task.name
        try:
            if watched.task_changed:
                watched.task_changed = False
                watched.task.CopyFrom(await self.client.get_task(name))
                self._changed.add("details")
            runs = await _first(self.client.list_runs(name))
            checkpoints = await _first(self.client.list_checkpoints(name))
        except NotFound:
            return
        except DaemonUnavailable:
            watched.runs_changed = True
            return
        except FinetunedError as error:
            self.show_error(error)
            return
        if name == self.table.chosen:
            self.runs.show(runs)
            self.checkpoints.show(checkpoints)
            self._changed.add("details")

    @on(TaskTable.Chosen)
    def _on_chosen(self, event: TaskTable.Chosen) -> None:
        self._other_curves = None
        self.watched = None
        self._changed.add("details")
        self.runs.show(())
        self.checkpoints.show(())
        for pane in (self.log_lines, self.events, self.parameters):
            pane.show(())
        self.curves.show(Curves())
        self._draw_keys()
        if event.name:
            self.follow_details(event.name)
        else:
            self.workers.cancel_group(self, "details")

    @on(TabBar.Chosen)
    def _on_tab(self, event: TabBar.Chosen) -> None:
        self.action_show_tab(event.name)

    def action_show_tab(self, name: str) -> None:
        """Show another tab; what had the focus within the old one gives it to the new one."""
        switcher = self.switcher
        was_inside = self.focused is not None and self.focused.parent is switcher
        switcher.current = name
        self.tabs.show(name)
        if was_inside:
            switcher.query_one(f"#{name}").focus()
        self._changed.add("details")

    def action_enter(self) -> None:
        """From the tasks to what is shown of one."""
        if self.focused is self.table:
            switcher = self.switcher
            switcher.query_one(f"#{switcher.current}").focus()

    @on(DataTable.RowSelected)
    def _on_row(self, event: DataTable.RowSelected) -> None:
        if isinstance(event.data_table, CheckpointsPane):
            self.action_resume_from()
        elif isinstance(event.data_table, RunsPane) and event.data_table.chosen is not None:
            self._show_run(self.table.chosen, event.data_table.chosen.number)

    @work(group="run", exclusive=True)
    async def _show_run(self, name: str, run: int) -> None:
        """The curves of an earlier run."""
        found = await self.attempt(
            self.client.metrics(name, run, max_points=CURVE_POINTS), f"curves of run {run}"
        )
        if found is None or name != self.table.chosen:
            return
        curves = Curves()
        curves.clear(found.run)
        for series in found.series.values():
            curves.fill(series.name, series.steps, series.values)
        is_newest = self.watched is not None and found.run == self.watched.curves.run
        self._other_curves = None if is_newest else curves
        self.action_show_tab("curves")

    def action_leave(self) -> None:
        """One step back: out of a filter, a zoom, what is shown of the task, an earlier run."""
        focused = self.focused
        if self.filter_line.has_class("-shown"):
            self._filter("")
            self._end_filter()
        elif isinstance(focused, LinesPane) and focused.filter:
            focused.search("")
        elif self.is_zoomed:
            self.action_zoom()
        elif focused is not self.table:
            self.table.focus()
        elif self.table.filter:
            self._filtering = None
            self._filter("")
        elif self._other_curves is not None:
            self._other_curves = None
            self._changed.add("details")

    def action_filter(self) -> None:
        """Type words to filter by: the lines that have the focus, else the tasks."""
        pane = self.focused if isinstance(self.focused, LinesPane) else None
        self._filtering = pane
        line = self.filter_line
        line.placeholder = "words in a line" if pane is not None else "name, state, device, type"
        line.value = pane.filter if pane is not None else self.table.filter
        line.add_class("-shown")
        line.focus()

    def _filter(self, text: str) -> None:
        if self._filtering is not None:
            self._filtering.search(text)
        else:
            self.table.filter = text
            self._changed.add("tasks")

    def _end_filter(self) -> None:
        self.filter_line.remove_class("-shown")
        (self._filtering or self.table).focus()

    @on(Input.Changed, "#filter")
    def _on_filter(self, event: Input.Changed) -> None:
        if event.input.has_class("-shown"):
            self._filter(event.value)

    @on(Input.Submitted, "#filter")
    def _on_filter_end(self) -> None:
        self._end_filter()

    def action_sort(self) -> None:
        """Sort by the next column that is shown."""
        names = [column.name for column in COLUMNS if column.from_width <= self.table.size.width]
        at = names.index(self.table.sort_by) + 1 if self.table.sort_by in names else 0
        self.table.sort(names[at % len(names)])

    def action_reverse(self) -> None:
        """Sort the other way round."""
        self.table.sort(self.table.sort_by)

    def action_metric(self) -> None:
        """The next curve."""
        self.action_show_tab("curves")
        self.curves.next_metric()

    def action_smooth(self) -> None:
        """Smooth the curve."""
        self.action_show_tab("curves")
        self.curves.next_smoothing()

    def action_log_scale(self) -> None:
        """Draw the curve by its logarithm."""
        self.action_show_tab("curves")
        self.curves.toggle_log_scale()

    def action_level(self) -> None:
        """The least level of log lines."""
        self.action_show_tab("log")
        log = self.log_lines
        log.next_level()
        self.say("log: all lines" if log.level == "debug" else f"log: {log.level} and above")

    def action_zoom(self) -> None:
        """The whole screen for what has the focus, and back."""
        name = "-zoom-tasks" if self.focused is self.table else "-zoom-details"
        is_zoomed = self.is_zoomed
        screen = self.table.screen
        screen.remove_class("-zoom-tasks", "-zoom-details")
        if not is_zoomed:
            screen.add_class(name)

    @property
    def is_zoomed(self) -> bool:
        """Whether something has the whole screen."""
        screen = self.table.screen
        return screen.has_class("-zoom-tasks") or screen.has_class("-zoom-details")

    def action_theme(self) -> None:
        """The other theme."""
        self.theme = _THEMES[0] if self.theme == _THEMES[1] else _THEMES[1]

    def action_interrupt(self) -> None:
        """Quit, whatever is open."""
        self.exit()

    def action_help(self) -> None:
        """All keys."""
        self.push_screen(Help())

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Only what can be done now is in the footer."""
        if len(self.screen_stack) > 1:  # a dialog has keys of its own
            return action == "interrupt" or action not in _ACTIONS
        if action == "start_daemon":
            return bool(self.lost)
        return self.allows(action)

    def get_system_commands(self, screen: Screen[object]) -> Iterable[SystemCommand]:
        """All keys, for the command palette."""
        for title, keys in GROUPS:
            for key in keys:
                name, _, parameter = key.action.partition("(")
                if name in _NOT_IN_PALETTE or not self.check_action(name, ()):
                    continue
                del parameter
                yield SystemCommand(
                    f"{title}: {key.label}", f"{key.help}  ({key.shown})", self._runs(key.action)
                )

    def _runs(self, action: str) -> Callable[[], Awaitable[None]]:
        async def run() -> None:
            await self.run_action(action)

        return run


def _closing(stream: AsyncIterator[object]) -> contextlib.AbstractAsyncContextManager[object]:
    """Ends a stream of the client at once, rather than when it is collected."""
    return aclosing(cast("AsyncGenerator[object]", stream))


async def _first(stream: AsyncIterator[T]) -> list[T]:
    """The first items of a list that may be long."""
    found: list[T] = []
    async for item in stream:
        found.append(item)
        if len(found) == _LIST_LIMIT:
            break
    return found


def wants_light() -> bool:
    """Whether the terminal says that its background is light, as some do."""
    background = os.environ.get("COLORFGBG", "").rpartition(";")[2]
    return background in ("7", "15")

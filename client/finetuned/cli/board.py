"""Lists that are watched: `task list`, `queue` and `device list` with `--watch`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Group, RenderableType
from rich.text import Text

from finetuned._overview import TaskDeleted, TasksSynced
from finetuned._watch import ConnectionLost
from finetuned.cli.live import LiveDisplay, is_interactive
from finetuned.cli.output import console, print_json_line, table_of, to_dict
from finetuned.cli.rows import (
    DEVICE_COLUMNS,
    QUEUE_COLUMNS,
    TASK_COLUMNS,
    Row,
    device_of,
    device_row,
    place_of,
    queue_row,
    task_row,
)
from finetuned.cli.settings import Exit, say, visible
from finetuned.cli.view import RECONNECTED, RECONNECTING
from finetuned.v1.system_service_pb2 import Device, WatchDevicesResponse
from finetuned.v1.task_pb2 import Task

if TYPE_CHECKING:
    from finetuned._client import Client


class Board:
    """What a watched list knows, from the items of its stream."""

    columns: Sequence[str] = ()
    empty = ""
    """Said where there is no row."""

    def take(self, item: Any) -> None:
        """Take an item."""
        raise NotImplementedError

    def rows(self) -> dict[str, Row]:
        """Rows by what they are about, in their order."""
        raise NotImplementedError


class TaskBoard(Board):
    """All tasks, newest first."""

    columns = TASK_COLUMNS
    empty = "no tasks"

    def __init__(self, limit: int = 0) -> None:
        self._tasks: dict[str, Task] = {}
        self._limit = limit

    def take(self, item: Any) -> None:
        """Keep a task, or drop it."""
        if isinstance(item, Task):
            self._tasks[item.name] = item
        elif isinstance(item, TaskDeleted):
            self._tasks.pop(item.name, None)

    def rows(self) -> dict[str, Row]:
        """One for each task."""
        tasks = list(self._tasks.values())
        newest = sorted(tasks, key=lambda task: task.create_time.ToNanoseconds(), reverse=True)
        return {task.name: task_row(task) for task in newest[: self._limit or None]}


class QueueBoard(Board):
    """Tasks that run, wait or are paused, by device."""

    columns = QUEUE_COLUMNS
    empty = "nothing runs, waits or is paused"

    def __init__(self, client: Client) -> None:
        self._client = client
        self._tasks: dict[str, Task] = {}
        # A task's device need not be the one it asked for, and its run keeps the one it has.
        self._devices: dict[tuple[str, int], str] = {}
        self._order = [device.id for device in client.list_devices()]

    def take(self, item: Any) -> None:
        """Keep a task, or drop it."""
        if isinstance(item, TaskDeleted):
            self._tasks.pop(item.name, None)
        elif isinstance(item, Task):
            run = (item.name, item.run)
            if run not in self._devices:
                self._devices[run] = device_of(self._client, item)
            self._tasks[item.name] = item  # last: the rows are drawn by another thread

    def rows(self) -> dict[str, Row]:
        """One for each task."""
        placed = [(self._devices[task.name, task.run], task) for task in list(self._tasks.values())]
        placed.sort(key=lambda row: place_of(row[0], row[1], self._order))
        return {task.name: queue_row(device, task) for device, task in placed}


class DeviceBoard(Board):
    """All devices."""

    columns = DEVICE_COLUMNS
    empty = "no devices"

    def __init__(self) -> None:
        self._devices: list[Device] = []

    def take(self, item: Any) -> None:
        """Keep the newest."""
        if isinstance(item, WatchDevicesResponse):
            self._devices = list(item.devices)

    def rows(self) -> dict[str, Row]:
        """One for each device."""
        return {device.id: device_row(device) for device in self._devices}


def watch_board(items: Iterable[Any], board: Board, *, as_json: bool) -> Exit:
    """Show a list while it changes, until Ctrl-C.

    On a terminal the table stays in place; elsewhere each row that changes is a line of its own;
    and with JSON each item is one.
    """
    try:
        if as_json:
            for item in items:
                _print_item(item)
        elif is_interactive(console()):
            _show_live(items, board)
        else:
            for line in _changes(items, board):
                print(visible(line), flush=True)
    except KeyboardInterrupt:
        pass
    return Exit.INTERRUPTED


def _show_live(items: Iterable[Any], board: Board) -> None:
    is_lost = is_known = False

    def render() -> RenderableType:
        rows = board.rows()
        parts: list[RenderableType] = [table_of(board.columns, rows.values())]
        if not rows:
            parts = [Text(board.empty if is_known else "connecting ...", style="dim")]
        if is_lost:
            parts.append(Text(RECONNECTING, style="yellow"))
        return Group(*parts)

    with LiveDisplay(console(), render, stays=True):
        for item in items:
            is_lost = isinstance(item, ConnectionLost)
            is_known = is_known or isinstance(item, TasksSynced | WatchDevicesResponse)
            board.take(item)


def _changes(items: Iterable[Any], board: Board) -> Iterator[str]:
    """The headings, then each row that is new or has changed; what has gone is said to be gone."""
    shown: dict[str, str] = {}
    was_lost = False
    yield "\t".join(column.upper() for column in board.columns)
    for item in items:
        board.take(item)
        if isinstance(item, ConnectionLost):
            was_lost = True
            say(RECONNECTING)
            continue
        if was_lost:
            was_lost = False
            say(RECONNECTED)
        rows = {name: "\t".join(map(str, row)) for name, row in board.rows().items()}
        for name, line in rows.items():
            if shown.get(name) != line:
                yield line
        for name in shown.keys() - rows.keys():
            yield f"{name} gone"
        shown = rows


def _print_item(item: Any) -> None:
    """A line with the names of `WatchTasksResponse` and `WatchDevicesResponse`."""
    if isinstance(item, Task):
        print_json_line({"task": to_dict(item)})
    elif isinstance(item, TaskDeleted):
        print_json_line({"deleted": item.name})
    elif isinstance(item, TasksSynced):
        print_json_line({"synced": {"task_count": item.task_count}})
    elif isinstance(item, ConnectionLost):
        print_json_line({"connection_lost": {"message": item.error.message}})
    else:
        print_json_line(to_dict(item))

"""All tasks and all devices as they change: where a reader stands, and the methods of both clients.

Neither stream has a history: on a new one everything comes anew, and what does not is gone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from typing import TypeAlias

from finetuned._calls import SYSTEM_SERVICE, TASK_SERVICE, items, task_state
from finetuned._checks import number
from finetuned._errors import FinetunedError
from finetuned._outage import Outage
from finetuned._streams import AsyncStreams, Place, Streams
from finetuned._watch import ConnectionLost
from finetuned.v1.system_service_pb2 import WatchDevicesRequest, WatchDevicesResponse
from finetuned.v1.task_pb2 import Task, TaskState
from finetuned.v1.task_service_pb2 import WatchTasksRequest, WatchTasksResponse

_LONGEST_INTERVAL = 60.0


@dataclass(frozen=True)
class TaskDeleted:
    """A task is not in the list any more: deleted, or out of the states that are watched."""

    name: str
    """`tasks/{task_id}`."""


@dataclass(frozen=True)
class TasksSynced:
    """Every task that there is has been yielded; what comes from now on is new."""

    task_count: int
    """Tasks in the list."""


TasksItem: TypeAlias = Task | TaskDeleted | TasksSynced | ConnectionLost
"""What `watch_tasks` yields."""

DevicesItem: TypeAlias = WatchDevicesResponse | ConnectionLost
"""What `watch_devices` yields."""


class TasksPlace:
    """What one watcher of the list of tasks has been told."""

    service = TASK_SERVICE
    rpc = "WatchTasks"
    interval = 0.0
    is_done = False

    def __init__(
        self, states: Iterable[TaskState.ValueType], reconnect_timeout: float | None
    ) -> None:
        self._states = list(states)
        self._outage = Outage(reconnect_timeout)
        self._known = set[str]()
        self._fresh: set[str] | None = None

    def request(self) -> WatchTasksRequest:
        """The states; from here on each task comes anew."""
        self._fresh = set()
        return WatchTasksRequest(states=self._states)

    def accept(self, response: WatchTasksResponse) -> tuple[Task | TaskDeleted | TasksSynced, ...]:
        """Take a message; with the end of the list, what has gone during an outage."""
        self._outage.over()
        match response.WhichOneof("response"):
            case "task":
                self._known.add(response.task.name)
                if self._fresh is not None:
                    self._fresh.add(response.task.name)
                return (response.task,)
            case "deleted":
                # Of one that was never yielded its deletion is no news.
                was_known = response.deleted in self._known
                self._known.discard(response.deleted)
                if self._fresh is not None:
                    self._fresh.discard(response.deleted)
                return (TaskDeleted(response.deleted),) if was_known else ()
            case "synced":
                gone = sorted(self._known - self._fresh) if self._fresh is not None else []
                self._known.difference_update(gone)
                self._fresh = None
                return (*map(TaskDeleted, gone), TasksSynced(len(self._known)))
            case _:  # a heartbeat, or what a later daemon may send
                return ()

    def lost(self, error: FinetunedError | None) -> ConnectionLost | None:
        """Tell of an outage once."""
        told = self._outage.take(error)
        return ConnectionLost(told) if told is not None else None

    def delay(self) -> float:
        """Seconds to wait before the next stream."""
        return self._outage.delay()


class DevicesPlace:
    """A watcher of the devices, who needs only the newest message."""

    service = SYSTEM_SERVICE
    rpc = "WatchDevices"
    is_done = False

    def __init__(self, interval: float, reconnect_timeout: float | None) -> None:
        # Beyond the contract's bounds the daemon says what is wrong; a watchdog needs a time.
        interval = number("interval", interval)
        self.interval = interval if 0 <= interval <= _LONGEST_INTERVAL else _LONGEST_INTERVAL
        self._asked = interval
        self._outage = Outage(reconnect_timeout)

    def request(self) -> WatchDevicesRequest:
        """The interval."""
        return WatchDevicesRequest(interval_seconds=self._asked)

    def accept(self, response: WatchDevicesResponse) -> tuple[WatchDevicesResponse, ...]:
        """Every message is passed on."""
        self._outage.over()
        return (response,)

    def lost(self, error: FinetunedError | None) -> ConnectionLost | None:
        """Tell of an outage once."""
        told = self._outage.take(error)
        return ConnectionLost(told) if told is not None else None

    def delay(self) -> float:
        """Seconds to wait before the next stream."""
        return self._outage.delay()


def tasks_place(
    states: str | TaskState.ValueType | Iterable[str | TaskState.ValueType],
    reconnect_timeout: float | None,
) -> TasksPlace:
    """Before the first message of the list of tasks."""
    return TasksPlace([task_state(state) for state in items(states)], reconnect_timeout)


class Overviews(Streams):
    """What `Client` shows of all tasks and devices."""

    def watch_tasks(
        self,
        states: str | TaskState.ValueType | Iterable[str | TaskState.ValueType] = (),
        *,
        reconnect_timeout: float | None = None,
    ) -> Iterator[TasksItem]:
        """Follow the list of tasks: each `Task`, then `TasksSynced`, then each that changes.

        A task that is not in the list any more comes as `TaskDeleted`. Of one that changes faster
        than it is read, the newest comes. Tasks come without their `parameters`; `get_task` has
        them. Where the connection breaks, a `ConnectionLost` is yielded, and the watch goes on by
        itself when the daemon is back: all tasks come again, what has gone meanwhile as
        `TaskDeleted`, then a `TasksSynced`. So a dict of tasks by name is all that a reader keeps:

        >>> tasks = {}
        >>> for item in client.watch_tasks():
        ...     if isinstance(item, finetuned.Task):
        ...         tasks[item.name] = item
        ...     elif isinstance(item, finetuned.TaskDeleted):
        ...         del tasks[item.name]
        ...     elif isinstance(item, finetuned.TasksSynced):
        ...         break
        >>> sorted(tasks)
        ['tasks/greetings']

        Args:
            states: Only tasks in one of these states, such as `running`. None given: all.
            reconnect_timeout: Seconds to keep trying while the daemon is away. None: for ever.

        Raises:
            InvalidArgument: No such state.
            DaemonUnavailable: It was away for longer than `reconnect_timeout`, or never there.
        """
        yield from self._follow(tasks_place(states, reconnect_timeout))

    def watch_devices(
        self, interval: float = 2.0, *, reconnect_timeout: float | None = None
    ) -> Iterator[DevicesItem]:
        """Follow the devices: memory, utilization, temperature, power, and which task has each.

        They come at once, at each interval, and as soon as a device is taken or freed. Where the
        connection breaks, a `ConnectionLost` is yielded, and the watch goes on by itself.

        Args:
            interval: Seconds between two, 0.5 to 60.
            reconnect_timeout: Seconds to keep trying while the daemon is away. None: for ever.

        Raises:
            InvalidArgument: The interval is out of its range.
            DaemonUnavailable: It was away for longer than `reconnect_timeout`, or never there.
        """
        place: Place[DevicesItem] = DevicesPlace(interval, reconnect_timeout)
        yield from self._follow(place)


class AsyncOverviews(AsyncStreams):
    """What `AsyncClient` shows of all tasks and devices."""

    async def watch_tasks(
        self,
        states: str | TaskState.ValueType | Iterable[str | TaskState.ValueType] = (),
        *,
        reconnect_timeout: float | None = None,
    ) -> AsyncIterator[TasksItem]:
        async with aclosing(self._follow(tasks_place(states, reconnect_timeout))) as followed:
            async for item in followed:
                yield item

    async def watch_devices(
        self, interval: float = 2.0, *, reconnect_timeout: float | None = None
    ) -> AsyncIterator[DevicesItem]:
        place: Place[DevicesItem] = DevicesPlace(interval, reconnect_timeout)
        async with aclosing(self._follow(place)) as followed:
            async for item in followed:
                yield item

    watch_tasks.__doc__ = Overviews.watch_tasks.__doc__
    watch_devices.__doc__ = Overviews.watch_devices.__doc__

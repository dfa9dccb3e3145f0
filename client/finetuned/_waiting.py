"""Waiting for the end of a run, and why it failed: generators as in `_calls`, and the methods."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import aclosing, contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

from finetuned._calls import Steps, T, TaskName, get_task, list_events_page
from finetuned._checks import seconds
from finetuned._errors import DeadlineExceeded, RunFailed
from finetuned._streams import AsyncStreams, Streams
from finetuned._watch import ENDED, Cursor, WatchItem
from finetuned._words import NOTES, enum_name, reason_word
from finetuned.v1.event_pb2 import Event, Result
from finetuned.v1.task_pb2 import EndReason, Task, TaskState
from finetuned.v1.task_service_pb2 import Snapshot

_LAST_EVENTS = 50
"""Among which the end of the latest run is looked for, before all of its events are."""

RUN_GOES_ON = "RUN_GOES_ON"

_EARLY = 0.05
"""Seconds by which gRPC's clock may be ahead of ours."""


def run_result(task: Task) -> Steps[Result | None]:
    """How the latest run ended; None before the first end."""
    if not task.run:
        return None
    for start in (max(task.last_seq - _LAST_EVENTS, 0), 0):
        found: Result | None = None
        after = start
        while True:
            page = yield from list_events_page(task.name, after, task.run)
            for event in page.events:
                if event.HasField("result"):
                    found = event.result  # a run that went on after a full disk has more than one
            if not page.events or page.events[-1].seq >= page.last_seq:
                break
            after = page.events[-1].seq
        if found is not None:
            return found
    return None


def ended(name: str, raise_on_failure: bool) -> Steps[Task]:
    """The task after its end.

    Raises:
        RunFailed: It has failed, and that is to be an error.
    """
    task = yield from get_task(name)
    if raise_on_failure and task.state == TaskState.TASK_STATE_FAILED:
        result = yield from run_result(task)
        word = reason_word(task.end_reason)
        raise RunFailed(
            f"{task.display_name} failed ({word}): {task.end_message}",
            reason=enum_name(EndReason, task.end_reason).removeprefix("END_REASON_"),
            task=task,
            result=result,
        )
    return task


class Waiting:
    """One wait: until when, and what is known of the task meanwhile."""

    def __init__(self, timeout: float | timedelta | None) -> None:
        """It begins now.

        Args:
            timeout: Seconds. None: for ever.

        Raises:
            InvalidArgument: It is no such number.
        """
        self._seconds = seconds("timeout", timeout)
        self.until = None if self._seconds is None else time.monotonic() + self._seconds
        """The monotonic time until which is waited."""
        self._name = ""
        self._state = TaskState.TASK_STATE_UNSPECIFIED

    def see(self, item: Task | WatchItem) -> None:
        """Take what is told of the task."""
        if isinstance(item, Task):
            self._name, self._state = item.display_name, item.state
        elif isinstance(item, Snapshot):
            self._state = item.task.state
        elif isinstance(item, Event) and item.HasField("state_change"):
            self._state = item.state_change.new_state

    @contextmanager
    def explained(self) -> Generator[None, None, None]:
        """Within it, a deadline that passes is explained."""
        try:
            yield
        except DeadlineExceeded as error:
            if self._seconds is None or (self.until or 0.0) > time.monotonic() + _EARLY:
                raise  # the call's own
            if not self._name:
                message = f"the daemon has not told of the task within {self._seconds:g} s"
                raise DeadlineExceeded(message, reason=RUN_GOES_ON) from error
            note = NOTES.get(self._state, "it goes on")
            raise DeadlineExceeded(
                f"{self._name} has not ended within {self._seconds:g} s; {note}",
                reason=RUN_GOES_ON,
            ) from error


def end_of(task: Task) -> Cursor:
    """What is still to be read of the task before its run is over."""
    return Cursor(task.name, task.last_seq, "", until_end=True, reconnect_timeout=None)


class Waits(Streams):
    """How `Client` waits."""

    def wait(
        self,
        name: TaskName,
        *,
        timeout: float | timedelta | None = None,
        raise_on_failure: bool = False,
    ) -> Task:
        """The task when its run has ended: at once if it has, else as long as it takes.

        One that is paused or was never started is waited for.

        Args:
            name: The task, by any of its names; or a `Task` or handle.
            timeout: Seconds to wait at most, or a `timedelta`, the daemon's absence included; what
                becomes of the run is not touched by it. None or `math.inf`: for ever.
            raise_on_failure: Make an end in failure an error; else see `state`, `end_reason` and
                `end_message`.

        Raises:
            DeadlineExceeded: It has not ended in time; `reason` is `RUN_GOES_ON`.
            RunFailed: It has failed, and `raise_on_failure` is set.
        """
        waiting = Waiting(timeout)
        with waiting.explained():
            task = self._run(get_task(name), waiting.until)
            waiting.see(task)
            if task.state not in ENDED:
                for item in self._follow(end_of(task), waiting.until):
                    waiting.see(item)
        return self._run(ended(task.name, raise_on_failure))


class AsyncWaits(AsyncStreams):
    """How `AsyncClient` waits."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T], until: float | None = None) -> T: ...

    async def wait(
        self,
        name: TaskName,
        *,
        timeout: float | timedelta | None = None,  # noqa: ASYNC109 - the same for both clients
        raise_on_failure: bool = False,
    ) -> Task:
        waiting = Waiting(timeout)
        with waiting.explained():
            task = await self._run(get_task(name), waiting.until)
            waiting.see(task)
            if task.state not in ENDED:
                async with aclosing(self._follow(end_of(task), waiting.until)) as items:
                    async for item in items:
                        waiting.see(item)
        return await self._run(ended(task.name, raise_on_failure))

    wait.__doc__ = Waits.wait.__doc__

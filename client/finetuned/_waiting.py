"""Waiting for the end of a run, and why it failed: generators as in `_calls`, and the methods."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from finetuned._calls import Steps, T, get_task, list_events_page
from finetuned._errors import DeadlineExceeded, RunFailed
from finetuned._streams import AsyncStreams, Streams
from finetuned._watch import ENDED, Cursor
from finetuned._words import reason_word
from finetuned.v1.event_pb2 import Result
from finetuned.v1.task_pb2 import EndReason, Task, TaskState

_LAST_EVENTS = 50
"""Among which the end of the latest run is looked for, before all of its events are."""

RUN_GOES_ON = "RUN_GOES_ON"


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
            reason=EndReason.Name(task.end_reason).removeprefix("END_REASON_"),
            task=task,
            result=result,
        )
    return task


@contextmanager
def waited(task: Task, timeout: float | None) -> Generator[float | None, None, None]:
    """Within it, the monotonic time until which is waited; a deadline that passes is explained."""
    try:
        yield None if timeout is None else time.monotonic() + timeout
    except DeadlineExceeded as error:
        raise DeadlineExceeded(
            f"{task.display_name} has not ended within {timeout:g} s; it goes on",
            reason=RUN_GOES_ON,
        ) from error


def end_of(task: Task) -> Cursor:
    """What is still to be read of the task before its run is over."""
    return Cursor(task.name, task.last_seq, "", until_end=True, reconnect_timeout=None)


class Waits(Streams):
    """How `Client` waits."""

    def wait(
        self, name: str, *, timeout: float | None = None, raise_on_failure: bool = False
    ) -> Task:
        """The task when its run has ended: at once if it has, else as long as it takes.

        One that is paused or was never started is waited for.

        Args:
            name: The task.
            timeout: Seconds to wait at most; the run goes on after that. None: for ever.
            raise_on_failure: Make an end in failure an error; else see `state`, `end_reason` and
                `end_message`.

        Raises:
            DeadlineExceeded: It has not ended in time; `reason` is `RUN_GOES_ON`.
            RunFailed: It has failed, and `raise_on_failure` is set.
        """
        task = self._run(get_task(name))
        if task.state not in ENDED:
            with waited(task, timeout) as deadline:
                for _ in self._follow(end_of(task), deadline):
                    pass
        return self._run(ended(task.name, raise_on_failure))


class AsyncWaits(AsyncStreams):
    """How `AsyncClient` waits."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

    async def wait(
        self,
        name: str,
        *,
        timeout: float | None = None,  # noqa: ASYNC109 - the same for both clients
        raise_on_failure: bool = False,
    ) -> Task:
        task = await self._run(get_task(name))
        if task.state not in ENDED:
            with waited(task, timeout) as deadline:
                async for _ in self._follow(end_of(task), deadline):
                    pass
        return await self._run(ended(task.name, raise_on_failure))

    wait.__doc__ = Waits.wait.__doc__

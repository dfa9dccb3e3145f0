"""Probes: three steps that measure what a run takes; the methods of both clients."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import TYPE_CHECKING

from finetuned._caller import Caller
from finetuned._calls import Steps, T, start_task
from finetuned._errors import ProbeFailed
from finetuned._watch import WatchItem
from finetuned._words import enum_name
from finetuned.v1.event_pb2 import Event, ProbeReport, Result
from finetuned.v1.task_pb2 import EndReason, ResumeChoice, Task


def start_probe(name: str, etag: str, request_id: str) -> Steps[Task]:
    """StartTask with `probe`."""
    return start_task(
        name, etag, request_id, ResumeChoice.RESUME_CHOICE_UNSPECIFIED, "", probe=True
    )


class ProbeWatch:
    """What a watch of a task has told of its probe."""

    def __init__(self, task: Task) -> None:
        """Nothing yet.

        Args:
            task: As the start of the probe has answered.
        """
        self.report: ProbeReport | None = None
        self.result: Result | None = None
        self._run = task.run

    def take(self, item: WatchItem) -> bool:
        """Takes an item; returns whether the probe has ended, and its task is idle again."""
        if not isinstance(item, Event) or item.run != self._run:
            return False
        match item.WhichOneof("payload"):
            case "probe_report":
                self.report = item.probe_report
            case "result":
                self.result = item.result
            case "state_change":
                return item.state_change.end_reason != EndReason.END_REASON_UNSPECIFIED
            case _:
                pass
        return False

    def answer(self) -> ProbeReport:
        """The report.

        Raises:
            ProbeFailed: There is none.
        """
        if self.report is None:
            result = self.result or Result()
            name = enum_name(EndReason, result.end_reason).removeprefix("END_REASON_")
            raise ProbeFailed(result.message, reason=name)
        return self.report


class Probes(Caller):
    """What `Client` does with probes."""

    if TYPE_CHECKING:

        def watch(self, name: str, after_seq: int = 0) -> Iterator[WatchItem]: ...

    def start_probe(self, name: str, *, etag: str = "", request_id: str = "") -> Task:
        """Start a probe of a task: three real steps on its longest samples, which are thrown away.

        It leaves nothing in the output folder. Its `probe_report` comes among the events of the
        run that the answer names; then the task is what it was before, unless the probe has failed.
        Estimates on this machine are corrected by it from then on.

        Args:
            name: The task.
            etag: The task's `etag` when it was seen. Empty: whatever is there.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.

        Raises:
            InvalidArgument: Parameters are wrong or missing, all of them in `violations`.
            FailedPrecondition: It is queued or running already.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(start_probe(name, etag, request_id))

    def probe_task(self, name: str) -> ProbeReport:
        """Probe a task, wait for the end, and tell what a run of it would take.

        Ctrl-C ends the waiting, not the probe.

        Raises:
            ProbeFailed: It has failed as a run would, or was stopped; `reason` says why.
            InvalidArgument: Parameters are wrong or missing, all of them in `violations`.
            FailedPrecondition: It is queued or running already.
        """
        task = self.start_probe(name)
        probe = ProbeWatch(task)
        try:
            for item in self.watch(task.name, task.last_seq):
                if probe.take(item):
                    break
        except KeyboardInterrupt:
            # Without the frames of what was waited in.
            raise KeyboardInterrupt("the probe goes on; end it: client.stop_task(name)") from None
        return probe.answer()


class AsyncProbes:
    """What `AsyncClient` does with probes."""

    if TYPE_CHECKING:

        async def _run(self, steps: Steps[T]) -> T: ...

        def watch(self, name: str, after_seq: int = 0) -> AsyncIterator[WatchItem]: ...

    async def start_probe(self, name: str, *, etag: str = "", request_id: str = "") -> Task:
        return await self._run(start_probe(name, etag, request_id))

    async def probe_task(self, name: str) -> ProbeReport:
        task = await self.start_probe(name)
        probe = ProbeWatch(task)
        async for item in self.watch(task.name, task.last_seq):
            if probe.take(item):
                break
        return probe.answer()

    start_probe.__doc__ = Probes.start_probe.__doc__
    probe_task.__doc__ = Probes.probe_task.__doc__

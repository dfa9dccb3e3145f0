"""A task to work with, from asyncio: `TaskHandle`'s verbs, awaited."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Mapping
from contextlib import aclosing
from datetime import timedelta
from os import PathLike
from typing import TYPE_CHECKING, Any, Self

from finetuned._errors import OutOfRange, RunFailed
from finetuned._logs import LogEntry
from finetuned._metrics import Metrics
from finetuned._seen import SeenTask
from finetuned._show import Display, display
from finetuned._violations import ParameterViolation
from finetuned._watch import WatchItem
from finetuned.v1.event_pb2 import Event, ProbeReport
from finetuned.v1.parameter_service_pb2 import EstimateTaskResponse
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.task_pb2 import Checkpoint, Run, Task
from finetuned.v1.task_service_pb2 import (
    ConfigFormat,
    DeleteTaskResponse,
    ExportTaskConfigResponse,
)

if TYPE_CHECKING:
    from finetuned._aio import AsyncClient


class AsyncTaskHandle(SeenTask):
    """A task, from asyncio, with what can be done with it.

    Attributes and verbs are those of `TaskHandle`, where they are described.
    """

    def __init__(self, client: AsyncClient, message: Task) -> None:
        """What clients do; `client.task(name)` is the way to one."""
        super().__init__(message)
        self._client = client

    async def refresh(self) -> Self:
        """Look again."""
        return self._seen(await self._client.get_task(self.name))

    async def start(self, *, resume: str | PathLike[str] = "") -> Self:
        """As `Client.start_task`."""
        return self._seen(await self._client.start_task(self.name, resume=resume))

    async def stop(self, *, discard: bool = False) -> Self:
        """As `Client.stop_task`: it asks for the end; `wait` waits for it."""
        return self._seen(await self._client.stop_task(self.name, discard=discard))

    async def pause(self) -> Self:
        """As `Client.pause_task`."""
        return self._seen(await self._client.pause_task(self.name))

    async def resume(self) -> Self:
        """As `Client.resume_task`."""
        return self._seen(await self._client.resume_task(self.name))

    async def move(self, position: int) -> Self:
        """As `Client.move_task`."""
        return self._seen(await self._client.move_task(self.name, position))

    async def update(
        self,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str | None = None,
        device: str | None = None,
        reset: str | Iterable[str] = (),
        update_template: bool = False,
    ) -> Self:
        """As `Client.update_task`."""
        task = await self._client.update_task(
            self.name,
            parameters,
            display_name=display_name,
            device=device,
            reset=reset,
            update_template=update_template,
        )
        return self._seen(task)

    async def delete(
        self, *, delete_outputs: bool = False, allow_missing: bool = False
    ) -> DeleteTaskResponse:
        """As `Client.delete_task`."""
        return await self._client.delete_task(
            self.name, delete_outputs=delete_outputs, allow_missing=allow_missing
        )

    async def wait(
        self,
        *,
        timeout: float | timedelta | None = None,  # noqa: ASYNC109 - the same for both clients
        raise_on_failure: bool = True,
    ) -> Self:
        """Wait for the end of the run. One that is paused or was never started is waited for.

        Args:
            timeout: Seconds to wait at most, or a `timedelta`. None or `math.inf`: for ever.
            raise_on_failure: Make an end in failure an error.

        Raises:
            RunFailed: It has failed, and `raise_on_failure` is set.
            DeadlineExceeded: It has not ended in time; `reason` is `RUN_GOES_ON`.
        """
        try:
            task = await self._client.wait(
                self.name, timeout=timeout, raise_on_failure=raise_on_failure
            )
        except RunFailed as error:
            if error.task is not None:
                self._seen(error.task)
            raise
        return self._seen(task)

    async def watch(
        self,
        after_seq: int = 0,
        *,
        log_epoch: str = "",
        until_end: bool = True,
        reconnect_timeout: float | None = None,
    ) -> AsyncGenerator[WatchItem, None]:
        """As `Client.watch`, to the end of the run unless `until_end` is false.

        The handle's attributes follow what is told.
        """
        items = self._client.watch(
            self.name,
            after_seq,
            log_epoch=log_epoch,
            until_end=until_end,
            reconnect_timeout=reconnect_timeout,
        )
        async with aclosing(items):
            async for item in items:
                self._see(item)
                yield item

    async def show(self, *, html: bool | None = None) -> None:
        """Show the run live until it ends: state, progress, loss curve, last log lines.

        In a notebook a panel that changes in place; elsewhere a line for each thing that matters.
        Ctrl-C, or the notebook's stop button, ends the showing, not the run.

        Args:
            html: Whether it is a panel. None: in notebooks.
        """
        shown = display(self.message, html)
        with shown:
            shown.begin(await self._client.metrics(self.name, max_points=Display.POINTS))
            for after_seq in (shown.after_seq, 0):
                try:
                    async for item in self.watch(after_seq):
                        shown.show(item)
                except OutOfRange:
                    if not after_seq:
                        raise
                else:
                    return

    async def metrics(
        self,
        run: int = 0,
        *,
        names: str | Iterable[str] = (),
        after_step: int = 0,
        max_points: int = 0,
    ) -> Metrics:
        """As `Client.metrics`."""
        return await self._client.metrics(
            self.name, run, names=names, after_step=after_step, max_points=max_points
        )

    def logs(
        self, *, level: str = "info", run: int = 0, follow: bool = False
    ) -> AsyncIterator[LogEntry]:
        """As `Client.logs`."""
        return self._client.logs(self.name, level=level, run=run, follow=follow)

    def events(self, after_seq: int = 0, *, run: int = 0) -> AsyncIterator[Event]:
        """As `Client.list_events`."""
        return self._client.list_events(self.name, after_seq, run=run)

    def runs(self) -> AsyncIterator[Run]:
        """As `Client.list_runs`."""
        return self._client.list_runs(self.name)

    def checkpoints(self, *, verify: bool = False) -> AsyncIterator[Checkpoint]:
        """As `Client.list_checkpoints`."""
        return self._client.list_checkpoints(self.name, verify=verify)

    async def validate(
        self, parameters: Mapping[str, Any] | Parameters | None = None
    ) -> list[ParameterViolation]:
        """As `Client.validate`: of the task as it is, or of an edit of it."""
        return await self._client.validate(None, parameters, task=self.name)

    async def estimate(
        self,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        resume: str | PathLike[str] = "",
    ) -> EstimateTaskResponse:
        """As `Client.estimate`: of the task as it is, or of an edit of it."""
        return await self._client.estimate(None, parameters, task=self.name, resume=resume)

    async def probe(self) -> ProbeReport:
        """As `Client.probe_task`."""
        report = await self._client.probe_task(self.name)
        await self.refresh()
        return report

    async def export_config(
        self,
        *,
        run: int = 0,
        format: str | ConfigFormat.ValueType = "yaml",  # noqa: A002 - the rpc's own word
    ) -> ExportTaskConfigResponse:
        """As `Client.export_config`."""
        return await self._client.export_config(self.name, run=run, format=format)

    def _seen(self, message: Task) -> Self:
        self._message = message
        return self

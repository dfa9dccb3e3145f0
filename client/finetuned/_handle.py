"""A task to work with, without asyncio: what `client.task(name)` and `client.train(...)` return."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
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
    from finetuned._client import Client


class TaskHandle(SeenTask):
    """A task, with what can be done with it; its attributes are those it was last seen with.

    What `client.task(name)` and `client.train(...)` return. A verb that changes the task returns
    the handle itself, so that `task.start().wait()` reads as it is done.

    >>> task = client.task("greetings")
    >>> task.state_name
    'pending'
    >>> task.start().wait()
    <TaskHandle 'greetings' 'Greetings' completed (finished) 3/3 steps loss 0.3333>
    >>> task.metrics().series["loss"].steps
    [1, 2, 3]
    """

    def __init__(self, client: Client, message: Task) -> None:
        """What clients do; `client.task(name)` is the way to one."""
        super().__init__(message)
        self._client = client

    def refresh(self) -> Self:
        """Look again."""
        return self._seen(self._client.get_task(self.name))

    def start(self, *, resume: str | PathLike[str] = "") -> Self:
        """As `Client.start_task`."""
        return self._seen(self._client.start_task(self.name, resume=resume))

    def stop(self, *, discard: bool = False) -> Self:
        """As `Client.stop_task`: it asks for the end; `wait` waits for it."""
        return self._seen(self._client.stop_task(self.name, discard=discard))

    def pause(self) -> Self:
        """As `Client.pause_task`."""
        return self._seen(self._client.pause_task(self.name))

    def resume(self) -> Self:
        """As `Client.resume_task`."""
        return self._seen(self._client.resume_task(self.name))

    def move(self, position: int) -> Self:
        """As `Client.move_task`."""
        return self._seen(self._client.move_task(self.name, position))

    def update(
        self,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str | None = None,
        device: str | None = None,
        reset: str | Iterable[str] = (),
        update_template: bool = False,
    ) -> Self:
        """As `Client.update_task`."""
        task = self._client.update_task(
            self.name,
            parameters,
            display_name=display_name,
            device=device,
            reset=reset,
            update_template=update_template,
        )
        return self._seen(task)

    def delete(
        self, *, delete_outputs: bool = False, allow_missing: bool = False
    ) -> DeleteTaskResponse:
        """As `Client.delete_task`."""
        return self._client.delete_task(
            self.name, delete_outputs=delete_outputs, allow_missing=allow_missing
        )

    def wait(
        self, *, timeout: float | timedelta | None = None, raise_on_failure: bool = True
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
            task = self._client.wait(self.name, timeout=timeout, raise_on_failure=raise_on_failure)
        except RunFailed as error:
            if error.task is not None:
                self._seen(error.task)
            raise
        return self._seen(task)

    def watch(
        self,
        after_seq: int = 0,
        *,
        log_epoch: str = "",
        until_end: bool = True,
        reconnect_timeout: float | None = None,
    ) -> Generator[WatchItem, None, None]:
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
        with closing(items):
            for item in items:
                self._see(item)
                yield item

    def show(self, *, html: bool | None = None) -> None:
        """Show the run live until it ends: state, progress, loss curve, last log lines.

        In a notebook a panel that changes in place; elsewhere a line for each thing that matters.
        Ctrl-C, or the notebook's stop button, ends the showing, not the run.

        Args:
            html: Whether it is a panel. None: in notebooks.
        """
        shown = display(self.message, html)
        with shown:
            shown.begin(self._client.metrics(self.name, max_points=Display.POINTS))
            for after_seq in (shown.after_seq, 0):
                try:
                    for item in self.watch(after_seq):
                        shown.show(item)
                except OutOfRange:  # events so old are gone
                    if not after_seq:
                        raise
                else:
                    return

    def metrics(
        self,
        run: int = 0,
        *,
        names: str | Iterable[str] = (),
        after_step: int = 0,
        max_points: int = 0,
    ) -> Metrics:
        """As `Client.metrics`."""
        return self._client.metrics(
            self.name, run, names=names, after_step=after_step, max_points=max_points
        )

    def logs(
        self, *, level: str = "info", run: int = 0, follow: bool = False
    ) -> Iterator[LogEntry]:
        """As `Client.logs`."""
        return self._client.logs(self.name, level=level, run=run, follow=follow)

    def events(self, after_seq: int = 0, *, run: int = 0) -> Iterator[Event]:
        """As `Client.list_events`."""
        return self._client.list_events(self.name, after_seq, run=run)

    def runs(self) -> Iterator[Run]:
        """As `Client.list_runs`."""
        return self._client.list_runs(self.name)

    def checkpoints(self, *, verify: bool = False) -> Iterator[Checkpoint]:
        """As `Client.list_checkpoints`."""
        return self._client.list_checkpoints(self.name, verify=verify)

    def validate(
        self, parameters: Mapping[str, Any] | Parameters | None = None
    ) -> list[ParameterViolation]:
        """As `Client.validate`: of the task as it is, or of an edit of it."""
        return self._client.validate(None, parameters, task=self.name)

    def estimate(
        self,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        resume: str | PathLike[str] = "",
    ) -> EstimateTaskResponse:
        """As `Client.estimate`: of the task as it is, or of an edit of it."""
        return self._client.estimate(None, parameters, task=self.name, resume=resume)

    def probe(self) -> ProbeReport:
        """As `Client.probe_task`."""
        report = self._client.probe_task(self.name)
        self.refresh()
        return report

    def export_config(
        self,
        *,
        run: int = 0,
        format: str | ConfigFormat.ValueType = "yaml",  # noqa: A002 - the rpc's own word
    ) -> ExportTaskConfigResponse:
        """As `Client.export_config`."""
        return self._client.export_config(self.name, run=run, format=format)

    def _seen(self, message: Task) -> Self:
        self._message = message
        return self

"""The client for programs without asyncio."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping
from datetime import timedelta
from os import PathLike
from types import TracebackType
from typing import Any, Self

import grpc

from finetuned import _calls, _fork, _prepare
from finetuned._calls import TaskName
from finetuned._checkpoints import Checkpoints, resume_choice
from finetuned._export import Exports
from finetuned._health import Healths
from finetuned._local import make_absolute
from finetuned._logs import Logs
from finetuned._metrics import Curves
from finetuned._overview import Overviews
from finetuned._pause import Pauses
from finetuned._probe import Probes
from finetuned._session import Attempts
from finetuned._status import from_rpc_error
from finetuned._tls import TLS
from finetuned._train import Trains
from finetuned._violations import ParameterViolation
from finetuned._waiting import Waits
from finetuned._watch import Cursor, WatchItem
from finetuned.v1.dataset_service_pb2 import BadLinePolicy, DatasetReport, InspectionProgress
from finetuned.v1.event_pb2 import Event
from finetuned.v1.parameter_service_pb2 import (
    EstimateTaskResponse,
    GetParameterSchemaResponse,
)
from finetuned.v1.parameters_pb2 import Parameters
from finetuned.v1.system_service_pb2 import (
    CheckEnvironmentResponse,
    Device,
    GetQuotaResponse,
    GetSystemInfoResponse,
)
from finetuned.v1.task_pb2 import Run, Task, TaskState, TrainingType
from finetuned.v1.task_service_pb2 import DeleteTaskResponse
from finetuned.v1.template_service_pb2 import Template


class Client(Checkpoints, Curves, Exports, Healths, Logs, Overviews, Pauses, Probes, Trains, Waits):
    """The daemon, from a program without asyncio. Threads may share one.

    >>> with Client() as client:
    ...     [task.display_name for task in client.list_tasks("pending")]
    ['Greetings']

    Tasks are named by `tasks/{task_id}`, by the bare id, or by their display name; where an id and
    a display name are the same word, the id wins. Every method raises `FinetunedError`s. Calls that
    are safe to repeat are repeated for up to 10 s while the daemon restarts.
    """

    def __init__(
        self,
        address: str | None = None,
        *,
        token: str | None = None,
        start_daemon: bool = False,
        timeout: float | timedelta = 10.0,
        language: str | None = None,
        tls: TLS | None = None,
    ) -> None:
        """Connects at the first call.

        Args:
            address: `unix:/path` or `host:port`; else `FINETUNED_ADDRESS`, else the daemon of this
                user on this machine.
            token: What TCP demands; else `FINETUNED_TOKEN`, else the token file of this user's
                daemon, at an address that this daemon has announced and nowhere else.
            start_daemon: Start the daemon at the first call if none serves, and at the next one
                after a call has found it gone. It lives on.
            timeout: Seconds that a call may take; those that read training data may take longer.
                `math.inf`: any time.
            language: Of the daemon's sentences, `en` or `zh`; else what `LC_ALL`, `LC_MESSAGES` or
                `LANG` says.
            tls: Files for TLS; else what `FINETUNED_TLS_CA`, `FINETUNED_TLS_CERT` and
                `FINETUNED_TLS_KEY` name. Without TLS no other machine is called.
        """
        super().__init__(address, token, start_daemon, timeout, language, tls)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; streams under way end. The daemon and its runs go on."""
        if self._session.is_forked:  # the channel is the parent's, and closing it here would hang
            self._session.is_closed = True
            return
        with self._lock:
            self._session.is_closed = True
            for channel in self._channels:
                channel.close()
            self._channels.clear()

    def create_task(
        self,
        training_type: str | TrainingType.ValueType,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str = "",
        device: str = "",
        task_id: str = "",
        start: bool = False,
        request_id: str = "",
        validate_only: bool = False,
        template: str = "",
        update_template: bool = False,
    ) -> Task:
        """Create a task.

        Args:
            training_type: `sft` or `pretrain`.
            parameters: Section to field to value, such as `{"training": {"batch_size": 4}}`; what
                is absent is the template's, else the default. Paths are the daemon's machine's;
                over its socket they may be relative, or begin with `~`.
            display_name: What a user sees; unique. Empty: made from type and time.
            device: `cpu`, `cuda:0` ... Empty: the first GPU if there is one, else the CPU.
            task_id: The id within `tasks/{task_id}`. Empty: the daemon chooses.
            start: Start it as well.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.
            validate_only: Check and write nothing.
            template: Any name of a template, for absent parameters.
            update_template: Write the task's parameters into that custom template too.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            AlreadyExists: The id or the display name is taken.
            NotFound: No such template.
        """
        return self._run(
            _calls.create_task(
                training_type,
                parameters,
                display_name,
                device,
                task_id,
                start,
                request_id,
                validate_only,
                template,
                update_template,
            )
        )

    def get_task(self, name: TaskName) -> Task:
        """The task as it stands, by any of its names, or of a `Task` or handle seen before.

        Raises:
            NotFound: No such task.
            TypeError: It is none of these.
        """
        return self._run(_calls.get_task(name))

    def list_tasks(
        self, states: str | TaskState.ValueType | Iterable[str | TaskState.ValueType] = ()
    ) -> Iterator[Task]:
        """All tasks, newest first, page by page; only those in one of `states` if there are any."""
        states = _calls.items(states)
        token = ""
        while True:
            page = self._run(_calls.list_tasks_page(states, token))
            yield from page.tasks
            token = page.next_page_token
            if not token:
                return

    def update_task(
        self,
        name: str,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str | None = None,
        device: str | None = None,
        reset: str | Iterable[str] = (),
        update_template: bool = False,
        validate_only: bool = False,
        etag: str = "",
    ) -> Task:
        """Change a task; what is not named stays. Earlier runs keep what they ran with.

        Args:
            name: The task.
            parameters: Those to change, as for `create_task`.
            display_name: A new one. None: as it is.
            device: A new one; empty: the default. None: as it is.
            reset: Parameters or sections, such as `training.batch_size`, that go back to their
                defaults unless `parameters` has them; `parameters`: all of them.
            update_template: Write the task's parameters into its custom template too.
            validate_only: Check and write nothing.
            etag: The task's `etag` when it was seen. Empty: whatever is there.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            FailedPrecondition: It has a run that is not over, or no custom template to update.
            AlreadyExists: The display name is taken.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(
            _calls.update_task(
                name,
                parameters,
                display_name,
                device,
                reset,
                update_template,
                validate_only,
                etag,
            )
        )

    def delete_task(
        self,
        name: str,
        *,
        etag: str = "",
        allow_missing: bool = False,
        delete_outputs: bool = False,
    ) -> DeleteTaskResponse:
        """Delete a task, its runs and events, and tell what became of its files.

        Args:
            name: The task.
            etag: The task's `etag` when it was seen. Empty: whatever is there.
            allow_missing: Succeed where there is no such task.
            delete_outputs: Delete what its runs recorded writing into their output folders too.

        Raises:
            FailedPrecondition: It has a run that is not over.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(_calls.delete_task(name, etag, allow_missing, delete_outputs))

    def start_task(
        self, name: str, *, etag: str = "", request_id: str = "", resume: str | PathLike[str] = ""
    ) -> Task:
        """Start a new run of a task. It waits in the queue while its device is busy.

        Args:
            name: The task.
            etag: The task's `etag` when it was seen. Empty: whatever is there.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.
            resume: The checkpoint that this run goes on from: `newest`, `best` or its folder. The
                task's own parameters stay. Empty: as they say.

        Raises:
            InvalidArgument: Parameters are wrong or missing, all of them in `violations`.
            FailedPrecondition: It has a run that is not over, or no such checkpoint.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(_calls.start_task(name, etag, request_id, *resume_choice(resume)))

    def list_runs(self, name: str) -> Iterator[Run]:
        """The runs of a task, newest first, page by page."""
        name = self._run(_calls.resolve(name))
        token = ""
        while True:
            page = self._run(_calls.list_runs_page(name, token))
            yield from page.runs
            token = page.next_page_token
            if not token:
                return

    def list_events(self, name: str, after_seq: int = 0, *, run: int = 0) -> Iterator[Event]:
        """The events of a task so far, oldest first, page by page; of one run only if `run`."""
        name = self._run(_calls.resolve(name))
        while True:
            page = self._run(_calls.list_events_page(name, after_seq, run))
            yield from page.events
            if not page.events or page.events[-1].seq >= page.last_seq:
                return
            after_seq = page.events[-1].seq

    def watch(
        self,
        name: str,
        after_seq: int = 0,
        *,
        log_epoch: str = "",
        until_end: bool = False,
        reconnect_timeout: float | None = None,
    ) -> Generator[WatchItem, None, None]:
        """Follow a task: a `Snapshot` of it, then its `Event`s after `after_seq`, old and new.

        Where the connection breaks, or nothing at all comes for 20 s, a `ConnectionLost` is
        yielded, and the watch goes on by itself when the daemon is back: with a new `Snapshot` and
        the events after the last one. No event is missed or comes twice. Where the daemon has
        another log by then, after a restore or a loss of power, a `LogReplaced` says so, and the
        events of the new log follow from the first on.

        Args:
            name: The task.
            after_seq: Last `seq` already seen. 0: from the first event.
            log_epoch: The `log_epoch` of the snapshot in which it was seen; checked if given.
            until_end: End when the task's run has ended; else the watch has no end. A pause is no
                end, and a task that was never started is waited for.
            reconnect_timeout: Seconds to keep trying while the daemon is away. None: for ever.

        Raises:
            NotFound: No such task, or it was deleted meanwhile.
            OutOfRange: The log that `after_seq` is of was restored or cut: watch again from 0.
            EventsLost: The daemon left out or repeated events.
            DaemonUnavailable: It was away for longer than `reconnect_timeout`, or never there.
        """
        name = self._run(_calls.resolve(name))
        yield from self._follow(Cursor(name, after_seq, log_epoch, until_end, reconnect_timeout))

    def parameter_schema(
        self, training_type: str | TrainingType.ValueType
    ) -> GetParameterSchemaResponse:
        """The form of a training type: sections and fields with labels, help, ranges, conditions.

        Labels and help are there in both languages, whatever the client's.
        """
        return self._run(_prepare.parameter_schema(training_type))

    def validate(
        self,
        training_type: str | TrainingType.ValueType | None = None,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        device: str = "",
        template: str = "",
        task: str = "",
        allow_unfinished: bool = False,
    ) -> list[ParameterViolation]:
        """All that is to be said about parameters: errors first, then warnings, then notices.

        Nothing is written, and wrong parameters are an answer, not an exception. With no `error`
        among the violations, a task with these parameters can be started.

        Args:
            training_type: `sft` or `pretrain`; needed unless `task` is given.
            parameters: As for `create_task`; what is absent is the template's or the task's, else
                the default.
            device: As for `create_task`.
            template: Any name of a template.
            task: Any name of a task: judge an edit of it.
            allow_unfinished: Required fields may be missing.

        Raises:
            InvalidArgument: No training type, or no such device.
            NotFound: No such template or task.
        """
        return self._run(
            _prepare.validate(training_type, parameters, device, template, task, allow_unfinished)
        )

    def estimate(
        self,
        training_type: str | TrainingType.ValueType | None = None,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        device: str = "",
        template: str = "",
        task: str = "",
        resume: str | PathLike[str] = "",
    ) -> EstimateTaskResponse:
        """What a run would do and take: steps, checkpoints, disk, memory, time.

        Arguments are those of `validate`, and `resume`: plan a run that goes on from a checkpoint,
        the `newest` or `best` of `task`, or the one in this folder. `resume_plan` tells then what
        goes on and what has changed.

        Raises:
            InvalidArgument: Fields are wrong or missing, all of them in `violations`.
            NotFound: No such template or task.
            FailedPrecondition: The task has no such checkpoint.
        """
        return self._run(
            _prepare.estimate(training_type, parameters, device, template, task, resume)
        )

    def create_template(
        self,
        display_name: str = "",
        training_type: str | TrainingType.ValueType | None = None,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        task: str = "",
        template_id: str = "",
        request_id: str = "",
    ) -> Template:
        """Create a template to begin tasks with.

        Args:
            display_name: What a user sees; unique.
            training_type: `sft` or `pretrain`; needed unless `task` is given.
            parameters: As for `create_task`. Files and folders are not looked at.
            task: Any name of a task whose type and parameters it takes; `parameters` win.
            template_id: The id within `templates/{template_id}`. Empty: the daemon chooses.
            request_id: Makes repeats of this call by yourself safe. Empty: a new one.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            AlreadyExists: The id or the display name is taken.
            NotFound: No such task.
        """
        return self._run(
            _prepare.create_template(
                display_name, training_type, parameters, task, template_id, request_id
            )
        )

    def get_template(self, name: str) -> Template:
        """The template, by `templates/{template_id}`, id, or display name.

        Raises:
            NotFound: No such template.
        """
        return self._run(_prepare.get_template(name))

    def list_templates(
        self, training_type: str | TrainingType.ValueType | None = None
    ) -> Iterator[Template]:
        """Presets, then custom templates by display name; only those of one type if it is given."""
        token = ""
        while True:
            page = self._run(_prepare.list_templates_page(training_type, token))
            yield from page.templates
            token = page.next_page_token
            if not token:
                return

    def update_template(
        self,
        name: str,
        parameters: Mapping[str, Any] | Parameters | None = None,
        *,
        display_name: str | None = None,
        reset: str | Iterable[str] = (),
        etag: str = "",
    ) -> Template:
        """Change a custom template; tasks made from it stay as they are. As `update_task`.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            FailedPrecondition: It is a preset.
            AlreadyExists: The display name is taken.
            Aborted: It has changed since `etag` was seen.
        """
        return self._run(_prepare.update_template(name, parameters, display_name, reset, etag))

    def delete_template(self, name: str, *, etag: str = "", allow_missing: bool = False) -> None:
        """Delete a custom template; tasks made from it stay as they are.

        Raises:
            FailedPrecondition: It is a preset.
            Aborted: It has changed since `etag` was seen.
        """
        self._run(_prepare.delete_template(name, etag, allow_missing))

    def inspect_dataset(
        self,
        path: str | PathLike[str],
        training_type: str | TrainingType.ValueType = "sft",
        *,
        tokenizer_path: str | PathLike[str] = "",
        max_seq_length: int = 0,
        bad_line_policy: str | BadLinePolicy.ValueType = "fail",
        max_rendered_samples: int | None = None,
        max_samples: int = 0,
    ) -> Iterator[InspectionProgress | DatasetReport]:
        """Read a whole data file as a run would: progress now and then, and the report last.

        Closing the iterator ends the reading.

        Args:
            path: On the daemon's machine; over its socket it may be relative, or begin with `~`.
            training_type: What it is to be used for, `sft` or `pretrain`.
            tokenizer_path: Folder of a model or tokenizer, to count tokens and show what is
                learned. Empty: neither is told.
            max_seq_length: Length in tokens at which samples are cut. 0: 512.
            bad_line_policy: `fail` or `skip`: what a bad line makes of the file.
            max_rendered_samples: Samples shown in full, 0 to 20. None: 3.
            max_samples: Samples to read at most. 0: all.

        Raises:
            InvalidArgument: Fields are wrong, all of them in `violations`.
            FailedPrecondition: The training environment can't run; see `check_environment`.
            ResourceExhausted: Too many inspections at once.
        """
        request = _prepare.inspect_request(
            path,
            training_type,
            tokenizer_path,
            max_seq_length,
            bad_line_policy,
            max_rendered_samples,
            max_samples,
        )
        attempts = Attempts(self._session, "InspectDataset", repeatable=True)
        while True:
            was_answered = False
            endpoint = self._connect()
            if endpoint.is_here:
                make_absolute(request)
            call = self._stubs[_calls.DATASET_SERVICE].InspectDataset(
                request, metadata=self._session.metadata(endpoint)
            )
            _fork.stream_begins(call)
            try:
                for response in call:
                    was_answered = self._session.was_reached = True
                    item = _prepare.inspect_item(response)
                    if item is not None:
                        yield item
                        _fork.check(self._session.pid)
                return
            except grpc.RpcError as error:
                if was_answered:
                    raise from_rpc_error(error) from error
                delay = attempts.after(endpoint, from_rpc_error(error))
            finally:
                _fork.stream_ends(call)
                if not self._session.is_forked:
                    call.cancel()
            self._pause(delay)

    def system_info(self) -> GetSystemInfoResponse:
        """What the daemon is and where it keeps things."""
        return self._run(_calls.system_info())

    def list_devices(self) -> list[Device]:
        """The devices that a task can run on, GPUs first."""
        return self._run(_calls.list_devices())

    def check_environment(self, *, refresh: bool = False) -> CheckEnvironmentResponse:
        """Whether this machine is ready to train, item by item, with a remedy for what is not.

        Args:
            refresh: Ask the training environment again, whatever is remembered; takes seconds.
        """
        return self._run(_prepare.check_environment(refresh))

    def quota(self) -> GetQuotaResponse:
        """The training quota and what is used of it; no `limit` where there is none."""
        return self._run(_prepare.quota())

    def shutdown(self) -> None:
        """End the daemon. Its runs go on; the next daemon adopts them."""
        self._run(_calls.shutdown())

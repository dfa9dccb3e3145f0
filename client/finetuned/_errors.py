"""What can go wrong, one tree for both clients.

    FinetunedError
    +-- DaemonUnavailable     UNAVAILABLE: nobody answers at the address, or the daemon stops
    |   +-- DaemonNotStarted  a daemon that was to be started ended, or never answered
    +-- InvalidArgument       INVALID_ARGUMENT: wrong fields, every one of them in `violations`
    +-- FailedPrecondition    FAILED_PRECONDITION: the resource is not in a state for this
    +-- NotFound              NOT_FOUND
    +-- AlreadyExists         ALREADY_EXISTS
    +-- Aborted               ABORTED: the `etag` no longer holds
    +-- OutOfRange            OUT_OF_RANGE: no such place in the event log; watch again from 0
    +-- PermissionDenied      PERMISSION_DENIED
    +-- Unauthenticated       UNAUTHENTICATED: the token is missing or wrong
    +-- ResourceExhausted     RESOURCE_EXHAUSTED: disk, or a limit of the daemon
    +-- DeadlineExceeded      DEADLINE_EXCEEDED: no answer in time
    +-- Unimplemented         UNIMPLEMENTED: the daemon is older than this client
    +-- InternalError         every other status; a fault of the daemon
    +-- EventsLost            a stream of events had a gap or a repeat
    +-- ProbeFailed           a probe ended without an answer
    +-- RunFailed             a run that was waited for has failed

Nothing here imports grpc: `_status.py` makes these from what grpc raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from finetuned.v1.event_pb2 import Evidence, Result
    from finetuned.v1.parameters_pb2 import Parameters
    from finetuned.v1.task_pb2 import EndReason, Task

REQUEST_ID_KEY = "request-id"
"""Metadata of a call: its id in the daemon's log."""


@dataclass(frozen=True)
class FieldViolation:
    """One wrong field of a request."""

    field: str
    """Path, such as `parameters.training.batch_size`."""
    description: str
    """A sentence: what is wrong and what would be right."""
    reason: str = ""
    """Stable, in capitals, such as `OUT_OF_RANGE`."""


@dataclass(frozen=True)
class PreconditionViolation:
    """One reason why a resource is not in a state for a request."""

    subject: str
    """The resource, such as `tasks/x`."""
    type: str
    """Stable, in capitals."""
    description: str
    """A sentence."""


class FinetunedError(Exception):
    """Base of all errors of this package.

    `code` is the name of the gRPC status, `reason` the daemon's stable reason in capitals; both are
    empty where the error did not come from the daemon and has no such thing. `request_id` is the
    call's in the daemon's log: `finetunectl daemon logs --request ID`. It is not the `request_id`
    of `create_task` and `start_task`, which makes a repeat safe.
    """

    code = ""
    request_id = ""

    def __init__(self, message: str, *, reason: str = "", code: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        if code:
            self.code = code


class DaemonUnavailable(FinetunedError):
    """Nobody answers at the daemon's address, or the daemon stops."""

    code = "UNAVAILABLE"


class DaemonNotStarted(DaemonUnavailable):
    """A daemon that was to be started ended, or never answered; the message holds its log's end."""


class InvalidArgument(FinetunedError):
    """Wrong fields, every one of them in `violations`.

    >>> try:
    ...     client.train("sft", {"training": {"batch_size": 0, "learning_rate": -1}})
    ... except finetuned.InvalidArgument as error:
    ...     for wrong in error.violations:
    ...         print(wrong.field, wrong.reason)
    training.batch_size OUT_OF_RANGE
    training.learning_rate OUT_OF_RANGE
    data.train_file REQUIRED
    data.output_dir REQUIRED
    data.model_path REQUIRED
    """

    code = "INVALID_ARGUMENT"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        violations: Sequence[FieldViolation] = (),
    ) -> None:
        super().__init__(message, reason=reason, code=code)
        self.violations = list(violations)


class FailedPrecondition(FinetunedError):
    """The resource is not in a state for this; `violations` says what is in the way."""

    code = "FAILED_PRECONDITION"

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        violations: Sequence[PreconditionViolation] = (),
    ) -> None:
        super().__init__(message, reason=reason, code=code)
        self.violations = list(violations)


class NotFound(FinetunedError):
    """There is no such resource."""

    code = "NOT_FOUND"


class AlreadyExists(FinetunedError):
    """The id or display name is taken."""

    code = "ALREADY_EXISTS"


class Aborted(FinetunedError):
    """The resource has changed since the `etag` was seen."""

    code = "ABORTED"


class OutOfRange(FinetunedError):
    """No such place in the event log: it was restored or cut. Watch again from 0."""

    code = "OUT_OF_RANGE"


class PermissionDenied(FinetunedError):
    """The daemon does not allow this over this connection."""

    code = "PERMISSION_DENIED"


class Unauthenticated(FinetunedError):
    """The token is missing or wrong."""

    code = "UNAUTHENTICATED"


class ResourceExhausted(FinetunedError):
    """Something has run out: the disk, or a limit of the daemon, such as `LIMIT_OPEN_STREAMS`."""

    code = "RESOURCE_EXHAUSTED"


class DeadlineExceeded(FinetunedError):
    """No answer in time."""

    code = "DEADLINE_EXCEEDED"


class Unimplemented(FinetunedError):
    """The daemon does not know this call; it is older than this client."""

    code = "UNIMPLEMENTED"


class InternalError(FinetunedError):
    """The daemon failed in a way it should not; its log says more."""

    code = "INTERNAL"


class EventsLost(FinetunedError):
    """A stream of events had a gap or a repeat; what was yielded before is right."""


# The one table from status to class.
BY_CODE: dict[str, type[FinetunedError]] = {
    error.code: error
    for error in (
        DaemonUnavailable,
        InvalidArgument,
        FailedPrecondition,
        NotFound,
        AlreadyExists,
        Aborted,
        OutOfRange,
        PermissionDenied,
        Unauthenticated,
        ResourceExhausted,
        DeadlineExceeded,
        Unimplemented,
        InternalError,
    )
}


class ProbeFailed(FinetunedError):
    """A probe ended without an answer; `reason` says why, such as `DEVICE_OUT_OF_MEMORY`."""


class RunFailed(FinetunedError):
    """A run that was waited for has failed.

    `reason` is the end reason's name, such as `DEVICE_OUT_OF_MEMORY`; `message` says it in a
    sentence, `advice` what to do.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: str = "",
        code: str = "",
        task: Task | None = None,
        result: Result | None = None,
    ) -> None:
        super().__init__(message, reason=reason, code=code)
        self.task = task
        """The task as it stands."""
        self.result = result
        """How the run ended, in full; None where no such event is kept."""

    @property
    def end_reason(self) -> EndReason.ValueType | None:
        """Why it ended."""
        return self.task.end_reason if self.task is not None else None

    @property
    def fix(self) -> Parameters | None:
        """Parameters that would likely mend it, for `task.update(error.fix)`; None: not known."""
        has_one = self.result is not None and self.result.HasField("fix")
        return self.result.fix if self.result is not None and has_one else None

    @property
    def advice(self) -> str:
        """Why `fix` would mend it, or what to do by hand; in English. May be empty."""
        return self.result.advice.en if self.result is not None else ""

    @property
    def evidence(self) -> Evidence | None:
        """The last metrics and log lines, and the samples it failed with."""
        has_one = self.result is not None and self.result.HasField("evidence")
        return self.result.evidence if self.result is not None and has_one else None

    @property
    def detail(self) -> str:
        """Last lines of the traceback or console."""
        return self.result.detail if self.result is not None else ""

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

Nothing here imports grpc: `_status.py` makes these from what grpc raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    """Wrong fields, every one of them in `violations`."""

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

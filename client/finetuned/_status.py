"""From what grpc raises to this package's errors, by the typed details of `google.rpc`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import grpc
from google.rpc import error_details_pb2, status_pb2
from grpc_status import rpc_status

from finetuned._errors import (
    BY_CODE,
    REQUEST_ID_KEY,
    DaemonUnavailable,
    FailedPrecondition,
    FieldViolation,
    FinetunedError,
    InternalError,
    InvalidArgument,
    PreconditionViolation,
    ResourceExhausted,
)

_TOO_LARGE = "message larger than max"
_CANCELLED = "CANCELLED"


def from_rpc_error(error: grpc.RpcError, sent: Iterable[tuple[str, str]] = ()) -> FinetunedError:
    """The error that a failed call of `grpc` or `grpc.aio` stands for.

    Args:
        error: What was raised.
        sent: Metadata of the call; its id is the error's where no answer has it.
    """
    call: Any = error  # both kinds have code(), details() and trailing_metadata()
    result = from_status(call.code().name, call.details() or "", _details(call))
    for key, value in (*sent, *(call.trailing_metadata() or ())):
        if key == REQUEST_ID_KEY:
            result.request_id = str(value)
    return result


def from_status(code: str, message: str, status: status_pb2.Status | None) -> FinetunedError:
    """The error of a status and its details.

    Args:
        code: Name of the status, such as `NOT_FOUND`.
        message: The status message, for people.
        status: The rich status, where the daemon sent one.
    """
    if code == _CANCELLED and status is None:
        # Not by us, who would know it: gRPC cancels so what comes while its server stops.
        return DaemonUnavailable("the daemon stops")
    reason = ""
    if code == ResourceExhausted.code and status is None and _TOO_LARGE in message:
        reason = "LIMIT_MESSAGE_BYTES"  # far too large: gRPC itself answers, which knows no reasons
    fields: list[FieldViolation] = []
    preconditions: list[PreconditionViolation] = []
    for detail in status.details if status is not None else ():
        info = error_details_pb2.ErrorInfo()
        bad_request = error_details_pb2.BadRequest()
        failure = error_details_pb2.PreconditionFailure()
        if detail.Unpack(info):
            reason = info.reason
        elif detail.Unpack(bad_request):
            fields += [
                FieldViolation(v.field, v.description, v.reason)
                for v in bad_request.field_violations
            ]
        elif detail.Unpack(failure):
            preconditions += [
                PreconditionViolation(v.subject, v.type, v.description) for v in failure.violations
            ]
    kind = BY_CODE.get(code, InternalError)
    if issubclass(kind, InvalidArgument):
        return kind(message, reason=reason, code=code, violations=fields)
    if issubclass(kind, FailedPrecondition):
        return kind(message, reason=reason, code=code, violations=preconditions)
    return kind(message or code, reason=reason, code=code)


def _details(call: Any) -> status_pb2.Status | None:
    # A call that ended on this side, such as by its deadline, has no trailing metadata.
    if not call.trailing_metadata():
        return None
    try:
        return rpc_status.from_call(call)
    except ValueError:  # code or message of the details contradict the status: not our daemon's
        return None

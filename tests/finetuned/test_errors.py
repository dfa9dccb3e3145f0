"""From gRPC statuses to this package's errors."""

from __future__ import annotations

import grpc
import pytest
from google.protobuf import any_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from finetuned import (
    FailedPrecondition,
    FieldViolation,
    FinetunedError,
    InternalError,
    InvalidArgument,
    PreconditionViolation,
)
from finetuned._errors import BY_CODE
from finetuned._status import from_status


def status(code: int, *details: Message) -> status_pb2.Status:
    result = status_pb2.Status(code=code, message="what the daemon says")
    for detail in details:
        packed = any_pb2.Any()
        packed.Pack(detail)
        result.details.append(packed)
    return result


INFO = error_details_pb2.ErrorInfo(reason="SOME_REASON", domain="finetuned")


@pytest.mark.parametrize("code", BY_CODE)
def test_each_status_has_its_class_and_reason(code: str) -> None:
    error = from_status(code, "what the daemon says", status(code_pb2.Code.Value(code), INFO))
    assert type(error) is BY_CODE[code]
    assert (error.code, error.reason, str(error)) == (code, "SOME_REASON", "what the daemon says")


def test_every_status_of_grpc_gives_an_error_of_ours() -> None:
    for code in grpc.StatusCode:
        assert isinstance(from_status(code.name, "", None), FinetunedError)
    assert isinstance(from_status("DATA_LOSS", "gone", None), InternalError)
    assert from_status("DATA_LOSS", "gone", None).code == "DATA_LOSS"


def test_invalid_argument_holds_every_wrong_field() -> None:
    wrong = error_details_pb2.BadRequest(
        field_violations=[
            error_details_pb2.BadRequest.FieldViolation(field="a.b", description="x", reason="R"),
            error_details_pb2.BadRequest.FieldViolation(field="a.c", description="y", reason="S"),
        ]
    )
    error = from_status("INVALID_ARGUMENT", "bad", status(code_pb2.INVALID_ARGUMENT, INFO, wrong))
    assert isinstance(error, InvalidArgument)
    assert error.violations == [FieldViolation("a.b", "x", "R"), FieldViolation("a.c", "y", "S")]


def test_failed_precondition_holds_what_is_in_the_way() -> None:
    failure = error_details_pb2.PreconditionFailure(
        violations=[
            error_details_pb2.PreconditionFailure.Violation(
                type="RUNNING", subject="tasks/a", description="it runs"
            )
        ]
    )
    error = from_status("FAILED_PRECONDITION", "no", status(code_pb2.FAILED_PRECONDITION, failure))
    assert isinstance(error, FailedPrecondition)
    assert error.violations == [PreconditionViolation("tasks/a", "RUNNING", "it runs")]


def test_details_of_unknown_kinds_are_passed_over() -> None:
    error = from_status(
        "NOT_FOUND",
        "no",
        status(code_pb2.NOT_FOUND, error_details_pb2.DebugInfo(detail="x"), INFO),
    )
    assert error.reason == "SOME_REASON"

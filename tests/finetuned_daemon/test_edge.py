"""Errors as statuses: short enough for the trailers, whatever was sent."""

from __future__ import annotations

import pytest
from google.rpc import error_details_pb2

from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.services.edge import to_status
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.paths import check_path


def bad_request(count: int, sentence: str) -> error_details_pb2.BadRequest:
    violations = [Violation(f"f{n}", Text(sentence, sentence), "WRONG_TYPE") for n in range(count)]
    status = to_status(InvalidRequest(violations))
    assert status.ByteSize() < 6000
    result = error_details_pb2.BadRequest()
    assert any(detail.Unpack(result) for detail in status.details)
    return result


@pytest.mark.parametrize("count", [1, 49, 60])
def test_as_many_fields_as_there_are_parameters_are_all_named(count: int) -> None:
    found = bad_request(count, "a sentence that is not short at all " * 9)
    assert [v.field for v in found.field_violations] == [f"f{n}" for n in range(count)]


@pytest.mark.parametrize("count", [101, 300, 100_000])
def test_of_too_many_the_first_are_named_and_the_others_counted(count: int) -> None:
    *first, last = bad_request(count, "wrong").field_violations
    assert len(first) >= 25
    assert [v.field for v in first] == [f"f{n}" for n in range(len(first))]
    assert (last.field, last.reason) == ("", "MORE_VIOLATIONS")
    assert last.description == f"{count - len(first):,} more values are wrong"


def test_a_path_that_no_system_follows_is_not_taken_apart() -> None:
    (violation,) = check_path("path", "/a" * 2049)
    assert (violation.field, violation.reason) == ("path", "NOT_A_PATH")
    assert "4,098 characters" in violation.message.en
    assert not check_path("path", "/a" * 2048)

"""The request id of a message, so that a repeat gets the first answer again."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from finetuned_daemon.errors import Violation
from finetuned_daemon.requests import RequestId, check_request_id

T = TypeVar("T")


def request_id(
    request: Any, answer: Callable[[T], Message], violations: list[Violation]
) -> RequestId[T] | None:
    """The request id of a message; None where the client chose none.

    Args:
        request: A message with the field `request_id`.
        answer: Makes the answer that is kept.
        violations: Gets one more where the id is too long, or not printable.
    """
    if not request.request_id:
        return None
    wrong = check_request_id(request.request_id)
    if wrong:
        violations += wrong
        return None
    body = copy.deepcopy(request)
    body.ClearField("request_id")
    name = type(request).DESCRIPTOR.name.encode()
    return RequestId(
        request.request_id,
        name + b"\0" + body.SerializeToString(deterministic=True),
        lambda record: answer(record).SerializeToString(),
    )

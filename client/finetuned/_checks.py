"""What arguments must be, beside parameters; refused here by name."""

from __future__ import annotations

import math
import operator
from datetime import timedelta
from numbers import Real
from typing import NoReturn, SupportsIndex, cast

from finetuned._errors import FieldViolation, InvalidArgument
from finetuned._parameters import WRONG_TYPE, is_utf8, not_utf8, wrong_type

_ENDLESS = 3e8
"""Seconds, ten years; gRPC has no room for many more."""


def refuse(violations: list[FieldViolation]) -> NoReturn:
    """Raise what is wrong, all of it."""
    raise InvalidArgument(
        "; ".join(f"{v.field}: {v.description}" for v in violations),
        reason="INVALID_FIELDS",
        violations=violations,
    )


def check_texts(**texts: object) -> None:
    """Raise where one is no text, or none that can be sent."""
    wrong = [
        not_utf8(field) if isinstance(text, str) else wrong_type(field, "a text", text)
        for field, text in texts.items()
        if not (isinstance(text, str) and is_utf8(text))
    ]
    if wrong:
        refuse(wrong)


def check_numbers(bits: int = 32, **numbers: object) -> None:
    """Raise where one is no whole number, or has no room in so many bits."""
    wrong: list[FieldViolation] = []
    for field, number in numbers.items():
        try:
            whole = operator.index(cast("SupportsIndex", number))
        except TypeError:
            whole = None
        if whole is None or isinstance(number, bool):
            wrong.append(wrong_type(field, "a whole number", number))
        elif not -(2 ** (bits - 1)) <= whole < 2 ** (bits - 1):
            wrong.append(wrong_type(field, "a value that fits", number))
    if wrong:
        refuse(wrong)


def number(field: str, value: object) -> float:
    """The number.

    Raises:
        InvalidArgument: It is none.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        refuse([wrong_type(field, "a number", value)])
    return float(value)


def seconds(field: str, value: float | timedelta | None) -> float | None:
    """How long; None: for ever, as is infinity and what gRPC has no room for.

    Raises:
        InvalidArgument: It is no number, or a negative one.
    """
    if value is None:
        return None
    given: object = value
    if isinstance(given, timedelta):
        given = given.total_seconds()
    elif isinstance(given, bool) or not isinstance(given, Real):
        refuse([wrong_type(field, "a number of seconds", given)])
    result = float(given)
    if math.isnan(result) or result < 0:
        what = f"must be a number of seconds, 0 or more, not {result:g}"
        refuse([FieldViolation(field, what, "OUT_OF_RANGE")])
    return result if result < _ENDLESS else None


__all__ = ["WRONG_TYPE", "check_numbers", "check_texts", "number", "refuse", "seconds"]

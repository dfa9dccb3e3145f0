"""Pages of lists, and what else requests of lists have in common."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.texts import Text

LARGEST_PAGE = BY_NAME["page_size"].default


def check_page_size(size: int) -> list[Violation]:
    """A page holds up to 1000; 0: as many as the rpc chooses."""
    return within("page_size", size, 0, LARGEST_PAGE)


def within(field: str, value: float, least: float, most: float) -> list[Violation]:
    """A number has bounds, both of them allowed."""
    if least <= value <= most:
        return []
    text = Text(
        f"must be from {least} to {most}, not {value}",
        f"必须在 {least} 到 {most} 之间，而不是 {value}",
    )
    return [Violation(field, text, "OUT_OF_RANGE")]


_Item = TypeVar("_Item")


def next_page_token(
    of: str, found: Sequence[_Item], size: int, place: Callable[[_Item], int]
) -> str:
    """The token of the page behind the first `size` of what was found; empty: that is all.

    Args:
        of: Tells the lists apart.
        found: One more than a page, where there are more.
        size: Of a page.
        place: Of an item in the list, by which it goes on.
    """
    return f"{of}-{place(found[size - 1])}" if len(found) > size else ""


def page_token(of: str, token: str, violations: list[Violation]) -> int:
    """The place in a page token, 0 for none; adds a violation where it is not of this list."""
    if not token:
        return 0
    kind, _, number = token.partition("-")
    if kind == of and number.isascii() and number.isdigit() and 0 < len(number) < 19:
        return int(number)
    violations.append(bad_page_token())
    return 0


def bad_page_token() -> Violation:
    """The violation of a page token that no list of this kind has given."""
    text = Text("must be the next_page_token of an answer", "必须是某个应答中的 next_page_token")
    return Violation("page_token", text, "BAD_PAGE_TOKEN")


def negative(field: str, value: int) -> Violation:
    """The violation of a number below 0."""
    text = Text(f"must not be negative, not {value}", f"不能为负数，而不是 {value}")
    return Violation(field, text, "OUT_OF_RANGE")


def not_negative(field: str, value: int) -> int:
    """The value.

    Raises:
        InvalidRequest: It is negative.
    """
    if value < 0:
        raise InvalidRequest([negative(field, value)])
    return value

"""Pages of lists, and what else requests of lists have in common."""

from __future__ import annotations

from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.texts import Text

LARGEST_PAGE = 1000


def check_page_size(size: int) -> list[Violation]:
    """A page holds up to 1000; 0: as many as the rpc chooses."""
    if 0 <= size <= LARGEST_PAGE:
        return []
    text = Text(
        f"must be from 0 to {LARGEST_PAGE}, not {size}",
        f"必须在 0 到 {LARGEST_PAGE} 之间，而不是 {size}",
    )
    return [Violation("page_size", text, "OUT_OF_RANGE")]


def page_token(token: str, violations: list[Violation]) -> int:
    """The number in a page token, 0 for none; adds a violation where it is not one of ours."""
    if not token:
        return 0
    if token.isascii() and token.isdigit() and len(token) < 19 and int(token) > 0:
        return int(token)
    text = Text("must be the next_page_token of an answer", "必须是某个应答中的 next_page_token")
    violations.append(Violation("page_token", text, "BAD_PAGE_TOKEN"))
    return 0


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

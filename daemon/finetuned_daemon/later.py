"""Parts of the daemon that are made when something first asks for them.

What plans, judges and reads data is a third of the daemon's code, and one that nobody asks anything
has no use for it: it starts sooner and takes less memory without.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar, cast

T = TypeVar("T")


class _Later(Generic[T]):
    """Stands for an object that is not made yet."""

    def __init__(self, make: Callable[[], T]) -> None:
        self._make = make
        self._made: T | None = None

    def __getattr__(self, name: str) -> Any:
        if self._made is None:
            self._made = self._make()
        return getattr(self._made, name)


def later(make: Callable[[], T]) -> T:
    """An object whose attributes are those of what `make` makes, once one of them is asked for.

    For objects whose methods are called, on the event loop's thread; `isinstance` does not know it.
    """
    return cast("T", _Later(make))


def is_made(part: object) -> bool:
    """Whether what stands for something has made it; everything else is."""
    return not isinstance(part, _Later) or part.__dict__["_made"] is not None

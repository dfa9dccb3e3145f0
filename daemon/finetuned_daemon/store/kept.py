"""Records that were read before, for as long as their rows say the same."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Kept(Generic[T]):
    """The records of a table that were read last.

    To read a row takes a tenth of what it takes to make a record of it: of the parameters alone
    there are 49. A row is compared as a whole, so that nobody has to say what has changed, and what
    is read within a transaction that is rolled back is never taken for what is there.
    """

    def __init__(self, make: Callable[[sqlite3.Row], T], most: int) -> None:
        """Takes what makes a record, which nobody changes, of a row; and how many are kept."""
        self._make = make
        self._most = most
        self._kept: OrderedDict[int, tuple[tuple[Any, ...], T]] = OrderedDict()

    def __call__(self, row: sqlite3.Row) -> T:
        """The record of a row, which has a column `key`: the same object as before, if it can be.

        Raises:
            ValueError: The row holds no such record.
        """
        key, cells = row["key"], tuple(row)
        kept = self._kept.get(key)
        if kept is not None and kept[0] == cells:
            self._kept.move_to_end(key)
            return kept[1]
        record = self._make(row)
        self._kept[key] = cells, record
        self._kept.move_to_end(key)
        if len(self._kept) > self._most:
            self._kept.popitem(last=False)
        return record

"""Strings that know where each of their characters comes from.

A `Tracked` is equal to the plain string in everything a template can ask, so that a template takes
the same way with it. Concatenating, cutting, stripping, splitting and replacing keep the origin of
every character exactly; whatever else makes a string of one leaves it `DERIVED`: the source is
known, the place in it is not. Nothing loses its origin silently.
"""

from __future__ import annotations

# ruff: noqa: D102 - the methods are those of `str`, and say what they are there
from collections.abc import Callable, Iterable, Iterator
from typing import Any, SupportsIndex

Run = tuple[int, int, int]
"""Characters in a row: how many, their source, and where in it they begin."""

TEMPLATE = -1
"""Source of what the template itself writes."""
MIXED = -2
"""Source of what was made of several sources."""
DERIVED = -1
"""Place of characters that are not those of their source, but made of them."""


class Tracked(str):
    """A string with the origin of its characters."""

    # Templates reach no attribute that begins with an underscore.
    __slots__ = ("_runs",)
    _runs: tuple[Run, ...]

    def __new__(cls, text: str, runs: tuple[Run, ...] | None = None) -> Tracked:
        """A string of these runs; without any, its origin is unknown."""
        made = super().__new__(cls, text)
        made._runs = ((len(text), MIXED, DERIVED),) if runs is None else runs
        return made

    def __str__(self) -> str:
        return self

    def __add__(self, other: str) -> Tracked:
        return Tracked(str.__add__(self, other), self._runs + runs_of(other))

    def __radd__(self, other: str) -> Tracked:
        return Tracked(str.__add__(other, self), runs_of(other) + self._runs)

    def __iter__(self) -> Iterator[str]:
        return (self._part(index, index + 1) for index in range(len(self)))

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        if isinstance(key, slice):
            start, stop, step = key.indices(len(self))
            if step == 1:
                return self._part(start, max(start, stop))
            return derived(str.__getitem__(self, key), [self])
        index = range(len(self))[key]
        return self._part(index, index + 1)

    def __mod__(self, value: Any) -> str:
        return derived(str.__mod__(self, value), [self, value])

    def __rmod__(self, value: str) -> str:
        return derived(str.__mod__(value, self), [self])

    def __mul__(self, count: SupportsIndex, /) -> str:
        return derived(str.__mul__(self, count), [self])

    def __rmul__(self, count: SupportsIndex, /) -> str:
        return derived(str.__mul__(self, count), [self])

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self._part(start, max(start, len(str.rstrip(self, chars))))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self._part(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self._part(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self._part(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self._part(0, len(str.removesuffix(self, suffix)))

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.split(self, sep, maxsplit), sep or "")

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._parts(str.rsplit(self, sep, maxsplit), sep or "")

    def splitlines(self, keepends: bool = False) -> list[str]:
        whole = self._parts(str.splitlines(self, keepends=True), "")
        if keepends:
            return whole
        return [part[: len(plain)] for part, plain in zip(whole, str.splitlines(self), strict=True)]

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, after = self._parts(list(str.partition(self, sep)), "")
        return before, middle, after

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        before, middle, after = self._parts(list(str.rpartition(self, sep)), "")
        return before, middle, after

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        if not old:
            return derived(str.replace(self, old, new, count), [self, new])
        return join(new, self.split(old, count))

    def join(self, iterable: Iterable[str], /) -> str:
        return join(self, iterable)

    def _part(self, start: int, stop: int) -> Tracked:
        text = str.__getitem__(self, slice(start, stop))
        runs: list[Run] = []
        at = 0
        for size, source, place in self._runs:
            first, last = max(start, at), min(stop, at + size)
            if first < last:
                runs.append((last - first, source, place if place < 0 else place + first - at))
            at += size
        return Tracked(text, tuple(runs))

    def _parts(self, plain: list[str], separator: str) -> list[str]:
        """The pieces of a split in their order, each found behind the one before."""
        parts: list[str] = []
        at = 0
        for piece in plain:
            at = str.find(self, piece, at)
            parts.append(self._part(at, at + len(piece)))
            at += len(piece) + len(separator)
        return parts


def _deriving(name: str) -> Callable[..., str]:
    plain = getattr(str, name)

    def method(self: Tracked, *args: Any, **options: Any) -> str:
        return derived(plain(self, *args, **options), [self, args])

    method.__name__ = name  # jinja's sandbox knows `format` by its name, and guards it
    return method


for _name in (
    *("capitalize", "casefold", "center", "expandtabs", "format", "format_map", "ljust", "lower"),
    *("rjust", "swapcase", "title", "translate", "upper", "zfill", "__format__"),
):
    setattr(Tracked, _name, _deriving(_name))


def runs_of(text: str) -> tuple[Run, ...]:
    """The runs of any string; a plain one is the template's."""
    if isinstance(text, Tracked):
        return text._runs  # noqa: SLF001  # pyright: ignore[reportPrivateUsage]
    return ((len(text), TEMPLATE, 0),) if text else ()


def concat(parts: Iterable[str]) -> str:
    """What `"".join` makes of plain strings."""
    return join("", parts)


def join(separator: str, parts: Iterable[str]) -> str:
    """What `separator.join` makes of plain strings."""
    pieces = list(parts)
    text = str.join(separator, pieces)
    if not isinstance(separator, Tracked) and not any(isinstance(p, Tracked) for p in pieces):
        return text
    between = runs_of(separator)
    runs: list[Run] = []
    for piece in pieces:
        runs += runs_of(piece)
        runs += between
    return Tracked(text, tuple(runs[: -len(between)] if between else runs))


def derived(text: str, made_of: object) -> str:
    """A string that was made of others, in ways that are not followed."""
    source = source_of(made_of)
    return text if source == TEMPLATE else Tracked(text, ((len(text), source, DERIVED),))


def source_of(value: object) -> int:
    """Whose text is in a value: a source, `TEMPLATE`, or `MIXED`."""
    sources = _sources(value)
    return TEMPLATE if not sources else sources.pop() if len(sources) == 1 else MIXED


def _sources(value: object) -> set[int]:
    """Whose text is in a value, looking into lists and mappings; without the template."""
    if isinstance(value, Tracked):
        return {source for _, source, _ in runs_of(value) if source != TEMPLATE}
    if isinstance(value, dict):
        return _sources([*value.keys(), *value.values()])
    if isinstance(value, list | tuple | set):
        return set[int]().union(*map(_sources, value))
    return set()

"""What a part of the benchmark says: rows, each a figure beside a limit of the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Options:
    """How much is measured."""

    rounds: int
    """How often each thing is measured, in turns with the others."""
    quick: bool
    """Small sizes and short times: shows that it works, not how fast it is."""
    folder: Path
    """An empty folder of this part's own, on the disk that the daemon's state would lie on."""


@dataclass(frozen=True)
class Row:
    """One figure and, where there is one, the limit that it is held against."""

    what: str
    figure: float
    unit: str
    """Of both, such as `ms`, `tokens/s`, `MB`."""
    limit: float | None = None
    """Measured in the same run, or fixed by what is promised; None: shown for itself."""
    against: str = ""
    """What the limit is of, such as `plain transformers script`."""
    bar: float | None = None
    """The ratio of figure to limit that is promised; None: none is."""
    is_cost: bool = True
    """Whether the ratio may be the bar at most; else at least."""
    detail: str = ""
    """What else was seen, such as latencies beside a rate."""

    @property
    def ratio(self) -> float | None:
        """Figure to limit."""
        return self.figure / self.limit if self.limit else None

    @property
    def is_met(self) -> bool | None:
        """Whether the promise holds; None: there is none."""
        if self.bar is None or self.ratio is None:
            return None
        return self.ratio <= self.bar if self.is_cost else self.ratio >= self.bar


@dataclass
class Part:
    """One part of the benchmark, measured."""

    name: str
    about: str
    """One sentence: what is compared with what."""
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What has to be known to read it: what was left out and why."""


Run = Callable[[Options], Part]
"""Each part's module has one, by the name `run`."""

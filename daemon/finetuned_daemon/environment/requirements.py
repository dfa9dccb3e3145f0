"""What training needs, from the one place where it stands: the metadata of this distribution."""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

DISTRIBUTION = "finetuned"
EXTRA = "train"
LOW_BIT_EXTRA = "qlora"
"""What 4-bit weights and 8-bit optimizers need beyond that: bitsandbytes."""


@dataclass(frozen=True)
class Requirements:
    """Versions that the training environment must have."""

    python: SpecifierSet
    packages: Sequence[Requirement]
    """In the order of the extra."""
    bitsandbytes: Requirement
    """Needed with 4-bit weights and 8-bit optimizers alone."""

    @property
    def names(self) -> list[str]:
        """The packages by name."""
        return [requirement.name for requirement in self.packages]


@functools.cache
def requirements() -> Requirements:
    """What the extras `train` and `qlora` of this distribution ask for."""
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    packages = _of_extra(EXTRA)
    known = {requirement.name for requirement in packages}
    (bitsandbytes,) = (r for r in _of_extra(LOW_BIT_EXTRA) if r.name not in known)
    return Requirements(
        python=SpecifierSet(metadata["Requires-Python"] or ""),
        packages=packages,
        bitsandbytes=bitsandbytes,
    )


def _of_extra(extra: str) -> tuple[Requirement, ...]:
    return tuple(
        requirement
        for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
        if requirement.marker is not None
        and requirement.marker.evaluate({"extra": extra})
        and not requirement.marker.evaluate({"extra": ""})
    )

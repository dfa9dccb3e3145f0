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


@dataclass(frozen=True)
class Requirements:
    """Versions that the training environment must have."""

    python: SpecifierSet
    packages: Sequence[Requirement]
    """In the order of the extra."""

    @property
    def names(self) -> list[str]:
        """The packages by name."""
        return [requirement.name for requirement in self.packages]


@functools.cache
def requirements() -> Requirements:
    """What the extra `train` of this distribution asks for."""
    metadata = importlib.metadata.metadata(DISTRIBUTION)
    return Requirements(
        python=SpecifierSet(metadata["Requires-Python"] or ""),
        packages=tuple(
            requirement
            for requirement in map(Requirement, importlib.metadata.requires(DISTRIBUTION) or ())
            if requirement.marker is not None
            and requirement.marker.evaluate({"extra": EXTRA})
            and not requirement.marker.evaluate({"extra": ""})
        ),
    )

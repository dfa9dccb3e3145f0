"""The Python that runs train with, and which packages it has."""

from __future__ import annotations

import functools
import shutil
import sys
import time
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from finetuned_daemon.environment import inventory
from finetuned_daemon.environment.capability import BITSANDBYTES
from finetuned_daemon.environment.process import Unanswered, ask
from finetuned_daemon.parameters.needs import EXTRA_PACKAGES
from finetuned_daemon.texts import Text

_DEADLINE_SECONDS = 20.0

Stamp = tuple[tuple[str, int], ...]
"""Files and folders with their times of change in nanoseconds; 0: there is none."""


class Inventory(BaseModel):
    """A Python and what is installed in it."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    python: str
    """Its version."""
    path: tuple[str, ...]
    """Where it looks for modules."""
    packages: dict[str, str]
    """Versions of those that we ask for, as far as they are installed."""


class TrainingPython:
    """`Config.runner_python`. What it has is asked again once a folder of its packages changes."""

    def __init__(self, executable: str, cwd: Path) -> None:
        self.executable = executable
        self._cwd = cwd
        self._inventory: Inventory | None = None
        self._stamp: Stamp = ()
        self.time = 0
        """When the inventory was taken, in microseconds since the epoch."""

    def known(self) -> Inventory | None:
        """What it has, as far as that takes no waiting; None: it must be asked.

        The Python of the daemon itself is always known.
        """
        if self._inventory is not None and self._stamp == self._look(self._inventory.path):
            return self._inventory
        if self.executable != sys.executable:
            return None
        return self._keep(Inventory.model_validate(inventory.take_inventory(_names())))

    async def ask(self, *, anew: bool = False) -> Inventory:
        """What it has; anew: whatever is remembered.

        Raises:
            Unanswered: It can't be started, or is no Python.
        """
        if anew:
            self._inventory = None
        known = self.known()
        if known is not None:
            return known
        answer = await ask(
            [self.executable, "-c", _source(), *_names()],
            seconds=_DEADLINE_SECONDS,
            cwd=self._cwd,
        )
        try:
            return self._keep(Inventory.model_validate_json(answer))
        except ValidationError as error:
            raise Unanswered(
                Text(f"{self.executable} is no Python", f"{self.executable} 不是 Python")
            ) from error

    def stamp(self) -> int:
        """Time of change of the executable in nanoseconds; 0: there is none."""
        return _changed(shutil.which(self.executable) or self.executable)

    def _keep(self, found: Inventory) -> Inventory:
        self._inventory = found
        self._stamp = self._look(found.path)
        self.time = time.time_ns() // 1000
        return found

    def _look(self, path: Iterable[str]) -> Stamp:
        # Whatever installs, updates or removes a package makes or removes a folder beside it.
        return ((self.executable, self.stamp()), *((entry, _changed(entry)) for entry in path))


@functools.cache
def _source() -> str:
    return Path(inventory.__file__).read_text(encoding="utf-8")


def _names() -> list[str]:
    # With the first question: a daemon starts sooner without the parser of requirements.
    from finetuned_daemon.environment.requirements import DISTRIBUTION, requirements

    extra = [name for package in EXTRA_PACKAGES for name in package.distributions]
    return [DISTRIBUTION, *requirements().names, BITSANDBYTES, *extra]


def _changed(path: str) -> int:
    try:
        return Path(path).stat().st_mtime_ns
    except OSError:  # not there, which is a state like another
        return 0

"""What a service is, whatever manages it: how it is asked for, and how it stands."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol

from finetuned._paths import Paths

NAME = "finetuned"

_MARK = "Written by `finetuned service install`"
_DIGEST = re.compile(rf"{re.escape(_MARK)}; unchanged while this fits: ([0-9a-f]{{64}})")
_FACTS = re.compile(r"Facts for `finetuned service`: (\{.*\})")
_NO_DIGEST = "0" * 64


class Refused(Exception):
    """What was asked for is not done; the message says why, and what to do."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A service as it is to be."""

    is_system: bool
    """The machine's; else one user's."""
    user: str
    """Whom it runs as; of a user's service that user."""
    python: Path
    """The Python that has finetuned. Not resolved: a link of a venv stands for the venv."""
    paths: Paths
    options: tuple[str, ...]
    """Of `finetuned serve`, without its folders."""
    environment: Mapping[str, str] = field(default_factory=dict[str, str])
    """Besides the folders."""
    socket_activation: bool = False
    linger: bool = False
    """That user's services are to outlive logout, and did not before."""
    owns_folders: bool = False
    """The folders are the service's own place, which the service manager makes."""
    needs_network: bool = False
    """It serves at an address that is not loopback."""

    @property
    def argv(self) -> tuple[str, ...]:
        """The daemon's command line. `-P`: no folder that happens to be current is searched."""
        return (str(self.python), "-P", "-m", "finetuned_daemon.main", "serve", *self.options)

    @property
    def facts(self) -> dict[str, Any]:
        """What later commands have to know, and can't ask of the service manager."""
        return {
            "state_dir": str(self.paths.state_dir),
            "runtime_dir": str(self.paths.runtime_dir),
            "user": self.user,
            "linger": self.linger,
        }


@dataclass(frozen=True)
class File:
    """A file of a service."""

    path: Path
    content: str


@dataclass(frozen=True, kw_only=True)
class State:
    """How a service stands; empty strings: nobody can know, or nothing to say."""

    is_enabled: bool = False
    """It starts by itself, with the machine or with its user."""
    is_running: bool = False
    waits: bool = False
    """Not running, and started by the first call."""
    pid: int = 0
    since: str = ""
    last_end: str = ""
    """How it ended last, where that was not as it should."""
    lingers: bool | None = None
    """Whether it outlives its user's logout; None: that is no question here."""


class Change(StrEnum):
    """What an installation makes of the one before."""

    NEW = "new"
    """There was none."""
    CHANGED = "changed"
    """Its files are others."""
    SAME = "same"
    """They are what they were."""


class Manager(Protocol):
    """A service manager: what it wants to have written, and the commands that it knows.

    Nothing here is run or written.
    """

    title: str
    """For people."""

    @property
    def paths(self) -> tuple[Path, ...]:
        """Every file that a service can have; the first is the service itself."""
        ...

    def files(self, plan: Plan) -> list[File]:
        """The files of a service, without mark."""
        ...

    def before(self, plan: Plan, *, has_user: bool) -> list[tuple[str, ...]]:
        """Commands before the files are written."""
        ...

    def probe(self) -> tuple[str, ...]:
        """A command that changes nothing and fails where the service manager can't be reached."""
        ...

    def install(self, plan: Plan, *, now: bool, change: Change) -> list[tuple[str, ...]]:
        """Commands once the files are there; with `now` it runs afterwards, as it is written."""
        ...

    def verify(self) -> tuple[str, ...]:
        """A command that says what is wrong with the files; empty: there is none."""
        ...

    def uninstall(self, *, has_socket: bool) -> list[tuple[str, ...]]:
        """Commands before the files are removed."""
        ...

    def removed(self) -> list[tuple[str, ...]]:
        """Commands afterwards."""
        ...

    def control(self, action: str, *, has_socket: bool) -> list[tuple[str, ...]]:
        """Commands of `start`, `stop` and `restart`."""
        ...

    def state(self, facts: Mapping[str, Any], *, has_socket: bool) -> State:
        """How it stands."""
        ...

    def logs(self, lines: int, *, follow: bool) -> tuple[str, ...]:
        """Shows what the service manager has kept of its output; empty: it keeps none."""
        ...

    def notes(self, plan: Plan) -> list[str]:
        """What whoever installs it should know."""
        ...


def marked(content: str, facts: Mapping[str, Any], comment: tuple[str, str], *, line: int) -> str:
    """The content with a mark, by which it is known again, and known to be unchanged.

    Args:
        content: Of the file.
        facts: Kept with it.
        comment: What begins and ends a comment there.
        line: Before which line.
    """
    begin, end = comment
    kept = json.dumps(facts).replace("--", r"-\u002d")  # which a comment of XML may not have
    head = (
        f"{begin}{_MARK}; unchanged while this fits: {_NO_DIGEST}{end}\n"
        f"{begin}Facts for `finetuned service`: {kept}{end}\n"
    )
    lines = content.splitlines(keepends=True)
    text = "".join([*lines[:line], head, *lines[line:]])
    return text.replace(_NO_DIGEST, _digest(text), 1)


def is_ours(text: str) -> bool:
    """Whether it was written by this command, and not changed since."""
    found = _DIGEST.search(text)
    return found is not None and _digest(text.replace(found[1], _NO_DIGEST, 1)) == found[1]


def was_ours(text: str) -> bool:
    """Whether it was written by this command, changed since or not."""
    return _DIGEST.search(text) is not None


def facts(text: str) -> dict[str, Any]:
    """What was kept with it; empty: nothing, or nothing that can be read."""
    found = _FACTS.search(text)
    try:
        value: object = json.loads(found[1]) if found else {}
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()

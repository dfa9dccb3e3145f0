"""What can go wrong with a request, in the daemon's own words.

    DaemonError
    +-- InvalidRequest      wrong fields, every one of them named
    +-- NotFound            no resource of that name
    +-- AlreadyExists       the name is taken
    +-- WrongState          the resource is not in a state for this
    +-- StaleEtag           it has changed since the caller saw it
    +-- CursorOutOfRange    no such place in an event log
    +-- DiskFull            nothing was written
    +-- LimitReached        a bound of `limits.py`
    +-- Stopping            the daemon is about to end
    +-- Unauthenticated     no token, or one that is not known
    +-- Forbidden           known, and not allowed to do this

Nothing here knows gRPC: `services/edge.py` has the one table from these classes to status codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetuned_daemon.texts import Text, printable


class Severity(StrEnum):
    """How grave a violation is; names as in `finetuned.v1.Severity`, gravest first."""

    ERROR = "ERROR"
    WARNING = "WARNING"
    NOTICE = "NOTICE"


@dataclass(frozen=True)
class Violation:
    """One wrong field."""

    field: str
    """Path, such as `training.batch_size`."""
    message: Text
    """A sentence: what is wrong and what would be right."""
    reason: str
    """Stable, in capitals: `OUT_OF_RANGE`, `FILE_NOT_FOUND` ..."""
    severity: Severity = Severity.ERROR
    suggested: bool | float | str | tuple[str, ...] | None = None
    """A value that would be right, where one is known."""
    suggested_field: str = ""
    """The field that `suggested` is for, where it is another one."""


class DaemonError(Exception):
    """Base of all; `reason` is stable and in capitals."""

    reason = "ERROR"

    def __str__(self) -> str:
        return printable(super().__str__())

    @property
    def metadata(self) -> Mapping[str, str]:
        """What a program may want of it beside the reason."""
        return {}


class InvalidRequest(DaemonError):
    """Wrong fields, every one of them named."""

    reason = "INVALID_FIELDS"

    def __init__(self, violations: Sequence[Violation]) -> None:
        self.violations = tuple(violations)
        super().__init__(
            "; ".join(
                f"{v.field}: {v.message.en}" if v.field else v.message.en for v in self.violations
            )
        )


class NotFound(DaemonError):
    """No resource of that name."""

    def __init__(self, kind: str, name: str) -> None:
        self.kind = kind
        self.name = name
        self.reason = f"{kind.upper()}_NOT_FOUND"
        super().__init__(f"there is no {kind} {name!r}")


class AlreadyExists(DaemonError):
    """The name is taken."""

    def __init__(self, kind: str, name: str, reason: str, message: str) -> None:
        self.kind = kind
        self.name = name
        self.reason = reason
        super().__init__(message)


class WrongState(DaemonError):
    """The resource is not in a state for this."""

    def __init__(self, subject: str, reason: str, message: str) -> None:
        self.subject = subject
        self.reason = reason
        super().__init__(message)


class StaleEtag(DaemonError):
    """It has changed since the caller saw it."""

    reason = "STALE_ETAG"

    def __init__(self, name: str) -> None:
        super().__init__(f"{name} has changed since that etag; get it again and decide anew")


class CursorOutOfRange(DaemonError):
    """No such place in an event log."""

    def __init__(self, reason: str, message: str, first_seq: int = 0) -> None:
        self.reason = reason
        self.first_seq = first_seq
        """Of the oldest event that is kept, where that is the reason."""
        super().__init__(message)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The oldest event that is kept."""
        return {"first_seq": str(self.first_seq)} if self.first_seq else {}


class DiskFull(DaemonError):
    """Nothing was written."""

    reason = "DISK_FULL"

    def __init__(self, where: str) -> None:
        super().__init__(f"no space left for {where}; nothing was changed")


class LimitReached(DaemonError):
    """A bound of `limits.py`: nothing was done."""

    def __init__(self, reason: str, limit: int, message: str) -> None:
        self.reason = reason
        self.limit = limit
        super().__init__(message)

    @property
    def metadata(self) -> Mapping[str, str]:
        """The bound."""
        return {"limit": str(self.limit)}


class Stopping(DaemonError):
    """The daemon is about to end; runs go on, and the next daemon takes them over."""

    reason = "DAEMON_STOPPING"

    def __init__(self) -> None:
        super().__init__("the daemon stops; runs go on, ask again when it is back")


class Unauthenticated(DaemonError):
    """No token, or one that is not known; no message ever holds it."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)


class Forbidden(DaemonError):
    """Known, and not allowed to do this."""

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        super().__init__(message)

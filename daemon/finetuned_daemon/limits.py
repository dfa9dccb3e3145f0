"""Every bound of the daemon, in one table: what it is by default, and what happens beyond it.

`docs/limits.md` is this table rendered; a test holds the two to each other. Knows no gRPC.
"""

from __future__ import annotations

import os
import resource
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from finetuned_daemon.errors import LimitReached

MEBIBYTE = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Limit:
    """One bound."""

    name: str
    """Stable; `LIMIT_` and it in capitals is the reason of an error."""
    default: int
    """The bound; 0: none."""
    unit: str
    """What is counted."""
    bounds: str
    """What it bounds, in a few words."""
    option: bool = False
    """Whether `finetuned serve` takes it, by `--most-` and its name."""
    error: str = ""
    """The sentence of the error beyond it, `{limit}` in it; empty: there is no such error."""
    beyond: str = ""
    """What happens beyond it, where that is no error of its own."""

    @property
    def flag(self) -> str:
        """The option of `finetuned serve`; empty: it is fixed."""
        return f"--most-{self.name.replace('_', '-')}" if self.option else ""

    @property
    def reason(self) -> str:
        """The stable reason of its error."""
        return f"LIMIT_{self.name.upper()}"


LIMITS: tuple[Limit, ...] = (
    # --- calls
    Limit(
        name="message_bytes",
        default=4 * MEBIBYTE,
        unit="bytes",
        bounds="one message from a client",
        error="a message may have {limit:,} bytes; send less at once, such as files by their path",
    ),
    Limit(
        name="answer_bytes",
        default=64 * MEBIBYTE,
        unit="bytes",
        bounds="one message to a client",
        beyond="gRPC answers RESOURCE_EXHAUSTED; ask for smaller pages",
    ),
    Limit(
        name="event_page_bytes",
        default=2 * MEBIBYTE,
        unit="bytes",
        bounds="the events of one page of ListEvents",
        beyond="the page ends earlier, and the next goes on",
    ),
    Limit(
        name="metric_points",
        default=50_000,
        unit="points",
        bounds="one page of GetMetrics, of all curves together",
        beyond="INVALID_ARGUMENT, `OUT_OF_RANGE`",
    ),
    Limit(
        name="thinned_points",
        default=100_000,
        unit="points",
        bounds="the answer to GetMetrics with `max_points`, of all curves together",
        beyond="each curve is thinned out further",
    ),
    Limit(
        name="kept_points",
        default=2_000_000,
        unit="points",
        bounds="points of curves that stay in memory for a minute after GetMetrics, about 20 bytes "
        "each, of 250 runs at most; those of the run asked for last always do",
        beyond="those asked for longest ago are read from the log again",
    ),
    Limit(
        name="watch_page_bytes",
        default=64 << 10,
        unit="bytes",
        bounds="events that a watch holds in memory; a client that does not read costs the daemon "
        "this and gRPC's own buffer, together about 0.2 MiB",
        beyond="the log itself is the queue: it is read on as the client reads",
    ),
    Limit(
        name="watch_kept_bytes",
        default=8 * MEBIBYTE,
        unit="bytes",
        bounds="the newest events of watched tasks, and messages of them, in memory for all "
        "watchers together",
        beyond="they are read from the log",
    ),
    Limit(
        name="metadata_bytes",
        default=16 << 10,
        unit="bytes",
        bounds="the metadata of one call",
        beyond="gRPC answers RESOURCE_EXHAUSTED",
    ),
    Limit(
        name="open_streams",
        default=1000,
        unit="streams",
        bounds="watches and other streams, of all clients; TCP leaves a tenth of them, rounded "
        "up, to the unix socket",
        option=True,
        error="{limit} streams are open; close some, or start the daemon with a higher "
        "--most-open-streams",
    ),
    Limit(
        name="calls_in_flight",
        default=200,
        unit="calls",
        bounds="calls that wait for their answer, of all clients; a stop, a pause, a shutdown and "
        "a look at the daemon always get in",
        option=True,
        error="{limit} calls are being answered; ask again in a moment",
    ),
    Limit(
        name="heavy_calls",
        default=64,
        unit="calls",
        bounds="calls among them that read files or start a process: create, edit, delete, start, "
        "resume, check, estimate, export, a look at data, environment or checkpoints",
        option=True,
        error="{limit} calls that read files are being answered; ask again in a moment",
    ),
    Limit(
        name="data_questions",
        default=2,
        unit="processes",
        bounds="processes that look at data files for clients",
        error="{limit} data files are being looked at; ask again in a moment",
    ),
    Limit(
        name="streams_per_connection",
        default=2000,
        unit="calls",
        bounds="calls and streams at once on one connection",
        beyond="further ones of that connection wait",
    ),
    Limit(
        name="open_files",
        default=8192,
        unit="files",
        bounds="connections, and all else that the daemon has open; less where the system allows "
        "less",
        beyond="a new connection waits until another is closed",
    ),
    Limit(
        name="connection_idle_seconds",
        default=3600,
        unit="seconds",
        bounds="how long a connection without a call stays open",
        beyond="it is closed; clients connect again by themselves",
    ),
    Limit(
        name="ping_interval_seconds",
        default=10,
        unit="seconds",
        bounds="the least time between a client's keepalive pings",
        beyond="its connection is closed (ENHANCE_YOUR_CALM)",
    ),
    # --- what is kept
    Limit(
        name="tasks",
        default=100_000,
        unit="tasks",
        bounds="tasks that there are",
        option=True,
        error="there are {limit:,} tasks; delete some, or start the daemon with a higher "
        "--most-tasks",
    ),
    Limit(
        name="queued_tasks",
        default=1000,
        unit="tasks",
        bounds="tasks that wait for a device",
        option=True,
        error="at most {limit:,} may wait for a device, and no more; let some run, stop some, or "
        "start the daemon with a higher --most-queued-tasks",
    ),
    Limit(
        name="runs",
        default=10_000,
        unit="runs",
        bounds="runs of one task",
        error="the task has {limit:,} runs; create another one like it",
    ),
    Limit(
        name="events",
        default=1_000_000,
        unit="events",
        bounds="the log of one task, about 150 bytes each. The newest run's events are always kept",
        option=True,
        beyond="once the task has ended, the oldest events of earlier runs are deleted; a cursor "
        "before what is left is OUT_OF_RANGE with the reason SEQ_COMPACTED",
    ),
    Limit(
        name="database_bytes",
        default=4096 * MEBIBYTE,
        unit="bytes",
        bounds="the database, nearly all of which are events: about 25 million of them",
        option=True,
        beyond="the logs of the oldest runs are thinned out, never of a task that has a run under "
        "way: their curves stay with 1,000 points each, and states, results, notices, checkpoints "
        "and evaluations; see [operations](operations.md#growth)",
    ),
    Limit(
        name="log_line_bytes",
        default=64 << 10,
        unit="bytes",
        bounds="one text in the log of a task",
        beyond="it is cut in the middle; the run folder keeps all of it",
    ),
    Limit(
        name="request_ids",
        default=100_000,
        unit="answers",
        bounds="answers kept for repeats of a create or start (the field `request_id`), for seven "
        "days",
        beyond="the oldest are forgotten",
    ),
    Limit(
        name="log_file_bytes",
        default=10 * MEBIBYTE,
        unit="bytes",
        bounds="one file of the daemon's log",
        beyond="it is renamed, and a new one begun",
    ),
    Limit(
        name="log_files",
        default=6,
        unit="files",
        bounds="files of the daemon's log",
        beyond="the oldest is deleted",
    ),
    Limit(
        name="console_bytes",
        default=64 * MEBIBYTE,
        unit="bytes",
        bounds="`console.log` of a run, what no logger caught",
        beyond="its end is kept in `console.log.1`, and it begins anew",
    ),
    Limit(
        name="notifications",
        default=1000,
        unit="notifications",
        bounds="notifications that are kept, delivered or not",
        beyond="the oldest is deleted",
    ),
    # --- lengths
    Limit(
        name="id_characters",
        default=63,
        unit="characters",
        bounds="`task_id`, `template_id`",
        beyond="INVALID_ARGUMENT, `BAD_TASK_ID` and the like",
    ),
    Limit(
        name="display_name_characters",
        default=200,
        unit="characters",
        bounds="`display_name`",
        beyond="INVALID_ARGUMENT, `BAD_DISPLAY_NAME`",
    ),
    Limit(
        name="request_id_characters",
        default=64,
        unit="characters",
        bounds="the field `request_id`; the metadata `request-id`",
        beyond="INVALID_ARGUMENT, `BAD_REQUEST_ID`; for the metadata, the daemon chooses another",
    ),
    Limit(
        name="mask_paths",
        default=200,
        unit="paths",
        bounds="paths of one field mask",
        beyond="INVALID_ARGUMENT, `TOO_MANY_PATHS`",
    ),
    Limit(
        name="page_size",
        default=1000,
        unit="items",
        bounds="one page of a list",
        beyond="INVALID_ARGUMENT, `OUT_OF_RANGE`",
    ),
)

BY_NAME: dict[str, Limit] = {limit.name: limit for limit in LIMITS}


class Limits:
    """The bounds of one daemon, and what of them is in use."""

    def __init__(self, given: Mapping[str, int] | None = None) -> None:
        """Takes the defaults, with what was given in their place."""
        self._values = {limit.name: limit.default for limit in LIMITS} | dict(given or {})
        self._counts: dict[str, Callable[[], int]] = {}

    def __getitem__(self, name: str) -> int:
        return self._values[name]

    def count_by(self, name: str, count: Callable[[], int]) -> None:
        """Says how the use of a limit is found out."""
        self._counts[name] = count

    def used(self, name: str) -> int | None:
        """How much of it is in use; None where that has no meaning."""
        count = self._counts.get(name)
        return None if count is None else count()

    def check(self, name: str, used: int, more: int = 1) -> None:
        """Holds a bound.

        Raises:
            LimitReached: With `more`, it would be passed.
        """
        most = self._values[name]
        if most and used + more > most:
            raise self.reached(name)

    def check_tcp_streams(self, used: int) -> None:
        """Holds the bound on open streams for one more over TCP: some are the unix socket's.

        Whoever has but the read-only token can't shut out the owner of the machine.

        Raises:
            LimitReached: All of TCP's are in use.
        """
        most = self._values["open_streams"]
        # Of one alone nothing can be kept.
        left = max(1, most - -(-most // 10))
        if most and used >= left:
            raise self.reached_at("open_streams", left)

    def reached(self, name: str) -> LimitReached:
        """The error of a bound."""
        return self.reached_at(name, self._values[name])

    def reached_at(self, name: str, most: int) -> LimitReached:
        """The error of a bound where a caller has only so much of it."""
        limit = BY_NAME[name]
        return LimitReached(limit.reason, most, limit.error.format(limit=most))


def open_files() -> int:
    """Descriptors that this process has open; 0 where that can't be known."""
    for folder in ("/proc/self/fd", "/dev/fd"):
        try:
            return len(os.listdir(folder)) - 1  # noqa: PTH208 - names alone, and quickly
        except OSError:
            continue
    return 0


def raise_open_files(most: int) -> None:
    """Lets this process have so many files open, or as many as the system allows.

    Many systems begin with 1024, and each connection is one.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = most if hard == resource.RLIM_INFINITY else min(most, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def render() -> str:
    """The table, as it stands in `docs/limits.md`."""
    lines = ["| name | default | what it bounds | option | beyond it |", "|---|---|---|---|---|"]
    for limit in LIMITS:
        option = f"`{limit.flag}`" if limit.flag else "fixed"
        beyond = limit.beyond or f"RESOURCE_EXHAUSTED, `{limit.reason}`"
        value = _amount(limit.default, limit.unit)
        lines.append(f"| `{limit.name}` | {value} | {limit.bounds} | {option} | {beyond} |")
    return "\n".join(lines) + "\n"


def _amount(value: int, unit: str) -> str:
    if unit == "bytes":
        if value % MEBIBYTE == 0:
            return f"{value // MEBIBYTE} MiB"
        return f"{value >> 10} KiB"
    return f"{value:,} {unit}"

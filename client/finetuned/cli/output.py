"""Answers on stdout: JSON, tables, words for enums, numbers and times."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.protobuf.struct_pb2 import Value
from google.protobuf.timestamp_pb2 import Timestamp
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from finetuned._violations import plain_value
from finetuned._words import STATE_COLORS
from finetuned._words import duration_text as duration_text
from finetuned._words import enum_name as enum_name
from finetuned._words import local as local
from finetuned._words import phase_word as phase_word
from finetuned._words import reason_word as reason_word
from finetuned._words import state_word as state_word
from finetuned.cli.settings import json_text, visible
from finetuned.v1.task_pb2 import Task, TaskState, TrainingType

# In rich's own word for orange.
STATE_STYLES = {word: f"dark_{c}" if c == "orange" else c for word, c in STATE_COLORS.items()}

_GAP = 2
"""Blanks between columns."""
_NAMES = ("name", "product")
_NAME_WIDTH = 12
"""To which a name shrinks before other columns do."""
_TIMES = ("created", "changed", "started", "ended")
_TIME_WIDTHS = (16, 10)
"""To which a time shrinks: to the minute, then to its date."""
_DROPPED = ("created", "changed", "ended", "started", "loss", "type", "place", "steps", "device")
"""Columns that are left out of a narrow terminal where a table has a name, in this order."""


class _Console(Console):
    """A console that leaves a closed pipe to the command, which has a status for it."""

    def on_broken_pipe(self) -> None:
        """Rich would end the process with a status of its own."""
        self.quiet = True  # what is in the buffer has no reader
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """What is drawn, without what a text in it would have the terminal do."""
        for segment in super().render(renderable, options):
            if segment.control or segment.text.isprintable():
                yield segment
            else:
                yield segment._replace(text=visible(segment.text))


def console(*, stderr: bool = False) -> Console:
    """Stdout, or stderr. Where it is no terminal, lines are as long as they are."""
    # What stands in a text, such as [red] or :smile:, is the user's and no markup.
    plain: dict[str, Any] = {"stderr": stderr, "highlight": False, "markup": False, "emoji": False}
    if (sys.stderr if stderr else sys.stdout).isatty():
        return _Console(**plain)
    is_colored = bool(os.environ.get("FORCE_COLOR"))
    return _Console(**plain, width=10_000, force_terminal=is_colored)


def type_word(training_type: TrainingType.ValueType) -> str:
    """`sft` or `pretrain`."""
    return enum_name(TrainingType, training_type).removeprefix("TRAINING_TYPE_").lower()


def state_text(state: TaskState.ValueType) -> Text:
    """The state in its colour."""
    word = state_word(state)
    return Text(word, style=STATE_STYLES.get(word, ""))


def time_text(moment: Timestamp) -> str:
    """Local time, to the second; empty where there is none."""
    return f"{local(moment):%Y-%m-%d %H:%M:%S}" if moment.seconds else ""


def bytes_text(size: int) -> str:
    """Such as `23.4 GiB`."""
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def value_text(value: bool | float | str | list[str]) -> str:
    """A parameter's value as `--set` takes it, such as `true` or `a,b`."""
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value).lower() if isinstance(value, bool) else str(value)


def progress_text(task: Task) -> str:
    """Such as `45/120 (38%)`; empty before the first step."""
    progress = task.progress
    if not progress.step:
        return ""
    if not progress.total_steps:
        return str(progress.step)
    return f"{progress.step}/{progress.total_steps} ({progress.step / progress.total_steps:.0%})"


def print_json(value: Message | Sequence[Message]) -> None:
    """One JSON object or array."""
    content = to_dict(value) if isinstance(value, Message) else [to_dict(item) for item in value]
    print(json_text(content, sys.stdout.encoding, indent=2))


def print_json_value(value: Any) -> None:
    """One JSON value that is no message."""
    print(json_text(value, sys.stdout.encoding, indent=2))


def print_json_line(value: dict[str, Any]) -> None:
    """One line of a JSON stream, at once."""
    print(json_text(value, sys.stdout.encoding), flush=True)


def print_table(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], wrapped: Sequence[str] = ()
) -> None:
    """A table with a line of headings; where it is too wide, the `wrapped` columns give way."""
    table = table_of(columns, rows, wrapped)
    out = console()
    # The last column is padded too, with blanks that copying would take along.
    for parts in out.render_lines(table, pad=False):
        line = Text.assemble(*((part.text, part.style or "") for part in parts))
        line.rstrip()
        out.print(line, soft_wrap=True)


def table_of(
    columns: Sequence[str], rows: Iterable[Sequence[str | Text]], wrapped: Sequence[str] = ()
) -> RenderableType:
    """The table that `print_table` prints."""
    cells = [
        [cell if isinstance(cell, Text) else Text(visible(cell)) for cell in row] for row in rows
    ]
    return _Table(columns, cells, wrapped)


class _Table:
    """A table that fits the width it is drawn in, whatever that is.

    A long name gives way first, then the time, then columns by `_DROPPED`; the state never does.
    """

    def __init__(
        self, columns: Sequence[str], rows: Sequence[Sequence[Text]], wrapped: Sequence[str]
    ) -> None:
        self._columns = columns
        self._rows = rows
        self._wrapped = wrapped

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Draws it."""
        widths = self._widths(options.max_width)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for at, width in widths.items():
            column = self._columns[at]
            table.add_column(
                Text(column.upper()),
                no_wrap=column not in self._wrapped,
                width=width,
                overflow="crop" if column in _TIMES else "ellipsis",
            )
        for row in self._rows:
            table.add_row(*(row[at] for at in widths))
        yield table

    def _widths(self, room: int) -> dict[int, int | None]:
        """Widths of the columns that are shown, by number; None: as the content has it."""
        if self._wrapped:
            return dict.fromkeys(range(len(self._columns)))
        widths = {
            at: max([cell_len(column), *(row[at].cell_len for row in self._rows)])
            for at, column in enumerate(self._columns)
        }
        natural = dict(widths)
        by_name = {column: at for at, column in enumerate(self._columns)}
        name = next((by_name[one] for one in _NAMES if one in by_name), None)
        if name is not None:
            self._narrow(widths, name, _NAME_WIDTH, room)
        for column in _DROPPED:
            at = by_name.get(column)
            if at is None:
                continue
            for least in _TIME_WIDTHS if column in _TIMES else ():
                if _excess(widths, room) > 0:
                    widths[at] = min(widths[at], least)
            if _excess(widths, room) > 0:
                del widths[at]
        if name is not None:
            self._narrow(widths, name, 1, room)
            # What other columns have left over.
            widths[name] = min(widths[name] - min(_excess(widths, room), 0), natural[name])
        return dict(widths)

    @staticmethod
    def _narrow(widths: dict[int, int], at: int, least: int, room: int) -> None:
        widths[at] = max(widths[at] - max(_excess(widths, room), 0), min(widths[at], least))


def _excess(widths: Mapping[int, int], room: int) -> int:
    return sum(widths.values()) + _GAP * (len(widths) - 1) - room


def print_pairs(pairs: Iterable[tuple[str, str | Text]]) -> None:
    """Names and values below each other; long values stay whole, for copying."""
    shown = [(name, value) for name, value in pairs if value]
    width = max((len(name) for name, _ in shown), default=0)
    out = console()
    for name, value in shown:
        out.print(Text(f"{name:<{width}}  ").append(value), soft_wrap=True)


def to_dict(message: Message) -> dict[str, Any]:
    """Protobuf's JSON with the contract's names, fields at zero, and 64-bit numbers as numbers.

    Its own writer makes them texts, for the sake of JavaScript; ours stay far below 2^53.
    """
    result: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        if field.has_presence and not message.HasField(field.name):
            continue
        value: Any = getattr(message, field.name)
        kind = field.message_type
        if kind is not None and kind.GetOptions().map_entry:
            result[field.name] = {
                key: _scalar(kind.fields_by_name["value"], value[key]) for key in sorted(value)
            }
        elif field.is_repeated:
            result[field.name] = [_scalar(field, item) for item in value]
        else:
            result[field.name] = _scalar(field, value)
    return result


def _scalar(field: Any, value: Any) -> Any:
    if isinstance(value, Timestamp):
        return value.ToJsonString()
    if isinstance(value, Duration):
        return value.ToTimedelta().total_seconds()
    if isinstance(value, Value):
        return plain_value(value)
    if isinstance(value, Message):
        return to_dict(value)
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if isinstance(value, float) and value - value != 0:  # JSON has neither NaN nor infinity
        return "NaN" if value != value else "Infinity" if value > 0 else "-Infinity"
    return value

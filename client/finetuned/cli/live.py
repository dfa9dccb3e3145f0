"""What stays in place on a terminal while it changes, and leaves the terminal in order."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any, Self

from rich.console import Console, RenderableType
from rich.live import Live

# Their own action would end the process at once, and leave the cursor hidden.
_ENDING = [signal.SIGTERM, *([signal.SIGHUP] if sys.platform != "win32" else [])]


class LiveDisplay:
    """Drawn again four times a second."""

    def __init__(
        self, out: Console, render: Callable[[], RenderableType], *, stays: bool = False
    ) -> None:
        """Draws nothing yet.

        Args:
            out: A terminal.
            render: What to draw.
            stays: Leave the last of it on the terminal.
        """
        self._handlers: dict[signal.Signals, Any] = {}
        self._live = Live(
            console=out, get_renderable=render, refresh_per_second=4, transient=not stays
        )

    def __enter__(self) -> Self:
        for number in _ENDING:
            # What is ignored, such as SIGHUP under nohup, stays so.
            if signal.getsignal(number) == signal.SIG_DFL:
                self._handlers[number] = signal.signal(number, _end)
        self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the terminal in order."""
        try:
            # After a hang-up there is no terminal left to put in order.
            with contextlib.suppress(OSError) if kind is SystemExit else contextlib.nullcontext():
                self._live.stop()
        finally:
            for number, handler in self._handlers.items():
                signal.signal(number, handler)


def is_interactive(out: Console) -> bool:
    """Whether something can stay in place: a dumb terminal, such as an editor's, can't."""
    return out.is_terminal and not out.is_dumb_terminal and out.file.isatty()


def _end(number: int, frame: FrameType | None) -> None:
    raise SystemExit(128 + number)

"""Asks another process a question: its answer is what it prints."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence
from pathlib import Path

from finetuned_daemon.texts import Text

_MOST_BYTES = 4 << 20
"""What is kept of an answer: its end."""


class Unanswered(Exception):
    """There is no answer; `text` says why."""

    def __init__(self, text: Text) -> None:
        self.text = text
        super().__init__(text.en)


async def ask(argv: Sequence[str], *, seconds: float, cwd: Path) -> bytes:
    """Runs a command in a process group of its own, and ends all of it when it is over.

    Returns:
        What it printed to stdout.

    Raises:
        Unanswered: It can't be started, failed, or took longer than `seconds`.
    """
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            cwd=cwd,
            env=_environment(),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
    except OSError as error:
        why = error.strerror or str(error)
        raise Unanswered(
            Text(f"{argv[0]} can't be started: {why}", f"无法启动 {argv[0]}：{why}")
        ) from error
    assert process.stdout is not None
    assert process.stderr is not None
    is_over = False
    try:
        async with asyncio.timeout(seconds):
            answer, said, status = await asyncio.gather(
                _end_of(process.stdout), _end_of(process.stderr), process.wait()
            )
        is_over = True
    except TimeoutError as error:
        raise Unanswered(
            Text(f"no answer within {seconds:g} s", f"{seconds:g} 秒内没有应答")
        ) from error
    finally:
        if not is_over:
            # It lives, or a child that it left behind holds the pipes: either keeps the number of
            # the group from being given to anybody else.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    if status:
        raise Unanswered(_ended(status, said.decode(errors="replace")))
    return answer


def _ended(status: int, said: str) -> Text:
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    last = f": {lines[-1][:300]}" if lines else ""
    if status < 0:
        name = _signal_name(-status)
        return Text(f"it was ended by {name}{last}", f"进程被 {name} 终止{last}")
    return Text(f"it ended with status {status}{last}", f"进程以状态码 {status} 退出{last}")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"


async def _end_of(stream: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while chunk := await stream.read(1 << 16):
        data += chunk
        del data[:-_MOST_BYTES]
    return bytes(data)


def _environment() -> dict[str, str]:
    """The daemon's, without its secrets. Nothing is asked of the hub, as in a run."""
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("FINETUNED_")},
        "HF_HUB_OFFLINE": "1",
    }

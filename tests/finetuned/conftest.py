"""What the client's tests share; daemon and scene come from the conftest above."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned import AsyncClient, Client, TaskHandle
from terminal import CTL, Terminal

Run = Callable[..., "subprocess.CompletedProcess[str]"]


class InThreads:
    """`Client`, or its handle, with the other's face, so that each test is written once."""

    def __init__(self, client: Client | TaskHandle) -> None:
        self._client = client

    def __repr__(self) -> str:
        return repr(self._client)

    def __getattr__(self, name: str) -> Any:
        method = getattr(self._client, name)
        if not callable(method):
            return method

        async def iterate(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
            items = method(*arguments, **options)
            end = object()
            try:
                while (item := await asyncio.to_thread(next, items, end)) is not end:
                    yield item
            finally:
                items.close()

        async def call(*arguments: Any, **options: Any) -> Any:
            answer = await asyncio.to_thread(method, *arguments, **options)
            return InThreads(answer) if isinstance(answer, TaskHandle) else answer

        returned = str(inspect.signature(method).return_annotation)
        return iterate if returned.startswith(("Iterator", "Generator")) else call


@pytest.fixture(params=["sync", "async"])
async def make(request: pytest.FixtureRequest) -> AsyncIterator[Callable[..., Any]]:
    """Makes clients of one of the two kinds; closes them."""
    made: list[Any] = []

    def make_one(*arguments: Any, **options: Any) -> Any:
        made.append(
            InThreads(Client(*arguments, **options))
            if request.param == "sync"
            else AsyncClient(*arguments, **options)
        )
        return made[-1]

    yield make_one
    for client in made:
        await client.close()


@pytest.fixture
def client(make: Callable[..., Any], daemon: Daemon) -> Any:
    """A client of the daemon, with `AsyncClient`'s face."""
    return make(daemon.address)


@pytest.fixture
def environment(daemon: Daemon, tmp_path: Path) -> dict[str, str]:
    """An environment in which the daemon is the user's own."""
    result = {
        **os.environ,
        "FINETUNED_STATE_DIR": str(daemon.paths.state_dir),
        "FINETUNED_RUNTIME_DIR": str(daemon.paths.runtime_dir),
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
    }
    result.pop("FINETUNED_ADDRESS", None)
    return result


@pytest.fixture
def ctl(environment: dict[str, str], tmp_path: Path) -> Run:
    """Runs a command to its end, in a folder of its own."""

    def run(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        options.setdefault("stdin", subprocess.DEVNULL)
        return subprocess.run(
            [CTL, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=60,
            **options,
        )

    return run


@pytest.fixture
def on_terminal(environment: dict[str, str], tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Begins a command on a terminal; what is left of it is ended."""
    begun: list[Terminal] = []

    def start(*arguments: str) -> Terminal:
        begun.append(Terminal(environment, tmp_path, list(arguments)))
        return begun[-1]

    yield start
    for terminal in begun:
        # Reaped: not ours any more, and its number may be somebody else's.
        with contextlib.suppress(ChildProcessError):
            if os.waitpid(terminal.pid, os.WNOHANG) == (0, 0):
                os.kill(terminal.pid, signal.SIGKILL)
                os.waitpid(terminal.pid, 0)


@pytest.fixture
def real(tmp_path: Path, environment: dict[str, str]) -> Iterator[Daemon]:
    """A daemon of the user's own with the real runner and a quota."""
    folder = tmp_path / "real"
    folder.mkdir()
    daemon = Daemon(folder, "--training-quota", "9", runner_module="finetuned_runner").start()
    environment["FINETUNED_STATE_DIR"] = str(daemon.paths.state_dir)
    environment["FINETUNED_RUNTIME_DIR"] = str(daemon.paths.runtime_dir)
    yield daemon
    daemon.close()

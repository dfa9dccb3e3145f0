"""What the client's tests share; daemon and scene come from the conftest above."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned import AsyncClient, Client


class InThreads:
    """`Client` with `AsyncClient`'s face, so that each test is written once."""

    def __init__(self, client: Client) -> None:
        self._client = client

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)

        async def iterate(*arguments: Any, **options: Any) -> AsyncIterator[Any]:
            items = method(*arguments, **options)
            end = object()
            try:
                while (item := await asyncio.to_thread(next, items, end)) is not end:
                    yield item
            finally:
                items.close()

        async def call(*arguments: Any, **options: Any) -> Any:
            return await asyncio.to_thread(method, *arguments, **options)

        return iterate if inspect.isgeneratorfunction(method) else call


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

"""Bytes between a handed socket and the daemon's own: all of them, in order, and held back."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from finetuned_daemon.service.relay import Relay

_MIB = 1024 * 1024


class Bench:
    """A relay between a listening socket and a server that answers with what it was sent."""

    def __init__(self, root: Path) -> None:
        self.outer, self.inner = root / "outer.sock", root / "inner.sock"
        self.listening = socket.socket(socket.AF_UNIX)
        self.listening.bind(str(self.outer))
        self.listening.listen()
        self.listening.setblocking(False)
        self.taken = 0

    async def start(self) -> None:
        self.server = await asyncio.start_unix_server(self._echo, self.inner)
        self.relay = Relay(self.listening, self.inner)

    async def _echo(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_MIB):
            self.taken += len(data)
            writer.write(data)
            await writer.drain()
        writer.close()

    async def dial(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return await asyncio.open_unix_connection(self.outer)


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    bench = Bench(tmp_path)
    await bench.start()
    yield bench
    await bench.relay.close()
    bench.server.close()
    bench.listening.close()


async def test_every_byte_arrives_in_order_and_an_end_is_passed_on(bench: Bench) -> None:
    sent = os.urandom(8 * _MIB)
    reader, writer = await bench.dial()

    async def send() -> None:
        writer.write(sent)
        await writer.drain()
        writer.write_eof()

    sending = asyncio.create_task(send())
    got = await reader.read()
    await sending
    assert hashlib.sha256(got).digest() == hashlib.sha256(sent).digest()
    writer.close()


async def test_one_that_does_not_read_is_waited_for_and_holds_up_nobody_else(bench: Bench) -> None:
    """What it does not take is not heaped up in the daemon."""
    stuck = socket.socket(socket.AF_UNIX)
    stuck.connect(str(bench.outer))
    stuck.setblocking(False)
    loop = asyncio.get_running_loop()
    sending = asyncio.create_task(loop.sock_sendall(stuck, bytes(64 * _MIB)))
    last = -1
    while bench.taken != last:  # until nothing moves any more
        last = bench.taken
        for _ in range(20):
            reader, writer = await bench.dial()
            writer.write(b"hello")
            assert await reader.readexactly(5) == b"hello"
            writer.close()
            bench.taken -= 5
    assert not sending.done()
    assert bench.taken < 8 * _MIB
    sending.cancel()
    stuck.close()


async def test_whoever_comes_while_it_stops_is_left_for_the_next(bench: Bench) -> None:
    reader, writer = await bench.dial()
    writer.write(b"a")
    assert await reader.readexactly(1) == b"a"
    await bench.relay.stop_accepting()
    late, late_writer = await bench.dial()
    late_writer.write(b"b")
    for _ in range(20):
        writer.write(b"c")
        assert await reader.readexactly(1) == b"c", "an open connection goes on"
    assert bench.taken == 21, "nothing of the late one"
    await bench.relay.close()
    assert await reader.read() == b"", "until the end"
    bench.relay = Relay(bench.listening, bench.inner)
    assert await late.readexactly(1) == b"b"
    writer.close()
    late_writer.close()


async def test_a_daemon_that_is_gone_ends_the_connection(bench: Bench) -> None:
    bench.inner.unlink()
    reader, writer = await bench.dial()
    assert await reader.read() == b""
    writer.close()

"""Connections of a listening socket that a service manager keeps, brought to the daemon's own.

Python's gRPC can't serve on a socket that is there already, and a second bind would take the path
away from whoever listens. So bytes are carried over, both ways, within this process: no byte waits
longer than its reader does, and none is looked at.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from pathlib import Path

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 256 * 1024
_PAUSE_SECONDS = 0.5


class Relay:
    """Accepts until `stop_accepting`; connections that are open stay until `close`."""

    def __init__(self, listening: socket.socket, target: Path) -> None:
        """Begins at once.

        Args:
            listening: Non-blocking; it stays open, as it is the service manager's.
            target: The daemon's own socket, at which it serves already.
        """
        self._listening = listening
        self._target = os.fspath(target)
        self._connections = set[asyncio.Task[None]]()
        self._accepting = asyncio.create_task(self._accept())

    async def stop_accepting(self) -> None:
        """Leaves whoever comes from now on in the queue of the socket, for the next daemon."""
        self._accepting.cancel()
        await asyncio.wait([self._accepting])

    async def close(self) -> None:
        """Ends every connection."""
        await self.stop_accepting()
        for connection in self._connections:
            connection.cancel()
        if self._connections:
            await asyncio.wait(self._connections)

    async def _accept(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                client, _ = await loop.sock_accept(self._listening)
            except OSError as error:
                if error.errno not in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    continue  # that one has gone away already
                _log.warning("a connection has to wait: %s", error)
                await asyncio.sleep(_PAUSE_SECONDS)
                continue
            connection = asyncio.create_task(self._carry(client))
            self._connections.add(connection)
            connection.add_done_callback(self._connections.discard)

    async def _carry(self, client: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        with client, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as inner:
            client.setblocking(False)
            inner.setblocking(False)
            try:
                await loop.sock_connect(inner, self._target)
                async with asyncio.TaskGroup() as ways:
                    ways.create_task(_pump(client, inner))
                    ways.create_task(_pump(inner, client))
            except* OSError as errors:
                # One side has gone: so does the other, and gRPC dials again.
                _log.debug("a connection has ended: %s", errors.exceptions[0])


async def _pump(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    while data := await loop.sock_recv(source, _CHUNK_BYTES):
        await loop.sock_sendall(sink, data)
    with contextlib.suppress(OSError):  # the other side has closed both ways first
        sink.shutdown(socket.SHUT_WR)

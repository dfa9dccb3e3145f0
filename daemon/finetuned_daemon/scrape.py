"""The least of HTTP that a scraper needs: GET of one path, on loopback, for some at once."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus

from finetuned_daemon.listen import BadAddress, Listen

PATH = "/metrics"

_MOST_CONNECTIONS = 32
_MOST_HEAD_BYTES = 8192
_PATIENCE_SECONDS = 10.0
"""How long a request may take to come, and an answer to be taken."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Body:
    """What is answered."""

    content_type: str
    data: bytes


class ScrapeServer:
    """Serves one path. Whoever asks and does not read costs a buffer, for seconds."""

    def __init__(self, render: Callable[[str], Awaitable[Body]]) -> None:
        """Takes what makes the answer from the header `Accept`."""
        self._render = render
        self._server: asyncio.Server | None = None
        self._open = set[asyncio.Task[None]]()
        # Those that wait for their client, to ask or to take its answer, oldest first.
        self._waiting = dict[asyncio.Task[None], asyncio.StreamWriter]()

    async def bind(self, listen: Listen) -> str:
        """Takes the address, and lets nobody in yet; returns it, with the port that it has.

        Raises:
            BadAddress: It can't be had.
        """
        try:
            self._server = await asyncio.start_server(
                self._came,
                listen.host.strip("[]"),
                listen.port,
                limit=_MOST_HEAD_BYTES,
                start_serving=False,
            )
        except OSError as error:
            address = f"{listen.host}:{listen.port}"
            raise BadAddress(f"can't serve metrics on {address}: {error.strerror}") from error
        port = self._server.sockets[0].getsockname()[1]
        return f"{listen.host}:{port}"

    async def start(self) -> None:
        """Lets scrapers in."""
        if self._server is not None:
            await self._server.start_serving()

    async def close(self) -> None:
        """Ends every connection."""
        if self._server is not None:
            self._server.close()
        for each in tuple(self._open):
            each.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    def _came(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._open) >= _MOST_CONNECTIONS:
            if not self._waiting:  # all of them are about to be answered
                writer.transport.abort()
                return
            self._turn_out(next(iter(self._waiting)))
        task = asyncio.get_running_loop().create_task(self._answer(reader, writer))
        self._open.add(task)
        self._waiting[task] = writer
        task.add_done_callback(self._went)

    def _turn_out(self, task: asyncio.Task[None]) -> None:
        """Ends a connection that keeps us waiting, so that another has its place."""
        self._waiting.pop(task).transport.abort()
        self._open.discard(task)
        task.cancel()

    def _went(self, task: asyncio.Task[None]) -> None:
        self._open.discard(task)
        self._waiting.pop(task, None)
        error = None if task.cancelled() else task.exception()
        if error is not None:  # a fault of ours, which ends nothing but this answer
            _log.error("metrics can't be told", exc_info=error)

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # It comes too slowly or torn, takes no answer, or is gone: nobody is left to be told.
        gone = (TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError, OSError)
        task = asyncio.current_task()
        assert task is not None
        try:
            with contextlib.suppress(*gone):
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    head = await reader.readuntil(b"\r\n\r\n")
                self._waiting.pop(task, None)
                status, body = await self._respond(head)
                self._waiting[task] = writer
                writer.write(_response(status, body, with_body=not head.startswith(b"HEAD ")))
                writer.close()
                async with asyncio.timeout(_PATIENCE_SECONDS):
                    await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _respond(self, head: bytes) -> tuple[HTTPStatus, Body]:
        line, _, rest = head.decode("latin-1").partition("\r\n")
        method, _, target = line.partition(" ")
        path = target.partition(" ")[0].partition("?")[0]
        headers = dict[str, str]()
        for field in rest.splitlines():
            name, _, value = field.partition(":")
            headers[name.strip().lower()] = value.strip()
        if not _is_loopback(headers.get("host", "")) or _is_from_page(headers):
            return _problem(HTTPStatus.FORBIDDEN, "no web page may read this, and no other name")
        if path != PATH:
            return _problem(HTTPStatus.NOT_FOUND, f"there is {PATH} alone")
        if method not in ("GET", "HEAD"):
            return _problem(HTTPStatus.METHOD_NOT_ALLOWED, "GET it")
        return HTTPStatus.OK, await self._render(headers.get("accept", ""))


def _is_loopback(host: str) -> bool:
    """Whether a `Host` names loopback: a page reaches it by a name of its own (DNS rebinding)."""
    name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() else host
    if name in ("", "localhost"):
        return True
    try:
        return ipaddress.ip_address(name.strip("[]")).is_loopback
    except ValueError:
        return False


def _is_from_page(headers: dict[str, str]) -> bool:
    """Browsers send these and let no page change them; no scraper does."""
    return "origin" in headers or headers.get("sec-fetch-site", "none") != "none"


def _problem(status: HTTPStatus, text: str) -> tuple[HTTPStatus, Body]:
    return status, Body("text/plain; charset=utf-8", f"{text}\n".encode())


def _response(status: HTTPStatus, body: Body, *, with_body: bool) -> bytes:
    fields = [
        f"HTTP/1.1 {status.value} {status.phrase}",
        f"Content-Type: {body.content_type}",
        f"Content-Length: {len(body.data)}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        "Connection: close",
    ]
    if status is HTTPStatus.METHOD_NOT_ALLOWED:
        fields.append("Allow: GET, HEAD")
    return "\r\n".join([*fields, "", ""]).encode() + (body.data if with_body else b"")

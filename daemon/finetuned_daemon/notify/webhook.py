"""Notifications by HTTP, signed as Standard Webhooks (standardwebhooks.com) says.

Where a URL is, only the operator says, never a caller of the API. No redirect is followed: what a
server answers leads the daemon nowhere. What it answers is not read beyond its head.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import ipaddress
import math
import re
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import SplitResult, parse_qsl, quote, unquote, urlsplit

from finetuned._version import __version__
from finetuned_daemon import logs
from finetuned_daemon.notify.channel import Channel, NotDelivered
from finetuned_daemon.notify.message import Notification

if TYPE_CHECKING:
    from http.client import HTTPConnection

_SECRET_PREFIX = "whsec_"  # noqa: S105 - no secret
_SECRET_BYTES = (24, 64)
_GONE = 410


class BadWebhook(Exception):
    """A URL or a secret that can't be used; the message has neither in it."""


@dataclass(frozen=True)
class Target:
    """A URL, taken apart."""

    is_https: bool
    host: str
    port: int | None
    path: str
    """With its query."""
    user: str
    """`user:password`; empty: none."""
    digest: str

    @property
    def any_port(self) -> int:
        """That of the URL, or of its scheme."""
        return self.port or (443 if self.is_https else 80)

    @property
    def label(self) -> str:
        """What may be shown: path and query are often secrets."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = f":{self.port}" if self.port else ""
        return f"{'https' if self.is_https else 'http'}://{host}{port}"


def parse_url(url: str, *, may_be_http: bool) -> Target:
    """Takes a URL apart.

    Raises:
        BadWebhook: It can't be used.
    """
    if not url or any(c.isspace() or not c.isprintable() for c in url):
        raise BadWebhook("the URL must not have blanks in it")
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        # Not in Python's words, which quote it: a password with a slash is a port to it.
        raise BadWebhook(
            "the URL can't be read; its port must be a number, and / ? # @ : in a user or password "
            "are written %2F %3F %23 %40 %3A"
        ) from error
    if parts.scheme not in ("https", "http") or not host:
        raise BadWebhook("the URL must begin with https:// and name a host")
    if parts.scheme == "http" and not may_be_http and not _is_loopback(host):
        raise BadWebhook(
            "the URL is http://, which anybody on the way can read; take https://, or say "
            "--notify-allow-http"
        )
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    for secret in _secrets_of(parts):
        logs.keep_secret(secret)
    return Target(parts.scheme == "https", host, port, _path(parts), _user(parts), digest)


def parse_secrets(text: str) -> tuple[bytes, ...]:
    """The secrets of a file, one a line, the first the newest: each signs.

    Raises:
        BadWebhook: One can't be used, or there is none.
    """
    found = list[bytes]()
    for line in filter(None, map(str.strip, text.splitlines())):
        try:
            secret = base64.b64decode(line.removeprefix(_SECRET_PREFIX), validate=True)
        except ValueError:
            secret = b""
        if not line.startswith(_SECRET_PREFIX) or not (
            _SECRET_BYTES[0] <= len(secret) <= _SECRET_BYTES[1]
        ):
            raise BadWebhook(
                f"it must have {_SECRET_PREFIX} and {_SECRET_BYTES[0]} to {_SECRET_BYTES[1]} bytes "
                "in base64 on each line; make one: finetuned notify new-secret FILE"
            )
        logs.keep_secret(line)
        found.append(secret)
    if not found:
        raise BadWebhook("it is empty; make one: finetuned notify new-secret FILE")
    return tuple(found)


def new_secret(random: bytes) -> str:
    """A secret as it stands in a file."""
    return _SECRET_PREFIX + base64.b64encode(random).decode()


def sign(secret: bytes, id_: str, timestamp: int, body: bytes) -> str:
    """One signature."""
    signed = f"{id_}.{timestamp}.".encode() + body
    return "v1," + base64.b64encode(hmac.digest(secret, signed, "sha256")).decode()


class Webhook(Channel):
    """One URL."""

    def __init__(self, target: Target, secrets: Sequence[bytes], *, seconds: float) -> None:
        """Takes where, what to sign with, and how long an attempt may take as a whole.

        Looking up the host's name can't be ended: an attempt may last as long as the system's
        resolver takes.
        """
        self.id = f"webhook-{target.digest}"
        self.label = f"webhook {target.label}"
        self._target = target
        self._secrets = secrets
        self._seconds = seconds
        self._attempt: _Attempt | None = None

    def send(self, notification: Notification) -> str:
        """Posts it; a status of 200 to 299 is delivered."""
        # Here and below: settings are read at every start, and most daemons post nothing.
        from http.client import HTTPException

        context = ssl.create_default_context() if self._target.is_https else None
        connection = self._connection(context)
        body = notification.body.encode()
        attempt = self._attempt = _Attempt(self._seconds)
        # The timeout of a socket is for each read alone: a server that drips would take for ever.
        end = threading.Timer(self._seconds, attempt.end)
        end.daemon = True
        end.start()
        try:
            connection.sock = attempt.connect(self._target, context)
            connection.request(
                "POST", self._target.path, body, self._headers(notification.id, body)
            )
            with connection.getresponse() as answer:
                status, retry_after = answer.status, answer.headers.get("retry-after", "")
            attempt.left()  # a head that was cut off by our own end is no answer
        except (OSError, HTTPException, ValueError) as error:
            raise NotDelivered(attempt.words(error)) from error
        finally:
            end.cancel()
            self._attempt = None
            attempt.close()
            connection.close()
        if status // 100 == 3:
            raise NotDelivered(f"status {status}: a redirect is not followed; give the URL itself")
        if status // 100 != 2:
            raise NotDelivered(
                f"status {status}",
                is_final=status == _GONE,
                not_before_seconds=_seconds(retry_after),
            )
        return f"status {status}"

    def abort(self) -> None:
        """Ends the connection."""
        attempt = self._attempt
        if attempt is not None:
            attempt.end()

    def _connection(self, context: ssl.SSLContext | None) -> HTTPConnection:
        """Not connected yet; of the target's kind, for the header `host`."""
        from http.client import HTTPConnection, HTTPSConnection

        host, port = self._target.host, self._target.any_port
        if context is not None:
            return HTTPSConnection(host, port, context=context)
        return HTTPConnection(host, port)

    def _headers(self, id_: str, body: bytes) -> dict[str, str]:
        now = int(time.time())
        headers = {
            "content-type": "application/json",
            "user-agent": f"finetuned/{__version__}",
            "connection": "close",
            "webhook-id": id_,
            "webhook-timestamp": str(now),
        }
        if self._secrets:
            signatures = (sign(secret, id_, now, body) for secret in self._secrets)
            headers["webhook-signature"] = " ".join(signatures)
        if self._target.user:
            user = base64.b64encode(self._target.user.encode()).decode()
            headers["authorization"] = f"Basic {user}"
        return headers


class _Attempt:
    """The socket of one attempt, and its end: by time, or by a thread that stops it."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._is_over = False
        self._sock: socket.socket | None = None

    def left(self) -> float:
        """Seconds that are left.

        Raises:
            TimeoutError: None are, or it was ended.
        """
        seconds = self._deadline - time.monotonic()
        if self._is_over or seconds <= 0:
            raise TimeoutError
        return seconds

    def connect(self, target: Target, context: ssl.SSLContext | None) -> socket.socket:
        """A connection to the first address of the host that takes one.

        Raises:
            OSError: None does, or not in time.
        """
        sock = self._connect(target)
        sock.settimeout(self.left())
        if context is None:
            return sock
        wrapped = context.wrap_socket(
            sock, server_hostname=target.host, do_handshake_on_connect=False
        )
        self._sock = wrapped
        wrapped.do_handshake()  # its timeout is for the whole of it
        wrapped.settimeout(self.left())
        return wrapped

    def end(self) -> None:
        """Ends it from another thread: what waits on the socket fails, and so does a later look."""
        self._is_over = True
        sock = self._sock
        if sock is not None:
            try:
                # Not TLS's own, which another thread must not touch.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already, or not connected

    def close(self) -> None:
        """Lets go of the socket."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None

    def words(self, error: Exception) -> str:
        """Why it has failed. None of the words of whoever answers: they may be anything."""
        from http.client import HTTPException, RemoteDisconnected

        # Of Python, not ETIMEDOUT of the system, which comes earlier.
        is_late = isinstance(error, TimeoutError) and error.errno is None
        if is_late or self._is_over or time.monotonic() >= self._deadline:
            return f"no answer within {self._seconds:g} s"
        if isinstance(error, HTTPException) and not isinstance(error, RemoteDisconnected):
            return "no HTTP answer"
        return str(error) or type(error).__name__

    def _connect(self, target: Target) -> socket.socket:
        failure: OSError = ConnectionError("the host has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            target.host, target.any_port, type=socket.SOCK_STREAM
        ):
            try:
                sock = self._sock = socket.socket(family, kind, protocol)
                sock.settimeout(self.left())
                sock.connect(address)
            except OSError as error:
                self.close()
                failure = error
            else:
                return sock
        raise failure


_WORD = re.compile(r"[A-Za-z]?[a-z]{0,14}")
"""Such as `services` or `finetuned`: no secret, and a word of other lines."""


def _secrets_of(parts: SplitResult) -> Iterator[str]:
    """What of a URL must stand in no log, as it is given and as it is sent."""
    pieces = [parts.path.strip("/"), parts.query, *parts.path.split("/")]
    pieces += [value for _, value in parse_qsl(parts.query)]
    for piece in pieces:
        if not _WORD.fullmatch(piece):
            yield from (piece, unquote(piece), quote(piece, safe="/%:@!$&'()*+,;=~?"))
    user, password = parts.username or "", parts.password or ""
    # A user alone is a token; beside a password it is a name.
    for piece in (password or user, f"{user}:{password}" if password else ""):
        yield from (piece, unquote(piece))
    yield base64.b64encode(_user(parts).encode()).decode()


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _path(parts: SplitResult) -> str:
    path = quote(parts.path, safe="/%:@!$&'()*+,;=~") or "/"
    return f"{path}?{quote(parts.query, safe='/%:@!$&()*+,;=~?')}" if parts.query else path


def _user(parts: SplitResult) -> str:
    if parts.username is None and parts.password is None:
        return ""
    return f"{unquote(parts.username or '')}:{unquote(parts.password or '')}"


def _seconds(retry_after: str) -> float:
    """What a header `retry-after` asks for; 0 where it can't be read."""
    from email.utils import parsedate_to_datetime

    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0

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
import socket
import ssl
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from urllib.parse import SplitResult, quote, unquote, urlsplit

from finetuned._version import __version__
from finetuned_daemon import logs
from finetuned_daemon.notify.channel import Channel, NotDelivered
from finetuned_daemon.notify.message import Notification

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
        raise BadWebhook(f"the URL can't be read ({error})") from error
    if parts.scheme not in ("https", "http") or not host:
        raise BadWebhook("the URL must begin with https:// and name a host")
    if parts.scheme == "http" and not may_be_http and not _is_loopback(host):
        raise BadWebhook(
            "the URL is http://, which anybody on the way can read; take https://, or say "
            "--notify-allow-http"
        )
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    for secret in (parts.path.strip("/"), parts.query, parts.password or ""):
        if len(secret) > _SHORTEST_SECRET:
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
        """Takes where, what to sign with, and how long an attempt may take."""
        self.id = f"webhook-{target.digest}"
        self.label = f"webhook {target.label}"
        self._target = target
        self._secrets = secrets
        self._seconds = seconds
        self._connection: HTTPConnection | None = None

    def send(self, notification: Notification) -> str:
        """Posts it; a status of 200 to 299 is delivered."""
        connection = self._connection = self._connect()
        # The timeout of a socket is for each read alone: a server that drips would take for ever.
        end = threading.Timer(self._seconds, self.abort)
        end.daemon = True
        end.start()
        began = time.monotonic()
        body = notification.body.encode()
        try:
            connection.request(
                "POST", self._target.path, body, self._headers(notification.id, body)
            )
            answer = connection.getresponse()
            status, retry_after = answer.status, answer.headers.get("retry-after", "")
        except (OSError, HTTPException, ValueError) as error:
            if time.monotonic() - began >= self._seconds:
                raise NotDelivered(f"no answer within {self._seconds:g} s") from error
            raise NotDelivered(_words(error)) from error
        finally:
            end.cancel()
            self._connection = None
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
        connection = self._connection
        sock: socket.socket | None = connection.sock if connection is not None else None
        if sock is not None:
            try:
                # Not TLS's own, which another thread must not touch.
                socket.socket.shutdown(sock, socket.SHUT_RDWR)
            except OSError:
                return  # it is closed already

    def _connect(self) -> HTTPConnection:
        target = self._target
        if target.is_https:
            context = ssl.create_default_context()
            return HTTPSConnection(target.host, target.port, timeout=self._seconds, context=context)
        return HTTPConnection(target.host, target.port, timeout=self._seconds)

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


_SHORTEST_SECRET = 11
"""Shorter ones, such as `/hooks`, are no secrets, and words of other lines."""


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
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return seconds if math.isfinite(seconds) and seconds > 0 else 0.0


def _words(error: BaseException) -> str:
    return logs.redacted(str(error) or type(error).__name__)

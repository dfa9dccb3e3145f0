"""Where the daemon is: its address, the token to show, and the channel options for both.

In this order: the address given, the variable `FINETUNED_ADDRESS`, the socket of the runtime
folder, the endpoint file that the daemon writes there (for platforms where gRPC has no unix
sockets).
"""

from __future__ import annotations

import ipaddress
import json
import os
import socket
import stat
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote_to_bytes

from finetuned._errors import DaemonUnavailable, InvalidArgument, PermissionDenied
from finetuned._paths import RUNTIME_DIR_VARIABLE, Paths, paths
from finetuned._tls import CA_VARIABLE, TLS, TLSContent, read_tls

ADDRESS_VARIABLE = "FINETUNED_ADDRESS"
TOKEN_VARIABLE = "FINETUNED_TOKEN"  # noqa: S105 (a name, not a token)

_PROBE_SECONDS = 1.0
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


@dataclass(frozen=True)
class Endpoint:
    """A place where a daemon serves, or would."""

    target: str
    """What gRPC dials: `unix:/path`, percent-encoded, or `host:port`."""
    token: str = field(default="", repr=False)
    """Sent with every call; empty on a unix socket, where the folder's mode is the wall."""
    tls: TLSContent | None = field(default=None, repr=False)
    """What TLS needs; None: without it, which is for this machine alone."""
    is_default: bool = False
    """Neither argument nor environment named it, so a daemon that we start will serve it."""

    @property
    def is_unix(self) -> bool:
        """Whether this is a unix socket."""
        return self.target.startswith("unix:")

    @property
    def is_here(self) -> bool:
        """Whether the daemon sees this machine's files; a port may be another's, forwarded."""
        return self.is_unix or self.is_default

    @property
    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Metadata of every call.

        Not grpc's call credentials: those refuse a channel without TLS.
        """
        return (("authorization", f"Bearer {self.token}"),) if self.token else ()

    @property
    def options(self) -> Sequence[tuple[str, str | int]]:
        """Channel options, for `grpc` and `grpc.aio` alike."""
        options: list[tuple[str, str | int]] = [
            # A proxy from the environment has no business between us and this machine's daemon.
            ("grpc.enable_http_proxy", 0),
            # gRPC's own backoff grows to two minutes; a local daemon is back within a second.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
            # In truth the time that an attempt to connect may take.
            ("grpc.min_reconnect_backoff_ms", 2000),
            # Else two clients of one process share a connection, and its backoff.
            ("grpc.use_local_subchannel_pool", 1),
            # A page of events may hold long tracebacks.
            ("grpc.max_receive_message_length", 64 * 1024 * 1024),
            # Errors come as metadata: by default gRPC replaces what is over 8 KiB, many long
            # violations, by a remark of its own.
            ("grpc.max_metadata_size", 64 * 1024),
            ("grpc.absolute_max_metadata_size", 256 * 1024),
        ]
        if self.is_unix:
            # grpc would send the percent-encoded path as :authority, which some servers refuse.
            options.append(("grpc.default_authority", "localhost"))
        return options

    def is_listening(self) -> bool:
        """Whether anybody accepts connections there, found out by connecting."""
        try:
            with self._dial():
                return True
        except OSError:
            return False

    def _dial(self) -> socket.socket:
        if self.is_unix:
            connection = socket.socket(socket.AF_UNIX)
            try:
                connection.settimeout(_PROBE_SECONDS)
                connection.connect(unquote_to_bytes(self.target.removeprefix("unix:")))
            except OSError:
                connection.close()
                raise
            return connection
        host, port = _split(self.target)
        return socket.create_connection((host, port), _PROBE_SECONDS)


def find(address: str | None = None, token: str | None = None, tls: TLS | None = None) -> Endpoint:
    """The endpoint to use now. It can change when another daemon takes over.

    Raises:
        InvalidArgument: The address is no address, the token no token, a file for TLS can't be
            used, or another machine was to be reached without TLS.
        DaemonUnavailable: No address is known, as no daemon has written one.
        PermissionDenied: What lies in the daemon's place is another user's.
    """
    address = address or os.environ.get(ADDRESS_VARIABLE)
    if address:
        return _endpoint(address, token, tls, is_default=False)
    here = paths()
    _check_owner(here)
    has_sockets = hasattr(socket, "AF_UNIX")
    # Read once: a daemon that ends takes both files away, one after the other.
    served = [] if has_sockets and here.socket.exists() else _addresses(_content(here.endpoint))
    if served:
        return _endpoint(served[0], token, tls, is_default=True)
    if has_sockets:
        return _endpoint(f"unix:{here.socket}", token, tls, is_default=True)
    raise DaemonUnavailable(f"no daemon has left its address in {here.endpoint}")


def announced() -> dict[str, object]:
    """What the daemon at the default address has left of itself; empty: none has."""
    return _content(paths().endpoint)


def _check_owner(here: Paths) -> None:
    """Whoever else owns the daemon's place could show us a daemon of his own.

    Where the runtime folder lies in a shared one for temporary files, anybody can make it first.
    """
    if not hasattr(os, "getuid"):
        return
    for path in (here.runtime_dir, here.socket, here.endpoint, here.token):
        try:
            status = path.lstat()
        except OSError:
            continue
        is_ours = status.st_uid == os.getuid()
        is_open = (
            path == here.runtime_dir and stat.S_ISDIR(status.st_mode) and (status.st_mode & 0o022)
        )
        if not is_ours or is_open:
            raise PermissionDenied(
                f"{path} {'can be written by others' if is_ours else 'belongs to another user'}, "
                "so whoever serves there may not be your daemon; have it removed, or choose "
                f"another folder by {RUNTIME_DIR_VARIABLE}",
                reason="NOT_YOURS",
            )


def _endpoint(address: str, token: str | None, tls: TLS | None, *, is_default: bool) -> Endpoint:
    if address.startswith("unix:"):
        path = address.removeprefix("unix:")
        # `unix:///path` is the same place; gRPC decodes percent signs, so a path must encode its.
        path = "/" + path.lstrip("/") if path.startswith("//") else path
        encoded = quote(os.fsencode(Path(path).absolute()))
        return Endpoint(f"unix:{encoded}", is_default=is_default)
    if address.startswith("/"):
        return _endpoint(f"unix:{address}", token, tls, is_default=is_default)
    place = _split(address)
    content = read_tls(tls)
    if content is None and not _is_here(place[0]):
        raise InvalidArgument(
            f"{address} is another machine's, and without TLS anybody between could read the token "
            f"and what you send; name the CA of its certificate by {CA_VARIABLE} or `tls`, or "
            "forward the port over ssh",
            reason="TLS_NEEDED",
        )
    return Endpoint(address, _token_for(place, token), content, is_default)


def _token_for(place: tuple[str, int], token: str | None) -> str:
    if token:
        return _checked(token, "the token")
    token = os.environ.get(TOKEN_VARIABLE)
    if token:
        return _checked(token, TOKEN_VARIABLE)
    # The file's token belongs to the daemon of our runtime folder. Whoever else serves on this
    # machine, another user's program perhaps, must not be shown it; after a crash that may be at
    # the very port.
    here = paths()
    content = _content(here.endpoint)
    own = [_split(a) for a in _addresses(content) if not a.startswith("unix:")]
    if place not in own or not _lives(content):
        return ""
    _check_owner(here)
    return _checked(_read(here.token), str(here.token))


def _is_here(host: str) -> bool:
    """Whether nobody but this machine is reached by it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _checked(token: str, source: str) -> str:
    token = token.strip()
    if not token.isascii() or (token and not token.isprintable()):
        raise InvalidArgument(
            f"{source} is no token of a daemon: those are one line of printable ASCII",
            reason="BAD_TOKEN",
        )
    return token


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    is_port = port.isascii() and port.isdecimal() and len(port) <= 5 and 0 < int(port) < 65536
    if not host.isascii() or not host.isprintable() or not host or not is_port:
        raise InvalidArgument(
            f"{address!r} is no address; use unix:/path/of.sock or host:port", reason="BAD_ADDRESS"
        )
    return host.strip("[]"), int(port)


def _content(endpoint_file: Path) -> dict[str, object]:
    """What the daemon has left there; empty where nothing of a daemon's is."""
    try:
        content: object = json.loads(_read(endpoint_file) or "{}")
    except (ValueError, RecursionError):  # written by something else than a daemon
        return {}
    return content if isinstance(content, dict) else {}


def _addresses(content: dict[str, object]) -> list[str]:
    addresses = content.get("addresses")
    if not isinstance(addresses, list):
        return []
    return [a for a in addresses if isinstance(a, str) and a.isprintable()]


def _lives(content: dict[str, object]) -> bool:
    """Whether the daemon that has left this still runs, and as this user."""
    if not hasattr(os, "getuid"):  # elsewhere a signal of 0 would end it
        return True
    here = _read(_BOOT_ID).strip()
    if here and content.get("boot_id", here) not in (here, ""):
        return False
    pid = content.get("pid")
    try:
        os.kill(pid if isinstance(pid, int) and pid > 0 else sys.maxsize, 0)
    except (OSError, OverflowError):  # nobody's, or another user's
        return False
    return True


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""

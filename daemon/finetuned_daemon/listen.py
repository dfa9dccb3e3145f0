"""TCP addresses that the daemon serves on: what they may be."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass


class BadAddress(ValueError):
    """An address that the daemon does not serve on; the message says why."""


@dataclass(frozen=True)
class Listen:
    """One TCP address."""

    host: str
    """As in a URL: an IPv6 address in brackets."""
    port: int
    """0: any that is free."""
    is_loopback: bool
    """Nobody but this machine reaches it."""


def parse_listen(address: str, *, has_tls: bool) -> Listen:
    """Reads `127.0.0.1:PORT`, `[::1]:PORT`, `localhost:PORT` or any other address of the machine.

    Names other than localhost are not taken: what they stand for can change between the check and
    the bind. `0.0.0.0` and `[::]` both stand for every address of the machine, of IPv4 and IPv6.

    Raises:
        BadAddress: It is no address, or needs TLS and has none.
    """
    host, colon, port = address.rpartition(":")
    bare = "127.0.0.1" if host == "localhost" else host
    is_bracketed = bare.startswith("[") and bare.endswith("]")
    bare = bare[1:-1] if is_bracketed else bare
    try:
        ip = ipaddress.ip_address(bare)
    except ValueError:
        ip = None
    if (
        not colon
        or ip is None
        or is_bracketed is not (ip.version == 6)
        or not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535)
    ):
        raise BadAddress(
            f"{address!r} is no IP address with a port, such as 127.0.0.1:7411, [::1]:7411 or "
            "192.168.1.20:7411 (port 0: any that is free)"
        )
    if not ip.is_loopback and not has_tls:
        raise BadAddress(
            f"{address!r} can be reached from other machines, and is served with encryption only: "
            "give --tls-cert and --tls-key as well; or listen on loopback and forward the port "
            "over ssh"
        )
    return Listen(f"[{bare}]" if ip.version == 6 else bare, int(port), ip.is_loopback)


def parse_metrics_listen(address: str) -> Listen:
    """Reads an address that metrics are served on.

    Raises:
        BadAddress: It is none, or is not loopback: there is no token and no encryption.
    """
    listen = parse_listen(address, has_tls=True)
    if not listen.is_loopback:
        raise BadAddress(
            f"{address!r} can be reached from other machines, and metrics have neither a token nor "
            "encryption: serve them on 127.0.0.1:9464, and let an agent on this machine or a "
            "reverse proxy with TLS and a password pass them on"
        )
    return listen

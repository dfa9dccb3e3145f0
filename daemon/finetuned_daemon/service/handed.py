"""What a service manager has handed to this process: a listening socket, and whom to tell.

systemd's protocols, a few lines each: `LISTEN_FDS` (sd_listen_fds) and `NOTIFY_SOCKET` (sd_notify).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import MutableMapping
from dataclasses import dataclass

from finetuned._paths import Paths
from finetuned_daemon.privacy import check_private

_log = logging.getLogger(__name__)

_FIRST_DESCRIPTOR = 3
_LISTEN = ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES")
_NOTIFY = "NOTIFY_SOCKET"


class HandedUnusable(Exception):
    """What was handed can't be served on; the message says why, and what to write instead."""


@dataclass(frozen=True)
class Handed:
    """What there is; all of it is absent where no service manager has started this process."""

    listening: socket.socket | None = None
    """Listens at the socket that clients dial; the service manager has it too, and keeps it."""
    notify: str = ""
    """Address that takes `READY=1` and the like; empty: nobody wants to know."""

    def tell(self, *lines: str) -> None:
        """Tells the service manager, such as `READY=1`, `STATUS=...`, `STOPPING=1`."""
        if not self.notify:
            return
        address = "\0" + self.notify[1:] if self.notify.startswith("@") else self.notify
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as here:
            try:
                here.connect(address)
                here.send("\n".join(lines).encode())
            except OSError as error:
                # It would take us for one that does not start: say why, in the log that it shows.
                _log.warning("the service manager can't be told at %s: %s", self.notify, error)


def take(paths: Paths, environment: MutableMapping[str, str]) -> Handed:
    """Takes what was handed, and leaves no trace of it to processes that are started from here.

    A runner that found them would speak in the daemon's name.

    Args:
        paths: Where clients look for this daemon.
        environment: Of this process; the variables are taken out of it.

    Raises:
        HandedUnusable: A socket was handed that is not the one that clients of this folder dial.
        FolderUnsafe: Others can get at the socket.
    """
    pid, count, _ = (environment.pop(name, "") for name in _LISTEN)
    notify = environment.pop(_NOTIFY, "")
    # Meant for a parent of ours else, which has let them through by mistake.
    is_ours = pid == str(os.getpid()) and count.isdecimal()
    sockets = [_socket(_FIRST_DESCRIPTOR + n) for n in range(int(count))] if is_ours else []
    if not sockets:
        return Handed(None, notify)
    dialled = os.fspath(paths.socket)
    for each in sockets:
        # Never TCP, whose name is no path: what comes by that way shows a token, and what comes by
        # this one need not.
        is_stream = each.type == socket.SOCK_STREAM
        if len(sockets) > 1 or not is_stream or each.getsockname() != dialled:
            raise HandedUnusable(
                f"the service manager listens at {', '.join(str(s.getsockname()) for s in sockets)}"
                f", but clients of {paths.state_dir} dial {dialled}; a socket unit must have "
                f"ListenStream={dialled} and nothing else (TCP is served with --listen)"
            )
    check_private(paths.socket)
    listening = sockets[0]
    listening.setblocking(False)
    return Handed(listening, notify)


def _socket(descriptor: int) -> socket.socket:
    try:
        os.set_inheritable(descriptor, False)
        return socket.socket(fileno=descriptor)
    except OSError as error:
        raise HandedUnusable(
            f"descriptor {descriptor} of LISTEN_FDS is no socket: {error}"
        ) from error

"""Notifications on the desktop of whoever the daemon runs as."""

from __future__ import annotations

import contextlib
import importlib
import os
import socket
import sys
from pathlib import Path
from typing import Any

from finetuned_daemon.notify.channel import Channel, NotDelivered
from finetuned_daemon.notify.command import Program, foreign_environment
from finetuned_daemon.notify.kinds import KINDS
from finetuned_daemon.notify.message import Notification

_NAME = "org.freedesktop.Notifications"
_PATH = "/org/freedesktop/Notifications"
_TROUBLES = (OSError, EOFError, ImportError, LookupError, RuntimeError, ValueError)
"""What a bus that is not there, not whole, or not ours makes of a call."""
_URGENCY = {False: 1, True: 2}
_URGENT = {kind.type for kind in KINDS if kind.is_urgent}
_DEFAULT_EXPIRY = -1


def program(platform: str, title: str, text: str) -> tuple[list[str], bytes] | None:
    """The command line that shows it, and its stdin; None: there the session bus does.

    Nothing of the texts is ever read as a program or as an option.
    """
    if platform == "darwin":
        lines = (
            "on run argv",
            "display notification (item 2 of argv) with title (item 1 of argv)",
            "end run",
        )
        script = [word for line in lines for word in ("-e", line)]
        return ["osascript", *script, "--", title, text], b""
    if platform == "win32":
        return ["msg", "*"], f"{title}\n{text}".encode()  # an argument may begin with a slash
    return None


class Desktop(Channel):
    """Linux: whoever has the name `org.freedesktop.Notifications` on the session bus."""

    def __init__(self, *, seconds: float, umask: int) -> None:
        """Takes the time that an answer may take."""
        self.id = self.label = "desktop"
        self._seconds = seconds
        self._program = Program(seconds, umask)
        self._bus: Any = None

    def send(self, notification: Notification) -> str:
        """Shows it."""
        title, text = notification.data["title"], notification.data["sentence"]
        found = program(sys.platform, title, text)
        if found is not None:
            self._program.run(*found, foreign_environment())
            return "shown"
        is_urgent = notification.content["type"] in _URGENT
        try:
            return self._show(title, text, is_urgent=is_urgent)
        except _TROUBLES as error:
            raise NotDelivered(f"no desktop takes it ({_words(error)})") from error

    def abort(self) -> None:
        """Ends a call that waits."""
        self._program.abort()
        if self._bus is not None:
            with contextlib.suppress(OSError):  # it is closed already
                self._bus.sock.shutdown(socket.SHUT_RDWR)

    def _show(self, title: str, text: str, *, is_urgent: bool) -> str:
        # Neither there nor needed on other systems, and without types.
        jeepney: Any = importlib.import_module("jeepney")
        blocking: Any = importlib.import_module("jeepney.io.blocking")
        self._bus = blocking.open_dbus_connection(_session_bus(), auth_timeout=self._seconds)
        try:
            service = jeepney.DBusAddress(_PATH, bus_name=_NAME, interface=_NAME)
            hints = {"urgency": ("y", _URGENCY[is_urgent]), "desktop-entry": ("s", "finetuned")}
            # Servers may read the text as markup.
            escaped = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
            actions = list[str]()
            content = ("finetuned", 0, "", title, escaped, actions, hints, _DEFAULT_EXPIRY)
            call = jeepney.new_method_call(service, "Notify", "susssasa{sv}i", content)
            reply = self._bus.send_and_get_reply(call, timeout=self._seconds)
            if reply.header.message_type is jeepney.MessageType.error:
                raise ConnectionError(str(reply.header.fields[jeepney.HeaderFields.error_name]))
        finally:
            bus, self._bus = self._bus, None
            bus.close()
        return "shown"


def _session_bus() -> str:
    """Its address: that of the environment, else where systemd puts it once somebody logs in."""
    given = os.environ.get("DBUS_SESSION_BUS_ADDRESS", "")
    if given:
        return given
    path = Path(f"/run/user/{os.getuid()}/bus")
    if not path.exists():
        raise ConnectionError("there is no session bus")
    return f"unix:path={path}"


def _words(error: BaseException) -> str:
    return str(error) or type(error).__name__

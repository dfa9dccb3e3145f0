"""Before the machine sleeps or shuts down, every run saves: systemd's logind is asked to wait.

logind gives a lock that delays both for a few seconds (`InhibitDelayMaxSec`, 5 by default), and
says on D-Bus when it is about to. Without a system bus or logind nothing of this is done.

A thread of its own speaks to the bus: it blocks as it likes, and never holds up the daemon.
"""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import os
import socket
import sys
import threading
from collections import deque
from collections.abc import Callable, Coroutine
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

_NAME = "org.freedesktop.login1"
_PATH = "/org/freedesktop/login1"
_MANAGER = "org.freedesktop.login1.Manager"
_BUS = "org.freedesktop.DBus"
_OWNER_CHANGED = "NameOwnerChanged"
_SIGNALS = ("PrepareForSleep", "PrepareForShutdown")
_BUS_VARIABLE = "DBUS_SYSTEM_BUS_ADDRESS"
_BUS_SOCKET = Path("/var/run/dbus/system_bus_socket")
"""Where it is without that variable. Where it is not, what speaks to it is not imported."""
_CALL_SECONDS = 5.0
_AGAIN_SECONDS = 60.0
_USUAL_DELAY_SECONDS = 5.0
_SHARE = 0.8
"""Of logind's delay for the runs: to hear of it and to answer takes a moment."""
_PATIENCE = 1.1
_TROUBLES = (OSError, EOFError, ImportError, LookupError, RuntimeError, ValueError)
"""What a bus that is not there, not whole, or not ours makes of a call."""


class Power:
    """Holds the lock, and lets it go when all runs have saved."""

    def __init__(self, save: Callable[[float], Coroutine[Any, Any, None]]) -> None:
        """Asks for nothing yet.

        Args:
            save: Lets every run save, and takes no longer than so many seconds.
        """
        self._save = save
        self._closed = threading.Event()
        self._logind: _Logind | None = None

    def start(self) -> None:
        """Asks for the lock, on Linux; to be called in the loop that runs are watched in."""
        if sys.platform == "linux":
            loop = asyncio.get_running_loop()
            threading.Thread(target=self._run, args=(loop,), name="power", daemon=True).start()

    def close(self) -> None:
        """Lets the lock go."""
        self._closed.set()
        if self._logind is not None:
            self._logind.hang_up()

    def _run(self, loop: asyncio.AbstractEventLoop) -> None:
        had_lock = False
        while not self._closed.is_set():
            try:
                with _Logind() as self._logind:
                    self._logind.lock()
                    if not had_lock:
                        _log.info("logind waits %g s for runs to save", self._logind.delay)
                    had_lock = True
                    self._serve(self._logind, loop)
            except _TROUBLES as error:
                if self._closed.is_set():
                    return
                if not had_lock:
                    _log.info("runs do not save before a suspend: no logind (%s)", error)
                    return
                _log.debug("logind can't be heard: %s", error)
                self._closed.wait(_AGAIN_SECONDS)

    def _serve(self, logind: _Logind, loop: asyncio.AbstractEventLoop) -> None:
        """Saves before each sleep; returns when there is another logind."""
        while (is_about_to := logind.hear()) is not None:
            if is_about_to:
                self._save_all(loop, logind.delay * _SHARE)
                logind.unlock()
            else:
                logind.lock()

    def _save_all(self, loop: asyncio.AbstractEventLoop, seconds: float) -> None:
        _log.info("the machine is about to sleep or to shut down: runs save")
        future = asyncio.run_coroutine_threadsafe(self._save(seconds), loop)
        try:
            error = future.exception(seconds * _PATIENCE)
        except FutureTimeoutError:
            _log.warning("the daemon was too busy to let its runs save in time")
        else:
            if error is not None:  # the lock must not be held for it
                _log.error("runs can't be saved before the machine sleeps", exc_info=error)


class _Logind:
    """A connection to the system bus, and logind on it."""

    def __init__(self) -> None:
        if not os.environ.get(_BUS_VARIABLE) and not _BUS_SOCKET.exists():
            raise ConnectionError("there is no system bus")
        # Neither there nor needed on other systems, and without types.
        self._jeepney: Any = importlib.import_module("jeepney")
        blocking: Any = importlib.import_module("jeepney.io.blocking")
        # Its own first call has no deadline, but this thread may wait.
        self._bus: Any = blocking.open_dbus_connection("SYSTEM", enable_fds=True, auth_timeout=2.0)
        self._manager = self._jeepney.DBusAddress(_PATH, bus_name=_NAME, interface=_MANAGER)
        self._heard = deque[Any]()
        self._descriptor: Any = None
        self.delay = _USUAL_DELAY_SECONDS
        """How long it waits, in seconds."""

    def __enter__(self) -> _Logind:
        try:
            dbus, rule = self._jeepney.message_bus, self._jeepney.MatchRule
            changed = rule(type="signal", sender=_BUS, interface=_BUS, member=_OWNER_CHANGED)
            changed.add_arg_condition(0, _NAME)
            self._call(dbus.AddMatch(changed))
            self._call(dbus.AddMatch(rule(type="signal", interface=_MANAGER, path=_PATH)))
            # The bus passes on what anybody sends to us alone: its sender must be logind.
            owner = self._call(dbus.GetNameOwner(_NAME))[0]
            told = rule(type="signal", sender=owner, interface=_MANAGER, path=_PATH)
            for wanted in (changed, told):
                self._bus.filter(wanted, queue=self._heard)
            properties = self._jeepney.Properties(self._manager)
            microseconds: int = self._call(properties.get("InhibitDelayMaxUSec"))[0][1]
            self.delay = microseconds / 1e6 or _USUAL_DELAY_SECONDS
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.unlock()
        self._bus.close()

    def hang_up(self) -> None:
        """Ends a `hear` in another thread."""
        with contextlib.suppress(OSError):  # it is closed already
            self._bus.sock.shutdown(socket.SHUT_RDWR)

    def lock(self) -> None:
        """Takes the lock, if it is not held."""
        if self._descriptor is None:
            reason = ("sleep:shutdown", "finetuned", "Training runs save a checkpoint", "delay")
            call = self._jeepney.new_method_call(self._manager, "Inhibit", "ssss", reason)
            self._descriptor = self._call(call)[0]

    def unlock(self) -> None:
        """Lets the lock go, if it is held."""
        if self._descriptor is not None:
            self._descriptor.close()
            self._descriptor = None

    def hear(self) -> bool | None:
        """Waits for the next word.

        Returns:
            True: the machine is about to sleep or to shut down. False: it woke up. None: this is
            not the logind any more that the lock is from.
        """
        while True:
            message = self._bus.recv_until_filtered(self._heard)
            member: str = message.header.fields[self._jeepney.HeaderFields.member]
            if member in _SIGNALS:
                return bool(message.body[0])
            if member == _OWNER_CHANGED and message.body[2]:
                return None

    def _call(self, message: Any) -> Any:
        wrappers: Any = importlib.import_module("jeepney.wrappers")
        reply = self._bus.send_and_get_reply(message, timeout=_CALL_SECONDS)
        try:
            return wrappers.unwrap_msg(reply)
        except self._jeepney.DBusErrorResponse as error:
            raise ConnectionError(str(error)) from error

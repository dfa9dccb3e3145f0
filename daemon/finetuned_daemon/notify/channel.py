"""What every way of a notification has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod

from finetuned_daemon import logs
from finetuned_daemon.notify.message import Notification
from finetuned_daemon.texts import printable


class NotDelivered(Exception):
    """It did not arrive; the message says why in one line.

    Whatever it was made of, no secret that is known and nothing that steers a terminal is in it.
    """

    def __init__(
        self, message: str, *, is_final: bool = False, not_before_seconds: float = 0.0
    ) -> None:
        """Says why.

        Args:
            message: A few words.
            is_final: There is no use in another attempt.
            not_before_seconds: The receiver wants to be left alone for so long.
        """
        super().__init__(printable(" ".join(logs.redacted(message).split())))
        self.is_final = is_final
        self.not_before_seconds = not_before_seconds


class Channel(ABC):
    """One way. Sends in a thread of its own, one notification at a time."""

    id: str
    """Tells it from the others, also after a restart; no secret is in it."""
    label: str
    """What people call it; no secret is in it."""

    @abstractmethod
    def send(self, notification: Notification) -> str:
        """Delivers it, in a bounded time; returns a word on how.

        Raises:
            NotDelivered: It did not arrive, or nobody knows.
        """

    @abstractmethod
    def abort(self) -> None:
        """Ends a `send` of another thread soon; the daemon stops."""

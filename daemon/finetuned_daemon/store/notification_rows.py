"""Notifications and their deliveries as rows."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetuned_daemon.store.database import Database


class DeliveryState(StrEnum):
    """How far a notification has come on one of its ways."""

    PENDING = "PENDING"
    DELIVERED = "DELIVERED"
    GIVEN_UP = "GIVEN_UP"


@dataclass(frozen=True)
class Delivery:
    """A notification on one of its ways. Times as in `Task`."""

    notification: int
    """Row of the notification."""
    notification_id: str
    body: str
    time: int
    """When what it tells of happened."""
    channel: str
    state: DeliveryState
    attempts: int
    next_time: int
    done_time: int
    error: str
    """Why the last attempt failed."""


class NotificationRows:
    """Reads and writes both."""

    def __init__(self, database: Database, most: int = 0) -> None:
        """Takes how many notifications are kept; 0: any number."""
        self._database = database
        self._most = most

    def add(
        self,
        connection: sqlite3.Connection,
        *,
        notification_id: str,
        time: int,
        task_key: int,
        run: int,
        cause: str,
        body: str,
        channels: Sequence[str],
    ) -> None:
        """Writes one for these ways; the oldest goes where there are too many."""
        cursor = connection.execute(
            "INSERT INTO notifications (notification_id, time, task_key, run, cause, body) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (notification_id, time, task_key, run, cause, body),
        )
        key = int(cursor.lastrowid or 0)
        connection.executemany(
            "INSERT INTO deliveries VALUES (?, ?, 'PENDING', 0, 0, 0, '')",
            [(key, channel) for channel in channels],
        )
        if self._most:
            connection.execute("DELETE FROM notifications WHERE key <= ?", (key - self._most,))

    def was_told(
        self, connection: sqlite3.Connection, task_key: int, run: int, cause: str, since: int
    ) -> bool:
        """Whether there is one of this cause for a run that is not older than `since`."""
        row = connection.execute(
            "SELECT 1 FROM notifications WHERE task_key = ? AND run = ? AND cause = ? "
            "AND time >= ?",
            (task_key, run, cause, since),
        ).fetchone()
        return row is not None

    def next_due(self, channel: str, latest: int) -> Delivery | None:
        """The pending one of a way that is due first.

        One that would be due after `latest` is due at once: the clock was set back since.
        """
        row = self._database.query_one(
            f"{_SELECT} WHERE state = 'PENDING' AND channel = ? "
            "ORDER BY CASE WHEN next_time > ? THEN 0 ELSE next_time END, notification LIMIT 1",
            channel,
            latest,
        )
        return None if row is None else _delivery(row)

    def save(self, delivery: Delivery) -> None:
        """Writes how far it has come; one that is gone stays gone."""
        with self._database.transaction(durable=False) as connection:
            connection.execute(
                "UPDATE deliveries SET state = ?, attempts = ?, next_time = ?, done_time = ?, "
                "error = ? WHERE notification = ? AND channel = ?",
                (
                    delivery.state.value,
                    delivery.attempts,
                    delivery.next_time,
                    delivery.done_time,
                    delivery.error,
                    delivery.notification,
                    delivery.channel,
                ),
            )

    def give_up_others(self, channels: Sequence[str], before: int, error: str) -> int:
        """Gives up what is pending on other ways, and older than `before`; returns how many."""
        others = f"channel NOT IN ({', '.join('?' * len(channels))})"
        with self._database.transaction(durable=False) as connection:
            cursor = connection.execute(
                f"UPDATE deliveries SET state = 'GIVEN_UP', error = ? "  # noqa: S608 - no value
                f"WHERE state = 'PENDING' AND {others} AND notification IN "
                "(SELECT key FROM notifications WHERE time < ?)",
                (error, *channels, before),
            )
        return cursor.rowcount

    def count(self, state: DeliveryState) -> int:
        """How many deliveries are in a state."""
        row = self._database.query_one(
            "SELECT count(*) AS number FROM deliveries WHERE state = ?", state.value
        )
        return int(row["number"]) if row else 0


def newest(connection: sqlite3.Connection, limit: int, *, undelivered: bool) -> list[Delivery]:
    """The newest deliveries of a database, newest first; `undelivered`: only those."""
    where = "WHERE state <> 'DELIVERED' " if undelivered else ""
    rows = connection.execute(
        f"{_SELECT} {where}ORDER BY notification DESC, channel LIMIT ?", (limit,)
    ).fetchall()
    return [_delivery(row) for row in rows]


_SELECT = (
    "SELECT deliveries.*, notification_id, body, time FROM deliveries "
    "JOIN notifications ON notifications.key = notification"
)


def _delivery(row: sqlite3.Row) -> Delivery:
    return Delivery(
        notification=row["notification"],
        notification_id=row["notification_id"],
        body=row["body"],
        time=row["time"],
        channel=row["channel"],
        state=DeliveryState(row["state"]),
        attempts=row["attempts"],
        next_time=row["next_time"],
        done_time=row["done_time"],
        error=row["error"],
    )

"""From an event to its receivers: at least once, in order until one fails, in nobody's way.

A notification is written in the transaction of its event, so that no kill comes between. Each way
has a worker of its own on the event loop, which reads one row at a time and sends it in a thread
that the end of the process ends: a receiver that hangs holds up its own way alone.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import sqlite3
import threading
from collections.abc import Sequence
from dataclasses import replace

from finetuned._paths import Paths
from finetuned.v1 import event_pb2, task_pb2
from finetuned_daemon.errors import DiskFull
from finetuned_daemon.notify import message
from finetuned_daemon.notify.causes import cause_of, is_candidate
from finetuned_daemon.notify.channel import Channel, NotDelivered
from finetuned_daemon.notify.kinds import NEEDS_ATTENTION
from finetuned_daemon.notify.message import Notification
from finetuned_daemon.notify.settings import NotifySettings
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.notification_rows import Delivery, DeliveryState, NotificationRows
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import now_us

_log = logging.getLogger(__name__)

_GROWTH = 3.0
_LONGEST_WAIT_SECONDS = 3600.0
_JITTER = 0.2
_CLOSE_SECONDS = 1.0
"""How long an attempt that is under way is waited for when the daemon stops."""
_SAME_SECONDS = 3600.0
"""A run that needs attention for the same reason again within this time is not told of again."""
_FULL_DISK_SECONDS = 5.0


class Notifier:
    """Writes notifications and sends them. Used on the event loop's thread alone."""

    def __init__(
        self,
        settings: NotifySettings,
        database: Database,
        records: Records,
        paths: Paths,
        *,
        most: int = 0,
        umask: int = 0o022,
    ) -> None:
        """Sends nothing yet.

        Args:
            settings: What is sent, and how.
            database: Of tasks and notifications.
            records: Tasks and runs.
            paths: The daemon's folders, for commands.
            most: Notifications that are kept; 0: any number.
            umask: Of commands.
        """
        self._settings = settings
        self._rows = NotificationRows(database, most)
        self._database = database
        self._records = records
        self._channels = channels(settings, paths, umask)
        self._bells = {channel.id: asyncio.Event() for channel in self._channels}
        self._workers = list[asyncio.Task[None]]()
        self._sending = set[asyncio.Future[str]]()

    @property
    def pending(self) -> int:
        """Deliveries that are still to be made."""
        return self._rows.count(DeliveryState.PENDING)

    @property
    def given_up(self) -> int:
        """Deliveries that were given up, of the notifications that are kept."""
        return self._rows.count(DeliveryState.GIVEN_UP)

    def note(
        self, connection: sqlite3.Connection, task_key: int, events: Sequence[event_pb2.Event]
    ) -> None:
        """Writes what somebody is to be told of, within the transaction that writes the events."""
        if not self._channels:
            return
        for event in events:
            if is_candidate(event):
                self._note(connection, task_key, event, events)

    def start(self) -> None:
        """Sends from now on, first what an earlier daemon has left."""
        ids = [channel.id for channel in self._channels]
        before = now_us() - self._give_up_us
        try:
            given_up = self._rows.give_up_others(ids, before, "its way is not given any more")
        except DiskFull as error:
            _log.warning("%s", error)
        else:
            if given_up:
                _log.warning("%d notifications are given up: their ways are gone", given_up)
        loop = asyncio.get_running_loop()
        for channel in self._channels:
            self._workers.append(loop.create_task(self._work(channel)))
        if self._channels:
            labels = ", ".join(channel.label for channel in self._channels)
            _log.info("notifications: %s", labels)

    async def close(self) -> None:
        """Ends it; what was not delivered is sent after the next start."""
        if self._sending:
            await asyncio.wait(self._sending, timeout=_CLOSE_SECONDS)
            await asyncio.sleep(0)  # what has arrived is recorded
        for worker in self._workers:
            worker.cancel()
        await asyncio.gather(*self._workers, return_exceptions=True)
        for channel in self._channels:
            channel.abort()

    @property
    def _give_up_us(self) -> int:
        return round(self._settings.give_up_hours * 3600e6)

    def _note(
        self,
        connection: sqlite3.Connection,
        task_key: int,
        event: event_pb2.Event,
        events: Sequence[event_pb2.Event],
    ) -> None:
        task, run = self._records.task_by_key(task_key), self._records.run(task_key, event.run)
        cause = None if run is None else cause_of(event, run)
        if task is None or run is None or cause is None:
            return
        if cause.kind.name not in self._settings.kinds:
            return
        time = event.time.ToMicroseconds()
        name = f"{cause.kind.name}:{cause.reason}"
        since = time - round(_SAME_SECONDS * 1e6)
        if cause.kind is NEEDS_ATTENTION and self._rows.was_told(
            connection, task_key, run.number, name, since
        ):
            return
        changed = event.WhichOneof("payload") == "state_change"
        state = task_pb2.TaskState.Name(event.state_change.new_state) if changed else run.state
        made = message.of_run(
            cause,
            time,
            task,
            run,
            state=str(state).removeprefix("TASK_STATE_"),
            output_path=next((e.result.output_path for e in events if e.HasField("result")), ""),
            language=self._settings.language,
        )
        self._rows.add(
            connection,
            notification_id=made.id,
            time=time,
            task_key=task_key,
            run=run.number,
            cause=name,
            body=made.body,
            channels=[channel.id for channel in self._channels],
        )
        for bell in self._bells.values():
            self._database.after_commit(bell.set)

    # --- sending

    async def _work(self, channel: Channel) -> None:
        bell, is_failing = self._bells[channel.id], False
        while True:
            bell.clear()
            now = now_us()
            latest = now + round((1 + _JITTER) * _LONGEST_WAIT_SECONDS * 1e6)
            delivery = self._rows.next_due(channel.id, latest)
            wait = None
            if delivery is not None and now < delivery.next_time <= latest:
                wait = (delivery.next_time - now) / 1e6
            if delivery is None or wait is not None:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait):  # `wait_for` may swallow a cancel
                        await bell.wait()
                continue
            result = await self._attempt(channel, delivery)
            if result.state is DeliveryState.DELIVERED and is_failing:
                _log.info("notifications arrive again: %s", channel.label)
            elif result.state is DeliveryState.GIVEN_UP:
                _log.error(
                    "notification %s is given up after %d attempts: %s: %s",
                    *(result.notification_id, result.attempts, channel.label, result.error),
                )
            elif result.state is DeliveryState.PENDING and not is_failing:
                # Once, however often: `finetuned notify log` has each.
                _log.warning("notifications don't arrive: %s: %s", channel.label, result.error)
            is_failing = result.state is not DeliveryState.DELIVERED
            await self._record(result)

    async def _attempt(self, channel: Channel, delivery: Delivery) -> Delivery:
        """Sends one; returns how far it has come."""
        delivery = replace(delivery, attempts=delivery.attempts + 1)
        future = _in_thread(channel, Notification(delivery.notification_id, delivery.body))
        self._sending.add(future)
        try:
            await asyncio.shield(future)
        except NotDelivered as error:
            return self._failed(delivery, error)
        finally:
            self._sending.discard(future)
        return replace(delivery, state=DeliveryState.DELIVERED, done_time=now_us(), error="")

    def _failed(self, delivery: Delivery, error: NotDelivered) -> Delivery:
        now = now_us()
        if error.is_final or now - delivery.time >= self._give_up_us:
            state = DeliveryState.GIVEN_UP
            return replace(delivery, state=state, done_time=now, error=str(error))
        wait = self._settings.retry_seconds * _GROWTH ** min(delivery.attempts - 1, 20)
        wait = min(max(wait, error.not_before_seconds), _LONGEST_WAIT_SECONDS)
        wait *= random.uniform(1 - _JITTER, 1 + _JITTER)  # noqa: S311 - no secret
        return replace(delivery, next_time=now + round(wait * 1e6), error=str(error))

    async def _record(self, delivery: Delivery) -> None:
        """Writes it, as soon as the disk takes it: what has arrived is not sent again meanwhile."""
        while True:
            try:
                self._rows.save(delivery)
            except DiskFull as error:
                _log.warning("%s", error)
                await asyncio.sleep(_FULL_DISK_SECONDS)
            else:
                return


def channels(settings: NotifySettings, paths: Paths, umask: int) -> list[Channel]:
    """Every way that settings give."""
    if not (settings.command or settings.desktop or settings.webhooks):
        return []
    # Most daemons tell nobody, and start sooner without.
    from finetuned_daemon.notify.command import Command
    from finetuned_daemon.notify.desktop import Desktop
    from finetuned_daemon.notify.webhook import Webhook

    found = list[Channel]()
    seconds = settings.timeout_seconds
    if settings.command:
        found.append(Command(settings.command, paths, seconds=seconds, umask=umask))
    if settings.desktop:
        found.append(Desktop(seconds=seconds, umask=umask))
    found += [Webhook(t, settings.secrets, seconds=seconds) for t in settings.webhooks]
    return found


def _in_thread(channel: Channel, notification: Notification) -> asyncio.Future[str]:
    """Sends in a thread that the end of the process ends: a daemon that stops waits for none."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[str] = loop.create_future()
    # A daemon that stops does not wait for it, and Python would remark that nobody has looked.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())

    def tell(how: str | None, error: NotDelivered | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(how or "")

    def work() -> None:
        how, failure = None, None
        try:
            how = channel.send(notification)
        except NotDelivered as error:
            failure = error
        except Exception as error:  # noqa: BLE001 - a mistake of ours must not end this way for good
            _log.exception("a notification can't be sent: %s", channel.label)
            failure = NotDelivered(f"{type(error).__name__}: {error}")
        with contextlib.suppress(RuntimeError):  # the daemon has ended meanwhile
            loop.call_soon_threadsafe(tell, how, failure)

    threading.Thread(target=work, name=f"notify-{channel.id}", daemon=True).start()
    return future

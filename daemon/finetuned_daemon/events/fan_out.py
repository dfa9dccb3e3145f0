"""Spreads the events of watched tasks: encoded once, and read once, for however many watch.

A watcher holds a cursor. What it lacks it takes from the newest events of its task, which lie in
memory for as long as somebody watches, else from the log. The messages are ready bytes, and
watchers at the same place are sent the same ones.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import OrderedDict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from itertools import islice, takewhile

from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.store.event_rows import EventRows

PAGE = 256
"""Events read from the log at once, at most."""

_PAGE_BYTES = BY_NAME["watch_page_bytes"].default
"""Of one page, and of the newest events of a task; one event at least."""

_KEPT_BYTES = BY_NAME["watch_kept_bytes"].default // 2
"""Of the newest events of all tasks, and of ready messages, each."""

_PAUSE_SECONDS = 50e-6
"""What a message to one watcher may cost: twice what it does on a core of 2020. So many watchers
that wait, so much time from one waking of a task's watchers to the next: they take at most about
half a core, and what has come meanwhile comes in one message."""
_LONGEST_PAUSE_SECONDS = 0.05

_AT_ONCE = 32
"""Watchers that are being sent something; others wait for one of them to be done. Whatever calls
come meanwhile stand behind these few, not behind a thousand."""
_SLOW_SECONDS = 0.02
"""One that takes longer does not read, and the next has its turn."""

# Of WatchTaskResponse and EventBatch: field numbers with the wire type of a message.
_EVENT = b"\x12"
_EVENTS = b"\x22"
_IN_BATCH = b"\x0a"


class FanOut:
    """The watchers of all tasks. Used on the event loop's thread alone."""

    def __init__(
        self,
        rows: EventRows,
        quiet_seconds: float,
        check_kept: Callable[[int, int], None],
    ) -> None:
        """Takes the log.

        Args:
            rows: The log.
            quiet_seconds: After so long without an event, each watcher is woken all the same.
            check_kept: Raises where events behind a cursor are gone: the cursor, and the oldest
                that is kept.
        """
        self.rows = rows
        self.check_kept = check_kept
        self._quiet_seconds = quiet_seconds
        self._feeds = dict[int, Feed]()
        # All wait equally long, so that they stand in the order of their deadlines.
        self._sleepers = dict[asyncio.Future[None], tuple[float, Follower]]()
        self._woken = deque[tuple[asyncio.Future[None], Follower]]()
        self._busy = dict[Follower, float]()
        """Those that are being sent something, in the order of the times since which they are."""
        self._timer: asyncio.TimerHandle | None = None
        self._slow_timer: asyncio.TimerHandle | None = None
        self._kept = OrderedDict[tuple[int, int, int], tuple[int, bytes]]()
        self._kept_size = 0
        self._newest_size = 0

    @contextlib.contextmanager
    def follow(self, task_key: int, after_seq: int, *, in_batches: bool) -> Generator[Follower]:
        """One more watcher of a task, within this."""
        feed = self._feeds.get(task_key)
        if feed is None:
            feed = self._feeds[task_key] = Feed(task_key, self.rows.last_seq(task_key))
        feed.watchers += 1
        follower = Follower(self, feed, after_seq, in_batches=in_batches)
        try:
            yield follower
        finally:
            self.done(follower)
            feed.watchers -= 1
            if not feed.watchers:
                del self._feeds[task_key]
                self._newest_size -= feed.size
            if not self._feeds:
                self._kept.clear()
                self._kept_size = 0

    def is_watched(self, task_key: int) -> bool:
        """Whether anybody watches a task."""
        return task_key in self._feeds

    def held_bytes(self) -> int:
        """Bytes of events and messages in memory for all watchers together."""
        return self._kept_size + self._newest_size

    def appended(self, task_key: int, first_seq: int, bodies: Iterable[bytes]) -> None:
        """Serialized events were committed behind those that there were."""
        feed = self._feeds.get(task_key)
        if feed is None:
            return
        self._newest_size -= feed.size
        feed.append(first_seq, bodies)
        self._newest_size += feed.size
        if self._newest_size > _KEPT_BYTES:  # hundreds of tasks write long lines
            for other in self._feeds.values():
                if other is not feed:
                    other.clear()
            self._newest_size = feed.size
        self._ring(feed)

    def look(self, task_key: int) -> None:
        """Lets the watchers of a task see whether it is still there."""
        feed = self._feeds.get(task_key)
        if feed is not None:
            if self.rows.last_seq(task_key) is None:
                feed.is_gone = True
            self._wake(feed)

    def wake_all(self) -> None:
        """Wakes every watcher, such as to tell it that the daemon stops."""
        for feed in self._feeds.values():
            self._wake(feed)

    # --- waiting

    def pause(self, feed: Feed) -> float:
        """Seconds until a feed may be rung again; not above 0: now."""
        return feed.quiet_until - asyncio.get_running_loop().time()

    async def sleep(self, follower: Follower) -> None:
        """Returns once its feed is rung, or it was quiet for long, and it is its turn."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        sleepers = follower.feed.sleepers
        self._sleepers[future] = (loop.time() + self._quiet_seconds, follower)
        sleepers[future] = follower
        if self._timer is None:
            self._timer = loop.call_later(self._quiet_seconds, self._look_at_the_clock)
        try:
            await future
        finally:
            self._sleepers.pop(future, None)
            sleepers.pop(future, None)

    async def turn(self, follower: Follower) -> None:
        """Returns once it is its turn."""
        loop = asyncio.get_running_loop()
        if len(self._busy) < _AT_ONCE and not self._woken:
            self._busy[follower] = loop.time()
        else:
            future = loop.create_future()
            self._woken.append((future, follower))
            self._go_on()
            await future

    def done(self, follower: Follower) -> None:
        """What it was given is sent."""
        if self._busy.pop(follower, None) is not None:
            self._go_on()

    def ring_later(self, feed: Feed, seconds: float) -> None:
        """Rings a feed after a pause, once."""
        if not feed.is_due:
            feed.is_due = True
            asyncio.get_running_loop().call_later(seconds, self._wake, feed)

    def _ring(self, feed: Feed) -> None:
        if not feed.sleepers or feed.is_due:
            return
        pause = self.pause(feed)
        if pause > 0:
            self.ring_later(feed, pause)
        else:
            self._wake(feed)

    def _wake(self, feed: Feed) -> None:
        feed.is_due = False
        # A few watchers of many tasks load the daemon as many of one do.
        pause = min(len(self._sleepers) * _PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS)
        feed.quiet_until = asyncio.get_running_loop().time() + pause
        for future in feed.sleepers:
            del self._sleepers[future]
        self._woken.extend(feed.sleepers.items())
        feed.sleepers.clear()
        self._go_on()

    def _go_on(self) -> None:
        """Gives turns away, as far as there are any."""
        if not self._woken:
            return
        loop = asyncio.get_running_loop()
        now = loop.time()
        while self._woken and len(self._busy) < _AT_ONCE:
            future, follower = self._woken.popleft()
            if not future.done():  # it was cancelled
                self._busy[follower] = now
                future.set_result(None)
        if self._woken and self._slow_timer is None:
            self._slow_timer = loop.call_later(_SLOW_SECONDS, self._pass_over)

    def _pass_over(self) -> None:
        """Takes the turn from those that are slow."""
        self._slow_timer = None
        old = asyncio.get_running_loop().time() - _SLOW_SECONDS / 2
        for follower in list(takewhile(lambda f: self._busy[f] <= old, self._busy)):
            del self._busy[follower]
        self._go_on()

    def _look_at_the_clock(self) -> None:
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._timer = None
        late = list(takewhile(lambda one: one[1][0] <= now, self._sleepers.items()))
        for future, (_, follower) in late:
            del self._sleepers[future], follower.feed.sleepers[future]
            self._woken.append((future, follower))
        if self._sleepers:
            deadline, _ = next(iter(self._sleepers.values()))
            self._timer = loop.call_at(deadline, self._look_at_the_clock)
        self._go_on()

    # --- what is read once for all

    def batch(self, feed: Feed, after_seq: int) -> tuple[int, bytes]:
        """The message of what follows in a task's log, with the last `seq` in it; empty: nothing.

        Raises:
            CursorOutOfRange: What follows was deleted.
        """
        key = (feed.task_key, after_seq, feed.last_seq)
        kept = self._kept.get(key)
        if kept is None:
            events = feed.after(after_seq) or self.read(feed, after_seq)
            if not events:
                return after_seq, b""
            body = b"".join(events)
            kept = (after_seq + len(events), b"".join((_EVENTS, _varint(len(body)), body)))
            self._keep(key, kept)
        return kept

    def singly(self, feed: Feed, after_seq: int) -> list[bytes]:
        """The same as a message each.

        Raises:
            CursorOutOfRange: What follows was deleted.
        """
        events = feed.after(after_seq) or self.read(feed, after_seq)
        return [_EVENT + event[1:] for event in events]

    def read(self, feed: Feed, after_seq: int) -> list[bytes]:
        """A page from the log, as it stands in a batch.

        Raises:
            CursorOutOfRange: What follows was deleted.
        """
        if feed.is_gone:
            return []
        last, bodies = self.rows.page(feed.task_key, after_seq, PAGE, _PAGE_BYTES)
        if last != after_seq + len(bodies) or not bodies:
            # Deleted while this watcher did not read; some may have been left.
            self.check_kept(after_seq, self.rows.first_seq(feed.task_key))
            return []
        heads, most = _HEADS, len(_HEADS)  # what costs of a long log is what is done for each
        return [heads[n] + b if (n := len(b)) < most else _framed(b) for b in bodies]

    def _keep(self, key: tuple[int, int, int], kept: tuple[int, bytes]) -> None:
        self._kept[key] = kept
        self._kept_size += len(kept[1])
        while self._kept_size > _KEPT_BYTES:
            _, (_, old) = self._kept.popitem(last=False)
            self._kept_size -= len(old)


class Feed:
    """The newest events of a task that is watched."""

    def __init__(self, task_key: int, last_seq: int | None) -> None:
        self.task_key = task_key
        self.last_seq = last_seq or 0
        self.is_gone = last_seq is None
        """Whether the task was deleted."""
        self.watchers = 0
        self.sleepers = dict[asyncio.Future[None], Follower]()
        """In the order in which they came, which is that in which they are woken."""
        self.quiet_until = 0.0
        """By the event loop's clock: until then it is not rung again."""
        self.is_due = False
        """Whether it will be rung after a pause."""
        self.size = 0
        """Bytes of what it holds."""
        self._newest = deque[bytes]()

    def append(self, first_seq: int, bodies: Iterable[bytes]) -> None:
        """Takes events; those for which there is no room go, the oldest first."""
        if first_seq != self.last_seq + 1:
            self.clear()
            self.last_seq = first_seq - 1
        for body in bodies:
            event = _framed(body)
            self._newest.append(event)
            self.size += len(event)
            self.last_seq += 1
            while self.size > _PAGE_BYTES and len(self._newest) > 1:
                self.size -= len(self._newest.popleft())

    def clear(self) -> None:
        """Lets its events go: they are in the log."""
        self._newest.clear()
        self.size = 0

    def holds(self, after_seq: int) -> bool:
        """Whether it has what follows, and something does."""
        return self.last_seq - len(self._newest) <= after_seq < self.last_seq

    def after(self, after_seq: int) -> Sequence[bytes]:
        """All that follows; empty where it does not have it."""
        if not self.holds(after_seq):
            return ()
        return tuple(islice(self._newest, after_seq - self.last_seq + len(self._newest), None))


class Follower:
    """One watcher of a task."""

    def __init__(self, fan_out: FanOut, feed: Feed, after_seq: int, *, in_batches: bool) -> None:
        self._fan_out = fan_out
        self.feed = feed
        self._in_batches = in_batches
        self.seq = after_seq
        """The last that it was given."""

    @property
    def is_gone(self) -> bool:
        """Whether the task was deleted."""
        return self.feed.is_gone

    @property
    def has_all(self) -> bool:
        """Whether it was given all that there is."""
        return self.seq >= self.feed.last_seq

    async def next(self) -> Sequence[bytes]:
        """The next messages, serialized; none: it was quiet for long, or something else happened.

        Raises:
            CursorOutOfRange: What follows was deleted.
        """
        fan_out, feed = self._fan_out, self.feed
        fan_out.done(self)
        if feed.is_gone:
            return ()
        if self.has_all:
            await fan_out.sleep(self)
        elif feed.holds(self.seq) and (pause := fan_out.pause(feed)) > 0:
            # It has just been given something, as the others have: the next comes with theirs.
            fan_out.ring_later(feed, pause)
            await fan_out.sleep(self)
        else:
            await fan_out.turn(self)
        if self.has_all or feed.is_gone:
            return ()
        messages: Sequence[bytes]
        if self._in_batches:
            seq, message = fan_out.batch(feed, self.seq)
            messages = (message,) if message else ()
        else:
            messages = fan_out.singly(feed, self.seq)
            seq = self.seq + len(messages)
        if not messages:  # a damaged database: never turn without a pause
            await fan_out.sleep(self)
        self.seq = seq
        return messages


def _framed(body: bytes) -> bytes:
    """An event as it stands in a batch."""
    size = len(body)
    return (_HEADS[size] if size < len(_HEADS) else _IN_BATCH + _varint(size)) + body


def _varint(value: int) -> bytes:
    result = bytearray()
    while value > 127:
        result.append(value & 127 | 128)
        value >>= 7
    result.append(value)
    return bytes(result)


_HEADS = tuple(_IN_BATCH + _varint(size) for size in range(1024))
"""Of the sizes that most events have: a long log is sent twice as fast with them."""

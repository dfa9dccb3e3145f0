"""What stands for a run once its events are deleted: thin curves, and what people look back at.

States, results, notices, checkpoints, evaluations and edits stay as they were, the newest thousand
of a run. Of each curve at most a thousand points stay: first and last, and of each stretch between
them the lowest and the highest.
"""

from __future__ import annotations

import asyncio
import json
import logging
import zlib
from array import array
from collections import deque
from collections.abc import Sequence

from finetuned.v1 import event_pb2
from finetuned_daemon.events.curves import Curves, Points, RunCurves, take
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.digest_rows import Digest, DigestRows, RunLog

POINTS = 1000
"""Most points of a curve that stay."""
_KEPT = 1000
"""Most events of a run that stay."""
_SLICE = 300
"""Events read in one go: 2 ms."""

_LOOKED_BACK_AT = frozenset(
    {
        *("state_change", "result", "notice", "task_edited", "probe_report"),
        *("checkpoint_saved", "checkpoint_deleted", "best_checkpoint", "evaluation"),
    }
)

_log = logging.getLogger(__name__)


class Digests:
    """Makes and reads them. Used on the event loop's thread alone; reads in slices."""

    def __init__(self, database: Database, curves: Curves) -> None:
        self._rows = DigestRows(database)
        curves.digest = self.curves

    async def make(self, log: RunLog, *, begin: bool = False) -> None:
        """Writes the digest of a run that has ended, where it has none.

        `begin`: notes that its log is about to be deleted, in the same transaction.
        """
        if self._rows.has(log.task_key, log.run):
            self._rows.save(log, None, begin=begin)
            return
        begins, after = 0, self._rows.first_seq(log.task_key) - 1
        curves, kept = RunCurves(), deque[tuple[int, int, bytes]](maxlen=_KEPT)
        last = self._rows.last_seq(log.task_key, log.run)
        end = self._rows.end(log.task_key, log.run)
        while piece := self._rows.read(log.task_key, after, max(last + 1, end), _SLICE):
            after = piece[-1][0]
            for seq, run, body in piece:
                event = event_pb2.Event.FromString(body)
                if seq < end and _is_looked_back_at(event):
                    kept.append((seq, run, body))
                if run == log.run:
                    begins = begins or seq
                    take(curves, event)
            await asyncio.sleep(0)
        points = await curves.thinned((), 0, POINTS)
        self._rows.save(log, Digest(begins, encode(points), kept), begin=begin)

    def curves(self, task_key: int, run: int) -> RunCurves | None:
        """The thinned curves of a run; None: its log is there.

        None of them where nothing stands for it any more: the end of a log is no curve of a run.
        """
        body = self._rows.curves(task_key, run)
        if body is None:
            return RunCurves.restored(()) if self._rows.is_gone(task_key, run) else None
        return RunCurves.restored(decode(body))

    def events(
        self, task_key: int, run: int, after_seq: int, limit: int
    ) -> list[event_pb2.Event] | None:
        """Up to `limit` events of a run that stand for those that are deleted.

        None where the run has no digest, or the log goes on behind `after_seq`.
        """
        first = self._rows.first_seq(task_key)
        if after_seq >= first - 1 or not self._rows.has(task_key, run):
            return None
        bodies = self._rows.kept(task_key, run, after_seq, first, limit)
        return [event_pb2.Event.FromString(body) for body in bodies]


def stays(body: bytes) -> bool:
    """Whether an event of this body stays where its run's are deleted."""
    return _is_looked_back_at(event_pb2.Event.FromString(body))


def _is_looked_back_at(event: event_pb2.Event) -> bool:
    return event.WhichOneof("payload") in _LOOKED_BACK_AT


def encode(curves: Sequence[Points]) -> bytes:
    """Curves as they are kept."""
    names = {points.metric: (len(points.steps), points.point_count) for points in curves}
    head = json.dumps(names).encode()
    data = b"".join(
        piece.tobytes()
        for points in curves
        for piece in (
            array("q", points.steps),
            array("d", points.values),
            array("d", points.epochs),
            array("d", points.times),
        )
    )
    return zlib.compress(len(head).to_bytes(4, "little") + head + data)


def decode(body: bytes) -> list[Points]:
    """Curves from what `encode` has made on such a machine."""
    data = zlib.decompress(body)
    start = 4 + int.from_bytes(data[:4], "little")
    names: dict[str, tuple[int, int]] = json.loads(data[4:start])
    result = list[Points]()
    for name, (count, total) in names.items():
        steps = array("q", data[start : start + 8 * count])
        values, epochs, times = (
            array("d", data[start + 8 * count * place : start + 8 * count * (place + 1)])
            for place in (1, 2, 3)
        )
        start += 32 * count
        result.append(Points(name, list(steps), list(values), list(epochs), list(times), total))
    return result

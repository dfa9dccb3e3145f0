"""A grpc.aio server that pushes: `python pusher.py SOCKET JSON`, the limit of `fanout`.

It makes events of some tasks at a pace, two at once as a step has them, and sends them at once, the
same ready bytes to every stream of a task, by nothing but grpc.aio. Only where the last message was
less than a pause ago it waits for that to pass, and all that was made meanwhile goes in one. Of a
file it sends the messages, one behind the other, each serialized as it is sent.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
from grpc import aio

from finetuned.v1 import event_pb2, task_service_pb2


class Pusher:
    """Events of one task for whoever listens."""

    def __init__(self, pace: float, pause: float) -> None:
        self._pace = pace
        self._pause = pause
        self._loop = asyncio.get_running_loop()
        self._news: asyncio.Future[Any] = self._loop.create_future()
        """The next message, and the same for the one behind it."""
        self._made = list[event_pb2.Event]()
        self._free_at = 0.0
        self._is_due = False
        self._seq = 0

    async def make(self) -> None:
        """Makes events, for ever. Each has the time at which it was due, however late it is."""
        began = time.time()
        for number in itertools.count(1):
            due = began + number * 2 / self._pace
            await asyncio.sleep(due - time.time())
            self._made += self._event(due), self._event(due)
            if self._is_due:
                continue
            wait = self._free_at - self._loop.time()
            if wait > 0:
                self._is_due = True
                self._loop.call_later(wait, self._send)
            else:
                self._send()

    def _send(self) -> None:
        batch = task_service_pb2.EventBatch(events=self._made)
        message = task_service_pb2.WatchTaskResponse(events=batch).SerializeToString()
        self._made, self._is_due = [], False
        self._free_at = self._loop.time() + self._pause
        news, self._news = self._news, self._loop.create_future()
        news.set_result((message, self._news))

    async def push(self) -> AsyncIterator[bytes]:
        """A first message, then what is new."""
        yield task_service_pb2.WatchTaskResponse(
            snapshot=task_service_pb2.Snapshot(log_epoch="x")
        ).SerializeToString()
        news = self._news
        while True:
            message, news = await asyncio.shield(news)
            yield message

    def _event(self, at: float) -> event_pb2.Event:
        self._seq += 1
        event = event_pb2.Event(seq=self._seq, run=1)
        event.time.FromMicroseconds(int(at * 1e6))
        if self._seq % 2:
            event.metrics.step = self._seq
            event.metrics.values["loss"] = 1 / self._seq
        else:
            event.progress.step, event.progress.total_steps = self._seq, 1_000_000
            event.progress.loss = 1 / self._seq
        return event


def _replay(path: Path) -> Any:
    data, messages = path.read_bytes(), list[task_service_pb2.WatchTaskResponse]()
    at = 0
    while at < len(data):
        start = at + 4
        at = start + int.from_bytes(data[at:start], "big")
        messages.append(task_service_pb2.WatchTaskResponse.FromString(data[start:at]))

    async def replay(request: bytes, context: Any) -> AsyncIterator[Any]:
        for message in messages:
            yield message

    return replay


async def main(socket: str, given: dict[str, Any]) -> None:
    """Serves until it is killed."""
    count = given.get("tasks", 0)
    pushers = [Pusher(given["pace"] / count, given["pause"]) for _ in range(count)]
    takes = itertools.cycle(pushers)

    async def push(request: bytes, context: Any) -> AsyncIterator[bytes]:
        async for message in next(takes).push():
            yield message

    handlers: dict[str, Any] = {"Push": grpc.unary_stream_rpc_method_handler(push)}
    for name, path in given.get("replays", {}).items():
        handlers[name] = grpc.unary_stream_rpc_method_handler(
            _replay(Path(path)),
            response_serializer=task_service_pb2.WatchTaskResponse.SerializeToString,
        )
    server = aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("bench", handlers),))
    server.add_insecure_port(f"unix:{socket}")
    await server.start()
    print("ready", flush=True)
    await asyncio.gather(server.wait_for_termination(), *(pusher.make() for pusher in pushers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))

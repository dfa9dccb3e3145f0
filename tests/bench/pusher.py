"""A grpc.aio server that pushes: `python pusher.py SOCKET JSON`, the limit of `fanout`.

It makes events of some tasks at a pace and sends them as one message every so often, the same ready
bytes to every stream of a task, by nothing but grpc.aio. Of a file it sends the messages, one
behind the other, each serialized as it is sent.
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
        self._news = asyncio.get_running_loop().create_future()
        self._seq = 0

    async def make(self) -> None:
        """Makes events, for ever."""
        began, made = time.time(), 0
        while True:
            await asyncio.sleep(self._pause)
            events = list[event_pb2.Event]()
            while began + made / self._pace <= time.time():
                events.append(self._event(began + made / self._pace))
                made += 1
            batch = task_service_pb2.EventBatch(events=events)
            message = task_service_pb2.WatchTaskResponse(events=batch).SerializeToString()
            news, self._news = self._news, asyncio.get_running_loop().create_future()
            if events:
                news.set_result(message)

    async def push(self) -> AsyncIterator[bytes]:
        """A first message, then what is new."""
        yield task_service_pb2.WatchTaskResponse(
            snapshot=task_service_pb2.Snapshot(log_epoch="x")
        ).SerializeToString()
        while True:
            yield await asyncio.shield(self._news)

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
    count = given.get("tasks", 1)
    pushers = [
        Pusher(given.get("pace", 1.0) / count, given.get("pause", 1.0)) for _ in range(count)
    ]
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
    await asyncio.gather(*(pusher.make() for pusher in pushers))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], json.loads(sys.argv[2])))

"""Many watchers in a process of their own: `python watchers.py JSON`, the load of `fanout`.

They read bytes: a message is looked into once, however many watchers get the same one, so that the
clients cost what gRPC itself does and little more. Lines on stdin say what to do, and each is
answered by one on stdout; see `main`.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import json
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from grpc import aio

from finetuned.v1 import task_service_pb2

WATCH_TASK = "/finetuned.v1.TaskService/WatchTask"
WATCH_TASKS = "/finetuned.v1.TaskService/WatchTasks"


@dataclass(frozen=True)
class Content:
    """What a message brings."""

    first: int = 0
    """`seq` of its first event; 0: it brings none."""
    times: tuple[float, ...] = ()
    """When each event was, by the clock of the process that wrote it."""


class Contents:
    """What messages bring, by their bytes."""

    def __init__(self, method: str) -> None:
        self._is_list = method == WATCH_TASKS
        self._known = dict[bytes, Content]()

    def __getitem__(self, message: bytes) -> Content:
        content = self._known.get(message)
        if content is None:
            content = self._known[message] = self._parse(message)
        return content

    def _parse(self, message: bytes) -> Content:
        if self._is_list:
            task = task_service_pb2.WatchTasksResponse.FromString(message).task
            try:  # whoever renames the task says when
                return Content(0, (float(task.display_name),))
            except ValueError:
                return Content()
        response = task_service_pb2.WatchTaskResponse.FromString(message)
        events = list(response.events.events)
        if response.HasField("event"):
            events.append(response.event)
        if not events:
            return Content()
        times = [event.time.seconds + event.time.nanos / 1e9 for event in events]
        if [event.seq for event in events] != list(
            range(events[0].seq, events[0].seq + len(events))
        ):
            raise AssertionError("a gap within a message")
        return Content(events[0].seq, tuple(times))


@dataclass
class Watcher:
    """One stream."""

    channel: aio.Channel
    method: str
    contents: Contents
    name: str
    seq: int
    """The last event that it has; below 0: it takes any for its first."""
    got: list[tuple[float, Content]] = field(default_factory=list)
    """Each message that it read, and when."""
    wrong: int = 0
    """Events that did not follow the one before: lost or repeated."""
    reading: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Returns once the first message is there."""
        stream: Any = self.channel.unary_stream(self.method)
        request = task_service_pb2.WatchTaskRequest(
            name=self.name, after_seq=max(self.seq, 0), allow_batches=True
        )
        self.call = stream(b"" if self.method == WATCH_TASKS else request.SerializeToString())
        if not isinstance(await self.call.read(), bytes):
            raise AssertionError("the stream ended before it began")

    async def read_on(self, until: int | None = None) -> None:
        """Reads to this event, or for ever."""
        read, contents, got, clock = self.call.read, self.contents, self.got, time.time
        while until is None or self.seq < until:
            message = await read()
            now = clock()
            if not isinstance(message, bytes):
                return
            content = contents[message]
            if content.first:
                self.wrong += self.seq >= 0 and content.first != self.seq + 1
                self.seq = content.first + len(content.times) - 1
            got.append((now, content))


async def main(given: dict[str, Any]) -> None:
    """Opens all, then obeys.

    `drain {task: seq}` waits until those that read have this event; `report FROM TO FILE` says what
    they got, with the latencies of all events of this time in a file; `resume {task: seq}` lets
    those that did not read catch up.
    """
    channels = [
        aio.insecure_channel(given["address"], options=[("grpc.use_local_subchannel_pool", 1)])
        for _ in range(given["connections"])
    ]
    contents = Contents(given["method"])
    watchers, stalled = list[Watcher](), list[Watcher]()
    for number in range(given["watchers"]):
        name, seq = given["tasks"][number % len(given["tasks"])]
        is_stalled = number < given["stalled"]
        seq = 0 if is_stalled else seq
        channel = channels[number % len(channels)]
        watcher = Watcher(channel, given["method"], contents, name, seq)
        (stalled if is_stalled else watchers).append(watcher)
    for start in range(0, given["watchers"], 50):
        await asyncio.gather(*(w.open() for w in [*stalled, *watchers][start : start + 50]))
    for watcher in watchers:
        watcher.reading = asyncio.create_task(watcher.read_on())
    print("ready", flush=True)
    while line := await asyncio.to_thread(sys.stdin.readline):
        word, _, rest = line.strip().partition(" ")
        answer: Any = {}
        if word == "drain":
            ends = json.loads(rest)
            for _ in range(600):  # half a minute; those who are measured tell nobody
                if all(watcher.seq >= ends[watcher.name] for watcher in watchers):
                    break
                await asyncio.sleep(0.05)
            answer = {
                "behind": sum(w.seq < ends[w.name] for w in watchers),
                "wrong": sum(w.wrong for w in watchers),
            }
        elif word == "report":
            begin, end, path = rest.split(" ", 2)
            answer = _report(watchers, float(begin), float(end), Path(path))
        elif word == "resume":
            ends = json.loads(rest)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(60):
                    await asyncio.gather(*(w.read_on(ends[w.name]) for w in stalled))
            answer = {
                "behind": sum(w.seq < ends[w.name] for w in stalled),
                "wrong": sum(w.wrong for w in stalled),
                "messages": sum(len(w.got) for w in stalled),
            }
        print(json.dumps(answer), flush=True)


def _report(watchers: list[Watcher], begin: float, end: float, path: Path) -> dict[str, Any]:
    latencies = array.array("d")
    messages = 0
    for watcher in watchers:
        for received, content in watcher.got:
            messages += begin <= received <= end
            latencies.extend(received - t for t in content.times if begin <= t <= end)
    path.write_bytes(latencies.tobytes())
    return {
        "messages": messages,
        "deliveries": len(latencies),
        "wrong": sum(watcher.wrong for watcher in watchers),
        "cpu": time.process_time(),
    }


if __name__ == "__main__":
    asyncio.run(main(json.loads(sys.argv[1])))

"""One watcher's stream, beside a bare grpc.aio server that sends the same messages.

A client that reads bytes and does not look at them reads a task of 20,000 events from its
beginning, from the daemon and from the bare server in turns. The bare server has the messages in
memory, and serializes each as it sends it.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from grpc import aio
from table import Options, Row
from watchers import WATCH_TASK

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import task_service_pb2

BAR = 0.5
"""Events a second: the daemon's to the bare server's, at least."""


def stream_rows(options: Options) -> list[Row]:
    """Measures; rows for `api`."""
    folder = options.folder / "streams"
    folder.mkdir()
    steps = 500 if options.quick else 10_000
    scene = Scene(folder / "scene")
    daemon = Daemon(folder).start()
    try:
        task = daemon.create(scene.play(steps=steps), start=True)
        eventually(lambda: daemon.get(task.name).last_seq >= 2 * steps, "all events", 300)
        last = daemon.wait(task.name, "COMPLETED").last_seq
        requests = [
            task_service_pb2.WatchTaskRequest(name=task.name, allow_batches=allowed)
            for allowed in (False, True)
        ]
        counts = list[int]()
        for number, request in enumerate(requests):
            messages = _all(daemon, request, last)
            counts.append(len(messages))
            data = b"".join(len(m).to_bytes(4, "big") + m for m in messages)
            (folder / str(number)).write_bytes(data)
        with _bare(folder, len(requests)) as address:
            measured = _measure(daemon.address, address, requests, counts, 2 * options.rounds)
            seconds = asyncio.run(measured)
    finally:
        daemon.close()
        scene.close()
    return [
        Row(
            f"one watcher reads {last:,} events, {how}",
            *(last / statistics.median(ours), "events/s", last / statistics.median(theirs)),
            "a bare server with the messages in memory",
            BAR,
            is_cost=False,
            detail=f"{count:,} messages",
        )
        for how, count, (ours, theirs) in zip(
            ("a message each", "in batches"), counts, seconds, strict=True
        )
    ]


@contextlib.contextmanager
def _bare(folder: Path, count: int) -> Iterator[str]:
    """A bare server of what lies in the files; its address."""
    replays = {f"Replay{number}": str(folder / str(number)) for number in range(count)}
    with tempfile.TemporaryDirectory(prefix="ft-") as short:  # a socket's path must be short
        socket = Path(short) / "bare.sock"
        command = [sys.executable, str(Path(__file__).with_name("pusher.py")), str(socket)]
        given = json.dumps({"replays": replays})
        with subprocess.Popen([*command, given], stdout=subprocess.PIPE) as bare:
            try:
                assert bare.stdout is not None
                bare.stdout.readline()
                yield f"unix:{socket}"
            finally:
                bare.kill()


async def _measure(
    ours: str,
    theirs: str,
    requests: list[task_service_pb2.WatchTaskRequest],
    counts: list[int],
    turns: int,
) -> list[tuple[list[float], list[float]]]:
    """Seconds of each turn of both, for each request."""
    measured = list[tuple[list[float], list[float]]]()
    async with aio.insecure_channel(ours) as channel, aio.insecure_channel(theirs) as other:
        for number, (request, count) in enumerate(zip(requests, counts, strict=True)):
            took: tuple[list[float], list[float]] = ([], [])
            data = request.SerializeToString()
            for _ in range(turns):
                took[0].append(await _seconds(channel, WATCH_TASK, data, count))
                took[1].append(await _seconds(other, f"/bench/Replay{number}", b"", count))
            measured.append(took)
    return measured


def _all(daemon: Daemon, request: task_service_pb2.WatchTaskRequest, last: int) -> list[bytes]:
    """The messages up to the one with the last event."""
    stream: Any = daemon.channel.unary_stream(WATCH_TASK)
    call, messages, seq = stream(request.SerializeToString()), list[bytes](), 0
    while seq < last:
        messages.append(next(call))
        response = task_service_pb2.WatchTaskResponse.FromString(messages[-1])
        for event in (*response.events.events, response.event):
            seq = max(seq, event.seq)
    call.cancel()
    return messages


async def _seconds(channel: aio.Channel, method: str, request: bytes, messages: int) -> float:
    """How long it takes to read so many messages of a new stream."""
    stream: Any = channel.unary_stream(method)
    began = time.perf_counter()
    call = stream(request)
    for _ in range(messages):
        await call.read()
    lasted = time.perf_counter() - began
    call.cancel()
    return lasted

"""How long others wait while the daemon takes over what a run has reported unseen.

The daemon is killed, its run writes 60,000 events meanwhile, and the next daemon takes them over
while one client asks GetTask again and again.
"""

from __future__ import annotations

import time
from pathlib import Path

from table import Options, Row

from conftest import Scene
from daemon_process import Daemon, eventually

_LOGGED = 58
"""Lines with each step, which is two events more."""
_LIMIT_MS = 100.0
_LATEST = 300.0
"""Seconds."""


def backlog_rows(options: Options) -> list[Row]:
    """Measures; a row for `api`.

    Raises:
        RuntimeError: The events were not taken over.
    """
    folder = options.folder / "backlog"
    folder.mkdir()
    steps = 100 if options.quick else 1000
    events = steps * (_LOGGED + 2)
    scene = Scene(folder / "scene")
    daemon = Daemon(folder)
    try:
        daemon.start()
        parameters = scene.play(steps=steps + 1, gated=True, lines=[_LOGGED, 60])
        name = daemon.create(parameters, start=True).name
        daemon.wait(name, "RUNNING")
        (file,) = eventually(lambda: _files(daemon.paths.state_dir), "the run reports")
        daemon.kill()
        scene.let_pass(steps)
        eventually(lambda: file.read_bytes().count(b"\n") >= events, "the run has gone on", 120)
        daemon.start()
        began, taken, last = time.monotonic(), list[float](), 0
        while last < events:
            asked = time.perf_counter()
            last = daemon.get(name).last_seq
            taken.append(time.perf_counter() - asked)
            if time.monotonic() > began + _LATEST:
                raise RuntimeError(f"{last} of {events} events were taken over")
            time.sleep(0.005)
        lasted = time.monotonic() - began
    finally:
        daemon.close()
        scene.close()
    taken.sort()
    return [
        Row(
            f"GetTask while a backlog of {events:,} events is taken over: p99",
            *(taken[len(taken) * 99 // 100] * 1000, "ms", _LIMIT_MS, "100 ms"),
            detail=f"p50 {taken[len(taken) // 2] * 1000:.1f}, max {taken[-1] * 1000:.0f} ms, "
            f"{len(taken)} calls in {lasted:.1f} s",
        )
    ]


def _files(state: Path) -> list[Path]:
    return list(state.rglob("events.jsonl"))

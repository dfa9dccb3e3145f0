"""The queue of each device: which run may start.

One run a device at a time, in the order of their places.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from finetuned_daemon.tasks import Run, TaskState


def may_start(active: Iterable[Run]) -> list[Run]:
    """The queued runs whose device is free, at most one a device.

    `active` are all QUEUED and RUNNING runs in the order of the queue.
    """
    runs = list(active)
    busy = {run.device for run in runs if run.state is TaskState.RUNNING}
    result = list[Run]()
    for run in runs:
        if run.state is TaskState.QUEUED and run.device not in busy:
            busy.add(run.device)
            result.append(run)
    return result


def queue_positions(queue: Iterable[tuple[int, str]]) -> dict[int, int]:
    """Places in the queues of their devices, from 1, by the keys of tasks.

    `queue` has task and device of all QUEUED runs in the order of the queue.
    """
    lengths = Counter[str]()
    result = dict[int, int]()
    for task_key, device in queue:
        lengths[device] += 1
        result[task_key] = lengths[device]
    return result


def moved(run: Run, position: int, active: Iterable[Run]) -> list[Run]:
    """The runs whose place changes where a queued one moves within the queue of its device.

    Args:
        run: Is QUEUED.
        position: Where it goes, from 1; beyond the end: last.
        active: As for `may_start`.
    """
    queue = [r for r in active if r.device == run.device and r.state is TaskState.QUEUED]
    places = [r.place for r in queue]
    others = [r for r in queue if r.key != run.key]
    others.insert(position - 1, run)
    return [
        replace(r, place=place) for r, place in zip(others, places, strict=True) if r.place != place
    ]

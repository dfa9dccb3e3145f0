"""The queue of each device: which run may start.

One run a device at a time, in the order of their starts.
"""

from __future__ import annotations

from collections.abc import Iterable

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


def queue_position(run: Run, active: Iterable[Run]) -> int:
    """Place of a queued run in the queue of its device, from 1; 0 if it is not queued."""
    place = 0
    for other in active:
        if other.device == run.device and other.state is TaskState.QUEUED:
            place += 1
            if other.key == run.key:
                return place
    return 0

"""Rows of the tables of tasks and devices, for a list that is shown once or watched."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from finetuned._errors import NotFound
from finetuned.cli.output import (
    bytes_text,
    progress_text,
    state_text,
    state_word,
    time_text,
    type_word,
)
from finetuned.v1.system_service_pb2 import Device
from finetuned.v1.task_pb2 import PauseReason, Task

if TYPE_CHECKING:
    from finetuned._client import Client

Row = Sequence[str | Text]

TASK_COLUMNS = ("name", "type", "state", "steps", "loss", "created")
QUEUE_COLUMNS = ("device", "place", "name", "state", "steps", "created")
DEVICE_COLUMNS = ("device", "product", "memory", "free", "use", "temp", "power", "task", "queued")
QUEUE_STATES = ("running", "queued", "paused")
"""States that are in the queue, in its order."""


def task_row(task: Task) -> Row:
    """A task of the list of tasks."""
    return (
        task.display_name,
        type_word(task.training_type),
        state_text(task.state).append(pause_text(task)),
        progress_text(task),
        f"{task.progress.loss:.4f}" if task.progress.HasField("loss") else "",
        time_text(task.create_time),
    )


def queue_row(device: str, task: Task) -> Row:
    """A task of the queue."""
    return (
        device,
        str(task.queue_position or ""),
        task.display_name,
        state_text(task.state).append(pause_text(task)),
        progress_text(task),
        time_text(task.create_time),
    )


def device_row(device: Device) -> Row:
    """A device."""
    celsius, watts = device.temperature_celsius, device.power_watts
    return (
        device.id,
        device.product_name,
        bytes_text(device.memory_total_bytes),
        bytes_text(device.memory_free_bytes),
        f"{device.utilization:.0%}" if device.HasField("utilization") else "",
        f"{celsius:.0f} °C" if device.HasField("temperature_celsius") else "",
        f"{watts:.0f} W" if device.HasField("power_watts") else "",
        device.running_task.removeprefix("tasks/") or "free",
        str(device.queued_tasks or ""),
    )


def device_of(client: Client, task: Task) -> str:
    """The device that a task's run has, which the task need not have asked for."""
    try:
        run = next((run for run in client.list_runs(task.name) if run.number == task.run), None)
    except NotFound:  # deleted meanwhile
        run = None
    return run.device if run is not None else task.device


def place_of(device: str, task: Task, devices: Sequence[str]) -> tuple[int, str, int, int, int]:
    """Where a task of the queue comes: by device, what runs, what waits, then what is paused."""
    at = devices.index(device) if device in devices else len(devices)
    started = task.start_time.ToNanoseconds()
    word = state_word(task.state)
    # A state that this client does not know comes last.
    rank = QUEUE_STATES.index(word) if word in QUEUE_STATES else len(QUEUE_STATES)
    return at, device, rank, task.queue_position, started


def pause_text(task: Task) -> str:
    """Why a paused task is paused, as an addition to its state; empty where nobody has to know."""
    is_full = task.pause_reason == PauseReason.PAUSE_REASON_DISK_FULL
    return " (disk full)" if is_full else ""

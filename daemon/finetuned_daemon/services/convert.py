"""Records to protos."""

from __future__ import annotations

from finetuned.v1 import system_service_pb2, task_pb2
from finetuned_daemon.devices import Device
from finetuned_daemon.events.build import (
    end_reason_value,
    phase_value,
    state_value,
    timestamp,
)
from finetuned_daemon.parameters import protos
from finetuned_daemon.runs.contract import Progress, TrainingType
from finetuned_daemon.tasks import Run, Task, TaskState

# Looked up rather than named: a client may send any number.
_TRAINING_TYPES: dict[int, TrainingType] = {
    task_pb2.TrainingType.Value(f"TRAINING_TYPE_{kind.value}"): kind for kind in TrainingType
}
_STATES: dict[int, TaskState] = {int(state_value(kind)): kind for kind in TaskState}


def task(record: Task, queue_position: int) -> task_pb2.Task:
    """A task as clients see it."""
    return task_pb2.Task(
        name=record.name,
        display_name=record.display_name,
        training_type=task_pb2.TrainingType.Value(f"TRAINING_TYPE_{record.training_type.value}"),
        parameters=protos.to_proto(record.parameters),
        device=record.device,
        state=state_value(record.state),
        phase=phase_value(record.phase),
        end_reason=end_reason_value(record.end_reason),
        end_message=record.end_message,
        run=record.run,
        progress=progress(record.progress),
        last_checkpoint=record.last_checkpoint,
        create_time=timestamp(record.create_time),
        update_time=timestamp(record.update_time),
        start_time=timestamp(record.start_time) if record.start_time else None,
        end_time=timestamp(record.end_time) if record.end_time else None,
        last_seq=record.last_seq,
        queue_position=queue_position,
        etag=record.etag,
    )


def run(record: Run, parent: Task) -> task_pb2.Run:
    """A run as clients see it."""
    identity = record.identity if record.state is TaskState.RUNNING else None
    return task_pb2.Run(
        name=f"{parent.name}/runs/{record.number}",
        number=record.number,
        state=state_value(record.state),
        end_reason=end_reason_value(record.end_reason),
        end_message=record.end_message,
        device=record.device,
        parameters=protos.to_proto(record.parameters),
        create_time=timestamp(record.create_time),
        start_time=timestamp(record.start_time) if record.start_time else None,
        end_time=timestamp(record.end_time) if record.end_time else None,
        pid=identity.pid if identity else 0,
        exit_code=record.exit_code,
        signal=record.signal,
        progress=progress(record.progress),
        last_checkpoint=record.last_checkpoint,
        run_dir=record.run_dir,
        output_dir=record.output_dir,
    )


def progress(record: Progress) -> task_pb2.Progress:
    """Progress; fields are the same, a test compares."""
    return task_pb2.Progress(**record.model_dump(exclude_none=True))


def training_type(value: int) -> TrainingType | None:
    """The training type; None for unspecified and for numbers that are no type."""
    return _TRAINING_TYPES.get(value)


def state(value: int) -> TaskState | None:
    """The state; None for unspecified and for numbers that are no state."""
    return _STATES.get(value)


def device(record: Device, running_task: str, queued: int) -> system_service_pb2.Device:
    """A device with what runs on it."""
    return system_service_pb2.Device(
        id=record.id,
        type=system_service_pb2.DeviceType.Value(f"DEVICE_TYPE_{record.type.value}"),
        product_name=record.product_name,
        memory_total_bytes=record.memory_total_bytes,
        memory_free_bytes=record.memory_free_bytes,
        utilization=record.utilization,
        cores=record.cores,
        compute_capability=record.compute_capability,
        driver_version=record.driver_version,
        running_task=running_task,
        queued_tasks=queued,
    )

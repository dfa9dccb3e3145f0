"""Records to protos."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import TYPE_CHECKING

from google.protobuf import duration_pb2, field_mask_pb2

from finetuned.v1 import (
    parameter_service_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)
from finetuned_daemon.checkpoints import Checkpoint
from finetuned_daemon.devices import Device
from finetuned_daemon.errors import Violation
from finetuned_daemon.events.build import (
    end_reason_value,
    pause_reason_value,
    phase_value,
    state_value,
    timestamp,
)
from finetuned_daemon.events.curves import Points
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.parameters import protos
from finetuned_daemon.parameters.schema import json_value
from finetuned_daemon.runs.contract import Progress, TrainingType
from finetuned_daemon.task_requests import ResumeChoice
from finetuned_daemon.tasks import Run, Task, TaskState
from finetuned_daemon.templates import Template
from finetuned_daemon.texts import Language, Text

if TYPE_CHECKING:
    from finetuned_daemon.environment.model import CheckStatus, Report
    from finetuned_daemon.export import ConfigFormat
    from finetuned_daemon.planner import Estimate
    from finetuned_daemon.planning.calibration import Calibration
    from finetuned_daemon.validation.resume import ResumePlan

# Looked up rather than named: a client may send any number.
_TRAINING_TYPES: dict[int, TrainingType] = {
    task_pb2.TrainingType.Value(f"TRAINING_TYPE_{kind.value}"): kind for kind in TrainingType
}
_RESUME_CHOICES: dict[int, ResumeChoice] = {
    task_pb2.ResumeChoice.Value(f"RESUME_CHOICE_{kind.value}"): kind for kind in ResumeChoice
}
_STATES: dict[int, TaskState] = {int(state_value(kind)): kind for kind in TaskState}


def task(record: Task, queue_position: int, *, with_parameters: bool = True) -> task_pb2.Task:
    """A task as clients see it."""
    return task_pb2.Task(
        name=record.name,
        display_name=record.display_name,
        training_type=task_pb2.TrainingType.Value(f"TRAINING_TYPE_{record.training_type.value}"),
        parameters=protos.to_proto(record.parameters) if with_parameters else None,
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
        template=record.template,
        probing=record.before_probe is not None,
        pause_reason=pause_reason_value(record.pause_reason),
    )


def template(record: Template) -> template_service_pb2.Template:
    """A template as clients see it."""
    return template_service_pb2.Template(
        name=record.name,
        display_name=record.display_name,
        training_type=task_pb2.TrainingType.Value(f"TRAINING_TYPE_{record.training_type.value}"),
        parameters=protos.to_proto(record.parameters),
        preset=record.is_preset,
        create_time=timestamp(record.create_time) if record.create_time else None,
        update_time=timestamp(record.update_time) if record.update_time else None,
        etag=record.etag,
    )


def violation(record: Violation, speaking: Language) -> parameter_service_pb2.ParameterViolation:
    """A violation of parameters, in one language."""
    return parameter_service_pb2.ParameterViolation(
        field=record.field,
        reason=record.reason,
        message=record.message.within(speaking),
        severity=parameter_service_pb2.Severity.Value(f"SEVERITY_{record.severity.value}"),
        suggested_value=None if record.suggested is None else json_value(record.suggested),
        suggested_field=record.suggested_field,
    )


def run(record: Run, parent: str) -> task_pb2.Run:
    """A run of a task, by the task's resource name, as clients see it."""
    identity = record.identity if record.state is TaskState.RUNNING else None
    return task_pb2.Run(
        name=f"{parent}/runs/{record.number}",
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
        retry=record.retry,
        probe=record.is_probe,
        attempt=record.attempt,
        request_id=record.request_id,
    )


def checkpoint(record: Checkpoint, parent: Task, speaking: Language) -> task_pb2.Checkpoint:
    """A checkpoint as clients see it, in one language."""
    return task_pb2.Checkpoint(
        name=f"{parent.name}/runs/{record.run}/checkpoints/{record.step}",
        path=record.path,
        run=record.run,
        step=record.step,
        epoch=record.manifest.epoch if record.manifest else 0.0,
        size_bytes=record.size_bytes,
        create_time=timestamp(record.create_time) if record.create_time else None,
        eval_loss=record.eval_loss,
        is_best=record.is_best,
        is_newest=record.is_newest,
        is_whole=record.problem is None,
        problem=record.problem.within(speaking) if record.problem else "",
    )


def resume_choice(value: int, violations: list[Violation]) -> ResumeChoice | None:
    """The choice of a checkpoint, None for unspecified; adds a violation where it is unknown."""
    if value and value not in _RESUME_CHOICES:
        text = Text(f"{value} is no choice", f"没有选项 {value}")
        violations.append(Violation("resume", text, "NOT_A_CHOICE"))
    return _RESUME_CHOICES.get(value)


def config_format(value: int, violations: list[Violation]) -> ConfigFormat:
    """The format to export; adds a violation where it is none that this version knows."""
    # With the first export: a daemon starts sooner without.
    from finetuned_daemon.export import ConfigFormat

    formats: dict[int, ConfigFormat] = {
        task_service_pb2.CONFIG_FORMAT_UNSPECIFIED: ConfigFormat.YAML,
        task_service_pb2.CONFIG_FORMAT_YAML: ConfigFormat.YAML,
        task_service_pb2.CONFIG_FORMAT_SCRIPT: ConfigFormat.SCRIPT,
    }
    if value not in formats:
        text = Text(f"{value} is no format", f"没有格式 {value}")
        violations.append(Violation("format", text, "NOT_A_CHOICE"))
    return formats.get(value, ConfigFormat.YAML)


def progress(record: Progress) -> task_pb2.Progress:
    """Progress; fields are the same, a test compares."""
    return task_pb2.Progress(**record.model_dump(exclude_none=True))


def series(record: Points) -> task_service_pb2.MetricSeries:
    """A piece of a curve."""
    return task_service_pb2.MetricSeries(**vars(record))


def training_type(value: int, violations: list[Violation]) -> TrainingType | None:
    """The training type, None for unspecified; adds a violation where the number is none."""
    if value and value not in _TRAINING_TYPES:
        text = Text(f"{value} is no training type", f"没有训练类型 {value}")
        violations.append(Violation("training_type", text, "NOT_A_CHOICE"))
    return _TRAINING_TYPES.get(value)


def mask_paths(mask: field_mask_pb2.FieldMask) -> list[str]:
    """The paths of a mask; of too many no more than it takes to refuse them."""
    return list(islice(mask.paths, BY_NAME["mask_paths"].default + 1))


def states(values: Iterable[int], violations: list[Violation]) -> list[TaskState]:
    """The states, each once; adds a violation for each number that is none, or for the first."""
    given = dict.fromkeys(values)
    wrong = [value for value in given if value not in _STATES]
    named = wrong[: len(_STATES)]
    for value in named:
        text = Text(f"{value} is no state", f"没有状态 {value}")
        violations.append(Violation("states", text, "NOT_A_CHOICE"))
    if len(wrong) > len(named):
        more = len(wrong) - len(named)
        text = Text(f"{more:,} more numbers are no states", f"另有 {more:,} 个数不是状态")
        violations.append(Violation("states", text, "NOT_A_CHOICE"))
    return [_STATES[value] for value in given if value in _STATES]


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
        temperature_celsius=record.temperature_celsius,
        power_watts=record.power_watts,
    )


def environment(record: Report, speaking: Language) -> system_service_pb2.CheckEnvironmentResponse:
    """A check of the environment, with its sentences in one language."""
    return system_service_pb2.CheckEnvironmentResponse(
        status=_check_status(record.status),
        items=[
            system_service_pb2.EnvironmentItem(
                name=item.name,
                status=_check_status(item.status),
                found=item.found,
                wanted=item.wanted,
                message=item.message.within(speaking),
                remedy=item.remedy.within(speaking),
                reason=item.reason,
            )
            for item in record.items
        ],
        devices=[
            system_service_pb2.DeviceCapability(
                device=device,
                bf16=can.bf16,
                fp16=can.fp16,
                tf32=can.tf32,
                four_bit=can.four_bit,
                eight_bit_optimizer=can.eight_bit_optimizer,
            )
            for device, can in record.capabilities.items()
        ],
        runner_python=record.runner_python,
        check_time=timestamp(record.check_time),
    )


def _check_status(status: CheckStatus) -> system_service_pb2.CheckStatus.ValueType:
    return system_service_pb2.CheckStatus.Value(f"CHECK_STATUS_{status.value}")


def estimate(record: Estimate, speaking: Language) -> parameter_service_pb2.EstimateTaskResponse:
    """An estimate, with its sentences in one language."""
    plan = record.plan
    duration = None
    if plan.duration_seconds is not None:
        duration = duration_pb2.Duration()
        duration.FromNanoseconds(int(plan.duration_seconds * 1e9))
    return parameter_service_pb2.EstimateTaskResponse(
        train_samples=plan.train_samples,
        eval_samples=plan.eval_samples,
        train_tokens=plan.train_tokens,
        cut_samples=plan.cut_samples,
        dropped_samples=plan.dropped_samples,
        exact=plan.exact,
        total_steps=plan.schedule.total_steps,
        steps_per_epoch=plan.schedule.steps_per_epoch,
        run_steps=plan.schedule.run_steps,
        checkpoints=plan.schedule.checkpoints,
        kept_checkpoints=plan.schedule.kept_checkpoints,
        quota_left=record.quota_left,
        disk_bytes=plan.disk_bytes,
        checkpoint_bytes=plan.disk.checkpoint_bytes,
        disk_free_bytes=plan.disk_free_bytes,
        trainable_parameters=plan.trainable_parameters,
        total_parameters=plan.total_parameters,
        peak_memory_bytes=plan.peak_memory_bytes,
        memory_parts=[
            parameter_service_pb2.MemoryPart(name=name, bytes=size)
            for name, size in sorted(plan.memory.parts.items(), key=lambda part: -part[1])
        ],
        memory_total_bytes=plan.memory_total_bytes,
        memory_free_bytes=plan.memory_free_bytes,
        duration=duration,
        device=record.device.id,
        violations=[violation(v, speaking) for v in record.violations],
        resume_plan=resume_plan(record.resume, speaking) if record.resume else None,
        calibration=calibration(plan.calibration) if plan.calibration else None,
    )


def calibration(record: Calibration) -> parameter_service_pb2.Calibration:
    """The probe that has corrected an estimate."""
    return parameter_service_pb2.Calibration(
        measured=record.measured,
        probe_time=timestamp(record.probe_time),
        planned_peak_memory_bytes=record.planned_peak_memory_bytes,
    )


def resume_plan(record: ResumePlan, speaking: Language) -> parameter_service_pb2.ResumePlan:
    """What a resume will be, in one language."""
    return parameter_service_pb2.ResumePlan(
        checkpoint=record.checkpoint,
        step=record.step,
        total_steps=record.total_steps,
        epoch=record.epoch,
        num_tokens=record.num_tokens,
        knows_parameters=record.knows_parameters,
        items=[
            parameter_service_pb2.ResumeItem(
                field=item.field,
                effect=parameter_service_pb2.ResumeEffect.Value(f"RESUME_EFFECT_{item.effect}"),
                then=None if item.then is None else json_value(item.then),
                now=None if item.now is None else json_value(item.now),
                message=item.message.within(speaking),
            )
            for item in record.items
        ],
    )

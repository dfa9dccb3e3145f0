"""Judges parameters as this machine is: finds out about device, environment and other tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from finetuned._paths import Paths
from finetuned_daemon.devices import Device, choose_device, list_devices
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.errors import Violation
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.requests import Given
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import Task
from finetuned_daemon.texts import Text
from finetuned_daemon.validation.check import by_severity, check, errors, resolve
from finetuned_daemon.validation.paths import check_path, own_folders
from finetuned_daemon.validation.surroundings import Surroundings


@dataclass(frozen=True)
class Judgement:
    """What came of it."""

    parameters: Parameters | None
    """None where a field is wrong in itself."""
    resolved: Parameters
    """The same, with the default in place of what is wrong in itself."""
    violations: list[Violation]
    """Gravest first."""
    device: Device
    """The device that the run would use."""

    @property
    def errors(self) -> list[Violation]:
        """Those with which nothing can be started."""
        return errors(self.violations)


class Judge:
    """The one way by which create, update, start, validate and estimate come to a judgement."""

    def __init__(self, records: Records, environment: Environment, paths: Paths) -> None:
        self._records = records
        self._environment = environment
        self._own_folders = own_folders(paths)

    async def judge(
        self,
        given: Given,
        training_type: TrainingType,
        device: str,
        *,
        complete: bool,
        task: Task | None = None,
    ) -> Judgement:
        """Judges parameters for a device, given by its id or empty for the one by default.

        Args:
            given: Values by section and name; absent ones get their default.
            training_type: What is trained.
            device: As asked for.
            complete: Demand what a start needs.
            task: The task that they are for; its own results are no other's.
        """
        devices = await asyncio.to_thread(list_devices)
        chosen, violations = _choose(device, devices)
        resolved = resolve(given)
        surroundings = Surroundings(
            device=chosen.id,
            capability=self._environment.capability(chosen),
            has_bitsandbytes=self._environment.has_bitsandbytes(),
            packages=self._environment.packages(),
            model_types=self._environment.model_types(),
            own_folders=self._own_folders,
            output_within=self._within_results(resolved.data.output_dir),
            output_owner=self._other_owner(resolved.data.output_dir, task),
        )
        parameters, found = await asyncio.to_thread(
            check, given, training_type, surroundings, complete=complete
        )
        return Judgement(parameters, resolved, by_severity([*violations, *found]), chosen)

    def _within_results(self, output_dir: str | None) -> str:
        """Resource name of a task in one of whose runs' folders an output folder lies."""
        if not output_dir or check_path("data.output_dir", output_dir):
            return ""
        path = Path(output_dir)
        task_id = self._records.task_with_output([str(p) for p in (path, *path.parents)])
        return f"tasks/{task_id}" if task_id else ""

    def _other_owner(self, output_dir: str | None, task: Task | None) -> str:
        """Resource name of another task with results in an output folder; empty: there is none."""
        if not output_dir:
            return ""
        own = task.task_id if task else ""
        for task_id in self._records.tasks_with_outputs_below(output_dir.rstrip("/")):
            if task_id != own:
                return f"tasks/{task_id}"
        return ""


def _choose(asked: str, devices: Sequence[Device]) -> tuple[Device, list[Violation]]:
    by_id = {device.id: device for device in devices}
    if asked in by_id:
        return by_id[asked], []
    fallback = by_id[choose_device(list(devices))]
    if not asked:
        return fallback, []
    text = Text(
        f"must be one of {', '.join(by_id)}, not {asked!r}",
        f"必须是 {'、'.join(by_id)} 之一，而不是 {asked!r}",
    )
    return fallback, [Violation("device", text, "DEVICE_NOT_FOUND", suggested=fallback.id)]

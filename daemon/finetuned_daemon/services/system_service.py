"""SystemService: decode, call, encode."""

from __future__ import annotations

import asyncio
import os
import platform
import sqlite3
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from grpc import aio

from finetuned._version import __version__
from finetuned.v1 import system_service_pb2, system_service_pb2_grpc
from finetuned_daemon.backups import DailyBackups
from finetuned_daemon.config import Config
from finetuned_daemon.devices import Look, Looks
from finetuned_daemon.errors import InvalidRequest, Stopping
from finetuned_daemon.events.build import timestamp
from finetuned_daemon.limits import LIMITS, Limits
from finetuned_daemon.manager import Manager
from finetuned_daemon.notify.notifier import Notifier
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.runs.standby import StandbyStatus
from finetuned_daemon.services import convert
from finetuned_daemon.services.edge import language
from finetuned_daemon.services.paging import within
from finetuned_daemon.tasks import TaskState, now_us

if TYPE_CHECKING:
    from finetuned_daemon.environment.environment import Environment

_INTERVAL = 2.0
_SHORTEST = 0.5
_LONGEST = 60
_PACE_SECONDS = 0.25
"""The least time between two messages of WatchDevices."""

_Context = aio.ServicerContext[Any, Any]


class SystemService(system_service_pb2_grpc.SystemServiceServicer):
    """The daemon itself and the machine it runs on."""

    def __init__(
        self,
        config: Config,
        manager: Manager,
        quota: Quota,
        environment: Environment,
        limits: Limits,
        backups: DailyBackups,
        looks: Looks,
        notifier: Notifier,
        *,
        addresses: Sequence[str],
        schema_version: int,
        stopping: asyncio.Event,
    ) -> None:
        self._manager = manager
        self._quota = quota
        self._environment = environment
        self._limits = limits
        self._backups = backups
        self._stopping = stopping
        self._looks = looks
        self._notifier = notifier
        self._still = _still(config, limits, addresses, schema_version)

    async def GetSystemInfo(  # noqa: N802, D102 - described in the proto, as all rpcs here
        self, request: system_service_pb2.GetSystemInfoRequest, context: _Context
    ) -> system_service_pb2.GetSystemInfoResponse:
        occupancy = self._manager.records.occupancy().values()
        backup_time = self._backups.last_time
        for limit in self._still.limits:
            used = self._limits.used(limit.name)
            if used is not None:
                limit.used = used
        answer = system_service_pb2.GetSystemInfoResponse(
            running_tasks=sum(bool(running) for running, _ in occupancy),
            queued_tasks=sum(queued for _, queued in occupancy),
            last_backup_time=None if backup_time is None else timestamp(backup_time),
            paused_tasks=self._manager.records.count(TaskState.PAUSED),
            pending_notifications=self._notifier.pending,
            failed_notifications=self._notifier.given_up,
            standby=_standby(self._manager.runs.standby),
        )
        answer.MergeFrom(self._still)
        return answer

    async def ListDevices(  # noqa: N802, D102
        self, request: system_service_pb2.ListDevicesRequest, context: _Context
    ) -> system_service_pb2.ListDevicesResponse:
        look = await self._looks.look()
        return system_service_pb2.ListDevicesResponse(devices=self._devices(look))

    async def WatchDevices(  # noqa: N802, D102
        self, request: system_service_pb2.WatchDevicesRequest, context: _Context
    ) -> AsyncIterator[system_service_pb2.WatchDevicesResponse]:
        interval = request.interval_seconds
        violations = within("interval_seconds", interval, _SHORTEST, _LONGEST) if interval else []
        if violations:
            raise InvalidRequest(violations)
        with self._manager.changes.device_bell() as bell:
            while not self._stopping.is_set():
                bell.clear()
                look = await self._looks.look()
                yield system_service_pb2.WatchDevicesResponse(
                    devices=self._devices(look), time=timestamp(look.time)
                )
                # Many changes at once are one: its use is measured over a while anyhow.
                await _rung(self._stopping, _PACE_SECONDS)
                await _rung(bell, (interval or _INTERVAL) - _PACE_SECONDS)
        raise Stopping

    async def CheckEnvironment(  # noqa: N802, D102
        self, request: system_service_pb2.CheckEnvironmentRequest, context: _Context
    ) -> system_service_pb2.CheckEnvironmentResponse:
        report = await self._environment.check(refresh=request.refresh)
        return convert.environment(report, language(context))

    async def GetQuota(  # noqa: N802, D102
        self, request: system_service_pb2.GetQuotaRequest, context: _Context
    ) -> system_service_pb2.GetQuotaResponse:
        return system_service_pb2.GetQuotaResponse(
            limit=self._quota.limit, used=self._quota.used, reserved=self._quota.reserved()
        )

    async def Shutdown(  # noqa: N802, D102
        self, request: system_service_pb2.ShutdownRequest, context: _Context
    ) -> system_service_pb2.ShutdownResponse:
        self._stopping.set()
        return system_service_pb2.ShutdownResponse()

    def _devices(self, look: Look) -> list[system_service_pb2.Device]:
        occupancy = self._manager.records.occupancy()
        result = list[system_service_pb2.Device]()
        for device in look.devices:
            running, queued = occupancy.get(device.id, ("", 0))
            result.append(
                convert.device(
                    device, running_task=f"tasks/{running}" if running else "", queued=queued
                )
            )
        return result


def _still(
    config: Config, limits: Limits, addresses: Sequence[str], schema_version: int
) -> system_service_pb2.GetSystemInfoResponse:
    """What of GetSystemInfo does not change while the daemon serves, but for use of the limits."""
    return system_service_pb2.GetSystemInfoResponse(
        version=__version__,
        pid=os.getpid(),
        addresses=addresses,
        state_dir=str(config.paths.state_dir),
        runtime_dir=str(config.paths.runtime_dir),
        start_time=timestamp(now_us()),
        runner_python=config.runner_python,
        python_version=platform.python_version(),
        sqlite_version=sqlite3.sqlite_version,
        platform=f"{sys.platform}-{platform.release()}-{platform.machine()}",
        schema_version=schema_version,
        limits=[
            system_service_pb2.Limit(name=limit.name, value=limits[limit.name], unit=limit.unit)
            for limit in LIMITS
        ],
        log_path=str(config.paths.log_file),
    )


def _standby(status: StandbyStatus) -> system_service_pb2.Standby:
    return system_service_pb2.Standby(
        state=system_service_pb2.StandbyState.Value(f"STANDBY_STATE_{status.state.name}"),
        pid=status.pid,
        memory_bytes=status.memory_bytes,
        ready_time=timestamp(status.ready_time) if status.ready_time else None,
        started_runs=status.started_runs,
    )


async def _rung(bell: asyncio.Event, seconds: float) -> None:
    """Returns once it is set, or time is up."""
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await bell.wait()

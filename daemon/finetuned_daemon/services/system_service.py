"""SystemService: decode, call, encode."""

from __future__ import annotations

import asyncio
import os
import platform
import sqlite3
import sys
from collections.abc import Callable, Sequence
from typing import Any

from grpc import aio

from finetuned._version import __version__
from finetuned.v1 import system_service_pb2, system_service_pb2_grpc
from finetuned_daemon.backups import DailyBackups
from finetuned_daemon.config import Config
from finetuned_daemon.devices import list_devices
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.events.build import timestamp
from finetuned_daemon.limits import LIMITS, Limits
from finetuned_daemon.manager import Manager
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.services import convert
from finetuned_daemon.services.edge import language
from finetuned_daemon.tasks import TaskState, now_us

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
        *,
        addresses: Sequence[str],
        schema_version: int,
        shut_down: Callable[[], None],
    ) -> None:
        self._config = config
        self._manager = manager
        self._quota = quota
        self._environment = environment
        self._limits = limits
        self._backups = backups
        self._addresses = addresses
        self._schema_version = schema_version
        self._shut_down = shut_down
        self._start_time = now_us()

    async def GetSystemInfo(  # noqa: N802, D102 - described in the proto, as all rpcs here
        self, request: system_service_pb2.GetSystemInfoRequest, context: _Context
    ) -> system_service_pb2.GetSystemInfoResponse:
        runs = [run for runs in self._manager.runs.active().values() for run, _ in runs]
        backup_time = self._backups.last_time
        return system_service_pb2.GetSystemInfoResponse(
            version=__version__,
            pid=os.getpid(),
            addresses=self._addresses,
            state_dir=str(self._config.paths.state_dir),
            runtime_dir=str(self._config.paths.runtime_dir),
            start_time=timestamp(self._start_time),
            runner_python=self._config.runner_python,
            python_version=platform.python_version(),
            sqlite_version=sqlite3.sqlite_version,
            platform=f"{sys.platform}-{platform.release()}-{platform.machine()}",
            running_tasks=sum(run.state is TaskState.RUNNING for run in runs),
            queued_tasks=sum(run.state is TaskState.QUEUED for run in runs),
            schema_version=self._schema_version,
            last_backup_time=None if backup_time is None else timestamp(backup_time),
            limits=[
                system_service_pb2.Limit(
                    name=limit.name,
                    value=self._limits[limit.name],
                    used=self._limits.used(limit.name),
                    unit=limit.unit,
                )
                for limit in LIMITS
            ],
            log_path=str(self._config.paths.log_file),
            paused_tasks=len(self._manager.records.paused_runs()),
        )

    async def ListDevices(  # noqa: N802, D102
        self, request: system_service_pb2.ListDevicesRequest, context: _Context
    ) -> system_service_pb2.ListDevicesResponse:
        devices = await asyncio.to_thread(list_devices)
        active = self._manager.runs.active()
        return system_service_pb2.ListDevicesResponse(
            devices=[
                convert.device(
                    device,
                    running_task=next(
                        (
                            task.name
                            for run, task in active.get(device.id, [])
                            if run.state is TaskState.RUNNING
                        ),
                        "",
                    ),
                    queued=sum(
                        run.state is TaskState.QUEUED for run, _ in active.get(device.id, [])
                    ),
                )
                for device in devices
            ]
        )

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
        self._shut_down()
        return system_service_pb2.ShutdownResponse()

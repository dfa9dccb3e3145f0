"""The devices of this machine, from NVML and psutil; never from torch."""

from __future__ import annotations

import asyncio
import logging
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

_log = logging.getLogger(__name__)

CPU = "cpu"

_SAME_MOMENT_SECONDS = 0.25


class DeviceType(StrEnum):
    """Kind of a device; names as in `finetuned.v1.DeviceType`."""

    CPU = "CPU"
    CUDA = "CUDA"


@dataclass(frozen=True, kw_only=True)
class Device:
    """A device that a task can run on; fields as in `finetuned.v1.Device`."""

    id: str
    type: DeviceType
    product_name: str
    memory_total_bytes: int
    memory_free_bytes: int
    utilization: float | None = None
    cores: int = 0
    compute_capability: str = ""
    driver_version: str = ""
    temperature_celsius: float | None = None
    power_watts: float | None = None


def list_devices() -> list[Device]:
    """All devices, GPUs first, the CPU last."""
    return [*_gpus(), _cpu()]


def choose_device(devices: list[Device]) -> str:
    """The device of a task that asks for none: the first GPU, else the CPU."""
    return devices[0].id


def _cpu() -> Device:
    import psutil  # at the first look: a daemon starts sooner without it

    memory = psutil.virtual_memory()
    return Device(
        id=CPU,
        type=DeviceType.CPU,
        product_name=_cpu_name(),
        memory_total_bytes=memory.total,
        memory_free_bytes=memory.available,
        utilization=psutil.cpu_percent() / 100,
        cores=len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1,
    )


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor() or platform.machine()


def _gpus() -> list[Device]:
    try:
        import pynvml as nvml
    except ImportError:
        return []
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:  # no driver: the usual case on a machine without a GPU
        return []
    try:
        driver = str(nvml.nvmlSystemGetDriverVersion())
        return [
            _gpu(nvml, nvml.nvmlDeviceGetHandleByIndex(index), index, driver)
            for index in range(nvml.nvmlDeviceGetCount())
        ]
    except nvml.NVMLError as error:
        _log.warning("NVML lists no devices: %s", error)
        return []
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, handle: Any, index: int, driver: str) -> Device:
    memory = nvml.nvmlDeviceGetMemoryInfo(handle)
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)

    def told(look: Callable[[], float]) -> float | None:
        try:
            return look()
        except nvml.NVMLError:  # not told by every card, nor for a MIG slice
            return None

    return Device(
        id=f"cuda:{index}",
        type=DeviceType.CUDA,
        product_name=str(nvml.nvmlDeviceGetName(handle)),
        memory_total_bytes=int(memory.total),
        memory_free_bytes=int(memory.free),
        utilization=told(lambda: nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100),
        compute_capability=f"{major}.{minor}",
        driver_version=driver,
        temperature_celsius=told(
            lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)
        ),
        power_watts=told(lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1000),
    )


@dataclass(frozen=True)
class Look:
    """The devices as they were at a moment."""

    devices: list[Device]
    time: int
    """Microseconds since the epoch."""


class Looks:
    """Looks at the devices for many at once: those who ask at the same moment share one look.

    The use of the CPU is measured from one look to the next, so that two right behind each other
    would say nothing.
    """

    def __init__(self) -> None:
        self._look: asyncio.Task[Look] | None = None
        self._until = 0.0

    async def look(self) -> Look:
        """The devices as they are now, or were a moment ago."""
        if self._look is None or time.monotonic() > self._until:
            self._until = math.inf  # as long as it takes
            self._look = asyncio.create_task(self._begin())
        return await asyncio.shield(self._look)

    async def _begin(self) -> Look:
        try:
            devices = await asyncio.to_thread(list_devices)
            return Look(devices, time.time_ns() // 1000)
        finally:
            self._until = time.monotonic() + _SAME_MOMENT_SECONDS

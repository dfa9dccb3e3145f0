"""Judges what was found: one item for each thing. Pure; asks nobody."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import InvalidVersion, Version

from finetuned._version import __version__
from finetuned_daemon.devices import Device, DeviceType
from finetuned_daemon.environment.capability import BITSANDBYTES
from finetuned_daemon.environment.model import Capability, CheckStatus, Item
from finetuned_daemon.environment.probe import Probe
from finetuned_daemon.environment.python import Inventory
from finetuned_daemon.environment.requirements import (
    DISTRIBUTION,
    EXTRA,
    LOW_BIT_EXTRA,
    requirements,
)
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import extra_packages
from finetuned_daemon.texts import NOTHING, Text

_DISK_WARNING_BYTES = 5 << 30
_DISK_ERROR_BYTES = 200 << 20


def _command(python: str, *arguments: str) -> Text:
    command = shlex.join([python, "-m", "pip", "install", *arguments])
    return Text(command, command)


def unusable_python(why: Text) -> Item:
    """The training environment's Python gives no answer."""
    return Item(
        name="python",
        status=CheckStatus.ERROR,
        wanted=str(requirements().python),
        message=Text(
            f"the Python that runs train with can't be used: {why.en}",
            f"用于训练的 Python 无法使用：{why.zh}",
        ),
        remedy=_other_python(),
        reason="PYTHON_UNUSABLE",
    )


def _other_python() -> Text:
    wanted = str(requirements().python)
    return Text(
        f"start the daemon with --runner-python and the path of a Python {wanted}",
        f"用 --runner-python 指定一个 Python {wanted} 的路径，然后重新启动守护进程",
    )


# --- Python and packages


def judge_packages(
    python: str, found: Inventory, *, has_gpu: bool, needs_bitsandbytes: bool = False
) -> Iterator[Item]:
    """Python, this distribution, and each package that training needs.

    Args:
        python: The training environment's.
        found: What is in it.
        has_gpu: On a GPU few do without bitsandbytes.
        needs_bitsandbytes: It is for a run that can't do without.
    """
    wanted = requirements().python
    if not wanted.contains(found.python, prereleases=True):
        yield Item(
            name="python",
            status=CheckStatus.ERROR,
            found=found.python,
            wanted=str(wanted),
            message=Text(
                f"{python} is Python {found.python}, too old to train with",
                f"{python} 是 Python {found.python}，版本过低，无法训练",
            ),
            remedy=_other_python(),
            reason="PYTHON_TOO_OLD",
        )
        return  # its packages are beside the point
    yield Item(name="python", found=found.python, wanted=str(wanted))
    yield _judge_own(python, found.packages.get(DISTRIBUTION))
    for requirement in requirements().packages:
        yield _judge_package(python, requirement, found.packages.get(requirement.name))
    yield _judge_bitsandbytes(
        python, found.packages.get(BITSANDBYTES), has_gpu=has_gpu, needed=needs_bitsandbytes
    )


def _judge_own(python: str, found: str | None) -> Item:
    wanted = f"=={__version__}"
    if found == __version__:
        return Item(name=DISTRIBUTION, found=found, wanted=wanted)
    if found is None:
        message = Text(
            f"{DISTRIBUTION} itself is not installed in {python}",
            f"{python} 中没有安装 {DISTRIBUTION} 本身",
        )
    else:
        message = Text(
            f"the runner has version {found}, and this daemon {__version__}",
            f"训练端的版本为 {found}，而守护进程的版本为 {__version__}",
        )
    return Item(
        name=DISTRIBUTION,
        status=CheckStatus.ERROR,
        found=found or "",
        wanted=wanted,
        message=message,
        remedy=_command(python, f"{DISTRIBUTION}[{EXTRA}]=={__version__}"),
        reason="PACKAGE_MISSING" if found is None else "VERSION_DIFFERS",
    )


def _judge_package(python: str, requirement: Requirement, found: str | None) -> Item:
    name, wanted = requirement.name, str(requirement.specifier)
    if found is None:
        return Item(
            name=name,
            status=CheckStatus.ERROR,
            wanted=wanted,
            message=Text(f"{name} is not installed in {python}", f"{python} 中没有安装 {name}"),
            remedy=_command(python, f"{DISTRIBUTION}[{EXTRA}]"),
            reason="PACKAGE_MISSING",
        )
    try:
        version = Version(found)
    except InvalidVersion:
        return broken_package(python, name, found, "no readable version")
    failed = [part for part in requirement.specifier if not part.contains(version, True)]
    if not failed:
        return Item(name=name, found=found, wanted=wanted)
    is_old = any(part.operator in (">=", ">", "~=") for part in failed)
    return Item(
        name=name,
        status=CheckStatus.ERROR,
        found=found,
        wanted=wanted,
        message=Text(
            f"{name} {found} is too {'old' if is_old else 'new'}",
            f"{name} {found} 版本过{'低' if is_old else '高'}",
        ),
        remedy=_command(python, f"{name}{wanted}"),
        reason="PACKAGE_TOO_OLD" if is_old else "PACKAGE_TOO_NEW",
    )


def _judge_bitsandbytes(python: str, found: str | None, *, has_gpu: bool, needed: bool) -> Item:
    requirement = requirements().bitsandbytes
    if found is not None:
        item = _judge_package(python, requirement, found)
        is_wrong = item.status is CheckStatus.ERROR
        return replace(item, status=CheckStatus.WARNING) if is_wrong and not needed else item
    if needed:
        status, message = (
            CheckStatus.ERROR,
            Text(
                f"{BITSANDBYTES} is not installed in {python}: QLoRA and 8-bit optimizers need it",
                f"{python} 中没有安装 {BITSANDBYTES}：QLoRA 与 8-bit 优化器需要它",
            ),
        )
    else:
        status, message = (
            CheckStatus.WARNING if has_gpu else CheckStatus.OK,
            Text(
                "not installed: QLoRA and 8-bit optimizers need it, all else runs without",
                "未安装：QLoRA 与 8-bit 优化器需要它，其他功能不受影响",
            ),
        )
    return Item(
        name=BITSANDBYTES,
        status=status,
        wanted=str(requirement.specifier),
        message=message,
        remedy=_command(python, f"{DISTRIBUTION}[{LOW_BIT_EXTRA}]"),
        reason="PACKAGE_MISSING",
    )


def judge_extra_packages(python: str, found: Inventory, parameters: Parameters) -> Iterator[Item]:
    """The packages that a run needs for an extension, and the environment lacks."""
    for field, package in extra_packages(parameters).items():
        if not any(name in found.packages for name in package.distributions):
            yield Item(
                name=package.name,
                status=CheckStatus.ERROR,
                message=Text(
                    f"{package.name} is not installed in {python}: {field} needs it",
                    f"{python} 中没有安装 {package.name}：{field} 需要它",
                ),
                remedy=_command(python, package.name),
                reason="PACKAGE_MISSING",
            )


# --- the probe


def failed_probe(why: Text) -> Item:
    """The training environment has its packages, and the probe gives no answer."""
    return Item(
        name="probe",
        status=CheckStatus.ERROR,
        message=Text(
            f"the training environment could not be asked: {why.en}",
            f"无法查询训练环境：{why.zh}",
        ),
        remedy=Text("look into the daemon's log, then check again", "查看守护进程日志后重新检查"),
        reason="PROBE_FAILED",
    )


def broken_package(python: str, name: str, found: str, error: str, *, needed: bool = True) -> Item:
    """A package is installed and can't be imported."""
    return Item(
        name=name,
        status=CheckStatus.ERROR if needed else CheckStatus.WARNING,
        found=found,
        message=Text(f"{name} can't be imported: {error}", f"{name} 无法导入：{error}"),
        remedy=_command(python, "--force-reinstall", name),
        reason="PACKAGE_BROKEN",
    )


def with_failures(
    items: Sequence[Item], python: str, probe: Probe, *, needs_bitsandbytes: bool = False
) -> list[Item]:
    """The items of packages, those that can't be imported in place of what was said of them."""
    return [
        broken_package(
            python,
            item.name,
            item.found,
            probe.failures[item.name],
            needed=needs_bitsandbytes or item.name != BITSANDBYTES,
        )
        if item.name in probe.failures
        else item
        for item in items
    ]


# --- devices


def judge_driver(python: str, gpus: Sequence[Device], probe: Probe | None) -> Item:
    """Whether torch can use the GPUs that the driver lists."""
    if not gpus:
        text = Text("no NVIDIA GPU: training runs on the CPU", "没有 NVIDIA GPU：将在 CPU 上训练")
        return Item(name="driver", message=text)
    found = gpus[0].driver_version
    if probe is None or probe.devices:
        return Item(name="driver", found=found)
    torch = probe.versions.get("torch", "")
    if not probe.cuda_build:
        return Item(
            name="driver",
            status=CheckStatus.ERROR,
            found=found,
            message=Text(
                f"torch {torch} is built for the CPU alone and can't use the GPU",
                f"torch {torch} 是仅支持 CPU 的版本，无法使用 GPU",
            ),
            remedy=_command(python, "--force-reinstall", *_torch()),
            reason="GPU_UNUSABLE",
        )
    if "too old" in probe.cuda_problem:
        return Item(
            name="driver",
            status=CheckStatus.ERROR,
            found=found,
            wanted=f"CUDA {probe.cuda_build}",
            message=Text(
                f"the driver is too old for torch {torch}, built for CUDA {probe.cuda_build}",
                f"驱动版本过低，不支持为 CUDA {probe.cuda_build} 构建的 torch {torch}",
            ),
            remedy=Text(
                "update the NVIDIA driver, or install a torch built for an older CUDA",
                "更新 NVIDIA 驱动，或安装为较低版本 CUDA 构建的 torch",
            ),
            reason="DRIVER_TOO_OLD",
        )
    return Item(
        name="driver",
        status=CheckStatus.ERROR,
        found=found,
        message=Text(
            f"torch can't use the GPU: {probe.cuda_problem or 'it finds none'}",
            f"torch 无法使用 GPU：{probe.cuda_problem or '没有找到 GPU'}",
        ),
        remedy=Text(
            "restart the machine, so that driver and kernel module are of one version",
            "重新启动机器，使驱动与内核模块版本一致",
        ),
        reason="GPU_UNUSABLE",
    )


def _torch() -> list[str]:
    return [f"{r.name}{r.specifier}" for r in requirements().packages if r.name == "torch"]


def judge_device(python: str, device: Device, probe: Probe | None, can: Capability) -> Item:
    """One device: what it is and can do, or why torch can't use it."""
    name = f"device/{device.id}"
    if device.type is DeviceType.CPU or probe is None:
        return Item(name=name, found=_describe(device, can))
    probed = probe.device(device.id)
    if probed is not None and probed.supported:
        return Item(name=name, found=_describe(device, can))
    if probed is None:
        text = Text(f"torch can't use {device.id}", f"torch 无法使用 {device.id}")
        remedy = NOTHING  # the driver's item has it
    else:
        torch, capability = probe.versions.get("torch", ""), probed.compute_capability
        text = Text(
            f"torch {torch} holds no code for compute capability {capability}",
            f"torch {torch} 不包含计算能力 {capability} 的代码",
        )
        remedy = _command(python, "--force-reinstall", *_torch())
    return Item(
        name=name,
        status=CheckStatus.ERROR,
        found=device.product_name,
        message=text,
        remedy=remedy,
        reason="GPU_UNUSABLE",
    )


def _describe(device: Device, can: Capability) -> str:
    abilities = {
        "bf16": can.bf16,
        "fp16": can.fp16,
        "TF32": can.tf32,
        "4-bit": can.four_bit,
        "8-bit": can.eight_bit_optimizer,
    }
    return f"{device.product_name}: {', '.join(name for name, has in abilities.items() if has)}"


# --- disk


def judge_disk(state_dir: Path, free_bytes: int) -> Item:
    """Room for the database and run folders."""
    found, wanted = f"{free_bytes / (1 << 30):.1f} GiB", f">={_DISK_WARNING_BYTES >> 30} GiB"
    if free_bytes >= _DISK_WARNING_BYTES:
        return Item(name="disk", found=found, wanted=wanted)
    is_full = free_bytes < _DISK_ERROR_BYTES
    return Item(
        name="disk",
        status=CheckStatus.ERROR if is_full else CheckStatus.WARNING,
        found=found,
        wanted=wanted,
        message=Text(
            f"{free_bytes >> 20} MiB are free where {state_dir} lies",
            f"{state_dir} 所在磁盘仅剩 {free_bytes >> 20} MiB",
        ),
        remedy=Text(
            "make room there, or start the daemon with --state-dir on another disk",
            "清理该磁盘，或用 --state-dir 把状态目录放到其他磁盘上",
        ),
        reason="DISK_LOW",
    )

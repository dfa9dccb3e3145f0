"""What a device can do, from the best that is known of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from finetuned_daemon.devices import Device, DeviceType
from finetuned_daemon.environment.model import Capability
from finetuned_daemon.environment.probe import Probe

BITSANDBYTES = "bitsandbytes"

_AMPERE = (8, 0)
"""The compute capability from which on there are bf16, TF32 and what QLoRA is offered for."""

CPU_CAPABILITY = Capability(
    bf16=True, fp16=False, tf32=False, four_bit=True, eight_bit_optimizer=True
)
"""bitsandbytes computes on the CPU, too."""


def has_bitsandbytes(probe: Probe | None, packages: Mapping[str, str] | None) -> bool:
    """Whether bitsandbytes can be used, as far as is known; arguments as of `capabilities`."""
    is_broken = probe is not None and BITSANDBYTES in probe.failures
    return not is_broken and (packages is None or BITSANDBYTES in packages)


def capabilities(
    device: Device, probe: Probe | None, packages: Mapping[str, str] | None
) -> Capability:
    """What can be done on a device, with the packages that are there.

    Args:
        device: The device, as NVML and psutil list it.
        probe: The answer of the training environment; None: it was not asked yet.
        packages: Versions of the packages that the training environment has; None: not known,
            and what may be there is not refused.
    """
    probed = probe.device(device.id) if probe else None
    if probed is not None:
        return Capability(
            bf16=probed.bf16,
            fp16=probed.fp16,
            tf32=probed.tf32,
            four_bit=probed.four_bit,
            eight_bit_optimizer=probed.eight_bit_optimizer,
        )
    can = device_capability(device)
    if has_bitsandbytes(probe, packages):
        return can
    return replace(can, four_bit=False, eight_bit_optimizer=False)


def device_capability(device: Device) -> Capability:
    """What a device can do where every package is there."""
    if device.type is DeviceType.CPU:
        return CPU_CAPABILITY
    major, _, minor = device.compute_capability.partition(".")
    is_ampere = (int(major), int(minor)) >= _AMPERE
    return Capability(
        bf16=is_ampere,
        fp16=True,
        tf32=is_ampere,
        four_bit=is_ampere,
        eight_bit_optimizer=is_ampere,
    )

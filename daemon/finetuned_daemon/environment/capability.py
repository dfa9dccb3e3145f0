"""What a device can do, from the best that is known of it."""

from __future__ import annotations

from collections.abc import Mapping

from finetuned_daemon.devices import Device, DeviceType
from finetuned_daemon.environment.model import Capability
from finetuned_daemon.environment.probe import Probe

BITSANDBYTES = "bitsandbytes"

_AMPERE = (8, 0)
"""The compute capability from which on there are bf16, TF32 and what QLoRA is offered for."""

_CPU = Capability(bf16=True, fp16=False, tf32=False, four_bit=False, eight_bit_optimizer=False)


def capabilities(
    device: Device, probe: Probe | None, packages: Mapping[str, str] | None
) -> Capability:
    """What a device can do.

    Args:
        device: The device, as NVML and psutil list it.
        probe: The answer of the training environment; None: it was not asked yet.
        packages: Versions of the packages that the training environment has; None: not known,
            and what may be there is not refused.
    """
    if device.type is DeviceType.CPU:
        return _CPU
    probed = probe.device(device.id) if probe else None
    if probed is not None:
        return Capability(
            bf16=probed.bf16,
            fp16=probed.fp16,
            tf32=probed.tf32,
            four_bit=probed.four_bit,
            eight_bit_optimizer=probed.eight_bit_optimizer,
        )
    major, _, minor = device.compute_capability.partition(".")
    is_ampere = (int(major), int(minor)) >= _AMPERE
    has_bitsandbytes = packages is None or BITSANDBYTES in packages
    return Capability(
        bf16=is_ampere,
        fp16=True,
        tf32=is_ampere,
        four_bit=is_ampere and has_bitsandbytes,
        eight_bit_optimizer=is_ampere and has_bitsandbytes,
    )

"""What a check of the training environment says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetuned_daemon.texts import NOTHING, Text


class CheckStatus(StrEnum):
    """How a check came out; names as in `finetuned.v1.CheckStatus`, best first."""

    OK = "OK"
    WARNING = "WARNING"
    ERROR = "ERROR"


_STATUSES = list(CheckStatus)


@dataclass(frozen=True, kw_only=True)
class Item:
    """One thing that was checked; fields as in `finetuned.v1.EnvironmentItem`."""

    name: str
    status: CheckStatus = CheckStatus.OK
    found: str = ""
    wanted: str = ""
    message: Text = NOTHING
    remedy: Text = NOTHING
    reason: str = ""


def errors(items: Iterable[Item]) -> list[Item]:
    """Those with which nothing can be trained."""
    return [item for item in items if item.status is CheckStatus.ERROR]


@dataclass(frozen=True, kw_only=True)
class Capability:
    """What a device can do; fields as in `finetuned.v1.DeviceCapability`."""

    bf16: bool
    fp16: bool
    tf32: bool
    four_bit: bool
    eight_bit_optimizer: bool


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that was checked."""

    items: Sequence[Item]
    capabilities: Mapping[str, Capability]
    """By id of the device, GPUs first."""
    runner_python: str
    check_time: int
    """When the training environment was asked, in microseconds since the epoch."""

    @property
    def status(self) -> CheckStatus:
        """The gravest status of all items."""
        statuses = [item.status for item in self.items]
        return max(statuses, key=_STATUSES.index, default=CheckStatus.OK)


def in_a_sentence(items: Iterable[Item]) -> str:
    """What is wrong and what mends it, each remedy once, in English."""
    by_remedy = dict[str, list[str]]()
    for item in items:
        by_remedy.setdefault(item.remedy.en, []).append(item.message.en)
    return "; ".join(
        ", ".join(messages) + (f" (remedy: {remedy})" if remedy else "")
        for remedy, messages in by_remedy.items()
    )

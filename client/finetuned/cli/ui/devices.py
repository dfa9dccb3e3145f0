"""The devices: one a line where there is little room, else with bars and what runs on each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.text import Text
from textual.widgets import Static

from finetuned.cli.output import bytes_text
from finetuned.cli.ui.text import bar, cell, lines_of, one_line
from finetuned.v1.system_service_pb2 import Device
from finetuned.v1.task_pb2 import Task

_FULL_SHARE = 0.9
"""Of the memory, from which on it is shown as scarce."""


_FEW = 2
"""Devices that have a line each in a narrow terminal."""


class Devices(Static):
    """All devices with their memory and utilization."""

    def __init__(self) -> None:
        super().__init__(id="devices", markup=False)
        self.devices: Sequence[Device] = ()
        self._tasks: Mapping[str, Task] = {}

    def take(self, devices: Sequence[Device], tasks: Mapping[str, Task]) -> None:
        """Take what the daemon says; the next `redraw` shows it."""
        self.devices, self._tasks = devices, tasks

    def redraw(self) -> None:
        """Draw for the width that there is."""
        width = max(self.content_size.width, 20)
        is_wide = self.screen.has_class("-wide")
        self.screen.set_class(len(self.devices) > _FEW, "-many-devices")
        lines = [line for device in self.devices for line in self._block(device, width)]
        if is_wide and len(lines) > self.size.height:
            lines = [_brief(device, width) for device in self.devices]
        elif not is_wide and len(self.devices) > _FEW:
            parts = [_brief(device, width // 2 - 1) for device in self.devices]
            pairs = [parts[at : at + 2] for at in range(0, len(parts), 2)]
            lines = [Text("  ").join(pair) for pair in pairs]
        elif not is_wide:
            lines = [self._row(device) for device in self.devices]
        self.update(lines_of(lines))

    def on_resize(self) -> None:
        """The bars take what there is."""
        self.redraw()

    def _row(self, device: Device) -> Text:
        line = Text(f"{cell(device.id, 7)} ", style="bold", no_wrap=True, overflow="ellipsis")
        line = Text(no_wrap=True, overflow="ellipsis").append_text(line)
        line.append("mem ").append_text(bar(_memory(device), 8, _memory_style(device)))
        line.append(f" {_used(device)}")
        if device.HasField("utilization"):
            line.append("  use ").append_text(bar(device.utilization, 6, "cyan"))
            line.append(f" {device.utilization:.0%}")
        return line.append(_sensors(device), style="dim").append(f"  {self._work(device)}")

    def _block(self, device: Device, width: int) -> list[Text]:
        name = one_line(device.product_name)
        head = Text(no_wrap=True, overflow="ellipsis").append(device.id, style="bold")
        head.append(f"  {name}", style="dim")
        memory = Text("mem ", no_wrap=True, overflow="ellipsis")
        used = f" {_used(device)}"
        size = max(width - 4 - len(used), 4)
        memory.append_text(bar(_memory(device), size, _memory_style(device))).append(used)
        lines = [head, memory]
        if device.HasField("utilization"):
            share = f"{device.utilization:>{len(used)}.0%}"
            use = Text("use ", no_wrap=True).append_text(bar(device.utilization, size, "cyan"))
            lines.append(use.append(share))
        work = Text(no_wrap=True, overflow="ellipsis").append(self._work(device))
        lines.append(work.append(_sensors(device), style="dim"))
        return [*lines, Text("")]

    def _work(self, device: Device) -> str:
        task = self._tasks.get(device.running_task)
        name = one_line(task.display_name) if task is not None else device.running_task
        waiting = f", {device.queued_tasks} waiting" if device.queued_tasks else ""
        return (name or "free") + waiting


def _brief(device: Device, width: int) -> Text:
    """Name, memory and utilization in exactly so many cells; a star where a task runs on it."""
    use = f"{device.utilization:>5.0%}" if device.HasField("utilization") else " " * 5
    mark = "*" if device.running_task else " "
    figures = f" {_used(device):>14}{use}"
    size = max(width - 8 - len(figures), 1)
    memory = bar(_memory(device), size, _memory_style(device))
    return Text.assemble((cell(device.id, 7), "bold"), mark, memory, figures)


def _memory(device: Device) -> float:
    total = device.memory_total_bytes
    return (total - device.memory_free_bytes) / total if total else 0.0


def _memory_style(device: Device) -> str:
    return "red" if _memory(device) >= _FULL_SHARE else "green"


def _used(device: Device) -> str:
    used = device.memory_total_bytes - device.memory_free_bytes
    total = bytes_text(device.memory_total_bytes)
    number = float(total.split()[0])
    return f"{number * used / max(device.memory_total_bytes, 1):.1f}/{total}"


def _sensors(device: Device) -> str:
    parts: list[str] = []
    if device.HasField("temperature_celsius"):
        parts.append(f"{device.temperature_celsius:.0f} °C")
    if device.HasField("power_watts"):
        parts.append(f"{device.power_watts:.0f} W")
    return "".join(f"  {part}" for part in parts)

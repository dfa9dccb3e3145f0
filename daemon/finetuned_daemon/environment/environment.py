"""Checks the environment: asks, remembers what was answered, and judges."""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import Sequence

from pydantic import BaseModel, ConfigDict, ValidationError

from finetuned_daemon.config import Config
from finetuned_daemon.devices import CPU, Device, DeviceType, list_devices
from finetuned_daemon.environment.capability import (
    capabilities,
    device_capability,
    has_bitsandbytes,
)
from finetuned_daemon.environment.model import Capability, Item, Report, errors
from finetuned_daemon.environment.probe import Probe
from finetuned_daemon.environment.process import Unanswered, ask
from finetuned_daemon.environment.python import Inventory, TrainingPython
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import needs_bitsandbytes
from finetuned_daemon.runs.contract import write_record
from finetuned_daemon.tasks import now_us
from finetuned_daemon.texts import Text

_log = logging.getLogger(__name__)

PROBE_DEADLINE_SECONDS = 60.0
"""Imports take 3 s from a warm disk, and tens of seconds from a cold or remote one."""


class _Key(BaseModel):
    """What an answer holds for: as long as none of it changes, nothing is asked again."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    python: str
    python_stamp: int
    module: str
    packages: dict[str, str]


class _Answer(BaseModel):
    """A probe's answer as it is kept."""

    model_config = ConfigDict(frozen=True, defer_build=True)

    key: _Key
    gpus: tuple[str, ...]
    """The GPUs with their driver, as NVML lists them."""
    time: int
    """When it was asked, in microseconds since the epoch."""
    probe: Probe


class Environment:
    """The training environment: `Config.runner_python` and the machine around it.

    Its methods run on the event loop's thread.
    """

    def __init__(
        self, config: Config, *, probe_deadline_seconds: float = PROBE_DEADLINE_SECONDS
    ) -> None:
        self._config = config
        self._deadline = probe_deadline_seconds
        self._file = config.paths.state_dir / "environment.json"
        self._python = TrainingPython(config.runner_python, config.paths.state_dir)
        self._answer: _Answer | None = None
        self._was_read = False
        self._probing: asyncio.Task[_Answer | Unanswered] | None = None

    async def close(self) -> None:
        """Ends a probe that is under way."""
        if self._probing is not None:
            self._probing.cancel()
            await asyncio.wait([self._probing])

    # --- what is known without waiting

    def known(self) -> Probe | None:
        """What the training environment last said of itself; None: that is of no use any more."""
        answer = self._known()
        return answer.probe if answer else None

    def capability(self, device: Device) -> Capability:
        """What a device can do; what packages it takes for that is another question."""
        return device_capability(device)

    def has_bitsandbytes(self) -> bool:
        """Whether bitsandbytes can be used, from what is known; not known: yes."""
        found = self._python.known()
        return has_bitsandbytes(self.known(), found.packages if found else None)

    def packages(self) -> frozenset[str] | None:
        """The packages that it has, of those that we ask for; None: it has not said so yet."""
        found = self._python.known()
        return frozenset(found.packages) if found else None

    def model_types(self) -> frozenset[str] | None:
        """`model_type`s that the training environment knows; None: it has not said so yet."""
        probe = self.known()
        return frozenset(probe.model_types) if probe and probe.model_types else None

    # --- checks

    async def check(self, *, refresh: bool = False) -> Report:
        """Checks everything; waits for the probe where its answer is not known.

        Args:
            refresh: Ask the training environment again, whatever is known.
        """
        # With the first check: a daemon starts sooner without the parser of requirements.
        from finetuned_daemon.environment import items as judging

        devices = await asyncio.to_thread(list_devices)
        has_gpu = any(device.type is DeviceType.CUDA for device in devices)
        path = self._config.runner_python
        found: Inventory | None = None
        probe: Probe | None = None
        time = now_us()
        packages = list[Item]()
        try:
            found = await self._python.ask(anew=refresh)
        except Unanswered as error:
            packages.append(judging.unusable_python(error.text))
        else:
            packages += judging.judge_packages(path, found, has_gpu=has_gpu)
        if found is not None and not errors(packages):
            answer = await self._asked(found, devices, refresh=refresh)
            if isinstance(answer, Unanswered):
                packages.append(judging.failed_probe(answer.text))
            else:
                probe, time = answer.probe, answer.time
                packages = judging.with_failures(packages, path, probe)
        can = {
            device.id: capabilities(device, probe, found.packages if found else None)
            for device in devices
        }
        return Report(
            items=[
                *packages,
                judging.judge_driver(path, _gpus(devices), _with_torch(probe)),
                *(
                    judging.judge_device(path, device, _with_torch(probe), can[device.id])
                    for device in devices
                ),
                await self._judge_disk(),
            ],
            capabilities=can,
            runner_python=path,
            check_time=time,
        )

    async def probe(self) -> Probe | None:
        """What the training environment says of itself; waits for it. None: it says nothing."""
        try:
            found = await self._python.ask()
        except Unanswered:
            return None
        answer = await self._asked(found, (), refresh=False)
        return None if isinstance(answer, Unanswered) else answer.probe

    async def before_start(self, parameters: Parameters, device: str) -> list[Item]:
        """What keeps a run from training on a device; empty: nothing that is known.

        A start does not wait for imports: where the probe's answer is not known, or an error, it
        is asked in the background for the next one.
        """
        from finetuned_daemon.environment import items as judging

        path = self._config.runner_python
        try:
            found = await self._python.ask()
        except Unanswered as error:
            return [judging.unusable_python(error.text)]
        needed = needs_bitsandbytes(parameters)
        packages = list(
            judging.judge_packages(path, found, has_gpu=device != CPU, needs_bitsandbytes=needed)
        )
        packages += judging.judge_extra_packages(path, found, parameters)
        if errors(packages):
            return errors(packages)
        devices = await asyncio.to_thread(list_devices) if device != CPU else ()
        answer = self._known(devices)
        if answer is None or _is_wrong(answer.probe, devices):
            self._begin(found)
        on_device = list[Item]()
        if answer is not None:
            probe = answer.probe
            packages = judging.with_failures(packages, path, probe, needs_bitsandbytes=needed)
            if device != CPU:
                on_device.append(judging.judge_driver(path, _gpus(devices), _with_torch(probe)))
            if not errors(on_device):
                on_device += [
                    judging.judge_device(
                        path, d, _with_torch(probe), capabilities(d, probe, found.packages)
                    )
                    for d in devices
                    if d.id == device
                ]
        return errors([*packages, *on_device, await self._judge_disk()])

    async def _judge_disk(self) -> Item:
        from finetuned_daemon.environment import items as judging

        state_dir = self._config.paths.state_dir
        free = (await asyncio.to_thread(shutil.disk_usage, state_dir)).free
        return judging.judge_disk(state_dir, free)

    # --- the probe

    def _known(self, devices: Sequence[Device] = ()) -> _Answer | None:
        """The last answer, if it holds still; with devices, if it was given with the same GPUs."""
        found = self._python.known()
        if found is None:
            return None
        if not self._was_read:
            self._was_read = True
            self._answer = self._read()
        answer = self._answer
        if answer is None or answer.key != self._key(found):
            return None
        if devices and answer.gpus != _describe(devices):
            return None
        return answer

    async def _asked(
        self, found: Inventory, devices: Sequence[Device], *, refresh: bool
    ) -> _Answer | Unanswered:
        known = None if refresh else self._known(devices)
        # An error is asked again: what is wrong may have been mended by now.
        if known is not None and not _is_wrong(known.probe, devices):
            return known
        return await asyncio.shield(self._begin(found))

    def _begin(self, found: Inventory) -> asyncio.Task[_Answer | Unanswered]:
        """The probe that is under way, or a new one: never two at once."""
        if self._probing is None or self._probing.done():
            self._probing = asyncio.get_running_loop().create_task(self._ask(self._key(found)))
        return self._probing

    async def _ask(self, key: _Key) -> _Answer | Unanswered:
        devices = await asyncio.to_thread(list_devices)
        time = now_us()
        command = [key.python, "-P", "-m", key.module, "--probe"]
        try:
            said = await ask(command, seconds=self._deadline, cwd=self._config.paths.state_dir)
            probe = Probe.model_validate_json(said)
        except Unanswered as error:
            _log.warning("the training environment gives no answer: %s", error)
            return error
        except ValidationError as error:
            _log.warning("the training environment answers what is no probe: %s", error)
            return Unanswered(Text("what it answers can't be understood", "无法理解其应答的内容"))
        answer = _Answer(key=key, gpus=_describe(devices), time=time, probe=probe)
        self._answer, self._was_read = answer, True
        try:
            if _is_wrong(probe, devices):
                # The next daemon asks again: it may be there because the machine was restarted.
                self._file.unlink(missing_ok=True)
            else:
                write_record(self._file, answer)
        except OSError as error:  # a full disk
            _log.warning("%s can't be written: %s", self._file, error)
        return answer

    def _read(self) -> _Answer | None:
        try:
            return _Answer.model_validate_json(self._file.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            _log.warning("%s can't be read, the environment is asked anew: %s", self._file, error)
            return None

    def _key(self, found: Inventory) -> _Key:
        return _Key(
            python=self._config.runner_python,
            python_stamp=self._python.stamp(),
            module=self._config.runner_module,
            packages=found.packages,
        )


def _with_torch(probe: Probe | None) -> Probe | None:
    """A probe that can say something of devices: one in which torch could be imported."""
    return None if probe is None or "torch" in probe.failures else probe


def _is_wrong(probe: Probe, devices: Sequence[Device]) -> bool:
    gpus = _gpus(devices)
    usable = {device.id for device in probe.devices if device.supported}
    return bool(probe.failures) or any(gpu.id not in usable for gpu in gpus)


def _gpus(devices: Sequence[Device]) -> list[Device]:
    return [device for device in devices if device.type is DeviceType.CUDA]


def _describe(devices: Sequence[Device]) -> tuple[str, ...]:
    return tuple(
        f"{gpu.id} {gpu.product_name} {gpu.compute_capability} {gpu.driver_version}"
        for gpu in _gpus(devices)
    )

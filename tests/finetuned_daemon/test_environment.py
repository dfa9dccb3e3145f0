"""The check of the environment: real processes; the training environment answers by a script."""

from __future__ import annotations

import asyncio
import json
import os
import shlex
import sys
import types
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from conftest import REPOSITORY
from daemon_process import TESTS, eventually
from finetuned._paths import paths
from finetuned._version import __version__
from finetuned_daemon.config import Config
from finetuned_daemon.devices import Device, DeviceType
from finetuned_daemon.environment import items
from finetuned_daemon.environment.capability import capabilities
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.environment.model import CheckStatus, Item, Report
from finetuned_daemon.environment.probe import Probe, ProbedDevice
from finetuned_daemon.environment.python import Inventory
from finetuned_daemon.environment.requirements import requirements
from finetuned_daemon.parameters.models import (
    OptimizationParameters,
    Parameters,
    TrainingParameters,
)
from pythons import python_without

TRAIN = ["accelerate", "jinja2", "peft", "psutil", "pydantic", "safetensors", "torch"]
TRAIN += ["transformers"]


class Lab:
    """A state folder, and what the training environment will answer."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.paths = paths(root / "state", root / "run")
        self.paths.state_dir.mkdir()
        self.script = root / "probe.json"
        self.answers()
        self.open: list[Environment] = []

    def answers(self, **fields: Any) -> None:
        self.script.write_text(json.dumps({"count": str(self.root / "count"), **fields}))

    @property
    def asked(self) -> int:
        """How often the training environment was probed."""
        count = self.root / "count"
        return count.stat().st_size if count.exists() else 0

    def environment(self, *, seconds: float = 60.0, **settings: Any) -> Environment:
        """As a daemon has it that has just started."""
        config = Config(paths=self.paths, **{"runner_module": "fake_runner", **settings})
        environment = Environment(config, probe_deadline_seconds=seconds)
        self.open.append(environment)
        return environment

    def wrapped_python(self, *lines: str) -> Path:
        """An executable that runs these lines of shell, in place of a Python."""
        path = self.root / "bin" / "python"
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(["#!/bin/sh", *lines, ""]))
        path.chmod(0o755)
        return path


@pytest.fixture
async def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Lab]:
    lab = Lab(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(TESTS))
    monkeypatch.setenv("FAKE_PROBE", str(lab.script))
    yield lab
    for environment in lab.open:
        await environment.close()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that lists one GPU."""

    class NVMLError(Exception):
        pass

    def answer(value: object) -> Callable[..., object]:
        return lambda *_: value

    nvml: Any = types.ModuleType("pynvml")
    nvml.NVMLError = NVMLError
    nvml.nvmlInit = nvml.nvmlShutdown = answer(None)
    nvml.nvmlSystemGetDriverVersion = answer("550.54")
    nvml.nvmlDeviceGetCount = answer(1)
    nvml.nvmlDeviceGetHandleByIndex = answer(0)
    nvml.nvmlDeviceGetMemoryInfo = answer(types.SimpleNamespace(total=80 << 30, free=79 << 30))
    nvml.nvmlDeviceGetCudaComputeCapability = answer((8, 0))
    nvml.nvmlDeviceGetUtilizationRates = answer(types.SimpleNamespace(gpu=0))
    nvml.nvmlDeviceGetName = answer("NVIDIA A100")
    nvml.NVML_TEMPERATURE_GPU = 0
    nvml.nvmlDeviceGetTemperature = answer(41)
    nvml.nvmlDeviceGetPowerUsage = answer(55_000)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)


def a100(*, supported: bool = True, bitsandbytes: bool = True) -> dict[str, Any]:
    """A GPU as the probe lists it."""
    return ProbedDevice(
        id="cuda:0",
        name="NVIDIA A100",
        compute_capability="8.0",
        supported=supported,
        bf16=True,
        fp16=True,
        tf32=True,
        four_bit=bitsandbytes,
        eight_bit_optimizer=bitsandbytes,
    ).model_dump()


def by_name(report: Report) -> dict[str, Item]:
    return {item.name: item for item in report.items}


def wrong(found: Report | list[Item]) -> dict[str, str]:
    """Reasons by name."""
    all_items = found.items if isinstance(found, Report) else found
    return {item.name: item.reason for item in all_items if item.status is not CheckStatus.OK}


# --- all is well


async def test_a_machine_that_can_train_is_ok_without_a_gpu_too(lab: Lab) -> None:
    report = await lab.environment().check()
    assert wrong(report) == {}
    assert report.status is CheckStatus.OK
    names = [item.name for item in report.items]
    front = ["python", "finetuned", *TRAIN, "bitsandbytes", "driver"]
    assert names == [*front, "device/cpu", "disk"]
    found = by_name(report)
    assert found["torch"].wanted == ">=2.6"
    assert found["finetuned"].found == __version__
    assert "training runs on the CPU" in found["driver"].message.en
    assert "CPU" in found["driver"].message.zh
    assert found["device/cpu"].found.endswith(": bf16, 4-bit, 8-bit")
    assert report.check_time > 0


async def test_what_is_wanted_stands_in_pyproject_alone(lab: Lab) -> None:
    import tomllib

    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert str(requirements().python) == project["requires-python"]
    extras = project["optional-dependencies"]
    assert requirements().names == [line.partition(">=")[0] for line in extras["train"]]
    wanted = requirements().bitsandbytes
    assert f"{wanted.name}{wanted.specifier}" in extras["qlora"]


async def test_with_a_gpu_it_is_listed_first_with_all_that_it_can_do(lab: Lab, gpu: None) -> None:
    lab.answers(devices=[a100()], cuda_build="12.8")
    report = await lab.environment().check()
    found = by_name(report)
    assert found["driver"].found == "550.54"
    assert found["device/cuda:0"].found == "NVIDIA A100: bf16, fp16, TF32, 4-bit, 8-bit"
    assert list(report.capabilities) == ["cuda:0", "cpu"]
    assert report.capabilities["cuda:0"].four_bit
    assert report.status is CheckStatus.OK


# --- asked once


async def test_callers_at_the_same_time_share_one_probe_and_the_next_daemon_asks_none(
    lab: Lab,
) -> None:
    environment = lab.environment()
    first, *others = await asyncio.gather(*(environment.check() for _ in range(5)))
    assert lab.asked == 1
    assert all(other.check_time == first.check_time for other in others)
    again = await lab.environment().check()
    assert lab.asked == 1
    assert again.check_time == first.check_time
    await environment.check(refresh=True)
    assert lab.asked == 2


async def test_another_python_in_the_same_place_is_asked_anew(lab: Lab) -> None:
    python = lab.wrapped_python(f'exec {shlex.quote(sys.executable)} "$@"')
    settings = {"runner_python": str(python)}
    assert wrong(await lab.environment(**settings).check()) == {}
    assert lab.environment(**settings).known() is None, "another Python is not known unasked"
    os.utime(python, ns=(1, 1))
    await lab.environment(**settings).check()
    assert lab.asked == 2


async def test_another_driver_is_asked_anew(
    lab: Lab, gpu: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    lab.answers(devices=[a100()], cuda_build="12.8")
    environment = lab.environment()
    await environment.check()
    nvml: Any = sys.modules["pynvml"]
    monkeypatch.setattr(nvml, "nvmlSystemGetDriverVersion", lambda: "570.1")
    await environment.check()
    assert lab.asked == 2


async def test_a_damaged_memory_is_asked_anew(lab: Lab) -> None:
    await lab.environment().check()
    (lab.paths.state_dir / "environment.json").write_text('{"key": {}')
    assert wrong(await lab.environment().check()) == {}
    assert lab.asked == 2


async def test_what_is_known_takes_no_waiting(lab: Lab) -> None:
    environment = lab.environment()
    assert environment.known() is None
    assert environment.model_types() is None
    await environment.check()
    for there in (environment, lab.environment()):
        assert there.known() is not None
        assert there.model_types() == {"llama", "qwen2"}


# --- what torch can't use


@pytest.mark.parametrize(
    ("answer", "reasons", "says"),
    [
        ({}, ("GPU_UNUSABLE", "GPU_UNUSABLE"), "built for the CPU alone"),
        (
            {
                "cuda_build": "13.0",
                "cuda_problem": "RuntimeError: The NVIDIA driver on your system is too old",
            },
            ("DRIVER_TOO_OLD", "GPU_UNUSABLE"),
            "built for CUDA 13.0",
        ),
        (
            {"cuda_build": "12.8", "cuda_problem": "RuntimeError: CUDA unknown error"},
            ("GPU_UNUSABLE", "GPU_UNUSABLE"),
            "CUDA unknown error",
        ),
        (
            {"cuda_build": "12.8", "devices": [a100(supported=False)]},
            ("", "GPU_UNUSABLE"),
            "no code for compute capability 8.0",
        ),
    ],
)
async def test_a_gpu_that_torch_cannot_use_is_an_error_with_a_remedy_for_the_gpu_alone(
    lab: Lab, gpu: None, answer: dict[str, Any], reasons: tuple[str, str], says: str
) -> None:
    lab.answers(**answer)
    environment = lab.environment()
    report = await environment.check()
    found = by_name(report)
    assert (found["driver"].reason, found["device/cuda:0"].reason) == reasons
    gravest = found["driver"] if reasons[0] else found["device/cuda:0"]
    assert report.status is CheckStatus.ERROR
    assert says in gravest.message.en
    assert gravest.message.zh != gravest.message.en
    assert gravest.remedy.en
    assert gravest.remedy.zh
    refused = await environment.before_start(Parameters(), "cuda:0")
    assert refused == [gravest], "each reason once"
    assert await environment.before_start(Parameters(), "cpu") == []
    # A restart of the machine may have mended it, and changed no version.
    assert await lab.environment().before_start(Parameters(), "cuda:0") == []


async def test_a_package_that_cannot_be_imported_is_an_error_until_it_can(lab: Lab) -> None:
    lab.answers(failures={"torch": "OSError: libgomp.so.1: cannot open shared object file"})
    environment = lab.environment()
    report = await environment.check()
    assert wrong(report) == {"torch": "PACKAGE_BROKEN"}
    torch = by_name(report)["torch"]
    assert "libgomp.so.1" in torch.message.en
    assert "libgomp.so.1" in torch.message.zh
    assert torch.remedy.en == f"{sys.executable} -m pip install --force-reinstall torch"
    # What is mended may not look changed: the start that is refused asks anew.
    lab.answers()
    assert [item.name for item in await environment.before_start(Parameters(), "cpu")] == ["torch"]
    await environment.check()
    assert lab.asked == 2
    assert await environment.before_start(Parameters(), "cpu") == []
    lab.answers(failures={"torch": "ImportError"})
    await environment.check(refresh=True)
    lab.answers()
    assert wrong(await lab.environment().check()) == {}, "nor by the next daemon"


# --- no answer


@pytest.mark.parametrize(
    ("answer", "en", "zh"),
    [
        ({"exit": 3}, "ended with status 3: something broke", "状态码 3 退出: something broke"),
        ({"print": "Hello!"}, "can't be understood", "无法理解"),
        ({"print": ""}, "can't be understood", "无法理解"),
        ({"hang": True}, "no answer within 1 s", "1 秒内没有应答"),
    ],
)
async def test_a_probe_without_an_answer_is_an_error_that_says_why_and_is_asked_again(
    lab: Lab, answer: dict[str, Any], en: str, zh: str
) -> None:
    lab.answers(**answer)
    environment = lab.environment(seconds=1.0 if "hang" in answer else 60.0)
    report = await environment.check()
    assert wrong(report) == {"probe": "PROBE_FAILED"}
    probe = by_name(report)["probe"]
    assert en in probe.message.en
    assert zh in probe.message.zh
    pid = lab.root / "pid"
    assert not pid.exists() or not psutil.pid_exists(int(pid.read_text()))
    # A start is let through: it ends with evidence of its own, if at all.
    assert await environment.before_start(Parameters(), "cpu") == []
    lab.answers()
    assert wrong(await lab.environment().check()) == {}


async def test_a_start_does_not_wait_for_the_probe_and_the_end_of_the_daemon_ends_it(
    lab: Lab,
) -> None:
    lab.answers(hang=True)
    environment = lab.environment()
    for _ in range(3):
        assert await environment.before_start(Parameters(), "cpu") == []
    pid = lab.root / "pid"
    await asyncio.to_thread(eventually, lambda: pid.exists() and pid.read_text(), "it hangs")
    assert lab.asked == 1, "never two at once"
    await environment.close()
    assert not psutil.pid_exists(int(pid.read_text()))


# --- which Python


async def test_a_python_without_packages_is_told_each_one_with_the_remedy_for_that_python(
    lab: Lab,
) -> None:
    made = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "venv", "--without-pip", str(lab.root / "a venv"))
    )
    assert await made.wait() == 0
    python = str(lab.root / "a venv" / "bin" / "python")
    # What the daemon's own Python has must not be taken for that one's.
    environment = lab.environment(runner_python=python)
    report = await environment.check()
    missing = ["finetuned", *TRAIN]
    assert wrong(report) == dict.fromkeys(missing, "PACKAGE_MISSING")
    assert lab.asked == 0, "nothing to import"
    for name in missing:
        item = by_name(report)[name]
        assert item.remedy.en.startswith(f"'{python}' -m pip install 'finetuned[train]")
        assert f"{name}" in item.message.en
        assert "没有安装" in item.message.zh
    refused = await environment.before_start(Parameters(), "cpu")
    assert [item.name for item in refused] == missing


@pytest.mark.parametrize(
    ("lines", "reason", "says"),
    [
        (
            ['echo \'{"python": "3.9.18", "path": [], "packages": {}}\''],
            "PYTHON_TOO_OLD",
            "Python 3.9.18",
        ),
        (["echo hello"], "PYTHON_UNUSABLE", "is no Python"),
        (["echo no module named encodings >&2", "exit 1"], "PYTHON_UNUSABLE", "named encodings"),
        (["kill -SEGV $$"], "PYTHON_UNUSABLE", "SIGSEGV"),
    ],
)
async def test_an_old_or_broken_python_is_an_error_that_says_so(
    lab: Lab, lines: list[str], reason: str, says: str
) -> None:
    environment = lab.environment(runner_python=str(lab.wrapped_python(*lines)))
    report = await environment.check()
    assert wrong(report) == {"python": reason}
    python = by_name(report)["python"]
    assert python.wanted == ">=3.11"
    assert says in python.message.en
    assert "--runner-python" in python.remedy.en
    assert "--runner-python" in python.remedy.zh
    assert [item.reason for item in await environment.before_start(Parameters(), "cpu")] == [reason]


async def test_a_python_that_is_not_there_is_an_error(lab: Lab) -> None:
    report = await lab.environment(runner_python="/nowhere/python").check()
    assert wrong(report) == {"python": "PYTHON_UNUSABLE"}
    assert "/nowhere/python can't be started: No such file" in by_name(report)["python"].message.en


# --- versions


def judged(**packages: str | None) -> dict[str, Item]:
    good = {"finetuned": __version__, "accelerate": "1.15.0", "jinja2": "3.1.6", "peft": "0.21"}
    good |= {"psutil": "7.2", "pydantic": "2.14", "safetensors": "0.8.0", "torch": "2.13.0+cpu"}
    good["transformers"] = "5.24.0.dev0"
    there = {name: version for name, version in (good | packages).items() if version is not None}
    found = Inventory(python="3.13.0", path=(), packages=there)
    return {item.name: item for item in items.judge_packages("/p", found, has_gpu=True)}


@pytest.mark.parametrize(
    ("name", "version", "reason", "remedy"),
    [
        ("torch", "2.5.1", "PACKAGE_TOO_OLD", "/p -m pip install 'torch>=2.6'"),
        ("transformers", "6.0.0", "PACKAGE_TOO_NEW", "/p -m pip install 'transformers<6,>=5.16'"),
        ("transformers", "4.57", "PACKAGE_TOO_OLD", "/p -m pip install 'transformers<6,>=5.16'"),
        ("torch", None, "PACKAGE_MISSING", "/p -m pip install 'finetuned[train]'"),
        ("peft", "", "PACKAGE_BROKEN", "/p -m pip install --force-reinstall peft"),
        (
            "finetuned",
            "0.0.1",
            "VERSION_DIFFERS",
            f"/p -m pip install 'finetuned[train]=={__version__}'",
        ),
    ],
)
def test_a_version_that_does_not_fit_is_an_error_with_the_command_that_mends_it(
    name: str, version: str | None, reason: str, remedy: str
) -> None:
    found = judged(**{name: version})
    errors = [item for item in found.values() if item.status is CheckStatus.ERROR]
    assert [(item.name, item.reason, item.remedy.en) for item in errors] == [(name, reason, remedy)]


def test_builds_for_a_device_and_previews_are_versions_like_others() -> None:
    assert {item.status for item in judged(bitsandbytes="0.50").values()} == {CheckStatus.OK}


# --- bitsandbytes

LOW_BIT = [
    Parameters(optimization=OptimizationParameters(use_qlora=True)),
    Parameters(optimization=OptimizationParameters(use_8bit_optimizer=True)),
    Parameters(training=TrainingParameters(optimizer="adamw_8bit")),
    Parameters(training=TrainingParameters(optimizer="paged_adamw_8bit")),
]


async def test_without_bitsandbytes_all_but_4_and_8_bits_starts(lab: Lab, gpu: None) -> None:
    """A run that needs it is refused, on the CPU as on a GPU, with the command that brings it."""
    python = python_without(lab.root / "plain", "bitsandbytes")
    environment = lab.environment(runner_python=python)
    for parameters in LOW_BIT:
        for device_id in ("cpu", "cuda:0"):
            (item,) = await environment.before_start(parameters, device_id)
            assert (item.name, item.reason) == ("bitsandbytes", "PACKAGE_MISSING")
            assert item.remedy.en == f"{python} -m pip install 'finetuned[qlora]'"
    assert await environment.before_start(Parameters(), "cpu") == []
    assert not environment.has_bitsandbytes()
    lab.answers(devices=[a100(bitsandbytes=False)], cuda_build="12.8")
    report = await environment.check(refresh=True)
    assert wrong(report) == {"bitsandbytes": "PACKAGE_MISSING"}
    assert report.status is CheckStatus.WARNING
    assert not any(can.four_bit for can in report.capabilities.values())
    assert environment.capability(CPU).four_bit, "the CPU could, if it were there"


async def test_bitsandbytes_that_can_t_be_imported_stops_who_needs_it_alone(lab: Lab) -> None:
    lab.answers(failures={"bitsandbytes": "OSError: libcudart.so.12"})
    environment = lab.environment()
    assert environment.has_bitsandbytes(), "not known yet"
    report = await environment.check()
    assert wrong(report) == {"bitsandbytes": "PACKAGE_BROKEN"}
    assert report.status is CheckStatus.WARNING
    assert not report.capabilities["cpu"].eight_bit_optimizer
    assert not environment.has_bitsandbytes()
    assert await environment.before_start(Parameters(), "cpu") == []
    for parameters in LOW_BIT:
        (item,) = await environment.before_start(parameters, "cpu")
        assert "libcudart.so.12" in item.message.en


def test_bitsandbytes_that_is_too_old_is_a_warning_until_a_run_needs_it() -> None:
    item = judged(bitsandbytes="0.49.2")["bitsandbytes"]
    assert (item.status, item.reason) == (CheckStatus.WARNING, "PACKAGE_TOO_OLD")
    assert item.remedy.en == "/p -m pip install 'bitsandbytes>=0.50'"
    found = Inventory(python="3.13.0", path=(), packages={"bitsandbytes": "0.49.2"})
    needed = items.judge_packages("/p", found, has_gpu=False, needs_bitsandbytes=True)
    assert {i.name: i.status for i in needed}["bitsandbytes"] is CheckStatus.ERROR


# --- devices, disk


def device(capability: str) -> Device:
    return Device(
        id="cuda:0",
        type=DeviceType.CUDA,
        product_name="GPU",
        memory_total_bytes=1,
        memory_free_bytes=1,
        compute_capability=capability,
    )


CPU = Device(
    id="cpu", type=DeviceType.CPU, product_name="CPU", memory_total_bytes=1, memory_free_bytes=1
)


def test_what_a_device_can_do_comes_from_the_probe_or_else_from_the_driver() -> None:
    def can(*arguments: Any) -> str:
        return "".join(
            "x" if ability else "." for ability in vars(capabilities(*arguments)).values()
        )

    probe = Probe.model_validate(
        {
            "python": "3.13.0",
            "versions": {},
            "failures": {},
            "cuda_build": "12.8",
            "cuda_problem": "",
            "devices": [a100(bitsandbytes=False)],
            "model_types": [],
        }
    )
    has = {"bitsandbytes": "0.50"}
    # bf16, fp16, TF32, 4-bit, 8-bit optimizers
    assert can(CPU, None, has) == can(CPU, None, None) == "x..xx"
    assert can(CPU, probe, has) == "x..xx"
    assert can(CPU, None, {}) == "x...."
    assert can(device("7.5"), None, has) == ".x..."
    assert can(device("8.0"), None, has) == "xxxxx"
    assert can(device("12.0"), None, has) == "xxxxx"
    assert can(device("8.0"), None, {}) == "xxx.."
    assert can(device("8.0"), None, None) == "xxxxx", "what may be there is not refused"
    assert can(device("8.0"), probe, has) == "xxx..", "it is there, and can't be imported"


@pytest.mark.parametrize(
    ("free", "status"),
    [(5 << 30, "OK"), ((5 << 30) - 1, "WARNING"), (200 << 20, "WARNING"), (1 << 20, "ERROR")],
)
def test_a_disk_is_judged_by_what_is_free(free: int, status: str) -> None:
    item = items.judge_disk(Path("/state"), free)
    assert item.status == status
    assert (item.reason == "DISK_LOW") is (status != "OK")
    assert ("/state" in item.message.en) is (status != "OK")


# --- the real one


async def test_the_real_training_environment_answers(lab: Lab) -> None:
    environment = lab.environment(runner_module="finetuned_runner")
    report = await environment.check()
    assert "probe" not in wrong(report)
    assert not {name for name in wrong(report) if name in TRAIN}
    probe = environment.known()
    assert probe is not None
    # torch itself names its build too, such as `2.13.0+cu130`.
    found = by_name(report)["torch"].found
    assert probe.versions["torch"].partition("+")[0] == found.partition("+")[0]
    assert 200_000_000 < probe.runtime_bytes < 2_000_000_000
    types_known = environment.model_types()
    assert types_known is not None
    assert {"llama", "qwen2", "qwen3"} <= types_known

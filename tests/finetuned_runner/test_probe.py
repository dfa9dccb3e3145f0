"""`--probe` as a process, with a torch and a bitsandbytes as this machine may not have them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetuned_daemon.environment.probe import Probe
from finetuned_runner.probe import is_supported

TORCH_WITH_GPUS = """
import types
print("a library that greets whoever imports it")
__version__ = "2.13.0+cu128"
version = types.SimpleNamespace(cuda="12.8")
CAPABILITIES = [(8, 0), (7, 5), (6, 1)]
cuda = types.SimpleNamespace(
    is_available=lambda: True,
    device_count=lambda: len(CAPABILITIES),
    get_arch_list=lambda: ["sm_75", "sm_80", "sm_86", "sm_90"],
    get_device_capability=lambda index: CAPABILITIES[index],
    get_device_name=lambda index: f"GPU {index}",
)
"""
TORCH_WITHOUT_DRIVER = """
import types
__version__ = "2.13.0+cu128"
version = types.SimpleNamespace(cuda="12.8")
def init():
    raise RuntimeError("The NVIDIA driver on your system is too old (found version 11040).\\nMore.")
cuda = types.SimpleNamespace(is_available=lambda: False, init=init)
"""
BITSANDBYTES = """
import types
__version__ = "0.50.2"
cextension = types.SimpleNamespace(lib=types.SimpleNamespace(compiled_with_cuda={whole}))
"""
OTHERS = ("transformers", "accelerate", "safetensors", "jinja2", "peft")


def probe(folder: Path, **modules: str) -> Probe:
    """The answer, with these modules in place of what is installed."""
    for name, source in modules.items():
        (folder / f"{name}.py").write_text(source)
    result = subprocess.run(
        [sys.executable, "-P", "-m", "finetuned_runner", "--probe"],
        env={**os.environ, "PYTHONPATH": str(folder), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        check=True,
        timeout=60,
    )
    return Probe.model_validate_json(result.stdout)


def test_gpus_are_told_with_what_each_can_do_and_nothing_else_is_printed(tmp_path: Path) -> None:
    others = dict.fromkeys(OTHERS, "__version__ = '1.0'")
    answer = probe(
        tmp_path, torch=TORCH_WITH_GPUS, bitsandbytes=BITSANDBYTES.format(whole=True), **others
    )
    assert answer.cuda_build == "12.8"
    assert answer.cuda_problem == ""
    assert answer.versions["torch"] == "2.13.0+cu128"
    assert answer.versions["bitsandbytes"] == "0.50.2"
    ampere, turing, pascal = answer.devices
    assert (ampere.id, ampere.name, ampere.compute_capability) == ("cuda:0", "GPU 0", "8.0")
    assert all((ampere.supported, ampere.bf16, ampere.fp16, ampere.tf32, ampere.four_bit))
    assert turing.supported
    assert turing.fp16
    assert not any((turing.bf16, turing.tf32, turing.four_bit, turing.eight_bit_optimizer))
    assert not pascal.supported


@pytest.mark.parametrize(
    ("bitsandbytes", "says"),
    [
        (BITSANDBYTES.format(whole=False), "no library for CUDA 12.8"),
        ("raise OSError('libcudart.so.12: cannot open')", "OSError: libcudart.so.12"),
    ],
)
def test_bitsandbytes_that_would_fail_in_a_run_is_not_counted(
    tmp_path: Path, bitsandbytes: str, says: str
) -> None:
    others = dict.fromkeys(OTHERS, "__version__ = '1.0'")
    answer = probe(tmp_path, torch=TORCH_WITH_GPUS, bitsandbytes=bitsandbytes, **others)
    assert says in answer.failures["bitsandbytes"]
    assert answer.devices[0].bf16
    assert not answer.devices[0].four_bit
    assert not answer.devices[0].eight_bit_optimizer


def test_a_torch_that_cannot_be_imported_is_an_answer(tmp_path: Path) -> None:
    answer = probe(tmp_path, torch="raise OSError('libgomp.so.1: cannot open\\nand more')")
    assert answer.failures == {"torch": "OSError: libgomp.so.1: cannot open"}
    assert answer.devices == ()


def test_a_driver_that_is_too_old_is_told_in_torch_s_own_words(tmp_path: Path) -> None:
    others = dict.fromkeys(OTHERS, "__version__ = '1.0'")
    answer = probe(tmp_path, torch=TORCH_WITHOUT_DRIVER, **others)
    assert answer.cuda_problem.startswith("RuntimeError: The NVIDIA driver on your system is too")
    assert "More" not in answer.cuda_problem
    assert answer.devices == ()


@pytest.mark.parametrize(
    ("capability", "architectures", "runs"),
    [
        ((8, 0), ["sm_80"], True),
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80"], False),
        ((9, 0), ["sm_80", "compute_80"], True),
        ((9, 0), ["sm_90a"], True),
        ((12, 0), ["sm_100", "sm_120"], True),
        ((6, 1), ["sm_75", "compute_75"], False),
        ((8, 0), [], False),
    ],
)
def test_code_runs_on_devices_of_its_own_generation(
    capability: tuple[int, int], architectures: list[str], runs: bool
) -> None:
    assert is_supported(capability, architectures) is runs


def test_what_a_probe_takes_does_not_depend_on_who_asks():
    """A parent with a gigabyte in memory is told the same runtime as a small one."""
    ask = "import subprocess, sys; print(subprocess.run([sys.executable, *sys.argv[1:]], " + (
        "capture_output=True, check=True, text=True).stdout)"
    )
    answers = []
    for ballast in ("", "held = b'x' * (1 << 30); "):
        command = [sys.executable, "-c", ballast + ask, "-P", "-m", "finetuned_runner", "--probe"]
        answer = subprocess.run(command, capture_output=True, check=True, text=True).stdout
        answers.append(json.loads(answer)["runtime_bytes"])
    assert answers[1] == pytest.approx(answers[0], rel=0.1)

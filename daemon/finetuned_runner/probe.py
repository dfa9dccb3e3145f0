"""`python -m finetuned_runner --probe`: what this Python can train with, as one JSON object.

Imports what a run imports. What can't be imported is a part of the answer.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import platform
import signal
import sys
from typing import Any

from finetuned_daemon.environment.probe import Probe, ProbedDevice
from finetuned_runner.environment import FIXED, prepare_bitsandbytes
from finetuned_runner.resident import peak_resident_bytes

_DEADLINE_SECONDS = 120
"""A driver that hangs must not leave a process behind whose daemon is gone."""
_NICENESS = 5
"""Runs come first."""
_AMPERE = (8, 0)
_PACKAGES = ("transformers", "accelerate", "safetensors", "jinja2", "peft")
_BITSANDBYTES = "bitsandbytes"


def main() -> int:
    """Prints the answer, and nothing else, to stdout; returns the exit status."""
    signal.alarm(_DEADLINE_SECONDS)
    os.nice(_NICENESS)
    # Libraries print when they are imported.
    answer = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    probe = _look()
    with open(answer, "w", encoding="utf-8") as file:
        file.write(probe.model_dump_json())
    return 0


def _look() -> Probe:
    os.environ.update(FIXED)
    # A run chooses its GPU by NVML's number.
    os.environ.pop("CUDA_VISIBLE_DEVICES", None)
    sys.modules["datasets"] = None  # type: ignore[assignment] # as in a run
    seen = _Imports()
    torch = seen.take("torch")
    model_types: tuple[str, ...] = ()
    has_bitsandbytes = False
    runtime_bytes = 0
    if torch is not None:  # all others import it too, and would say the same
        is_installed = importlib.util.find_spec(_BITSANDBYTES) is not None
        # peft imports it wherever it is installed; a run that does not need it does without.
        sys.modules[_BITSANDBYTES] = None  # type: ignore[assignment]
        for package in _PACKAGES:
            seen.take(package)
        auto = seen.take("transformers.models.auto.modeling_auto", of="transformers")
        if auto is not None:
            model_types = tuple(sorted(auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
        # The recipes, with all that a run imports.
        seen.take("finetuned_runner.sft", of="finetuned")
        runtime_bytes = 0 if seen.failures else peak_resident_bytes()
        if is_installed:
            del sys.modules[_BITSANDBYTES]
            has_bitsandbytes = _has_bitsandbytes(torch, seen)
    cuda_problem = _cuda_problem(torch)
    return Probe(
        python=platform.python_version(),
        versions=seen.versions,
        failures=seen.failures,
        cuda_build=(torch.version.cuda or "") if torch is not None else "",
        cuda_problem=cuda_problem,
        devices=_devices(torch, has_bitsandbytes) if torch is not None and not cuda_problem else (),
        model_types=model_types,
        runtime_bytes=runtime_bytes,
    )


class _Imports:
    """What was imported, and what could not be."""

    def __init__(self) -> None:
        self.versions: dict[str, str] = {}
        self.failures: dict[str, str] = {}

    def take(self, module: str, *, of: str = "") -> Any:
        """Imports a module of a package; None where that fails."""
        package = of or module
        try:
            imported: Any = importlib.import_module(module)
        except Exception as error:  # noqa: BLE001 - an import runs others' code: anything is raised
            self.fail(package, error)
            return None
        if not of:
            self.versions[package] = str(getattr(imported, "__version__", ""))
        return imported

    def fail(self, package: str, error: BaseException) -> None:
        """Records why a package can't be used; its first reason counts."""
        self.failures.setdefault(package, _one_line(error))


def _has_bitsandbytes(torch: Any, seen: _Imports) -> bool:
    prepare_bitsandbytes()
    imported = seen.take(_BITSANDBYTES)
    if imported is None:
        return False
    # Without its library for this CUDA it can be imported, and fails in the first step of a run.
    library = getattr(getattr(imported, "cextension", None), "lib", None)
    if torch.cuda.is_available() and getattr(library, "compiled_with_cuda", True) is False:
        error = ImportError(f"it has no library for CUDA {torch.version.cuda}")
        seen.fail(_BITSANDBYTES, error)
        return False
    return True


def _cuda_problem(torch: Any) -> str:
    """Why torch can use no GPU; empty: it can, or is built without CUDA."""
    if torch is None or torch.version.cuda is None or torch.cuda.is_available():
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _one_line(error)
    return "it finds none"


def _devices(torch: Any, has_bitsandbytes: bool) -> tuple[ProbedDevice, ...]:
    if torch.version.cuda is None:
        return ()
    architectures = torch.cuda.get_arch_list()
    found = list[ProbedDevice]()
    for index in range(torch.cuda.device_count()):
        capability: tuple[int, int] = torch.cuda.get_device_capability(index)
        is_ampere = capability >= _AMPERE
        found.append(
            ProbedDevice(
                id=f"cuda:{index}",
                name=torch.cuda.get_device_name(index),
                compute_capability=f"{capability[0]}.{capability[1]}",
                supported=is_supported(capability, architectures),
                bf16=is_ampere,
                fp16=True,
                tf32=is_ampere,
                four_bit=is_ampere and has_bitsandbytes,
                eight_bit_optimizer=is_ampere and has_bitsandbytes,
            )
        )
    return tuple(found)


def is_supported(capability: tuple[int, int], architectures: list[str]) -> bool:
    """Whether code for these architectures runs on a device.

    `sm_80` is machine code, for devices of the same major version and no older minor one;
    `compute_80` is compiled when it is loaded, for any that is no older (CUDA C++ Programming
    Guide, "Compute capability compatibility").
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        digits = number.rstrip("abcdefghijklmnopqrstuvwxyz")  # such as `sm_90a`
        if not digits.isdigit():
            continue
        major, minor = int(digits[:-1]), int(digits[-1])
        if kind == "sm" and capability[0] == major and capability[1] >= minor:
            return True
        if kind == "compute" and capability >= (major, minor):
            return True
    return False


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:500]

"""What must be set before torch and transformers are imported."""

from __future__ import annotations

import logging
import os
import sys

from finetuned_daemon.parameters.needs import needs_bitsandbytes
from finetuned_daemon.runs.contract import Spec

FIXED = {
    # A run never asks the hub: paths are local, and a task must behave the same without a network.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TQDM_DISABLE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # NVML, which the daemon counts by, numbers GPUs by their bus; CUDA by their speed unless told.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
}


def prepare(spec: Spec) -> None:
    """Sets the environment of this process and its children."""
    prepare_imports()
    if spec.num_threads > 0:
        os.environ["OMP_NUM_THREADS"] = str(spec.num_threads)
    kind, _, number = spec.device.partition(":")
    os.environ["CUDA_VISIBLE_DEVICES"] = (number or "0") if kind == "cuda" else ""
    if needs_bitsandbytes(spec.parameters):
        prepare_bitsandbytes()
    else:
        hide_bitsandbytes()


def prepare_imports() -> None:
    """Sets what is the same for every run: all that may be set before it is known which."""
    os.environ.update(FIXED)
    # OpenMP's default is to spin at barriers: one other busy process then makes training 12 times
    # slower, passive 2 times.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    # None makes a package count as not installed; this one is of no use here and costs 0.6 s.
    sys.modules["datasets"] = None  # type: ignore[assignment]
    _forget_kernels()


def hide_bitsandbytes() -> None:
    """Makes it count as not installed, for as long as the process lives: libraries remember that.

    It costs 2 s, and transformers and peft import it wherever it is installed.
    """
    sys.modules["bitsandbytes"] = None  # type: ignore[assignment]


def _forget_kernels() -> None:
    """Kernels of the hub are others' code, which a model's config.json may name."""
    sys.modules["kernels"] = None  # type: ignore[assignment]


def prepare_bitsandbytes() -> None:
    """Keeps bitsandbytes from the kernels of the hub, which round to bf16 besides."""
    _forget_kernels()
    # On a CPU with AVX512-BF16 it says that it would rather have them.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def prepare_without_torch() -> None:
    """Sets the environment of a process that only tokenizes: it starts in half the time."""
    os.environ.update(FIXED)
    os.environ["TRANSFORMERS_NO_ADVISORY_WARNINGS"] = "1"  # that there is no torch
    for package in ("torch", "datasets", "bitsandbytes", "kernels"):
        sys.modules[package] = None  # type: ignore[assignment]

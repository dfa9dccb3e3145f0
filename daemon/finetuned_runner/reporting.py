"""Metrics for other tools (`extensions.report_to`), through the callbacks of transformers.

Each tool writes below the run's output folder and uploads nothing, unless whoever started the
daemon has set the tool's own variables.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from pathlib import Path
from typing import Any

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import extra_packages
from finetuned_daemon.runs.contract import EndReason
from finetuned_runner.failures import RunFailed
from finetuned_runner.report import Report


def prepare_reporting(parameters: Parameters, output_dir: Path) -> None:
    """Tells the tool where to write; before it is imported."""
    folder = _folder(parameters, output_dir)
    if folder is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    match folder.name:
        case "tensorboard":
            os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder)
        case "wandb":
            os.environ["WANDB_DIR"] = str(folder)
            _unless_set(WANDB_MODE="offline", WANDB_PROJECT="finetuned")
        case "mlflow":
            _unless_set(MLFLOW_TRACKING_URI=folder.as_uri())
        case _:
            os.environ["SWANLAB_LOG_DIR"] = str(folder)
            _unless_set(SWANLAB_MODE="local", SWANLAB_PROJECT="finetuned")


def end_reporting(parameters: Parameters, output_dir: Path, report: Report) -> None:
    """Lets the tool write what it still holds, and records its files as the run's own."""
    folder = _folder(parameters, output_dir)
    if folder is None:
        return
    if folder.name in ("wandb", "swanlab"):  # the other two are closed by their callbacks
        tool: Any = importlib.import_module(folder.name)
        tool.finish()
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    report.record_output(
        folder, {path.relative_to(folder).as_posix(): path.stat().st_mtime_ns for path in files}
    )


def need_packages(parameters: Parameters) -> None:
    """Raises RunFailed before the work begins, where a package for an extension is missing."""
    for field, package in extra_packages(parameters).items():
        if not any(importlib.util.find_spec(module) for module in package.modules):
            raise RunFailed(
                EndReason.RUNNER_CRASHED,
                f"{field} needs {package.name}, which is not installed; install it or turn this "
                "off.",
            )


def _folder(parameters: Parameters, output_dir: Path) -> Path | None:
    tool = parameters.extensions.report_to
    return None if tool == "none" else output_dir / tool


def _unless_set(**values: str) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)

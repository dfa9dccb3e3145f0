"""Metrics for other tools (`extensions.report_to`), in nobody's way.

Each tool writes below the run's output folder and uploads nothing, unless whoever started the
daemon has set the tool's own variables. It has a thread of its own: one that is missing, fails, or
waits for a server costs a run nothing but a notice.
"""

from __future__ import annotations

import importlib.util
import logging
import math
import os
import queue
import re
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple, Self

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import REPORT_TO, extra_packages, in_effect
from finetuned_daemon.runs.contract import EndReason, Spec
from finetuned_runner.failures import RunFailed
from finetuned_runner.report import Report
from finetuned_runner.trackers import TRACKERS, About

_FIELD = "extensions.report_to"
_MOST_WAITING = 10_000
"""Steps that a tool may be behind; beyond it, the newest are left out."""
_END_SECONDS = 20.0
"""How long the end of a run waits for its tool."""
_SUMMARY = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss")
_NO_CONFIG = ("data.output_dir", "data.resume_from_checkpoint", _FIELD)
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD")
_SHORTEST_SECRET = 6
_USER_IN_URL = re.compile(r"://[^/@\s]+@")
_LOG = logging.getLogger(__name__)


class _Step(NamedTuple):
    values: dict[str, float]
    number: int


def need_packages(parameters: Parameters) -> None:
    """Raises RunFailed before the work begins, where a package for an extension is missing."""
    for field, package in extra_packages(parameters).items():
        if field == _FIELD:
            continue  # a run does without it
        if not any(importlib.util.find_spec(module) for module in package.modules):
            raise RunFailed(
                EndReason.RUNNER_CRASHED,
                f"{field} needs {package.name}, which is not installed; install it or turn this "
                "off.",
            )


class Tracking(TrainerCallback):
    """Hands what the Trainer logs to the tool's thread."""

    def __init__(self, spec: Spec, parameters: Parameters, report: Report) -> None:
        """Begins nothing; `parameters` are those that take effect."""
        self._tool = "none" if spec.probe else parameters.extensions.report_to
        self._folder = Path(spec.output_dir) / self._tool
        self._name = f"{spec.display_name or spec.task.removeprefix('tasks/')} run {spec.run}"
        self._config = _config(parameters, spec)
        self._report = report
        self._waiting: queue.Queue[_Step | bool] = queue.Queue(_MOST_WAITING)
        """Steps, then whether the run has failed."""
        self._thread: threading.Thread | None = None
        self._is_broken = threading.Event()
        self._left_out = 0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Starts the thread."""
        self._begin(state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **context: Any
    ) -> None:
        """Hands over what is logged."""
        # An evaluation that a pause has left out comes before the training.
        self._begin(state.global_step)
        if self._thread is None or self._is_broken.is_set():
            return
        values = {
            _tag(name): float(value)
            for name, value in (context.get("logs") or {}).items()
            if name not in _SUMMARY and isinstance(value, int | float) and math.isfinite(value)
        }
        try:
            self._waiting.put_nowait(_Step(values, state.global_step))
        except queue.Full:
            self._left_out += 1

    def _begin(self, step: int) -> None:
        if self._tool == "none" or self._thread is not None:
            return
        self._thread = threading.Thread(
            target=self._work, args=(step,), name=self._tool, daemon=True
        )
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Lets the tool write what it still holds, and records its files as the run's own."""
        if self._thread is not None:
            self._end(self._thread, failed=kind is not None)

    def _end(self, thread: threading.Thread, *, failed: bool) -> None:
        until = time.monotonic() + _END_SECONDS
        try:
            self._waiting.put(failed, timeout=_END_SECONDS)
        except queue.Full:
            self._left_out += 1
        thread.join(max(0.0, until - time.monotonic()))
        if thread.is_alive() and not self._is_broken.is_set():
            self._say(
                "TRACKER_BEHIND",
                f"{self._tool} has not taken all metrics within {_END_SECONDS:g} s of the end; "
                "those of the run itself are whole.",
            )
        elif self._left_out:
            self._say("TRACKER_BEHIND", f"{self._tool} was too slow for {self._left_out} steps.")
        try:
            self._record()
        except OSError as error:
            _LOG.warning("the files of %s stay when outputs are deleted: %s", self._tool, error)

    def _record(self) -> None:
        _tidy(self._folder, only_links=self._tool == "mlflow")  # its files need their empty folders
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file()]
        if not files:
            self._folder.rmdir()
            return
        self._report.record_output(
            self._folder,
            {path.relative_to(self._folder).as_posix(): path.stat().st_mtime_ns for path in files},
        )

    def _work(self, first_step: int) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            kind = TRACKERS[self._tool]
            kind.prepare(self._folder)
            package = REPORT_TO[self._tool]
            if not any(importlib.util.find_spec(module) for module in package.modules):
                raise ModuleNotFoundError(f"it is not installed; pip install {package.name}")
            tracker = kind()
            said = tracker.begin(About(self._name, self._folder, self._config, first_step))
            if said:
                self._say("TRACKER_SPLIT", said)
            while not isinstance(item := self._waiting.get(), bool):
                tracker.log(item.values, item.number)
            tracker.end(failed=item)
        except BaseException as error:  # noqa: BLE001 - some tools raise SystemExit; the run goes on
            self._is_broken.set()
            text = " ".join(_without_secrets(f"{error}").split()) or type(error).__name__
            self._say(
                "TRACKER_FAILED",
                f"The run goes on without {self._tool}, which failed: {text[:300]}",
            )

    def _say(self, reason: str, text: str) -> None:
        _LOG.warning("%s", text)
        self._report.notice(_FIELD, reason, text)


def _tidy(folder: Path, *, only_links: bool) -> None:
    """Removes links and empty folders: only files can be recorded, and others would stay."""
    for path in sorted(folder.rglob("*"), reverse=True):
        if path.is_symlink():
            path.unlink()
        elif not only_links and path.is_dir() and not any(path.iterdir()):
            path.rmdir()


def _tag(name: str) -> str:
    """The tag that transformers gives a value, by which dashboards group them."""
    return f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"


def _without_secrets(text: str) -> str:
    """Without keys of the environment, and users in addresses: servers put them into errors."""
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST_SECRET:
            text = text.replace(value, "[secret]")
    return _USER_IN_URL.sub("://[secret]@", text)


def _config(parameters: Parameters, spec: Spec) -> dict[str, Any]:
    """Parameters that have a say, without folders of this machine."""
    values = in_effect(parameters, spec.training_type.value.lower())
    return {
        path: Path(value).name
        if path.startswith("data.") and isinstance(value, str)
        else value
        if isinstance(value, bool | int | float | str)
        else str(value)
        for path, value in values.items()
        if path not in _NO_CONFIG and value is not None
    }

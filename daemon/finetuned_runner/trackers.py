"""What each tool of `extensions.report_to` has to be told: begin, log, end. Nothing of a run here.

They are called in a thread of their own, one call at a time, and may raise and block as they like.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetuned_daemon.runs.contract import write_atomic

_PROJECT = "finetuned"
_ID_FILE = "finetuned-run-id"
"""In the tool's folder: by what the next process of the run, after a pause, finds it again."""


@dataclass(frozen=True)
class About:
    """The run, as a tool is told of it."""

    name: str
    folder: Path
    """The tool's folder, below the run's output folder."""
    config: Mapping[str, Any]
    """Parameters by path, without folders of this machine."""
    first_step: int
    """The step that it goes on from; 0: it begins."""

    @property
    def known_id(self) -> str | None:
        """The tool's id of this run, where an earlier process had one."""
        try:
            return (self.folder / _ID_FILE).read_text("utf-8").strip() or None
        except FileNotFoundError:
            return None

    def keep_id(self, id_: str) -> None:
        """Keeps it for the next process."""
        write_atomic(self.folder / _ID_FILE, id_.encode() + b"\n")


class Tracker(ABC):
    """One tool."""

    @staticmethod
    @abstractmethod
    def prepare(folder: Path) -> None:
        """Sets its variables, where the user has not; before it is imported."""

    @abstractmethod
    def begin(self, about: About) -> str:
        """Begins, or goes on; returns what a user is to know of that, or nothing."""

    @abstractmethod
    def log(self, values: Mapping[str, float], step: int) -> None:
        """Takes the values of a step."""

    @abstractmethod
    def end(self, *, failed: bool) -> None:
        """Writes what it still holds."""


class TensorBoard(Tracker):
    """Event files; `purge_step` takes back what an earlier process logged beyond its checkpoint."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """There is nothing to set."""

    def begin(self, about: About) -> str:
        """Opens a file of its own for each process."""
        module = "torch.utils.tensorboard"
        if importlib.util.find_spec("tensorboard") is None:
            module = "tensorboardX"
        purge = {"purge_step": about.first_step + 1} if about.first_step else {}
        self._writer = _import(module).SummaryWriter(log_dir=str(about.folder), **purge)
        rows = "\n".join(f"| {key} | {value} |" for key, value in about.config.items())
        self._writer.add_text("parameters", f"| parameter | value |\n|---|---|\n{rows}", 0)
        self._writer.flush()
        return ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Writes them at once."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def end(self, *, failed: bool) -> None:
        """Closes the file."""
        self._writer.close()


class Wandb(Tracker):
    """Weights & Biases."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """Offline, unless told; its output is no part of ours."""
        os.environ["WANDB_DIR"] = str(folder)
        _unless_set(WANDB_MODE="offline", WANDB_PROJECT=_PROJECT, WANDB_SILENT="true")

    def begin(self, about: About) -> str:
        """Begins a run, or goes on with the one of before by its id."""
        wandb = _import("wandb")
        known = about.known_id
        self._run = wandb.init(
            project=os.environ["WANDB_PROJECT"],
            name=about.name,
            id=known,
            resume="allow" if known else None,
            dir=str(about.folder),
            config=dict(about.config),
            save_code=False,
            # What runs print may have data in it.
            settings=wandb.Settings(console="off", disable_git=True, x_save_requirements=False),
        )
        about.keep_id(self._run.id)
        self._run.define_metric("*", step_metric="step")
        if known and os.environ["WANDB_MODE"] == "offline":
            return (
                f"Weights & Biases is offline, so what comes now lies in a second folder of run "
                f"{known}; wandb sync takes both for one run."
            )
        return ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """By a step of ours: its own may only grow, and a run goes back to its checkpoint."""
        self._run.log({**values, "step": step})

    def end(self, *, failed: bool) -> None:
        """Waits until all is written."""
        self._run.finish(exit_code=int(failed))


class MLflow(Tracker):
    """MLflow: a database where the whole package is, else files."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """In the run's folder, unless told."""
        if "MLFLOW_TRACKING_URI" not in os.environ:
            if importlib.util.find_spec("sqlalchemy") is not None:
                os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{folder}/mlflow.db"
            else:
                os.environ["MLFLOW_TRACKING_URI"] = folder.as_uri()
                _unless_set(MLFLOW_ALLOW_FILE_STORE="true")  # 3.17 refuses it otherwise
        _unless_set(
            MLFLOW_EXPERIMENT_NAME=_PROJECT,
            MLFLOW_HTTP_REQUEST_TIMEOUT="10",
            MLFLOW_HTTP_REQUEST_MAX_RETRIES="2",
            GIT_PYTHON_REFRESH="quiet",
        )

    def begin(self, about: About) -> str:
        """Begins a run, or goes on with the one of before by its id."""
        mlflow: Any = _import("mlflow")
        self._client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        self._entities: Any = _import("mlflow.entities")
        known = about.known_id
        if known:
            self._client.update_run(known, status="RUNNING")
            self._id = known
            return ""
        name = os.environ["MLFLOW_EXPERIMENT_NAME"]
        found = self._client.get_experiment_by_name(name)
        local = os.environ["MLFLOW_TRACKING_URI"].startswith("sqlite:")
        place = (about.folder / "artifacts").as_uri() if local else None
        experiment = found.experiment_id if found else self._client.create_experiment(name, place)
        self._id = self._client.create_run(experiment, run_name=about.name).info.run_id
        about.keep_id(self._id)
        parameters = [
            self._entities.Param(key, str(value)[:250]) for key, value in about.config.items()
        ]
        self._client.log_batch(self._id, params=parameters)
        return ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """One request for all of a step."""
        now = _now_ms()
        metrics = [self._entities.Metric(key, value, now, step) for key, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def end(self, *, failed: bool) -> None:
        """Says how it ended."""
        self._client.set_terminated(self._id, "FAILED" if failed else "FINISHED")


class Trackio(Tracker):
    """Trackio: an SQLite file."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """In the run's folder, unless told; a Space or server only where the variables say so."""
        _unless_set(TRACKIO_DIR=str(folder), TRACKIO_PROJECT=_PROJECT)

    def begin(self, about: About) -> str:
        """Begins a run, or goes on with the one of that name."""
        trackio = _import("trackio")
        self._run = trackio.init(
            project=os.environ["TRACKIO_PROJECT"],
            name=about.known_id or about.name,
            resume="allow",
            config=dict(about.config),
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )
        about.keep_id(about.known_id or about.name)
        return ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hands them to its own thread."""
        self._run.log(dict(values), step=step)

    def end(self, *, failed: bool) -> None:
        """Waits until all is written."""
        self._run.finish()


class SwanLab(Tracker):
    """SwanLab, from 0.10 on."""

    @staticmethod
    def prepare(folder: Path) -> None:
        """For its dashboard where that is installed, else offline; online only where told."""
        os.environ["SWANLAB_LOG_DIR"] = str(folder)
        has_board = importlib.util.find_spec("swanboard") is not None
        _unless_set(
            SWANLAB_MODE="local" if has_board else "offline",
            # What runs print may have data in it; the rest tells of the machine.
            SWANLAB_TERMINAL_PROXY_TYPE="none",
            SWANLAB_PROBE_RUNTIME="false",
            SWANLAB_PROBE_GIT="false",
        )

    def begin(self, about: About) -> str:
        """Begins a run; one that is not online can't be gone on with."""
        # 0.10 takes this variable of earlier versions for JSON, and fails.
        project = os.environ.pop("SWANLAB_PROJECT", None)
        self._swanlab = _import("swanlab")
        known, mode = about.known_id, os.environ["SWANLAB_MODE"]
        can_resume = mode in ("online", "cloud")
        run = self._swanlab.init(
            project=project or os.environ.get("SWANLAB_PROJECT_NAME", _PROJECT),
            name=about.name,
            log_dir=str(about.folder),
            mode="online" if mode == "cloud" else mode,
            config=dict(about.config),
            **({"id": known, "resume": "allow"} if known and can_resume else {}),
        )
        about.keep_id(str(run.id))
        if known and not can_resume:
            return (
                f"SwanLab is not online, so what comes now is a run of its own there; the one "
                f"before is {known}."
            )
        return ""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Hands them to its own thread."""
        self._swanlab.log(dict(values), step=step)

    def end(self, *, failed: bool) -> None:
        """Waits until all is written."""
        if failed:
            self._swanlab.finish(state="crashed", error="the run broke off")
        else:
            self._swanlab.finish()


TRACKERS: dict[str, type[Tracker]] = {
    "tensorboard": TensorBoard,
    "wandb": Wandb,
    "mlflow": MLflow,
    "trackio": Trackio,
    "swanlab": SwanLab,
}
"""By the value of `extensions.report_to`."""


def _import(name: str) -> Any:
    """A tool's module; none of them has to be installed."""
    return importlib.import_module(name)


def _unless_set(**values: str) -> None:
    for name, value in values.items():
        os.environ.setdefault(name, value)


def _now_ms() -> int:
    return time.time_ns() // 1_000_000

"""What goes into a support bundle: collected whole before anything is written, bounded, redacted.

Each part stands for itself: one that can't be had is left out, and the bundle says why.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetuned._errors import FinetunedError
from finetuned._paths import Paths
from finetuned._version import __version__
from finetuned.cli.log import parsed
from finetuned.cli.support_redact import Redactor

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.v1.task_pb2 import Run, Task

_MOST_TASKS = 1000
_MOST_RUNS = 5
_MOST_EVENTS = 2000
_LOG_BYTES = 1 << 20
_START_BYTES = 32 << 10
_CONSOLE_BYTES = 32 << 10
_CHECK_SECONDS = 60.0

_PACKAGES = (
    *("torch", "transformers", "peft", "accelerate", "datasets", "tokenizers", "safetensors"),
    *("bitsandbytes", "liger-kernel", "flash-attn", "numpy", "grpcio", "protobuf", "pydantic"),
    *("psutil", "nvidia-ml-py", "platformdirs", "typer", "rich", "jinja2", "sentencepiece"),
)
_VARIABLES = ("FINETUNED_", "CUDA_", "NVIDIA_", "NCCL_", "HF_", "OMP_", "MKL_", "TORCH", "PYTORCH")

# What of an event is a number, or a word of ours. All else could hold data or a name.
_SAFE: dict[str, tuple[str, ...]] = {
    "state_change": ("old_state", "new_state", "end_reason"),
    "phase_change": ("phase", "deadline_seconds"),
    "progress": (
        *("step", "total_steps", "epoch", "tokens_per_second", "eta_seconds", "num_tokens"),
        *("loss", "learning_rate"),
    ),
    "metrics": ("step", "epoch", "values"),
    "evaluation": ("step", "epoch", "values"),
    "log_line": ("level", "logger"),
    "checkpoint_saved": ("step", "size_bytes", "cause"),
    "checkpoint_deleted": ("step",),
    "best_checkpoint": ("step", "eval_loss"),
    "notice": ("field", "reason"),
    "result": ("end_reason", "step", "exit_code", "signal"),
    "task_edited": ("fields",),
}


@dataclass(frozen=True)
class Item:
    """One file of the bundle."""

    name: str
    purpose: str
    """In a few words, for the one who decides whether to hand it on."""
    content: bytes


class Collector:
    """Collects the files."""

    def __init__(
        self,
        paths: Paths,
        client: Client | None,
        redactor: Redactor,
        *,
        task: str,
        with_console: bool,
    ) -> None:
        self._paths = paths
        self._client = client
        self._redactor = redactor
        self._task = task
        self._with_console = with_console
        self._left_out = list[str]()
        # Names first: they are replaced in every text from then on.
        self._tasks = self._list_tasks()

    def items(self) -> list[Item]:
        """All files, those that explain the others first."""
        items = list[Item]()
        for part in (
            self._versions,
            self._system,
            self._database,
            self._task_list,
            self._runs,
            self._logs,
        ):
            try:
                items += part()
            except (FinetunedError, OSError, ValueError) as error:
                why = error.message if isinstance(error, FinetunedError) else str(error)
                self._left_out.append(f"{part.__name__.strip('_')}: {self._redactor.text(why)}")
        return [self._read_me(items), *items]

    def _read_me(self, items: Iterable[Item]) -> Item:
        lines = ["A support bundle of finetuned. What it holds:", ""]
        lines += [f"  {item.name}: {item.purpose}" for item in items]
        lines += ["", "Values such as path-1a2b or name-3c4d stand for what is not told; the same"]
        lines += ["value has the same one within this bundle alone."]
        if self._left_out:
            lines += ["", "Left out:", *(f"  {line}" for line in self._left_out)]
        return Item("README.txt", "what is in here", "\n".join(lines).encode() + b"\n")

    def _json(self, name: str, purpose: str, value: Any) -> Item:
        return Item(name, purpose, self._redactor.json(value))

    # --- the machine

    def _versions(self) -> Iterator[Item]:
        packages = dict[str, str]()
        for package in _PACKAGES:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                packages[package] = importlib.metadata.version(package)
        content = {
            "finetuned": __version__,
            "python": platform.python_version(),
            "implementation": platform.python_implementation(),
            "system": f"{platform.system()} {platform.release()} {platform.machine()}",
            "libc": " ".join(platform.libc_ver()),
            "packages": packages,
            "environment_variables": sorted(v for v in os.environ if v.startswith(_VARIABLES)),
        }
        purpose = "versions of Python and packages; names of variables, without their values"
        yield self._json("versions.json", purpose, content)

    def _system(self) -> Iterator[Item]:
        if self._client is None:
            self._left_out.append("system, doctor, devices: no daemon answers")
            return
        from finetuned.cli.output import to_dict

        info = to_dict(self._client.system_info())
        limits = info.pop("limits", [])
        redactor = self._redactor
        system = {key: self._system_value(key, value) for key, value in info.items()}
        yield self._json("system.json", "what the daemon is", system)
        yield self._json("limits.json", "its limits, and what is in use", limits)
        devices = [to_dict(device) for device in self._client.list_devices()]
        for device in devices:
            device["running_task"] = redactor.task(device.get("running_task", ""))
        yield self._json("devices.json", "GPUs and CPU", devices)
        report = to_dict(self._client.check_environment())
        report["runner_python"] = redactor.path(report["runner_python"])
        for entry in report["items"]:
            for field in ("found", "wanted", "message", "remedy"):
                entry[field] = redactor.text(entry.get(field, ""))
        yield self._json("doctor.json", "whether the machine is ready to train", report)

    def _system_value(self, key: str, value: Any) -> Any:
        if key in ("addresses",):
            return [
                str(v).partition(":")[0] if str(v).startswith("unix:") else "tcp" for v in value
            ]
        plain = ("version", "platform", "python_version", "sqlite_version")
        if key in plain or key.endswith("_time"):
            return value
        return self._redactor.value(key, value)

    def _database(self) -> Iterator[Item]:
        if not self._paths.state_dir.is_dir():
            self._left_out.append("database: its folder is not on this machine")
            return
        command = (sys.executable, "-m", "finetuned_daemon.main", "db", "check", "--json")
        folders = ("--state-dir", str(self._paths.state_dir))
        try:
            result = subprocess.run(
                [*command, *folders],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_CHECK_SECONDS,
                check=False,
            )
            content: Any = json.loads(result.stdout)
        except (ValueError, subprocess.TimeoutExpired):
            self._left_out.append("database: it could not be checked")
            return
        text = self._redactor.text
        yield self._json(
            "database.json",
            "whether the database and its backups are whole",
            {
                "is_whole": content.get("is_whole"),
                "problems": [text(str(problem)) for problem in content.get("problems", [])],
                "notes": [text(str(note)) for note in content.get("notes", [])],
                "backups": len(content.get("backups", [])),
            },
        )

    # --- tasks and runs

    def _list_tasks(self) -> list[Task]:
        """The tasks, newest first; their names are known to the redactor then."""
        tasks: list[Task] = []
        if self._client is not None:
            with contextlib.suppress(FinetunedError):
                for task in self._client.list_tasks():
                    tasks.append(task)
                    if len(tasks) >= _MOST_TASKS:
                        break
        for task in tasks:
            self._redactor.name(task.display_name)
            self._redactor.task(task.name)
            self._redactor.name(task.template.rpartition("/")[2])
            data = task.parameters.data
            for path in (data.train_file, data.eval_file, data.model_path, data.output_dir):
                self._redactor.path(path)
        for folder in self._run_folders():
            self._redactor.name(folder.name)
        return tasks

    def _run_folders(self) -> list[Path]:
        """Folders of tasks that have had runs, newest first."""
        try:
            folders = [f for f in (self._paths.state_dir / "runs").iterdir() if f.is_dir()]
        except OSError:
            return []
        return sorted(folders, key=lambda folder: -folder.stat().st_mtime)

    def _task_list(self) -> Iterator[Item]:
        from finetuned.cli.output import phase_word, reason_word, state_word, type_word

        tasks = [
            {
                "task": self._redactor.task(task.name),
                "display_name": self._redactor.name(task.display_name),
                "type": type_word(task.training_type),
                "state": state_word(task.state),
                "phase": phase_word(task.phase),
                "end_reason": reason_word(task.end_reason),
                "device": task.device,
                "run": task.run,
                "step": task.progress.step,
                "total_steps": task.progress.total_steps,
                "events": task.last_seq,
                "create_time": task.create_time.ToJsonString(),
                "start_time": task.start_time.ToJsonString(),
                "end_time": task.end_time.ToJsonString(),
            }
            for task in self._tasks
        ]
        if self._client is None:
            tasks = [{"task": self._redactor.name(f.name)} for f in self._run_folders()]
        yield self._json("tasks.json", "states and ends of all tasks", tasks[:_MOST_TASKS])

    def _runs(self) -> Iterator[Item]:
        if self._client is None:
            yield from self._runs_from_folders()
            return
        from finetuned.v1.task_pb2 import TaskState

        if self._task:
            chosen = [self._client.get_task(self._task)]
        else:
            failed = TaskState.TASK_STATE_FAILED
            chosen = [task for task in self._tasks if task.state == failed][:_MOST_RUNS]
        for task in chosen:
            for run in self._client.list_runs(task.name):
                yield from self._run(self._client, task, run)
                break

    def _run(self, client: Client, task: Task, run: Run) -> Iterator[Item]:
        from finetuned.cli.output import to_dict

        content = to_dict(run)
        shown = {
            key: value
            for key, value in content.items()
            if key not in ("parameters", "name", "end_message", "output_dir", "last_checkpoint")
        }
        shown = {
            k: v if k.endswith("time") else self._redactor.value(k, v) for k, v in shown.items()
        }
        shown["parameters"] = self._parameters(content.get("parameters", {}))
        folder = f"runs/{self._redactor.name(task.name.rpartition('/')[2])}/{run.number}"
        yield self._json(f"{folder}/run.json", "a run and its parameters, without names", shown)
        after = max(0, task.last_seq - _MOST_EVENTS)
        events = (to_dict(e) for e in client.list_events(task.name, after, run=run.number))
        yield self._events(folder, (self._event(e) for e in events))
        number = str(run.number)
        home = self._paths.state_dir / "runs" / task.name.rpartition("/")[2] / number
        yield from self._console(folder, home)

    def _runs_from_folders(self) -> Iterator[Item]:
        count = 0
        wanted = self._task.removeprefix("tasks/")
        for home in self._run_folders():
            runs = sorted(
                (p for p in home.iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)
            )
            if not runs or (wanted and home.name != wanted):
                continue
            result = _record(runs[-1] / "result.json")
            if result.get("end_reason") in ("FINISHED", "STOPPED_BY_USER") and not wanted:
                continue
            folder = f"runs/{self._redactor.name(home.name)}/{runs[-1].name}"
            yield from self._run_from_folder(folder, runs[-1], result)
            count += 1
            if count >= _MOST_RUNS:
                return

    def _run_from_folder(self, folder: str, home: Path, result: dict[str, Any]) -> Iterator[Item]:
        spec = _record(home / "spec.json")
        kept = ("format_version", "run", "training_type", "device", "num_threads", "attempt")
        shown = {key: spec[key] for key in (*kept, "probe", "request_id") if key in spec}
        shown["parameters"] = self._parameters(spec.get("parameters", {}))
        shown["result"] = {
            **{k: result[k] for k in ("end_reason", "step") if k in result},
            "traceback": self._redactor.traceback(str(result.get("detail", ""))),
        }
        yield self._json(f"{folder}/run.json", "a run and its parameters, without names", shown)
        lines = (parsed(line) for line in _tail(home / "events.jsonl", _LOG_BYTES).splitlines())
        events = (
            self._event({**line, str(line.get("kind")): line.get("payload")})
            for line in list(lines)[-_MOST_EVENTS:]
            if line is not None
        )
        yield self._events(folder, events)
        yield from self._console(folder, home)

    def _parameters(self, sections: dict[str, Any]) -> dict[str, Any]:
        return {section: self._redactor.value(section, v) for section, v in sections.items()}

    def _events(self, folder: str, events: Iterable[dict[str, Any]]) -> Item:
        lines = [json.dumps(event).encode() for event in events]
        purpose = "its events: numbers and kinds, no texts"
        return Item(f"{folder}/events.jsonl", purpose, b"\n".join([*lines, b""]))

    def _event(self, event: dict[str, Any]) -> dict[str, Any]:
        result = {k: event[k] for k in ("seq", "time", "run", "request_id") if event.get(k)}
        for kind, fields in _SAFE.items():
            payload = event.get(kind)
            if isinstance(payload, dict):
                result[kind] = {f: payload[f] for f in fields if f in payload}
                if kind == "result":
                    detail = str(payload.get("detail", ""))
                    result[kind]["traceback"] = self._redactor.traceback(detail)
                return result
        return result

    def _console(self, folder: str, home: Path) -> Iterator[Item]:
        if self._with_console and (home / "console.log").exists():
            text = _tail(home / "console.log", _CONSOLE_BYTES).decode(errors="replace")
            purpose = "the last lines that it printed, DATA MAY BE IN THEM"
            yield Item(f"{folder}/console.txt", purpose, self._redactor.text(text).encode())

    # --- logs

    def _logs(self) -> Iterator[Item]:
        lines = [parsed(line) for line in _tail(self._paths.log_file, _LOG_BYTES).splitlines()]
        if lines:
            content = b"".join(
                json.dumps(self._log_line(line), ensure_ascii=False).encode() + b"\n"
                for line in lines
                if line is not None
            )
            yield Item("daemon-log.jsonl", "the end of the daemon's log", content)
        text = _tail(self._paths.log, _START_BYTES).decode(errors="replace")
        if text:
            shown = "\n".join(map(self._start_line, text.splitlines())) + "\n"
            yield Item("daemon-start.txt", "what it printed when it started", shown.encode())

    def _log_line(self, line: dict[str, Any]) -> dict[str, Any]:
        result = dict[str, Any]()
        for key, value in line.items():
            if key == "exception":
                result[key] = self._redactor.traceback(str(value))
            elif key == "task":
                result[key] = self._redactor.task(str(value))
            elif key in ("time", "level", "logger", "method") or not isinstance(value, str):
                result[key] = value
            else:
                result[key] = self._redactor.text(value)
        return result

    def _start_line(self, line: str) -> str:
        return self._redactor.text(line)


def _record(path: Path) -> dict[str, Any]:
    """A record of a run folder; empty where there is none."""
    try:
        return parsed(path.read_bytes()) or {}
    except OSError:
        return {}


def _tail(path: Path, most: int) -> bytes:
    """The last whole lines of a file, not longer than `most` together; empty: there is none."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - most))
            data = file.read(most)
    except OSError:
        return b""
    return data if size <= most else data.partition(b"\n")[2]

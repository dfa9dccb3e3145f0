"""From the start of a run to the end of its first optimizer step, beside programs that do the same.

All train the same small model on the same chats with the same settings. Ours is measured as a bare
runner, as the daemon starts it, and as its user has it: from the call of StartTask to the event of
step 1, which is durable by then, in the hands of a watcher; cold, from a standby, and from a
standby with tokens that an earlier run has left in the cache. No other figure has the cache's help.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import material
import peers
from google.protobuf.json_format import ParseDict
from peers import Settings
from table import Options, Part, Row

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, system_service_pb2, task_pb2, task_service_pb2

COLD, SERVED, STANDBY, CACHED = "runner", "daemon", "standby", "standby, cached tokens"
PLAIN, FACTORY, TRL = "plain transformers script", "LLaMA-Factory", "trl sft"
COLD_BAR = 1.0
STANDBY_BAR = 0.35
FACTORY_BAR = 0.25

_CHATS, _MANY = 2000, 50_000
_STEPS = 2
_SECONDS = 600.0
_LOSS = re.compile(r"['\"]loss['\"]:")
_LOOK_SECONDS = 0.005

Command = Callable[[Settings, Path], list[str]]


class _Failed(Exception):
    """A system did not come to its first step."""


def run(options: Options) -> Part:
    """Measures all in turns.

    Raises:
        _Failed: Ours or the plain script did not train.
    """
    count = 300 if options.quick else _CHATS
    data, model = options.folder / "chats.jsonl", options.folder / "model"
    material.write_chats(data, count)
    material.make_model(model, data)
    settings = Settings(str(model), str(data), "", _STEPS)
    part = Part("start", f"seconds to the end of the first step, LoRA, {count:,} chats")
    systems = _systems(part, quick=options.quick)
    found: dict[str, list[float]] = {name: [] for name in (COLD, SERVED, STANDBY, CACHED, PLAIN)}
    found |= {name: [] for name in systems}
    for number in range(1 if options.quick else options.rounds):
        for system, command in list(systems.items()):
            folder = options.folder / f"{system.replace(' ', '-')}-{number}"
            try:
                found[system].append(_first_step(settings, command, folder))
            except _Failed as error:
                if system in (COLD, PLAIN):
                    raise
                part.notes.append(f"{system} did not train: {error}")
                del systems[system]
        for system, seconds in _served(settings, options.folder / f"daemon-{number}"):
            found[system].append(seconds)
        said = ", ".join(f"{name} {times[-1]:.2f}" for name, times in found.items() if times)
        print(f"  round {number + 1}: {said}", flush=True)
    part.rows += _rows(found)
    if not options.quick:
        part.rows += _growth(settings, found, options.folder)
    return part


def _systems(part: Part, *, quick: bool) -> dict[str, Command]:
    systems: dict[str, Command] = {PLAIN: peers.plain, COLD: peers.ours}
    if quick:
        part.notes.append("a quick run leaves out trl and LLaMA-Factory")
        return systems
    if (Path(sys.executable).parent / "trl").exists():
        systems[TRL] = peers.trl
    else:
        part.notes.append("trl is not installed")
    program = os.environ.get("LLAMAFACTORY") or shutil.which("llamafactory-cli")
    if program:
        systems[FACTORY] = lambda settings, folder: peers.llama_factory(settings, folder, program)
    else:
        part.notes.append("LLaMA-Factory is not installed: LLAMAFACTORY=/path/to/llamafactory-cli")
    return systems


def _rows(found: dict[str, list[float]]) -> list[Row]:
    middle = {name: statistics.median(times) for name, times in found.items() if times}
    plain = middle[PLAIN]
    rows = [
        Row("cold: runner started by itself", middle[COLD], "s", plain, PLAIN, COLD_BAR),
        Row("cold: StartTask to its event", middle[SERVED], "s", plain, PLAIN),
        Row("standby: StartTask to its event", middle[STANDBY], "s", plain, PLAIN, STANDBY_BAR),
    ]
    if FACTORY in middle:
        limit = middle[FACTORY]
        what = "standby: StartTask to its event"
        rows.append(Row(what, middle[STANDBY], "s", limit, FACTORY, FACTORY_BAR))
        rows.append(Row("cold: runner started by itself", middle[COLD], "s", limit, FACTORY))
    if TRL in middle:
        rows.append(Row("standby: StartTask to its event", middle[STANDBY], "s", middle[TRL], TRL))
    cached = "standby, tokens in the cache: StartTask to its event"
    rows.append(Row(cached, middle[CACHED], "s", plain, PLAIN))
    return rows


def _growth(settings: Settings, found: dict[str, list[float]], folder: Path) -> list[Row]:
    """A first step on many chats, beside one on few: once each, for it takes long."""
    many = folder / "many.jsonl"
    lines = Path(settings.data).read_bytes().splitlines(keepends=True)
    with many.open("wb") as file:
        file.writelines(lines[number % len(lines)] for number in range(_MANY))
    here = replace(settings, data=str(many))
    rows = list[Row]()
    for system, command in ((COLD, peers.ours), (PLAIN, peers.plain)):
        figure = _first_step(here, command, folder / f"many-{system.replace(' ', '-')}")
        limit = statistics.median(found[system])
        against = f"{system}, {_CHATS:,} chats"
        rows.append(Row(f"{_MANY:,} chats: {system}", figure, "s", limit, against))
    many.unlink()
    return rows


# --- programs


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "DISABLE_VERSION_CHECK": "1",
    }


def _first_step(settings: Settings, command: Command, folder: Path) -> float:
    """Seconds from the start of a program to the loss of its first step."""
    run_dir = folder / "run"
    arguments = command(replace(settings, output=str(folder / "out")), run_dir)
    log = folder / "log"
    # Our runner says it there.
    events = run_dir / "events.jsonl"
    first = 0.0
    with log.open("wb") as output:
        began = time.monotonic()
        process = subprocess.Popen(
            arguments, stdout=output, stderr=output, env=_environment(), cwd=folder
        )
        try:
            while not first and process.poll() is None:
                time.sleep(_LOOK_SECONDS)
                if _has_loss(log) or _has_loss(events):
                    first = time.monotonic() - began
            process.wait(_SECONDS)
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
    said = log.read_text(errors="replace")[-2000:]
    shutil.rmtree(folder)
    if not first or process.returncode:
        raise _Failed(f"{arguments[:3]} ended with {process.returncode}:\n{said}")
    return first


def _has_loss(file: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        return bool(_LOSS.search(file.read_text(errors="replace")))
    return False


# --- the daemon


def _served(settings: Settings, folder: Path) -> Iterator[tuple[str, float]]:
    """Runs of a daemon of its own: a cold one, then those from its standby."""
    folder.mkdir()
    daemon = Daemon(folder, "--standby-idle-minutes", "15", runner_module="finetuned_runner")
    daemon.environment.update(_environment())
    try:
        daemon.start()
        yield SERVED, _served_run(daemon, settings, folder / "cold", from_standby=False)
        _until_ready(daemon)
        shutil.rmtree(daemon.paths.state_dir / "cache")
        yield STANDBY, _served_run(daemon, settings, folder / "standby", from_standby=True)
        _until_ready(daemon)
        yield CACHED, _served_run(daemon, settings, folder / "cached", from_standby=True)
    finally:
        daemon.close()
    shutil.rmtree(folder)


def _served_run(daemon: Daemon, settings: Settings, output: Path, *, from_standby: bool) -> float:
    """Seconds from the call that starts a task to its first step in the hands of a watcher."""
    here = replace(settings, output=str(output))
    sections = peers.sections(here)
    sections["lora"]["lora_target_modules"] = {"values": peers.MODULES}
    parameters = ParseDict(sections, parameters_pb2.Parameters())
    name = daemon.create(parameters).name
    began = time.monotonic()
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=name))
    first = 0.0
    request = task_service_pb2.WatchTaskRequest(name=name, after_seq=0)
    call = daemon.tasks.WatchTask(request, timeout=_SECONDS)
    state = task_pb2.TASK_STATE_UNSPECIFIED
    for response in call:
        event = response.event
        if not first and event.progress.step >= 1:
            first = time.monotonic() - began
        state = event.state_change.new_state or state
        if state in (task_pb2.TASK_STATE_COMPLETED, task_pb2.TASK_STATE_FAILED):
            break
    call.cancel()
    runs = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs
    process = json.loads((Path(runs[0].run_dir) / "process.json").read_bytes())
    if not first or process["is_from_standby"] is not from_standby:
        raise _Failed(f"{name} ended in {task_pb2.TaskState.Name(state)}: {process}")
    return first


def _until_ready(daemon: Daemon) -> None:
    """Waits for the standby, and until the machine has nothing more to do for it."""
    request = system_service_pb2.GetSystemInfoRequest()
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        state = daemon.system.GetSystemInfo(request).standby.state
        if state == system_service_pb2.STANDBY_STATE_READY:
            return
        time.sleep(0.2)
    raise _Failed("there is no standby")

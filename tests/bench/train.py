"""How fast training is, and in how much memory, beside its peers: in turns, and losses compared.

Peers that are not installed are left out. LLAMAFACTORY=/path/to/llamafactory-cli names that one;
it wants other versions than ours, and so an environment of its own. CHECKPOINTING=1 measures all
with gradient checkpointing.
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
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import material
import peers
from peers import Settings
from table import Options, Part, Row

OURS, PLAIN = "finetuned", "transformers Trainer"
RATES = {PLAIN: 1.0, "LLaMA-Factory": 1.25, "trl sft": 1.8}
"""Tokens a second: ours to theirs, at least."""
MEMORY = 0.95
"""Peak memory: ours to the plain Trainer's, at most."""
LOSS = 1e-4
"""How far a loss may be from the plain Trainer's."""

_LOSS = re.compile(r"['\"]loss['\"]:\s*['\"]?([-+.\deE]+)")
_SKIPPED = 3
"""First steps that don't count for the rate: they are slower everywhere."""


@dataclass
class Measured:
    """One run of one system."""

    losses: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    peak: int = 0
    """Resident memory of its largest process, in bytes."""

    @property
    def rate(self) -> float:
        """Steps a second, when it is under way."""
        return (len(self.times) - 1 - _SKIPPED) / (self.times[-1] - self.times[_SKIPPED])

    @property
    def first(self) -> float:
        """Seconds from the start to the end of the first step."""
        return self.times[0]


Command = Callable[[Settings, Path], list[str]]


class _Failed(Exception):
    """A system did not train; says how it ended."""


def run(options: Options) -> Part:
    """Trains with each system in turns.

    Raises:
        _Failed: Ours or the plain Trainer, which all is held against, did not train.
    """
    steps, chats = (6, 300) if options.quick else (16, 2000)
    data, model = options.folder / "chats.jsonl", options.folder / "model"
    material.write_chats(data, chats)
    material.make_model(model, data)
    checkpointing = bool(os.environ.get("CHECKPOINTING"))
    settings = Settings(str(model), str(data), "", steps, checkpointing=checkpointing)
    part = Part("train", f"LoRA of a small model, {steps} steps, beside programs that do the same")
    if checkpointing:
        part.notes.append("with gradient checkpointing")
    systems = _systems(part, quick=options.quick)
    found: dict[str, list[Measured]] = {name: [] for name in systems}
    for number in range(1 if options.quick else options.rounds):
        for system, command in list(systems.items()):
            folder = options.folder / f"{system.replace(' ', '-')}-{number}"
            here = replace(settings, output=str(folder / "out"))
            try:
                found[system].append(_measure(command(here, folder / "run"), folder))
            except _Failed as error:
                if system in (OURS, PLAIN):
                    raise
                part.notes.append(f"{system} did not train: {error}")
                del systems[system], found[system]
                continue
            finally:
                shutil.rmtree(folder, ignore_errors=True)
            rate = found[system][-1].rate
            print(f"  round {number + 1}: {system} {rate:.2f} steps/s", flush=True)
    part.rows += _rows(found, _tokens(settings))
    return part


def _systems(part: Part, *, quick: bool) -> dict[str, Command]:
    systems: dict[str, Command] = {OURS: peers.ours, PLAIN: peers.plain}
    if quick:
        part.notes.append("a quick run leaves out trl and LLaMA-Factory")
        return systems
    if (Path(sys.executable).parent / "trl").exists():
        systems["trl sft"] = peers.trl
    else:
        part.notes.append("trl is not installed")
    program = os.environ.get("LLAMAFACTORY") or shutil.which("llamafactory-cli")
    if program:
        systems["LLaMA-Factory"] = lambda settings, folder: peers.llama_factory(
            settings, folder, program
        )
    else:
        part.notes.append("LLaMA-Factory is not installed: LLAMAFACTORY=/path/to/llamafactory-cli")
    return systems


def _rows(found: dict[str, list[Measured]], tokens: float) -> list[Row]:
    def middle(system: str, value: Callable[[Measured], float]) -> float:
        return statistics.median(map(value, found[system]))

    rows = list[Row]()
    theirs = [system for system in found if system != OURS]
    ours = middle(OURS, lambda m: m.rate) * tokens
    for system in theirs:
        rate = middle(system, lambda m: m.rate) * tokens
        bar = RATES[system]
        rows.append(Row("tokens/s", ours, "tokens/s", rate, system, bar, is_cost=False))
    peak = middle(OURS, lambda m: m.peak / 1e6)
    for system in theirs:
        limit = middle(system, lambda m: m.peak / 1e6)
        bar = MEMORY if system == PLAIN else None
        rows.append(Row("peak memory", peak, "MB", limit, system, bar))
    first = middle(OURS, lambda m: m.first)
    for system in theirs:
        limit = middle(system, lambda m: m.first)
        rows.append(Row("first step, as the rates are measured", first, "s", limit, system))
    pairs = zip(found[OURS][0].losses, found[PLAIN][0].losses, strict=True)
    difference = max(abs(one - other) for one, other in pairs)
    what = "largest difference of a loss"
    rows.append(Row(what, difference, "", LOSS, f"{LOSS:g} from {PLAIN}", 1.0))
    return rows


def _tokens(settings: Settings) -> float:
    """Real tokens of a step, in the mean over the data: the same for all systems."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(settings.model)
    lines = Path(settings.data).read_text().splitlines()
    lengths = [
        len(tokenizer.apply_chat_template(json.loads(line)["messages"])["input_ids"])
        for line in lines
    ]
    mean = statistics.mean(min(length, settings.max_length) for length in lengths)
    return mean * settings.batch_size * settings.accumulation


def _measure(command: list[str], folder: Path) -> Measured:
    measured = Measured()
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(os.cpu_count())),
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONUNBUFFERED": "1",
        "DISABLE_VERSION_CHECK": "1",
    }
    began = time.monotonic()
    log = folder / "log"
    with log.open("w") as kept:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=environment,
            cwd=folder,
        )
        events = folder / "run" / "events.jsonl"
        follower = threading.Thread(target=_follow, args=(process, events, began, measured))
        follower.start()
        assert process.stdout is not None
        for line in process.stdout:
            kept.write(line)
            match = _LOSS.search(line)
            if match:
                measured.times.append(time.monotonic() - began)
                measured.losses.append(float(match[1]))
        process.wait()
        follower.join()
    if process.returncode or len(measured.times) <= _SKIPPED + 1:
        print(log.read_text()[-3000:], file=sys.stderr)
        said = f"{Path(command[0]).name} ended with {process.returncode}"
        raise _Failed(f"{said} after {len(measured.times)} steps")
    return measured


def _follow(process: subprocess.Popen[str], events: Path, began: float, measured: Measured) -> None:
    """Reads our runner's events, and looks at the memory of the process and its children."""
    import psutil

    position = 0
    while process.poll() is None:
        time.sleep(0.02)
        with contextlib.suppress(psutil.Error):
            root = psutil.Process(process.pid)
            sizes = [p.memory_info().rss for p in (root, *root.children(recursive=True))]
            measured.peak = max(measured.peak, *sizes)
        if not events.exists():
            continue
        with events.open() as file:
            file.seek(position)
            for line in iter(file.readline, ""):
                if not line.endswith("\n"):
                    break
                position += len(line.encode())
                event = json.loads(line)
                if event["kind"] == "metrics":
                    measured.times.append(time.monotonic() - began)
                    measured.losses.append(event["payload"]["values"]["loss"])

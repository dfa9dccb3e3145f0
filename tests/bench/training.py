"""`make bench`: training against its peers, in turns, in one run; ratios, and losses compared.

Peers that are not installed are left out. LLAMAFACTORY=/path/to/llamafactory-cli names that one;
it wants other versions than ours, and so an environment of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import material
import peers
from peers import Settings

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


def main() -> int:
    """Measures, prints a table, and says whether the bars are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--only", help="names of systems, separated by commas")
    arguments = parser.parse_args()
    systems = _systems(arguments.only)
    found: dict[str, list[Measured]] = {name: [] for name in systems}
    with tempfile.TemporaryDirectory(prefix="finetuned-bench-") as name:
        root = Path(name)
        chats, model = root / "chats.jsonl", root / "model"
        material.write_chats(chats, 2000)
        material.make_model(model, chats)
        settings = Settings(
            str(model), str(chats), "", arguments.steps, checkpointing=arguments.checkpointing
        )
        tokens = _tokens(settings)
        for number in range(arguments.rounds):
            for system, command in systems.items():
                folder = root / f"{system.replace(' ', '-')}-{number}"
                here = replace(settings, output=str(folder / "out"))
                found[system].append(_measure(command(here, folder / "run"), folder))
                print(
                    f"round {number + 1}: {system} {found[system][-1].rate:.2f} steps/s", flush=True
                )
                shutil.rmtree(folder)
    return _tell(found, tokens, arguments)


def _systems(only: str | None) -> dict[str, Command]:
    systems: dict[str, Command] = {"finetuned": peers.ours, "transformers Trainer": peers.plain}
    if (Path(sys.executable).parent / "trl").exists():
        systems["trl sft"] = peers.trl
    program = os.environ.get("LLAMAFACTORY") or shutil.which("llamafactory-cli")
    if program:
        systems["LLaMA-Factory"] = lambda settings, folder: peers.llama_factory(
            settings, folder, program
        )
    chosen = only.split(",") if only else list(systems)
    return {name: command for name, command in systems.items() if name in chosen}


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
        sys.exit(f"{command[:3]} ended with {process.returncode}:\n{log.read_text()[-3000:]}")
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


def _tell(found: dict[str, list[Measured]], tokens: float, arguments: argparse.Namespace) -> int:
    def middle(system: str, value: Callable[[Measured], float]) -> float:
        return statistics.median(map(value, found[system]))

    print(f"\n{arguments.steps} steps, {arguments.rounds} rounds in turns, medians")
    print(f"{'':22}{'tokens/s':>10}{'ours':>8}{'peak MB':>9}{'ours':>8}{'first s':>9}{'loss':>9}")
    for system in found:
        rate, peak = middle(system, lambda m: m.rate), middle(system, lambda m: m.peak)
        print(
            f"{system:22}{rate * tokens:10.0f}"
            f"{middle('finetuned', lambda m: m.rate) / rate:8.2f}{peak / 1e6:9.0f}"
            f"{middle('finetuned', lambda m: m.peak) / peak:8.2f}"
            f"{middle(system, lambda m: m.first):9.1f}{found[system][0].losses[-1]:9.4f}"
        )
    missed = []
    for system, bar in (("LLaMA-Factory", 1.25), ("trl sft", 1.8)):
        if system in found:
            ratio = middle("finetuned", lambda m: m.rate) / middle(system, lambda m: m.rate)
            if ratio < bar:
                missed.append(f"{ratio:.2f} of the tokens/s of {system}, not {bar}")
    if "transformers Trainer" in found:
        plain = found["transformers Trainer"]
        ratio = middle("finetuned", lambda m: m.peak) / statistics.median(m.peak for m in plain)
        if ratio > 0.95:
            missed.append(f"{ratio:.2f} of the memory of the plain Trainer, not 0.95")
        pairs = zip(found["finetuned"][0].losses, plain[0].losses, strict=True)
        difference = max(abs(one - other) for one, other in pairs)
        print(f"largest difference of a loss from the plain Trainer's: {difference:.1e}")
        if difference > 1e-4:
            missed.append(f"losses differ by {difference:.1e}, not by 1e-4 at most")
    print("\n".join(f"missed: {line}" for line in missed) or "all bars are met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())

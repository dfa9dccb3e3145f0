"""Runs: as real processes, and within the test's own where a process would show nothing more."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import pytest

# Before torch is imported anywhere: one thread, so that results are equal to the bit.
os.environ.update(
    {
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TQDM_DISABLE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
)

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    CONTROL,
    EVENTS,
    RESULT,
    SPEC,
    CheckpointSaved,
    Control,
    EventLine,
    Metrics,
    Notice,
    Payload,
    PhaseChange,
    Result,
    Spec,
    StopWish,
    TrainingType,
    write_record,
)
from tiny import chats, documents, make_model, write_jsonl

P = TypeVar("P")
DEADLINE = 60.0


@dataclass
class Run:
    """A run folder, and the process that works on it."""

    folder: Path
    spec: Spec
    process: subprocess.Popen[bytes] | None = None

    @property
    def output(self) -> Path:
        return Path(self.spec.output_dir)

    @property
    def result(self) -> Result:
        return Result.model_validate_json((self.folder / RESULT).read_bytes())

    def lines(self) -> list[EventLine]:
        """All events so far; a torn last line doesn't count."""
        path = self.folder / EVENTS
        text = path.read_text() if path.exists() else ""
        return [EventLine.model_validate_json(line) for line in text.split("\n")[:-1]]

    def events(self, kind: type[P]) -> list[P]:
        """The payloads of one kind, in order."""
        return [event for line in self.lines() if isinstance(event := line.parse(), kind)]

    def payloads(self) -> list[Payload]:
        return [event for line in self.lines() if (event := line.parse()) is not None]

    def phases(self) -> list[str]:
        """Phases in order, without immediate repeats."""
        phases = [str(event.phase) for event in self.events(PhaseChange)]
        return [p for i, p in enumerate(phases) if i == 0 or phases[i - 1] != p]

    def losses(self) -> dict[int, float]:
        """Logged loss by step."""
        return {event.step: event.values["loss"] for event in self.events(Metrics)}

    def rates(self) -> dict[int, float]:
        """Learning rate by step."""
        return {event.step: event.values["learning_rate"] for event in self.events(Metrics)}

    def notices(self) -> dict[str, Notice]:
        """Notices by reason."""
        return {event.reason: event for event in self.events(Notice)}

    def checkpoints(self) -> list[CheckpointSaved]:
        return self.events(CheckpointSaved)

    def wish(self, stop: StopWish) -> None:
        write_record(self.folder / CONTROL, Control(stop=stop))

    def wait(self) -> int:
        """Exit status, when the process has ended."""
        assert self.process is not None
        return self.process.wait(DEADLINE)

    def wait_for(self, holds: Callable[[Run], bool]) -> None:
        """Waits until something holds while the process lives."""
        end = time.monotonic() + DEADLINE
        while not holds(self):
            assert time.monotonic() < end, f"not within {DEADLINE} s: {self.lines()[-3:]}"
            assert self.process is not None
            assert self.process.poll() is None, (self.folder / "console.log").read_text()
            time.sleep(0.01)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Lets pass what libraries say to one another: peft uses an old name of transformers'."""
    allowed = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(allowed)


class Shop:
    """Makes runs."""

    def __init__(self, root: Path, models: Path):
        self.root = root
        self.models = models
        self._started: list[subprocess.Popen[bytes]] = []

    def model(self, template: str | None = "chatml", **options: Any) -> Path:
        name = "-".join([str(template), *(f"{key}{value}" for key, value in options.items())])
        return make_model(self.models / name, template, **options)

    def chats(self, count: int = 24, *, turns: int = 1, name: str = "chats.jsonl") -> Path:
        return write_jsonl(self.root / name, chats(count, turns=turns))

    def documents(self, count: int = 24, name: str = "documents.jsonl") -> Path:
        return write_jsonl(self.root / name, documents(count))

    def make(
        self,
        name: str = "run",
        *,
        kind: TrainingType = TrainingType.SFT,
        template: str | None = "chatml",
        **sections: dict[str, Any],
    ) -> Run:
        """A run folder with its spec. Logs every step, and has no data loader process."""
        folder = self.root / name
        folder.mkdir(parents=True)
        data = {"dataloader_num_workers": 0, **sections.pop("data", {})}
        if "model_path" not in data:
            data["model_path"] = str(self.model(template))
        if "train_file" not in data:
            data["train_file"] = str(self.chats() if kind is TrainingType.SFT else self.documents())
        data["output_dir"] = str(self.root / "out")
        training = {"gradient_accumulation_steps": 2, "num_train_epochs": 1, "max_seq_length": 128}
        training |= sections.pop("training", {})
        spec = Spec(
            task="tasks/test",
            run=1,
            training_type=kind,
            device="cpu",
            num_threads=1,
            output_dir=str(self.root / "out" / name),
            parameters=Parameters.model_validate(
                {
                    "data": data,
                    "training": training,
                    "logging": {"logging_steps": 1, **sections.pop("logging", {})},
                    "optimization": {"fp16": False, "gradient_checkpointing": False}
                    | sections.pop("optimization", {}),
                    **sections,
                }
            ),
        )
        write_record(folder / SPEC, spec)
        return Run(folder, spec)

    def start(self, run: Run) -> Run:
        """Starts the runner as a process of its own."""
        with (run.folder / "console.log").open("ab") as console:
            run.process = subprocess.Popen(
                [sys.executable, "-m", "finetuned_runner", str(run.folder)],
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
        self._started.append(run.process)
        return run

    def here(self, run: Run, watch: Any = None) -> Run:
        """Runs the recipe in this process, to its end."""
        from finetuned_runner import pretrain, sft
        from finetuned_runner.control import Watch
        from finetuned_runner.failures import judge
        from finetuned_runner.report import Report

        report = Report(run.folder)
        watch = watch(run.folder, report) if watch else Watch(run.folder, report)
        recipe = sft if run.spec.training_type is TrainingType.SFT else pretrain
        try:
            result = recipe.run(run.spec, report, watch)
        except Exception as error:  # noqa: BLE001 - as the runner itself does
            result = judge(error, run.spec.parameters, report.step)
        watch.end(result)
        return run

    def close(self) -> None:
        for process in self._started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of tiny models, made when first asked for."""
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="session")
def large_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chats enough that their tokens are still made long after the first step."""
    made = [
        {"messages": [{"role": "user", "content": f"Number {number}?"}, answer]}
        for number, answer in enumerate(
            [{"role": "assistant", "content": "One word more. " * 60}] * 20_000
        )
    ]
    return write_jsonl(tmp_path_factory.mktemp("large") / "chats.jsonl", made)


@pytest.fixture
def shop(tmp_path: Path, models: Path) -> Iterator[Shop]:
    """Makes runs in a folder of the test's own."""
    shop = Shop(tmp_path, models)
    yield shop
    shop.close()


@pytest.fixture(scope="module")
def module_shop(tmp_path_factory: pytest.TempPathFactory, models: Path) -> Iterator[Shop]:
    """Makes runs that several tests of a module look at."""
    shop = Shop(tmp_path_factory.mktemp("runs"), models)
    yield shop
    shop.close()

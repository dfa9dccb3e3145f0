"""Runs that begin from a standby: as any other, whatever happens to whom."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import psutil
import pytest

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, system_service_pb2, task_pb2, task_service_pb2
from terminal import CTL
from tiny import chats, make_model, write_jsonl

pytestmark = [
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="only Linux forks"),
    pytest.mark.timeout(900),
]

_SECONDS = 600.0
"""Imports take 4 s where nothing else runs, and each test has several."""
_LOOK_SECONDS = 0.1

OFF = system_service_pb2.STANDBY_STATE_OFF
NONE = system_service_pb2.STANDBY_STATE_NONE
READY = system_service_pb2.STANDBY_STATE_READY

T = TypeVar("T")


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and data."""
    root = tmp_path_factory.mktemp("studio")
    make_model(root / "model", layers=1)
    write_jsonl(root / "chats.jsonl", chats(64))
    # Enough for a process of its own that makes tokens.
    write_jsonl(root / "many.jsonl", chats(2000))
    return root


def seen(look: Callable[[], T | None], what: str) -> T:
    """The first true answer of `look`; asked seldom, so as to keep no core from the imports."""
    deadline = time.monotonic() + _SECONDS
    while not (answer := look()):
        assert time.monotonic() < deadline, f"not seen: {what}"
        time.sleep(_LOOK_SECONDS)
    return answer


class Place:
    """A daemon with a standby, and runs in it."""

    def __init__(self, root: Path, studio: Path, *options: str) -> None:
        self.studio = studio
        self.root = root
        self.daemon = Daemon(
            root, "--standby-idle-minutes", "15", *options, runner_module="finetuned_runner"
        )
        # One thread: results are equal to the bit.
        self.daemon.environment["OMP_NUM_THREADS"] = "1"

    def standby(self) -> system_service_pb2.Standby:
        request = system_service_pb2.GetSystemInfoRequest()
        return self.daemon.system.GetSystemInfo(request).standby

    def until(self, state: int) -> system_service_pb2.Standby:
        def look() -> system_service_pb2.Standby | None:
            standby = self.standby()
            return standby if standby.state == state else None

        name = system_service_pb2.StandbyState.Name(state)  # type: ignore[arg-type]
        return seen(look, f"the standby is {name}")

    def ready(self) -> system_service_pb2.Standby:
        """Lets a run end where there was none, and waits for the standby."""
        if self.standby().state == NONE:
            self.end(self.create())
        return self.until(READY)

    def create(self, data: str = "chats.jsonl", **training: Any) -> str:
        """Starts a run of two steps; returns the task's name."""
        settings = {"batch_size": 2, "gradient_accumulation_steps": 1, "max_seq_length": 128}
        optimization = training.pop("optimization", {})
        parameters = parameters_pb2.Parameters(
            data=parameters_pb2.DataParameters(
                train_file=str(self.studio / data),
                model_path=str(self.studio / "model"),
                output_dir=str(self.root / "out"),
                dataloader_num_workers=0,
            ),
            training=parameters_pb2.TrainingParameters(
                **{**settings, "max_steps": 2, **training}  # type: ignore[arg-type]
            ),
            lora=parameters_pb2.LoraParameters(lora_r=4),
            optimization=parameters_pb2.OptimizationParameters(
                gradient_checkpointing=False, **optimization
            ),
            logging=parameters_pb2.LoggingParameters(logging_steps=1),
        )
        return self.daemon.create(parameters, start=True).name

    def long(self) -> str:
        """Starts a run that goes on until it is stopped; returns once it trains."""
        name = self.create("many.jsonl", max_steps=100_000)
        seen(lambda: self.daemon.get(name).progress.step >= 1, f"{name} trains")
        return name

    def end(self, name: str) -> task_pb2.Task:
        ends = (
            task_pb2.TASK_STATE_COMPLETED,
            task_pb2.TASK_STATE_STOPPED,
            task_pb2.TASK_STATE_FAILED,
        )

        def look() -> task_pb2.Task | None:
            task = self.daemon.get(name)
            return task if task.state in ends else None

        return seen(look, f"{name} ends")

    def stop(self, name: str) -> task_pb2.Task:
        self.daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=name))
        return self.end(name)

    def run_dir(self, name: str) -> Path:
        request = task_service_pb2.ListRunsRequest(parent=name)
        return Path(self.daemon.tasks.ListRuns(request).runs[0].run_dir)

    def process(self, name: str) -> psutil.Process:
        """Of its runner."""
        return psutil.Process(self.who(name)["identity"]["pid"])

    def who(self, name: str) -> dict[str, Any]:
        content: dict[str, Any] = json.loads((self.run_dir(name) / "process.json").read_bytes())
        return content

    def values(self, name: str) -> list[dict[str, float]]:
        """Its metrics, without those of time."""
        return [
            {k: v for k, v in event.metrics.values.items() if "second" not in k}
            for event in self.daemon.events(name)
            if event.HasField("metrics")
        ]


@pytest.fixture(scope="module")
def shared(studio: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One daemon for the tests that leave it as it was."""
    place = Place(tmp_path_factory.mktemp("place"), studio)
    place.daemon.start()
    yield place
    place.daemon.close()


@pytest.fixture
def place(studio: Path, tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path, studio)
    yield place
    place.daemon.close()


def facts(process: psutil.Process) -> dict[str, Any]:
    """What a process has from whoever started it."""
    folder = Path(f"/proc/{process.pid}")
    lines = (folder / "status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    opened = [str(path.readlink()) for path in (folder / "fd").iterdir()]
    # Pipes and sockets are to processes that make tokens, which are forked there and spawned here;
    # the second run finds the tokens of the first.
    own = ("pipe:", "socket:", f"{process.cwd().partition('/runs/')[0]}/cache/")
    files = [name for name in opened if not name.startswith(own)]
    held = {name.replace(process.cwd(), "RUN_DIR") for name in files}
    stat = (folder / "stat").read_text().rpartition(")")[2].split()
    return {
        "command": [part for part in process.cmdline() if part][:-1],
        "environment": {
            name: value.replace(process.cwd(), "RUN_DIR").strip()
            for name, value in process.environ().items()
        },
        "descriptors": sorted(held),
        **{name: status[name] for name in ("Umask", "SigBlk", "SigIgn", "SigCgt", "Uid", "Gid")},
        "oom_score_adj": (folder / "oom_score_adj").read_text(),
        "limits": (folder / "limits").read_text(),
        "nice": process.nice(),
        "leads group": int(stat[2]) == process.pid,
        "leads session": int(stat[3]) == process.pid,
        "terminal": stat[4],
    }


def test_a_run_from_a_standby_is_as_a_run_that_was_started(shared: Place) -> None:
    """It is the daemon's child and has what any runner has: a name, descriptors, a mask."""
    shared.ready()
    os.kill(shared.standby().pid, signal.SIGKILL)
    shared.until(NONE)
    cold = shared.long()
    assert not shared.who(cold)["is_from_standby"]
    expected = facts(shared.process(cold))
    shared.stop(cold)
    before = shared.ready().started_runs
    name = shared.long()
    process = shared.process(name)
    assert shared.who(name)["is_from_standby"]
    assert shared.standby().started_runs == before + 1
    assert process.ppid() == shared.daemon.process.pid  # type: ignore[union-attr]
    assert [part for part in process.cmdline() if part][-1] == str(shared.run_dir(name))
    assert process.environ()["TRAINING_RUN_DIR"] == str(shared.run_dir(name))
    found = facts(process)
    shared.stop(name)
    for environment in (expected["environment"], found["environment"]):
        environment.pop("PWD", None)
    assert found == expected


def test_losses_are_the_same(shared: Place) -> None:
    """Whether its process was forked or started, a run learns the same to the bit."""
    shared.ready()
    os.kill(shared.standby().pid, signal.SIGKILL)
    shared.until(NONE)
    cold = shared.create()
    assert shared.end(cold).state == task_pb2.TASK_STATE_COMPLETED
    shared.until(READY)
    forked = [shared.create(), shared.create()]
    for name in forked:
        assert shared.end(name).state == task_pb2.TASK_STATE_COMPLETED
        assert shared.who(name)["is_from_standby"]
        assert shared.values(name) == shared.values(cold)
    assert not shared.who(cold)["is_from_standby"]


def test_memory_is_shown(shared: Place) -> None:
    """The standby's process, its memory and since when it is ready can be asked for."""
    standby = shared.ready()
    resident = psutil.Process(standby.pid).memory_info().rss
    assert standby.memory_bytes == pytest.approx(resident, rel=0.2)
    assert standby.memory_bytes > 100 << 20
    assert standby.ready_time.seconds > 0
    status = subprocess.run(
        [CTL, "--address", shared.daemon.address, "daemon", "status"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"ready, process {standby.pid}, " in status.stdout


def test_a_stop_saves(shared: Place) -> None:
    """A run from a standby that is stopped leaves a checkpoint, and ends as stopped."""
    shared.ready()
    name = shared.long()
    assert shared.who(name)["is_from_standby"]
    assert shared.stop(name).state == task_pb2.TASK_STATE_STOPPED
    request = task_service_pb2.ListCheckpointsRequest(parent=name)
    assert shared.daemon.tasks.ListCheckpoints(request).checkpoints


def test_a_killed_run_leaves_nothing(shared: Place) -> None:
    """Its signal is known, what it has left behind ends, and no zombie stays; others start."""
    shared.ready()
    name = shared.long()
    process = shared.process(name)
    process.kill()
    task = shared.end(name)
    assert task.state == task_pb2.TASK_STATE_FAILED
    request = task_service_pb2.ListRunsRequest(parent=name)
    run = shared.daemon.tasks.ListRuns(request).runs[0]
    assert run.signal == "SIGKILL"
    daemon = psutil.Process(shared.daemon.process.pid)  # type: ignore[union-attr]

    def is_clean() -> bool:
        children = {child.pid for child in daemon.children()}
        return children <= {shared.standby().pid}

    seen(is_clean, "nothing is left but the standby")
    assert shared.standby().state == READY
    other = shared.create()
    assert shared.end(other).state == task_pb2.TASK_STATE_COMPLETED
    assert shared.who(other)["is_from_standby"]


def test_a_killed_standby_takes_no_run_along(shared: Place) -> None:
    """Its run goes on to the end with a known exit, and the next one starts the usual way."""
    standby = shared.ready()
    name = shared.long()
    os.kill(standby.pid, signal.SIGKILL)
    shared.until(NONE)
    assert shared.process(name).is_running()
    other = shared.create()  # waits for the device
    assert shared.stop(name).state == task_pb2.TASK_STATE_STOPPED
    assert shared.end(other).state == task_pb2.TASK_STATE_COMPLETED
    assert not shared.who(other)["is_from_standby"]


def test_a_stuck_standby_holds_up_no_run(shared: Place) -> None:
    """One that does not answer is given up, and the run is started the usual way."""
    standby = shared.ready()
    os.kill(standby.pid, signal.SIGSTOP)
    name = shared.create()
    assert shared.end(name).state == task_pb2.TASK_STATE_COMPLETED
    assert not shared.who(name)["is_from_standby"]
    assert not psutil.pid_exists(standby.pid)


def test_bitsandbytes_is_had_where_it_is_needed(shared: Place) -> None:
    """A run that needs what a standby has hidden is started the usual way, and gets it."""
    pytest.importorskip("bitsandbytes")
    standby = shared.ready()
    name = shared.create(optimization={"use_8bit_optimizer": True})
    assert shared.end(name).state == task_pb2.TASK_STATE_COMPLETED
    assert not shared.who(name)["is_from_standby"]
    assert shared.standby().pid == standby.pid


def test_a_daemon_that_is_killed_leaves_its_run_and_takes_its_standby(place: Place) -> None:
    """The next daemon adopts the run, under the name that its process has; the standby ends."""
    place.daemon.start()
    standby = psutil.Process(place.ready().pid)
    name = place.long()
    process = place.process(name)
    place.daemon.kill()
    seen(lambda: not standby.is_running(), "the standby ends")
    assert process.is_running()
    place.daemon.start()
    assert place.stop(name).state == task_pb2.TASK_STATE_STOPPED
    seen(lambda: not process.is_running(), "whoever has it now has reaped it")


def test_a_daemon_that_ends_ends_its_standby(place: Place) -> None:
    """Nothing of it is left behind."""
    place.daemon.start()
    standby = psutil.Process(place.ready().pid)
    assert place.daemon.stop() == 0
    assert not standby.is_running()


def test_no_run_begins_from_what_has_been_replaced(place: Place, tmp_path: Path) -> None:
    """After a change of what was imported, or of where it lies, a run starts the usual way."""
    packages = tmp_path / "packages"
    packages.mkdir()
    place.daemon.environment["PYTHONPATH"] = str(packages)
    place.daemon.start()
    standby = place.ready()
    (packages / "another.py").touch()
    name = place.create()
    assert place.end(name).state == task_pb2.TASK_STATE_COMPLETED
    assert not place.who(name)["is_from_standby"]
    assert place.until(READY).pid != standby.pid
    other = place.create()
    assert place.end(other).state == task_pb2.TASK_STATE_COMPLETED
    assert place.who(other)["is_from_standby"]


def test_it_is_dropped_when_idle(studio: Path, tmp_path: Path) -> None:
    """A standby that no run has begun from for the time that is set ends by itself."""
    place = Place(tmp_path, studio, "--standby-idle-minutes", "0.0001")
    place.daemon.start()
    with contextlib.closing(place.daemon):
        place.end(place.create())
        log = place.daemon.paths.log_file
        seen(lambda: "no run has started" in log.read_text(), "it is dropped")
        assert place.standby().state == NONE


def test_it_can_be_turned_off(studio: Path, tmp_path: Path) -> None:
    """With 0 minutes none is made, and it says so."""
    place = Place(tmp_path, studio, "--standby-idle-minutes", "0")
    place.daemon.start()
    with contextlib.closing(place.daemon):
        assert place.standby().state == OFF
        place.end(place.create())
        assert place.standby().state == OFF
        assert not list(place.daemon.paths.state_dir.glob("standby*"))


def test_a_spare_process_becomes_the_run(studio: Path, tmp_path: Path) -> None:
    """Where nothing is forked, the standby itself is the next run, and is made anew after it."""
    place = Place(tmp_path, studio, "--standby-spare")
    place.daemon.start()
    with contextlib.closing(place.daemon):
        standby = place.ready()
        name = place.long()
        assert place.who(name)["is_from_standby"]
        assert place.process(name).pid == standby.pid
        assert place.process(name).environ()["TRAINING_RUN_DIR"] == str(place.run_dir(name))
        assert place.standby().state == NONE
        assert place.stop(name).state == task_pb2.TASK_STATE_STOPPED
        assert place.until(READY).pid != standby.pid

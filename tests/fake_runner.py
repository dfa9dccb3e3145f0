"""A runner without a model, for tests of the daemon alone.

Keeps the contract of the run folder, in milliseconds.

`python -m fake_runner RUN_DIR`. What it does stands in `scenario.json` in the model folder:

    steps       optimizer steps (default 3)
    save_steps  a checkpoint every so many steps
    gated       take a step only for each byte that a test writes into the FIFO `gate` of the model
    folder
    hold        wait for ever in this phase, such as LOADING_MODEL; a stop ends it
    deaf        neither a wish nor SIGTERM stops it
    exit        leave at this step with this exit status and no result: [step, status]
    garble      write lines that are no events before the first step
    console     print this line
    child       start a process that never ends, its pid in the file `child` of the run folder
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NoReturn

from finetuned_daemon.runs.contract import (
    CONTROL,
    EVENTS,
    PROCESS,
    RESULT,
    SPEC,
    CheckpointSaved,
    Control,
    EndReason,
    EventLine,
    LogLine,
    Metrics,
    Payload,
    PhaseChange,
    Process,
    ProcessIdentity,
    Progress,
    Result,
    RunPhase,
    Spec,
    StopWish,
    write_record,
)

_LOOK_SECONDS = 0.01


class FakeRunner:
    """One run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        identity = ProcessIdentity.of(os.getpid())
        assert identity is not None
        write_record(run_dir / PROCESS, Process(identity=identity))
        self.spec = Spec.model_validate_json((run_dir / SPEC).read_bytes())
        model = Path(self.spec.parameters.data.model_path or "")
        self.scenario: dict[str, Any] = json.loads((model / "scenario.json").read_text())
        self.gate = os.open(model / "gate", os.O_RDWR) if self.scenario.get("gated") else -1
        self.events = open(run_dir / EVENTS, "ab")  # noqa: SIM115 - open as long as the process lives
        self.seq = 0
        self.step = 0
        self.steps = int(self.scenario.get("steps", 3))
        self.was_told = False

    def run(self) -> NoReturn:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._told)
        if "console" in self.scenario:
            print(self.scenario["console"], flush=True)
        if self.scenario.get("child"):
            child = subprocess.Popen([sys.executable, "-c", "import signal; signal.pause()"])
            (self.run_dir / "child").write_text(str(child.pid))
        for phase in (RunPhase.STARTING, RunPhase.LOADING_MODEL, RunPhase.PREPARING_DATA):
            self.enter(phase)
        if self.scenario.get("garble"):
            self.events.write(b'{"seq": 1, "no": "event"}\n\x00\x00\nnot json\n')
        self.enter(RunPhase.TRAINING)
        while self.step < self.steps:
            self.wait_for_gate()
            self.step += 1
            self.one_step()
            if self.wish():
                self.stop()
        self.end(EndReason.FINISHED, self.save("end"))

    def enter(self, phase: RunPhase) -> None:
        self.emit(PhaseChange(phase=phase))
        while self.scenario.get("hold") == phase:
            if self.wish():
                self.stop()
            time.sleep(_LOOK_SECONDS)
        if self.wish():
            self.stop()

    def one_step(self) -> None:
        done = Progress(
            step=self.step, total_steps=self.steps, epoch=self.step / self.steps, loss=1 / self.step
        )
        self.emit(Metrics(step=self.step, epoch=done.epoch, values={"loss": 1 / self.step}))
        self.emit(done)
        status = self.scenario.get("exit")
        if status and status[0] == self.step:
            os._exit(status[1])
        every = int(self.scenario.get("save_steps", 0))
        if every and self.step % every == 0:
            self.save("steps")

    def wait_for_gate(self) -> None:
        while self.gate >= 0:
            if select.select([self.gate], [], [], _LOOK_SECONDS)[0]:
                os.read(self.gate, 1)
                return
            if self.wish():
                self.stop()

    def wish(self) -> StopWish | None:
        if self.scenario.get("deaf"):
            return None
        if self.was_told:
            return StopWish.SAVE
        with contextlib.suppress(FileNotFoundError):
            return Control.model_validate_json((self.run_dir / CONTROL).read_bytes()).stop
        return None

    def stop(self) -> NoReturn:
        self.emit(PhaseChange(phase=RunPhase.STOPPING))
        saves = self.wish() is StopWish.SAVE and self.step > 0
        self.end(EndReason.STOPPED_BY_USER, self.save("stop") if saves else "")

    def save(self, cause: Any) -> str:
        folder = Path(self.spec.output_dir) / f"checkpoint-{self.step}"
        folder.mkdir(exist_ok=True)
        (folder / "manifest.json").write_text("{}")  # a checkpoint to all who only look
        self.emit(CheckpointSaved(path=str(folder), step=self.step, cause=cause))
        return str(folder)

    def emit(self, payload: Payload) -> None:
        self.seq += 1
        self.events.write(EventLine.make(self.seq, payload).model_dump_json().encode() + b"\n")
        self.events.flush()

    def end(self, reason: EndReason, output_path: str) -> NoReturn:
        self.emit(LogLine(level="info", logger="fake", text=f"ends: {reason}"))
        write_record(
            self.run_dir / RESULT,
            Result(end_reason=reason, step=self.step, output_path=output_path),
        )
        sys.exit(0)

    def _told(self, *_: object) -> None:
        self.was_told = True


if __name__ == "__main__":
    FakeRunner(Path(sys.argv[1])).run()

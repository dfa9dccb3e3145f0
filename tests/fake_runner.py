"""A runner without a model, for tests of the daemon alone.

Keeps the contract of the run folder, in milliseconds.

`python -m fake_runner RUN_DIR`. What it does stands in `scenario.json` in the model folder:

    steps       optimizer steps (default 3)
    save_steps  a checkpoint every so many steps
    eval_losses the evaluation loss that the checkpoint of a step has, by step
    gated       take a step only for each byte that a test writes into the FIFO `gate` of the model
    folder
                (the training quota may end it earlier)
    hold        wait for ever in this phase, such as LOADING_MODEL; a stop ends it
    deaf        neither a wish nor SIGTERM stops it
    exit        leave at this step with this exit status and no result: [step, status]
    fail        end at this step as failed: {"step", "reason"}, only with a batch "above" a size,
                only in one "attempt", and with more fields of `Result`
    garble      write lines that are no events before the first step
    console     print this line
    log         log this line at the end
    lines       log so many lines with each step, each of so many characters: [lines, characters]
    child       start a process that never ends, its pid in the file `child` of the run folder;
                "group": in a process group of its own
    report      fields of the report of a probe, which leaves a file in its output folder
    beats       touch `heartbeat` ten times in a second; a number: only until that step
    crash       end in each of the first so many starts, and how: [starts, "SIGSEGV" or a status]
    durable     sync what it saves; takes time, and matters only where power is lost
    frozen      do nothing at all, not even say who it is; a stop does not end it

`python -m fake_runner --probe`. What it answers stands in the file that `FAKE_PROBE` names, if it
does: fields of a probe, and

    hang        answer never; its pid in the file `pid` beside
    exit        leave with this status
    print       print this instead of the answer
    count       add a byte to this file for each time that it is asked
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
import time
from hashlib import sha256
from pathlib import Path
from typing import Any, NoReturn

from finetuned_daemon.environment.probe import Probe
from finetuned_daemon.runs.contract import (
    CONTROL,
    EVENTS,
    HEARTBEAT,
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
    ProbeReport,
    Process,
    ProcessIdentity,
    Progress,
    Result,
    RunPhase,
    Spec,
    StopWish,
    TrainingType,
    sync_dir,
    write_record,
)
from finetuned_daemon.runs.manifest import (
    MANIFEST,
    OUTPUTS,
    STATE_FILES,
    FileEntry,
    Manifest,
    WrittenFolder,
)

_LOOK_SECONDS = 0.01


class FakeRunner:
    """One run."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.spec = Spec.model_validate_json((run_dir / SPEC).read_bytes())
        model = Path(self.spec.parameters.data.model_path or "")
        self.scenario: dict[str, Any] = json.loads((model / "scenario.json").read_text())
        if self.scenario.get("frozen"):
            time.sleep(600)
        identity = ProcessIdentity.of(os.getpid())
        assert identity is not None
        if (run_dir / PROCESS).exists():
            sys.exit(75)
        write_record(run_dir / PROCESS, Process(identity=identity))
        self.gate = os.open(model / "gate", os.O_RDWR) if self.scenario.get("gated") else -1
        self.events = open(run_dir / EVENTS, "ab")  # noqa: SIM115 - open as long as the process lives
        self.seq = 0
        self.step = self.resumed_step()
        self.steps = int(self.scenario.get("steps", 3))
        self.was_told = False
        self.save_wishes = 0
        self.saved = 0

    def run(self) -> NoReturn:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, self._told)
        if "console" in self.scenario:
            print(self.scenario["console"], flush=True)
        if "beats" in self.scenario:
            threading.Thread(target=self.beat, daemon=True).start()
        if "crash" in self.scenario:
            self.crash(*self.scenario["crash"])
        if self.scenario.get("child"):
            child = subprocess.Popen(
                [sys.executable, "-c", "import signal; signal.pause()"],
                process_group=0 if self.scenario["child"] == "group" else None,
            )
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
            self.save_now()
            if self.wish():
                self.stop()
        if self.spec.probe:
            self.measure()
        self.end(EndReason.FINISHED, self.save("end"))

    def resumed_step(self) -> int:
        """After a pause it goes on where it was; a run of its own begins at 0, for brevity."""
        resumed = self.spec.parameters.data.resume_from_checkpoint
        if self.spec.attempt == 1 or not resumed:
            return 0
        return Manifest.model_validate_json((Path(resumed) / MANIFEST).read_bytes()).step

    def beat(self) -> None:
        until = self.scenario["beats"]
        while until is True or self.step < until:
            (self.run_dir / HEARTBEAT).touch()
            time.sleep(0.1)

    def crash(self, starts: int, how: str | int) -> None:
        with open(self.run_dir / "starts", "ab") as file:
            file.write(b".")
            if file.tell() > starts:
                return
        self.emit(PhaseChange(phase=RunPhase.STARTING, message="a line of another length"))
        print("it went wrong early", flush=True)
        if isinstance(how, int):
            os._exit(how)
        os.kill(os.getpid(), signal.Signals[how])
        time.sleep(60)

    def measure(self) -> NoReturn:
        (Path(self.spec.output_dir) / "left").write_text("by a runner that cleans up badly")
        measured = {
            "peak_memory_bytes": 3 << 30,
            "memory_total_bytes": 8 << 30,
            "memory_available_bytes": 6 << 30,
            "tokens_per_second": 100.0,
            "seconds_per_step": 2.0,
            "start_seconds": 1.0,
            "seconds_per_checkpoint": 0.5,
            "checkpoint_bytes": 1 << 20,
            "disk_bytes": 2 << 20,
            "duration_seconds": 60.0,
            "run_steps": 20,
            "train_samples": 10,
            "train_tokens": 500,
            "longest_tokens": 90,
            "longest_lengths": [90, 60, 50],
            "learned_share": 0.5,
        }
        self.emit(ProbeReport.model_validate(measured | self.scenario.get("report", {})))
        self.end(EndReason.PROBED, "")

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
        lines, characters = self.scenario.get("lines", (0, 0))
        for _ in range(lines):
            self.emit(LogLine(level="info", logger="fake", text="x" * characters))
        status = self.scenario.get("exit")
        if status and status[0] == self.step:
            os._exit(status[1])
        every = 0 if self.spec.probe else int(self.scenario.get("save_steps", 0))
        if every and self.step % every == 0:
            path = self.save("steps")
            quota = self.quota()
            if quota is not None and self.saved >= quota and self.step < self.steps:
                self.end(EndReason.QUOTA_USED_UP, path)
        failure = dict(self.scenario.get("fail", {}))
        above = failure.pop("above", 0)
        is_due = failure.pop("step", None) == self.step
        is_due &= failure.pop("attempt", self.spec.attempt) == self.spec.attempt
        if is_due and self.spec.parameters.training.batch_size > above:
            self.end(EndReason(failure.pop("reason")), "", **failure)

    def wait_for_gate(self) -> None:
        while self.gate >= 0:
            if select.select([self.gate], [], [], _LOOK_SECONDS)[0]:
                os.read(self.gate, 1)
                return
            self.save_now()
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
        saves = self.wish() is StopWish.SAVE and self.step > 0 and not self.spec.probe
        self.end(EndReason.STOPPED_BY_USER, self.save("stop") if saves else "")

    def save(self, cause: Any) -> str:
        """A checkpoint that is whole to all who only look: names, sizes and shapes are right."""
        output = Path(self.spec.output_dir)
        folder = output / f"checkpoint-{self.step}"
        lora = self.spec.parameters.lora
        files = dict.fromkeys(STATE_FILES, b"state")
        if self.spec.training_type is TrainingType.SFT and lora.use_lora:
            shape = {
                "r": lora.lora_r,
                "lora_alpha": lora.lora_alpha,
                "target_modules": lora.lora_target_modules,
                "base_model_name_or_path": self.spec.parameters.data.model_path,
            }
            files["adapter_config.json"] = json.dumps(shape).encode()
            files["adapter_model.safetensors"] = (2).to_bytes(8, "little") + b"{}"
        entries = {
            n: FileEntry(size=len(data), sha256=sha256(data).hexdigest())
            for n, data in files.items()
        }
        manifest = Manifest(
            step=self.step,
            files=entries,
            epoch=self.step / self.steps,
            eval_loss=self.scenario.get("eval_losses", {}).get(str(self.step)),
            parameters=self.spec.parameters.model_dump(mode="json"),
        )
        files[MANIFEST] = manifest.model_dump_json().encode()
        folder.mkdir(parents=True, exist_ok=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
        status = output.stat()
        written = WrittenFolder(
            name=folder.name,
            files={name: (folder / name).stat().st_mtime_ns for name in files},
            path=os.path.realpath(output),
            device=status.st_dev,
            inode=status.st_ino,
        )
        with open(self.run_dir / OUTPUTS, "ab") as file:
            file.write(written.model_dump_json().encode() + b"\n")
        if self.scenario.get("durable"):
            self.sync(*(folder / name for name in files), self.run_dir / OUTPUTS)
            self.sync(folder, output, self.run_dir)
        self.emit(CheckpointSaved(path=str(folder), step=self.step, cause=cause))
        self.saved += 1
        return str(folder)

    def sync(self, *paths: Path) -> None:
        """As the real one does, before anybody hears of them."""
        for path in paths:
            sync_dir(path)  # of a file, too

    def save_now(self) -> None:
        """Saves where that was newly wished for."""
        with contextlib.suppress(FileNotFoundError):
            control = Control.model_validate_json((self.run_dir / CONTROL).read_bytes())
            if control.save > self.save_wishes and control.stop is None and self.step:
                self.save_wishes = control.save
                self.save("suspend")

    def quota(self) -> int | None:
        """Checkpoints that it may save, as it was last told."""
        with contextlib.suppress(FileNotFoundError):
            control = Control.model_validate_json((self.run_dir / CONTROL).read_bytes())
            if control.checkpoint_quota is not None:
                return control.checkpoint_quota
        return self.spec.checkpoint_quota

    def emit(self, payload: Payload) -> None:
        self.seq += 1
        self.events.write(EventLine.make(self.seq, payload).model_dump_json().encode() + b"\n")
        self.events.flush()

    def end(self, reason: EndReason, output_path: str, **more: Any) -> NoReturn:
        text = self.scenario.get("log", f"ends: {reason}")
        self.emit(LogLine(level="info", logger="fake", text=text))
        write_record(
            self.run_dir / RESULT,
            Result(end_reason=reason, step=self.step, output_path=output_path, **more),
        )
        sys.exit(0)

    def _told(self, *_: object) -> None:
        self.was_told = True


def probe() -> None:
    """Answers as `FAKE_PROBE` says; without it as a machine on which all is well."""
    says: dict[str, Any] = {}
    if "FAKE_PROBE" in os.environ:
        script = Path(os.environ["FAKE_PROBE"])
        says = json.loads(script.read_text())
    if "count" in says:
        with open(says["count"], "ab") as file:
            file.write(b".")
    if says.get("hang"):
        script.with_name("pid").write_text(str(os.getpid()))
        signal.alarm(60)  # whoever asked may have been killed
        signal.pause()
    if "exit" in says:
        print("something broke", file=sys.stderr)
        sys.exit(says["exit"])
    if "print" in says:
        print(says["print"])
        return
    answer: dict[str, Any] = {
        "python": "3.11.7",
        "versions": {"torch": "2.13.0"},
        "failures": {},
        "cuda_build": "",
        "cuda_problem": "",
        "devices": [],
        "model_types": ["llama", "qwen2"],
    }
    print(Probe.model_validate(answer | says).model_dump_json())


if __name__ == "__main__":
    if sys.argv[1:] == ["--probe"]:
        probe()
    else:
        FakeRunner(Path(sys.argv[1])).run()

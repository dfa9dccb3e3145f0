"""The contract of the run folder, the one bridge between daemon and runner.

    spec.json      daemon, before the start   what to do; never changed
    process.json   runner, first thing        who it is: pid, start time, boot id, versions
    events.jsonl   runner, append only        one `EventLine` a line; fsynced at checkpoints and end
    console.log    runner's stdout and stderr
    control.json   daemon, replaced whole     what is wished of the run
    result.json    runner, last thing         how it ended; absent and process gone: it was killed
    heartbeat      runner, touched            every few seconds: it is alive

A run that was paused goes on in a folder of the same kind, `attempt-2` in its run folder, then
`attempt-3`. What the daemon writes for itself, so that run folders alone can rebuild the database,
stands in `aside.py`.

Either side can die at any instant, and nothing has to be guessed afterwards. Payload models have
the names and fields of the messages in `finetuned/v1/event.proto` (a test compares), so that the
daemon copies them without knowing them.

Imported by the runner: nothing here may need grpc, SQL or torch.
"""

from __future__ import annotations

import errno
import os
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from finetuned_daemon.parameters.models import Parameters

FORMAT_VERSION = 1

SPEC = "spec.json"
PROCESS = "process.json"
EVENTS = "events.jsonl"
CONSOLE = "console.log"
CONTROL = "control.json"
RESULT = "result.json"
HEARTBEAT = "heartbeat"

HEARTBEAT_SECONDS = 5.0
"""How often a runner touches its `heartbeat`."""


class TrainingType(StrEnum):
    """What is trained; names as in `finetuned.v1.TrainingType`."""

    SFT = "SFT"
    PRETRAIN = "PRETRAIN"


class RunPhase(StrEnum):
    """What a run is doing; names as in `finetuned.v1.RunPhase`."""

    STARTING = "STARTING"
    LOADING_MODEL = "LOADING_MODEL"
    PREPARING_DATA = "PREPARING_DATA"
    TRAINING = "TRAINING"
    EVALUATING = "EVALUATING"
    SAVING = "SAVING"
    MERGING = "MERGING"
    STOPPING = "STOPPING"
    PAUSING = "PAUSING"
    WAITING_FOR_SPACE = "WAITING_FOR_SPACE"


class EndReason(StrEnum):
    """Why a run ended; names as in `finetuned.v1.EndReason`.

    `tasks.ENDS` maps each to a state and a sentence.
    """

    FINISHED = "FINISHED"
    EARLY_STOPPED = "EARLY_STOPPED"
    STEP_LIMIT = "STEP_LIMIT"
    STOPPED_BY_USER = "STOPPED_BY_USER"
    DEVICE_OUT_OF_MEMORY = "DEVICE_OUT_OF_MEMORY"
    HOST_OUT_OF_MEMORY = "HOST_OUT_OF_MEMORY"
    DISK_FULL = "DISK_FULL"
    DATASET_INVALID = "DATASET_INVALID"
    MODEL_UNLOADABLE = "MODEL_UNLOADABLE"
    LOSS_NOT_FINITE = "LOSS_NOT_FINITE"
    DEVICE_LOST = "DEVICE_LOST"
    RUNNER_KILLED = "RUNNER_KILLED"
    RUNNER_CRASHED = "RUNNER_CRASHED"
    INTERRUPTED = "INTERRUPTED"
    QUOTA_USED_UP = "QUOTA_USED_UP"
    PROBED = "PROBED"
    RUNNER_HUNG = "RUNNER_HUNG"


class _Record(BaseModel):
    # Unknown keys are kept out of the way, not refused: a newer runner may say more than an older
    # daemon knows.
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


# --- spec.json, control.json, result.json


class Spec(_Record):
    """What a run is to do; written by the daemon before the start."""

    format_version: int = FORMAT_VERSION
    task: str
    """Resource name, `tasks/{task_id}`."""
    run: int
    """Number within the task, from 1."""
    display_name: str = ""
    """Of the task at the start, for people."""
    training_type: TrainingType
    device: str
    """`cpu` or `cuda:N`."""
    num_threads: int = 0
    """OpenMP threads of the runner; 0: left to the library."""
    output_dir: str
    """Folder of this run alone, below the task's `data.output_dir`.

    Checkpoints and the final model.
    """
    checkpoint_quota: int | None = None
    """Checkpoints that the run may save before it has to end; None: any number.

    One in `control.json` takes its place. A stop saves all the same.
    """
    cache_dir: str = ""
    """Folder where tokens of training data are kept for the next run; empty: the run folder."""
    probe: bool = False
    """Only measure what a run takes. The daemon removes the output folder then."""
    attempt: int = 1
    """Number of the process within the run: one more after each pause.

    A later one finds in `output_dir` what the earlier ones have saved, and goes on from
    `data.resume_from_checkpoint`, where that is given.
    """
    run_parameters: Parameters | None = None
    """The run's own parameters, where a pause has changed from where this process goes on."""
    disk_wait_seconds: float = 0.0
    """How long it waits for room on a full disk, with all in memory, before it ends."""
    request_id: str = ""
    """The call that started it, for logs."""
    parameters: Parameters


class StopWish(StrEnum):
    """How a run is asked to end."""

    SAVE = "SAVE"
    DISCARD = "DISCARD"


class Control(_Record):
    """What is wished of a run; the runner looks at it at every step and while it loads."""

    stop: StopWish | None = None
    checkpoint_quota: int | None = None
    """As in `Spec`, where it has changed since."""
    save: int = 0
    """Each time that this grows, a checkpoint is wished for now: the machine will be suspended."""


FixValue = bool | int | float | str | tuple[str, ...]


class Result(_Record):
    """How a run ended, by its own account."""

    end_reason: EndReason
    message: str = ""
    """One sentence, with what to do next where that is known."""
    step: int = 0
    output_path: str = ""
    """Folder of the final adapter or model; empty where none was written."""
    detail: str = ""
    """Last lines of the traceback, where it failed and the message does not say it all."""
    samples: tuple[int, ...] = ()
    """Lines of a data file, from 1, whose samples it failed with."""
    sample_file: str = ""
    """The data file that they are lines of."""
    excerpt: str = ""
    """What such a sample looks like."""
    field: str = ""
    """The parameter that is to blame, by path, where the reason alone does not say it."""
    fix: dict[str, FixValue] = Field(default_factory=dict)
    """Parameters that would mend it, by path, where the run alone can know them."""


# --- process.json


class ProcessIdentity(_Record):
    """A process that can't be mistaken for a later one with the same pid."""

    pid: int
    start_time: float
    """Linux: clock ticks since boot (immune to clock changes).

    Elsewhere seconds since the epoch.
    """
    boot_id: str

    @classmethod
    def of(cls, pid: int) -> ProcessIdentity | None:
        """The identity of a live process; None if there is none, or only a zombie."""
        started = _start_time(pid)
        return None if started is None else cls(pid=pid, start_time=started, boot_id=boot_id())

    def is_alive(self) -> bool:
        """Whether this very process still runs."""
        return self.boot_id == boot_id() and ProcessIdentity.of(self.pid) == self


class Process(_Record):
    """Who the runner is; the first thing it writes."""

    identity: ProcessIdentity
    versions: dict[str, str] = Field(default_factory=dict)
    is_from_standby: bool = False
    """Whether it came from a process that had imported everything before."""


def boot_id() -> str:
    """Tells this boot of the machine from every other."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux: the boot time is the best there is
        import psutil

        return f"boot-{psutil.boot_time():.0f}"


def _start_time(pid: int) -> float | None:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        if Path("/proc/self/stat").exists():
            return None
    except ProcessLookupError:  # it went away between open and read
        return None
    else:
        # The name may hold spaces and brackets; fields are counted after its last bracket. State is
        # 3, start time 22.
        fields = stat[stat.rindex(")") + 2 :].split()
        return None if fields[0] in "ZX" else float(fields[19])
    import psutil  # not on Linux, where a daemon starts sooner without it

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else process.create_time()
    except psutil.NoSuchProcess:
        return None


# --- events.jsonl


class PhaseChange(_Record):
    """The run entered a phase."""

    phase: RunPhase
    message: str = ""
    deadline_seconds: float | None = None


class Progress(_Record):
    """How far the run has come; fields as in `finetuned.v1.Progress`."""

    step: int = 0
    total_steps: int = 0
    epoch: float = 0.0
    tokens_per_second: float = 0.0
    eta_seconds: float | None = None
    num_tokens: int = 0
    loss: float | None = None
    learning_rate: float | None = None


class Metrics(_Record):
    """Values measured at a step."""

    step: int
    epoch: float = 0.0
    values: dict[str, float]


class LogLine(_Record):
    """A line of the log."""

    level: Literal["debug", "info", "warning", "error"]
    logger: str = ""
    text: str


class CheckpointSaved(_Record):
    """A checkpoint is whole on disk."""

    path: str
    step: int
    size_bytes: int = 0
    cause: Literal["steps", "epoch", "interval", "stop", "signal", "suspend", "end"] = "steps"


class CheckpointDeleted(_Record):
    """A checkpoint was removed."""

    path: str
    step: int


class BestCheckpoint(_Record):
    """A checkpoint has a lower evaluation loss than all before."""

    path: str
    step: int
    eval_loss: float


class Evaluation(_Record):
    """The evaluation data was scored."""

    step: int
    epoch: float = 0.0
    values: dict[str, float]


class ProbeReport(_Record):
    """What a probe has measured; fields as in `finetuned.v1.ProbeReport`."""

    peak_memory_bytes: int
    memory_total_bytes: int
    memory_available_bytes: int
    tokens_per_second: float
    seconds_per_step: float
    start_seconds: float
    evaluation_tokens_per_second: float = 0.0
    seconds_per_evaluation: float = 0.0
    seconds_per_checkpoint: float
    checkpoint_bytes: int
    disk_bytes: int
    duration_seconds: float
    run_steps: int
    train_samples: int
    train_tokens: int
    longest_tokens: int
    longest_lengths: tuple[int, ...] = ()
    learned_share: float = 1.0


class Notice(_Record):
    """A setting that the run had to change, and why."""

    field: str = ""
    reason: str
    message: str


Payload = (
    PhaseChange
    | Progress
    | Metrics
    | LogLine
    | CheckpointSaved
    | CheckpointDeleted
    | BestCheckpoint
    | Evaluation
    | ProbeReport
    | Notice
)

PAYLOADS: dict[str, type[BaseModel]] = {
    "phase_change": PhaseChange,
    "progress": Progress,
    "metrics": Metrics,
    "log_line": LogLine,
    "checkpoint_saved": CheckpointSaved,
    "checkpoint_deleted": CheckpointDeleted,
    "best_checkpoint": BestCheckpoint,
    "evaluation": Evaluation,
    "probe_report": ProbeReport,
    "notice": Notice,
}
"""What a runner may report, by the name of its field in `finetuned.v1.Event`."""

KINDS: dict[type[BaseModel], str] = {model: kind for kind, model in PAYLOADS.items()}


class EventLine(_Record):
    """One line of `events.jsonl`."""

    seq: Annotated[int, Field(ge=1, lt=1 << 53)]
    """Position in this file: 1, 2, 3 ... without gap."""
    time: float
    """Seconds since the epoch, by the runner's clock."""
    kind: str
    payload: dict[str, Any]

    @classmethod
    def make(cls, seq: int, payload: Payload) -> EventLine:
        """A line for `payload`, now."""
        return cls(
            seq=seq,
            time=time.time(),
            kind=KINDS[type(payload)],
            payload=payload.model_dump(mode="json", exclude_none=True),
        )

    def parse(self) -> Payload | None:
        """The payload as its model; None for a kind that this version does not know.

        Raises:
            pydantic.ValidationError: The payload is not what the kind demands.
        """
        model = PAYLOADS.get(self.kind)
        return None if model is None else model.model_validate(self.payload)  # type: ignore[return-value]


# --- files

DISK_FULL_ERRNOS = frozenset({errno.ENOSPC, errno.EDQUOT})
"""No space, or no more of the user's share of it."""


def write_atomic(path: Path, data: bytes) -> None:
    """Replaces `path` as a whole.

    Readers see the old content or the new, also after a loss of power.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_dir(path.parent)


def sync_dir(path: Path) -> None:
    """Makes names made or changed in a folder durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_dirs(path: Path, mode: int = 0o777) -> None:
    """Makes a folder and the parents that are missing, all of them durably.

    `mode` is that of the folder itself, less the umask, as of `Path.mkdir`.
    """
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(mode=mode, parents=True, exist_ok=True)
    for folder in reversed(missing):
        sync_dir(folder.parent)


def write_record(path: Path, record: BaseModel) -> None:
    """Writes a record as JSON, atomically."""
    write_atomic(path, record.model_dump_json(indent=1).encode() + b"\n")

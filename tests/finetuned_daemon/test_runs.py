"""Parts of a run's life without a daemon: folder, identity, outcome, queue."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.bundle import LONGEST_LINE, Bundle
from finetuned_daemon.runs.contract import (
    Control,
    EndReason,
    EventLine,
    LogLine,
    Notice,
    ProcessIdentity,
    Result,
    Spec,
    StopWish,
    TrainingType,
)
from finetuned_daemon.runs.outcome import Evidence, decide
from finetuned_daemon.runs.process import Exit
from finetuned_daemon.runs.scheduler import may_start, moved, queue_positions
from finetuned_daemon.tasks import ENDS, Run, TaskState


def line(seq: int, text: str = "x") -> bytes:
    return EventLine.make(seq, LogLine(level="info", text=text)).model_dump_json().encode() + b"\n"


def test_a_torn_last_line_waits_until_it_is_whole(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    assert bundle.read_events(0).lines == [], "no file yet"
    torn = line(2)
    (tmp_path / "events.jsonl").write_bytes(line(1) + torn[:10])
    first = bundle.read_events(0)
    assert [entry.seq for entry in first.lines] == [1]
    assert bundle.read_events(first.end).lines == []
    with open(tmp_path / "events.jsonl", "ab") as file:
        file.write(torn[10:])
    assert [entry.seq for entry in bundle.read_events(first.end).lines] == [2]


def test_a_long_file_is_read_in_bounded_chunks_and_nothing_is_lost(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    count = 3000
    (tmp_path / "events.jsonl").write_bytes(b"".join(line(n + 1, "y" * 900) for n in range(count)))
    seqs, offset, looks, more = list[int](), 0, 0, True
    while more:
        new = bundle.read_events(offset)
        seqs += [entry.seq for entry in new.lines]
        offset, more, looks = new.end, new.more, looks + 1
    assert seqs == list(range(1, count + 1))
    assert looks > 2


def test_a_line_longer_than_a_chunk_is_read_whole_and_what_follows_it_comes_in_chunks(
    tmp_path: Path,
) -> None:
    """One line of megabytes brings no more than itself at once."""
    bundle = Bundle(tmp_path)
    lines = [line(1), line(2, "y" * (3 << 20)), *(line(n, "z" * 900) for n in range(3, 1003))]
    (tmp_path / "events.jsonl").write_bytes(b"".join(lines))
    looks, offset, more = list[list[int]](), 0, True
    while more:
        new = bundle.read_events(offset)
        looks.append([entry.seq for entry in new.lines])
        offset, more = new.end, new.more
    assert [seq for look in looks for seq in look] == list(range(1, 1003))
    assert looks[:2] == [[1], [2]]
    assert max(len(look) for look in looks) < 200


def test_lines_that_are_no_events_are_counted_and_passed_over(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    (tmp_path / "events.jsonl").write_bytes(b"garbage\n\0\0\0\n" + line(1) + b'{"seq": 0}\n')
    new = bundle.read_events(0)
    assert [entry.seq for entry in new.lines] == [1]
    assert new.garbled == 2, "zeros that a loss of power leaves are not counted"


def test_a_line_without_end_is_given_up_at_its_limit(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    (tmp_path / "events.jsonl").write_bytes(b"x" * (LONGEST_LINE + (2 << 20)) + b"\n" + line(1))
    seqs, offset, more, garbled = list[int](), 0, True, 0
    while more:
        new = bundle.read_events(offset)
        seqs += [entry.seq for entry in new.lines]
        offset, more, garbled = new.end, new.more, garbled + new.garbled
    assert seqs == [1]
    assert garbled >= 1


def test_what_is_written_into_the_folder_is_read_again(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path / "runs/1")
    spec = Spec(
        task="tasks/x",
        run=1,
        training_type=TrainingType.SFT,
        device="cpu",
        output_dir="/out",
        parameters=Parameters(),
    )
    bundle.create(spec)
    bundle.create(spec)
    assert bundle.read_spec() == spec
    bundle.write_control(Control(stop=StopWish.SAVE))
    assert bundle.read_result() is None
    (bundle.path / "result.json").write_text('{"end_reason": "FIN')
    assert bundle.read_result() is None, "half a result is none"
    assert not [p for p in bundle.path.iterdir() if p.name.endswith(".tmp")]


def test_every_payload_survives_its_line() -> None:
    notice = Notice(field="optimization.fp16", reason="X", message="y")
    again = EventLine.model_validate_json(EventLine.make(1, notice).model_dump_json())
    assert again.parse() == notice


def test_an_identity_tells_a_process_from_a_later_one_of_the_same_pid() -> None:
    me = ProcessIdentity.of(os.getpid())
    assert me is not None
    assert me.is_alive()
    assert not me.model_copy(update={"start_time": me.start_time - 1}).is_alive()
    assert not me.model_copy(update={"boot_id": "another"}).is_alive()
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.DEVNULL)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert ProcessIdentity.of(child.pid) is None, "a zombie has ended"
    child.wait()


def evidence(**changes: object) -> Evidence:
    fields: dict[str, object] = {
        "result": None,
        "exit": Exit(),
        "was_watched": True,
        "stop": None,
        "was_forced": False,
        "step": 3,
        "last_checkpoint": "",
        "console_tail": "",
    }
    return Evidence(**{**fields, **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "reason", "says"),
    [
        ({"exit": Exit(signal="SIGKILL")}, EndReason.RUNNER_KILLED, "SIGKILL"),
        ({"exit": Exit(signal="SIGSEGV")}, EndReason.RUNNER_KILLED, "SIGSEGV"),
        ({"exit": Exit(code=0)}, EndReason.RUNNER_CRASHED, "exit status 0"),
        ({"exit": Exit(code=7)}, EndReason.RUNNER_CRASHED, "exit status 7"),
        ({}, EndReason.RUNNER_KILLED, "can't be known"),
        ({"was_watched": False}, EndReason.INTERRUPTED, "no daemon watched"),
        (
            {"stop": StopWish.SAVE, "was_forced": True, "exit": Exit(signal="SIGKILL")},
            EndReason.STOPPED_BY_USER,
            "by force",
        ),
        (
            {"stop": StopWish.SAVE, "exit": Exit(signal="SIGKILL")},
            EndReason.RUNNER_KILLED,
            "SIGKILL",
        ),
        ({"last_checkpoint": "/o/checkpoint-2"}, EndReason.RUNNER_KILLED, "/o/checkpoint-2"),
    ],
)
def test_without_a_result_a_run_is_never_completed(
    changes: dict[str, object], reason: EndReason, says: str
) -> None:
    outcome = decide(evidence(**changes))
    assert outcome.end_reason is reason
    assert says in outcome.message
    assert ENDS[outcome.end_reason].state is not TaskState.COMPLETED


def test_a_result_is_believed_whatever_the_exit() -> None:
    result = Result(end_reason=EndReason.FINISHED, step=9)
    outcome = decide(evidence(result=result, exit=Exit(signal="SIGKILL")))
    assert outcome.end_reason is EndReason.FINISHED
    assert outcome.message == ENDS[EndReason.FINISHED].sentence.en


def queue(*runs: tuple[str, TaskState]) -> list[Run]:
    return [
        Run(key=key, task_key=key, number=1, device=device, state=state, parameters=Parameters())
        for key, (device, state) in enumerate(runs, start=1)
    ]


def test_the_first_in_each_queue_starts_where_the_device_is_free() -> None:
    q, r = TaskState.QUEUED, TaskState.RUNNING
    runs = queue(("cuda:0", r), ("cuda:0", q), ("cpu", q), ("cpu", q), ("cuda:1", q))
    assert [run.key for run in may_start(runs)] == [3, 5]
    waiting = [(run.task_key, run.device) for run in runs if run.state is q]
    assert queue_positions(waiting) == {2: 1, 3: 1, 4: 2, 5: 1}


@pytest.mark.parametrize(
    ("key", "position", "order"),
    [
        (4, 1, [4, 2, 3]),
        (2, 2, [3, 2, 4]),
        (2, 3, [3, 4, 2]),
        (3, 99, [2, 4, 3]),
        (3, 2, [2, 3, 4]),
    ],
)
def test_a_move_takes_one_run_elsewhere_and_keeps_the_order_of_the_others(
    key: int, position: int, order: list[int]
) -> None:
    """The queue of another device is not touched, and what runs keeps its place."""
    q, r = TaskState.QUEUED, TaskState.RUNNING
    runs = queue(("cpu", r), ("cpu", q), ("cpu", q), ("cpu", q), ("cuda:0", q))
    runs = [replace(run, place=10 * run.key) for run in runs]
    changed = {run.key: run for run in moved(runs[key - 1], position, runs)}
    after = sorted((changed.get(run.key, run) for run in runs), key=lambda run: run.place)
    assert [run.key for run in after] == [1, *order, 5]
    assert all(run.place != runs[run.key - 1].place for run in changed.values())


@pytest.mark.parametrize(("asked", "expected"), [("1", 1), ("3", 3), ("0", None), ("x", None)])
def test_a_run_has_the_threads_that_the_daemon_was_started_with(monkeypatch, asked, expected):
    """OMP_NUM_THREADS of whoever started the daemon holds, where it is a number of threads."""
    from finetuned_daemon.runs import launch

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    usual = launch.num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", asked)
    assert launch.num_threads() == (expected or usual)

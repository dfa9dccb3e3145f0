"""What a watched run looks like, event by event."""

from __future__ import annotations

import json
import math

import pytest

from finetuned import ConnectionLost, DaemonUnavailable, Event, Snapshot, Task
from finetuned.cli.output import bytes_text, duration_text, to_dict
from finetuned.cli.tracker import Tracker
from finetuned.cli.view import JsonView, PlainView, event_line
from finetuned.v1 import event_pb2, task_pb2


def tracker(**fields: object) -> Tracker:
    return Tracker(Task(name="tasks/a", display_name="a", **fields))  # type: ignore[arg-type]


def metrics(seq: int, step: int, loss: float, run: int = 1) -> Event:
    return Event(seq=seq, run=run, metrics=event_pb2.Metrics(step=step, values={"loss": loss}))


def test_the_losses_are_those_of_the_latest_run() -> None:
    seen = tracker(run=2)
    assert not seen.apply(metrics(1, 1, 9.0, run=1)), "an earlier run is not shown"
    assert seen.apply(metrics(2, 1, 3.0, run=2))
    assert seen.losses == [(1, 3.0)]
    seen.apply(metrics(3, 1, 2.0, run=3))
    assert seen.losses == [(1, 2.0)], "it was started again while watched"


def test_history_does_not_turn_back_what_the_snapshot_says() -> None:
    seen = tracker()
    task = Task(state=task_pb2.TASK_STATE_COMPLETED, run=1, last_seq=5, last_checkpoint="/c")
    seen.apply(Snapshot(task=task))
    change = event_pb2.StateChange(new_state=task_pb2.TASK_STATE_RUNNING)
    seen.apply(Event(seq=3, run=1, state_change=change))
    assert seen.has_ended
    seen.apply(Event(seq=6, run=2, state_change=change))
    assert not seen.has_ended
    assert seen.checkpoint == ""


def test_a_lost_connection_is_known_until_the_next_snapshot() -> None:
    seen = tracker()
    seen.apply(ConnectionLost(DaemonUnavailable("gone"), 3))
    assert not seen.is_connected
    seen.apply(Snapshot(task=Task()))
    assert seen.is_connected


@pytest.mark.parametrize(
    ("event", "line"),
    [
        (
            Event(
                phase_change=event_pb2.PhaseChange(
                    phase=task_pb2.RUN_PHASE_STOPPING, message="saving", deadline_seconds=30
                )
            ),
            "stopping: saving (within 30 s)",
        ),
        (
            Event(
                state_change=event_pb2.StateChange(
                    new_state=task_pb2.TASK_STATE_FAILED,
                    end_reason=task_pb2.END_REASON_DEVICE_OUT_OF_MEMORY,
                )
            ),
            "failed (device out of memory)",
        ),
        (
            Event(
                checkpoint_saved=event_pb2.CheckpointSaved(path="/c", step=20, size_bytes=3 << 20)
            ),
            "checkpoint at step 20: /c (3.0 MiB)",
        ),
        (
            Event(notice=event_pb2.Notice(field="optimization.fp16", message="Not here.")),
            "notice: optimization.fp16: Not here.",
        ),
        (
            Event(evaluation=event_pb2.Evaluation(step=5, values={"eval_loss": 1.5})),
            "evaluation at step 5  eval_loss 1.5",
        ),
        (Event(log_line=event_pb2.LogLine(level="error", text="boom")), "error: boom"),
        (Event(log_line=event_pb2.LogLine(level="info", text="chatter")), ""),
        (Event(), ""),
    ],
)
def test_an_event_is_a_line_if_it_matters(event: Event, line: str) -> None:
    assert event_line(event, tracker()) == line


def test_metrics_are_shown_with_how_far_it_is() -> None:
    progress = task_pb2.Progress(
        step=5, total_steps=20, tokens_per_second=12345.6, eta_seconds=3725
    )
    line = event_line(metrics(1, 5, 1.25), tracker(progress=progress))
    assert line == "step 5/20 (25%)  loss 1.2500  tokens/s 12,346  1:02:05 left"
    assert event_line(metrics(1, 5, 1.25), tracker()) == "step 5  loss 1.2500"


def test_a_lost_connection_is_told_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    view = PlainView()
    for item in (ConnectionLost(DaemonUnavailable("gone"), 3), Snapshot(task=Task())):
        view.show(item, tracker())
    out, err = capsys.readouterr()
    assert out == ""
    assert "connection lost" in err
    assert "is back" in err


def test_json_lines_are_json_even_where_the_loss_is_none(
    capsys: pytest.CaptureFixture[str],
) -> None:
    JsonView().show(metrics(2**40, 1, math.nan), tracker())
    event = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["event"]
    assert event["seq"] == 2**40
    assert event["metrics"]["values"] == {"loss": "NaN"}


def test_json_has_zeros_and_leaves_out_what_is_absent() -> None:
    content = to_dict(Task(name="tasks/a"))
    assert content["run"] == 0
    assert content["state"] == "TASK_STATE_UNSPECIFIED"
    assert "progress" not in content


def test_numbers_for_people() -> None:
    assert [duration_text(s) for s in (-3, 0, 59.6, 3725)] == ["0:00", "0:00", "1:00", "1:02:05"]
    assert [bytes_text(b) for b in (0, 1023, 1536, 24 << 30)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "24.0 GiB",
    ]

"""`finetunectl task checkpoints`, `task start --resume`, and the plan of a resume."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.cli.checkpoint import show_plan
from finetuned.v1 import parameter_service_pb2 as parameter_service
from finetuned.v1 import task_service_pb2
from terminal import Terminal

Run = Callable[..., subprocess.CompletedProcess[str]]


def test_checkpoints_are_listed_chosen_and_deleted(
    ctl: Run, on_terminal: Callable[..., Terminal], daemon: Daemon, scene: Scene
) -> None:
    parameters = scene.play(steps=6, save_steps=2, eval_losses={"2": 0.25, "4": 0.5})
    task = daemon.create(parameters, start=True, task_id="some-task")
    daemon.wait(task.name, "COMPLETED")

    shown = ctl("task", "checkpoints", "some-task")
    assert shown.returncode == 0, shown.stderr
    heading, *rows = shown.stdout.splitlines()
    assert heading.split()[:3] == ["STEP", "RUN", "EPOCH"]
    assert [row.split()[0] for row in rows] == ["6", "4", "2"]
    assert "newest" in rows[0]
    assert "best" in rows[2]
    assert "--resume newest" in shown.stderr

    folder = json.loads(ctl("task", "checkpoints", "some-task", "--json").stdout)[2]["path"]
    for choice in ("2", "best", folder):
        started = ctl("task", "start", "some-task", "--resume", choice)
        assert started.returncode == 0, started.stderr
        daemon.wait(task.name, "COMPLETED")
        assert resumed(daemon, task.name) == folder

    empty = ctl("task", "start", "some-task", "--resume", "")
    assert (empty.returncode, empty.stdout) == (2, ""), "nothing is begun anew unasked"
    unknown = ctl("task", "start", "some-task", "--resume", "3")
    assert unknown.returncode == 2
    assert "no checkpoint of step 3; there are: 6" in unknown.stderr

    Path(folder, "optimizer.pt").write_bytes(b"st")
    broken = ctl("task", "checkpoints", "some-task")
    assert "not whole" in broken.stdout
    assert "optimizer.pt is not what was written" in broken.stderr

    asked = on_terminal("task", "delete-checkpoint", "some-task", "6")
    asked.read_until("[y/N]")
    assert ": the newest one?" in " ".join(asked.plain.split())
    asked.type(b"n\n")
    assert asked.end() == 1
    deleted = ctl("task", "delete-checkpoint", "some-task", "6", "--run", "1", "--yes")
    assert deleted.returncode == 0, deleted.stderr
    assert not Path(folder).with_name("checkpoint-6").exists()


def resumed(daemon: Daemon, name: str) -> str:
    """The checkpoint that a task's newest run goes on from."""
    runs = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=name)).runs
    return runs[0].parameters.data.resume_from_checkpoint


def test_a_plan_names_each_change_with_what_it_means(capsys: pytest.CaptureFixture[str]) -> None:
    effects = parameter_service.ResumeEffect
    rate = parameter_service.ResumeItem(
        field="training.learning_rate",
        effect=effects.RESUME_EFFECT_DIFFERENT_RUN,
        message="steps go another way from here",
    )
    rate.then.number_value, rate.now.number_value = 1e-3, 5e-4
    weights = parameter_service.ResumeItem(
        field="weights",
        effect=effects.RESUME_EFFECT_CONTINUES,
        message="as they were at step 40",
    )
    show_plan(
        parameter_service.ResumePlan(
            checkpoint="/out/run-1/checkpoint-40",
            step=40,
            total_steps=120,
            epoch=1.25,
            num_tokens=5000,
            knows_parameters=True,
            items=[rate, weights],
        )
    )
    assert capsys.readouterr().out == (
        "goes on from /out/run-1/checkpoint-40\n"
        "at step 40 of 120, 1.25 passes over the data, 5,000 tokens\n"
        "  another run from here: losses are not those of an uninterrupted one\n"
        "    training.learning_rate  0.001 -> 0.0005; steps go another way from here\n"
        "  goes on\n"
        "    weights                 as they were at step 40\n"
    )

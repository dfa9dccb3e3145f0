"""`finetunectl task export-config`: a task's settings leave the program, and come back."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc
import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import parameters_pb2, task_pb2
from finetuned.v1 import task_service_pb2 as pb2
from terminal import CTL

Ctl = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def ctl(daemon: Daemon, tmp_path: Path) -> Ctl:
    """Runs a command to its end."""
    environment = {
        **os.environ,
        "FINETUNED_ADDRESS": daemon.address,
        "COLUMNS": "100",
        "LC_ALL": "C.UTF-8",
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [CTL, *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=tmp_path,
            timeout=60,
            stdin=subprocess.DEVNULL,
            check=False,
        )

    return run


def export(daemon: Daemon, name: str, **request: Any) -> pb2.ExportTaskConfigResponse:
    return daemon.tasks.ExportTaskConfig(pb2.ExportTaskConfigRequest(name=name, **request))


def test_a_task_made_of_exported_yaml_has_the_same_parameters(
    daemon: Daemon, scene: Scene, ctl: Ctl, tmp_path: Path
) -> None:
    """From the command line to a file and back."""
    task = daemon.create(scene.parameters(learning_rate=1e-5, max_steps=7))
    exported = ctl("task", "export-config", task.display_name, "-o", "config.yaml")
    assert (exported.returncode, exported.stdout) == (0, "")
    assert "config.yaml written" in exported.stderr
    checked = ctl("check", "config.yaml")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    created = ctl("task", "create", "config.yaml", "--name", "again", "--json")
    assert created.returncode == 0, created.stderr
    again = daemon.get(json.loads(created.stdout)["name"])
    assert again.parameters == task.parameters
    assert again.training_type == task.training_type


def test_a_run_exports_what_it_ran_with(daemon: Daemon, scene: Scene) -> None:
    """A task that was edited since has other settings; its device was chosen at the start."""
    task = daemon.create(scene.parameters(batch_size=4), start=True)
    task = daemon.wait(task.name, "COMPLETED")
    edit = parameters_pb2.Parameters(training=parameters_pb2.TrainingParameters(batch_size=8))
    daemon.tasks.UpdateTask(
        pb2.UpdateTaskRequest(task=task_pb2.Task(name=task.name, parameters=edit))
    )
    assert "  batch_size: 8  #" in export(daemon, task.name).content
    of_run = export(daemon, task.name, run=1)
    assert "  batch_size: 4  #" in of_run.content
    assert 'device: "cpu"' in of_run.content
    assert of_run.file_name == f"{task.display_name}-run-1.yaml"
    script = export(daemon, task.name, run=1, format=pb2.CONFIG_FORMAT_SCRIPT)
    assert "\nBATCH_SIZE = 4  #" in script.content
    assert script.file_name.endswith("-run-1.py")


def test_what_can_not_be_exported_is_named(daemon: Daemon, scene: Scene) -> None:
    """A run, a format, a task that there is not; a script of a task without data."""

    def code(name: str, **request: Any) -> grpc.StatusCode:
        with pytest.raises(grpc.RpcError) as caught:
            export(daemon, name, **request)
        found: grpc.StatusCode = caught.value.code()
        return found

    task = daemon.create(parameters_pb2.Parameters())
    assert code("tasks/none") == grpc.StatusCode.NOT_FOUND
    assert code(task.name, run=1) == grpc.StatusCode.NOT_FOUND
    assert code(task.name, run=-1) == grpc.StatusCode.INVALID_ARGUMENT
    assert code(task.name, format=9) == grpc.StatusCode.INVALID_ARGUMENT
    script = pb2.CONFIG_FORMAT_SCRIPT
    assert code(task.name, format=script) == grpc.StatusCode.INVALID_ARGUMENT
    assert export(daemon, task.name).content


def test_what_a_script_trains_without_is_said_beside_it(
    daemon: Daemon, scene: Scene, ctl: Ctl
) -> None:
    """On stderr, so that the script itself can go into a pipe; YAML leaves nothing out."""
    parameters = scene.parameters()
    parameters.extensions.lora_init = "pissa"
    name = daemon.create(parameters).display_name
    script = ctl("task", "export-config", name, "--format", "script")
    assert "warning: the script trains without extensions.lora_init = 'pissa'" in script.stderr
    assert "warning" not in script.stdout
    assert "warning" not in ctl("task", "export-config", name).stderr


def test_no_file_is_overwritten_unasked(
    daemon: Daemon, scene: Scene, ctl: Ctl, tmp_path: Path
) -> None:
    """`--force` is how one asks; without `-o` all goes to stdout."""
    name = daemon.create(scene.parameters()).display_name
    file = tmp_path / "mine.py"
    file.write_text("mine")
    command = ("task", "export-config", name, "--format", "script", "-o", "mine.py")
    refused = ctl(*command)
    assert refused.returncode == 2
    assert "--force" in refused.stderr
    assert file.read_text() == "mine"
    assert ctl(*command, "--force").returncode == 0
    shown = ctl("task", "export-config", name, "--format", "script")
    assert "warning" not in shown.stderr
    assert shown.stdout == file.read_text()
    assert not os.access(file, os.X_OK)
    assert ctl("task", "export-config", name, "--format", "toml").returncode == 2
    gone = ctl("task", "export-config", name, "--run", "3")
    assert gone.returncode == 1
    assert "runs/3" in gone.stderr

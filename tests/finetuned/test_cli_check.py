"""`finetunectl check` and what it shares with `train`: files, mended files, tables in pipes."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from daemon_process import Daemon
from terminal import CTL

if TYPE_CHECKING:
    from conftest import Scene

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def files(scene: Scene) -> list[str]:
    return ["--model", str(scene.model), "--data", str(scene.data), "--device", "cpu"]


def test_a_table_in_a_pipe_is_whole_and_has_no_blanks_at_its_ends(ctl: Run) -> None:
    shown = ctl("params", "--all").stdout
    assert "..." not in shown.replace(", ...", "")
    assert not re.search(r" $", shown, re.M)
    assert shown.endswith("\n* must be filled in, or be seen and confirmed\n")


@pytest.mark.parametrize("command", ["params --all", "doctor", "template list", "check"])
def test_a_table_that_nobody_reads_ends_as_in_a_shell(
    environment: dict[str, str], daemon: Daemon, command: str
) -> None:
    # The reader has gone before anything is written.
    line = f"{{ read -r; {CTL} {command} 2>/dev/null; echo $? >&3; }} < <(sleep 0.1; echo) | true"
    answer = subprocess.run(
        ["/bin/bash", "-c", f"exec 3>&1; {line}"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (answer.stdout, answer.stderr) == ("141\n", "")


def test_a_mended_file_keeps_what_nobody_can_mend(ctl: Run, scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "training: {learning_rate: '2,5', batchsize: 3, batch_size: 500}\nxyzzy: {a: 1}\n"
    )
    fixed = ctl("check", "a.yaml", *files(scene), "--fix")
    assert fixed.returncode == 2
    document = yaml.safe_load(fixed.stdout)
    assert document["training"] == {"learning_rate": "2,5", "batchsize": "3", "batch_size": 128}
    assert document["xyzzy"] == {"a": "1"}
    (tmp_path / "b.yaml").write_text(fixed.stdout)
    again = ctl("check", "b.yaml").stdout
    for field in ("training.learning_rate", "training.batchsize", "xyzzy"):
        assert re.search(rf"^error +{re.escape(field)} ", again, re.M)
    unheld = ctl("check", *files(scene), "--set", "nonsense", "--fix")
    assert (unheld.returncode, unheld.stdout) == (2, "")
    assert "nothing is written" in unheld.stderr
    assert "--set" in unheld.stderr


def test_a_mended_file_has_the_suggestions_of_notices_too(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    noticed = json.loads(ctl("check", *files(scene), "--json").stdout)["violations"]
    assert [(v["severity"], v["field"]) for v in noticed] == [("notice", "optimization.fp16")]
    fixed = ctl("check", *files(scene), "--fix")
    (tmp_path / "b.yaml").write_text(fixed.stdout)
    assert ctl("check", "b.yaml").stdout == ""


def test_a_mended_file_of_a_task_or_template_is_usable_alone(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    ctl("task", "create", *files(scene), "--name", "t", "--set", "training.batch_size=8")
    fixed = ctl("check", "--task", "t", "--set", "lora.lora_r=0", "--fix")
    (tmp_path / "b.yaml").write_text(fixed.stdout)
    document = yaml.safe_load(fixed.stdout)
    assert (document["training_type"], document["device"]) == ("sft", "cpu")
    assert document["data"]["model_path"] == str(scene.model)
    assert document["training"]["batch_size"] == 8
    assert ctl("check", "b.yaml").returncode == 0
    ctl("template", "save", "p", "--type", "pretrain", "--set", "training.batch_size=4")
    answer = json.loads(ctl("check", "--template", "p", "--fix", "--json").stdout)
    assert answer["training_type"] == "pretrain"
    assert answer["parameters"]["training"]["batch_size"] == 4
    assert answer["valid"] is False


def test_what_a_training_type_does_not_have_is_named(ctl: Run, scene: Scene) -> None:
    answer = ctl("check", *files(scene), "--type", "pretrain", "--set", "lora.lora_r=4")
    assert re.search(r"^warning +lora +has no effect: pretrain ", answer.stdout, re.M)
    of_sft = ctl("check", *files(scene), "--set", "lora.lora_r=4")
    assert "has no effect: sft" not in of_sft.stdout


def test_a_template_of_another_type_is_named_beside_the_rest(ctl: Run, scene: Scene) -> None:
    wrong = ["--set", "training.batch_size=0", "--set", "training.batchsize=1"]
    answer = ctl("check", *files(scene), "--template", "pretrain", "--type", "sft", *wrong)
    assert answer.returncode == 2
    for field in ("template", "training.batch_size", "training.batchsize"):
        assert re.search(rf"^error +{re.escape(field)} ", answer.stdout, re.M), answer.stdout
    ctl("task", "create", *files(scene), "--name", "t")
    both = ctl("check", "--task", "t", "--template", "sft")
    assert both.returncode == 2
    assert "--task" in both.stderr


def test_everything_wrong_is_named_at_once(ctl: Run, scene: Scene) -> None:
    wrong = ["--model", "/nope", "--data", ".", "--device", "cuda:77", "--set", "x"]
    answer = ctl("check", *wrong, "--type", "dpo")
    for field in ("device", "data.model_path", "data.train_file", "--set", "training_type"):
        assert re.search(rf"^error +{re.escape(field)} ", answer.stdout, re.M), answer.stdout
    estimated = ctl("estimate", *wrong)
    for field in ("device", "data.model_path", "data.train_file", "--set"):
        assert re.search(rf"^  {re.escape(field)} ", estimated.stderr, re.M), estimated.stderr


def test_a_suggestion_for_no_parameter_takes_its_option() -> None:
    from finetuned import ParameterViolation
    from finetuned.cli.violations import with_suggestions

    device = ParameterViolation("device", "DEVICE_NOT_FOUND", "is not there", "error", "cpu")
    size = ParameterViolation("training.batch_size", "OUT_OF_RANGE", "is 0", "error", 1)
    given = ["check", "--device", "cuda:7", "--set=training.batch_size=0", "--set", "a.b=1"]
    assert with_suggestions(given, [device, size]) == (
        "finetunectl check --set a.b=1 --device cpu --set training.batch_size=1"
    )
    unmended = ParameterViolation("a.b", "UNKNOWN_FIELD", "is none", "error")
    assert with_suggestions(given, [device, unmended]) == ""


def test_a_file_may_be_given_with_or_without_its_option(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    scene.play(steps=1)
    (tmp_path / "a.yaml").write_text("training: {batch_size: 500}\n")
    for given in (["a.yaml"], ["-f", "a.yaml"], ["--file", "a.yaml"]):
        assert "training.batch_size" in ctl("check", *given).stdout
        for command in ("estimate", "train"):
            assert "training.batch_size" in ctl(command, *given, *files(scene)).stderr
    assert ctl("check", "a.yaml", "-f", "a.yaml").returncode == 2


def test_a_templates_file_does_not_name_the_task(ctl: Run, scene: Scene, tmp_path: Path) -> None:
    ctl("template", "save", "mine", "--set", "training.batch_size=1")
    ctl("template", "export", "mine", "mine.yaml")
    assert yaml.safe_load((tmp_path / "mine.yaml").read_text())["kind"] == "template"
    create = ["task", "create", "-f", "mine.yaml", *files(scene), "--json"]
    assert json.loads(ctl(*create).stdout)["display_name"] not in ("", "mine")
    assert json.loads(ctl(*create, "--name", "own").stdout)["display_name"] == "own"
    (tmp_path / "task.yaml").write_text("display_name: its own\n")
    create = ["task", "create", "-f", "task.yaml", *files(scene), "--json"]
    assert json.loads(ctl(*create).stdout)["display_name"] == "its own"
    (tmp_path / "task.yaml").write_text("kind: car\n")
    assert "must be task or template" in ctl(*create[:-1]).stderr


def test_a_record_warns_of_files_that_are_not_those_of_its_run(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    """By size, and where that is the same by hash; a record that says nothing is none."""
    config = scene.model / "config.json"

    def recorded(path: Path) -> dict[str, object]:
        content = path.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        return {"name": path.name, "size": len(content), "sha256": digest}

    record = {
        "kind": "training_record",
        "training_type": "sft",
        "device": "cpu",
        "parameters": {"data": {"model_path": str(scene.model), "train_file": str(scene.data)}},
        "files": {"data.train_file": [recorded(scene.data)], "data.model_path": [recorded(config)]},
    }
    (tmp_path / "training_record.json").write_text(json.dumps(record))
    same = ctl("check", "training_record.json")
    assert (same.returncode, "of that run" in same.stderr) == (0, False), same.stderr
    scene.data.write_bytes(scene.data.read_bytes().swapcase())
    config.write_text(config.read_text() + "\n")
    for command in ("check", "task create"):
        other = ctl(*command.split(), "training_record.json")
        chats = f"warning: data.train_file {scene.data.name} is not the file of that run (SHA-256"
        assert chats in other.stderr, command
        assert "warning: data.model_path config.json is not the file" in other.stderr, command

"""`finetunectl` before a run, where something is wrong: templates, edits, deletions, data."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml

from before_run import dataset, editor, files
from daemon_process import Daemon
from terminal import Terminal
from tiny import make_model, write_jsonl

if TYPE_CHECKING:
    from conftest import Scene

Run = Callable[..., "subprocess.CompletedProcess[str]"]
OnTerminal = Callable[..., Terminal]


def shown(ctl: Run, name: str) -> dict[str, object]:
    content = yaml.safe_load(ctl("template", "show", name).stdout)
    return {
        key: content[key] for key in content if key not in ("kind", "training_type", "display_name")
    }


def test_a_file_replaces_a_template_and_set_changes_it(ctl: Run, tmp_path: Path) -> None:
    ctl("template", "save", "t", "--set", "training.batch_size=8", "--set", "lora.lora_r=4")
    (tmp_path / "t.yaml").write_text("training: {learning_rate: 1e-5}\n")
    ctl("template", "save", "t", "--set", "lora.lora_r=8", "--update")
    assert shown(ctl, "t") == {"training": {"batch_size": 8}, "lora": {"lora_r": 8}}
    assert ctl("template", "import", "t.yaml", "--update").returncode == 0
    assert shown(ctl, "t") == {"training": {"learning_rate": 1e-5}}
    ctl("template", "save", "t", "--set", "lora.lora_r=8", "--update")
    ctl("template", "save", "t", "t.yaml", "--set", "training.batch_size=4", "--update")
    assert shown(ctl, "t") == {"training": {"batch_size": 4, "learning_rate": 1e-5}}


def test_a_template_keeps_its_type(ctl: Run, tmp_path: Path) -> None:
    ctl("template", "save", "t", "--type", "pretrain")
    (tmp_path / "t.yaml").write_text("training_type: sft\n")
    answer = ctl("template", "import", "t.yaml", "--update")
    assert answer.returncode == 2
    assert "is pretrain in template t, and can't become sft" in answer.stderr


def test_a_list_of_a_file_replaces_that_of_the_task(ctl: Run, scene: Scene) -> None:
    modules = "lora.lora_target_modules=q_proj"
    ctl("task", "create", *files(scene), "--name", "one", "--set", modules)
    ctl("template", "save", "t")
    ctl("template", "save", "t", "--task", "one", "--set", modules, "--update")
    assert shown(ctl, "t")["lora"] == {"lora_target_modules": ["q_proj"]}


@pytest.mark.parametrize("form", [["mine.yaml"], ["--file", "mine.yaml"], ["-f", "mine.yaml"]])
def test_a_file_is_taken_in_either_form(
    ctl: Run, scene: Scene, tmp_path: Path, form: list[str]
) -> None:
    (tmp_path / "mine.yaml").write_text("training: {batch_size: 8}\n")
    assert ctl("template", "save", "t", *form).returncode == 0
    assert shown(ctl, "t") == {"training": {"batch_size": 8}}
    created = json.loads(ctl("task", "create", *form, *files(scene), "--json").stdout)
    assert created["parameters"]["training"]["batch_size"] == 8
    twice = ctl("template", "save", "u", "mine.yaml", "--file", "mine.yaml")
    assert twice.returncode == 2
    assert "is given twice" in twice.stderr


def test_a_template_comes_from_stdin_and_goes_to_stdout(ctl: Run, tmp_path: Path) -> None:
    text = "training: {batch_size: 8}\n"
    nameless = ctl("template", "import", "-", stdin=None, input=text)
    assert nameless.returncode == 2
    assert "--name" in nameless.stderr
    assert ctl("template", "import", "-", "--name", "t", stdin=None, input=text).returncode == 0
    assert yaml.safe_load(ctl("template", "export", "t", "-").stdout)["training"] == {
        "batch_size": 8
    }
    assert not (tmp_path / "-").exists()


@pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
def test_an_empty_file_makes_no_template(ctl: Run, tmp_path: Path, text: str) -> None:
    (tmp_path / "empty.yaml").write_text(text)
    for command in (["import", "empty.yaml"], ["save", "t", "empty.yaml"]):
        answer = ctl("template", *command)
        assert answer.returncode == 2
        assert "empty.yaml  is empty" in answer.stderr
    assert len(json.loads(ctl("template", "list", "--json").stdout)) == 2, "the presets alone"


def test_an_export_overwrites_only_where_it_may(
    ctl: Run, on_terminal: OnTerminal, tmp_path: Path
) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("precious")
    unasked = ctl("template", "export", "sft", "mine.yaml")
    assert unasked.returncode == 2
    assert "finetunectl template export sft mine.yaml --force" in unasked.stderr
    terminal = on_terminal("template", "export", "sft", "mine.yaml")
    terminal.read_until("Overwrite mine.yaml?")
    terminal.type(b"n\n")
    assert (terminal.end(), "nothing was written" in terminal.plain) == (1, True)
    assert file.read_text() == "precious"
    assert ctl("template", "export", "sft", "mine.yaml", "--force").returncode == 0
    assert yaml.safe_load(file.read_text())["training_type"] == "sft"


def test_a_template_cannot_take_anothers_id_for_its_name(ctl: Run) -> None:
    made = json.loads(ctl("template", "save", "first", "--json").stdout)
    own_id = made["name"].removeprefix("templates/")
    for name in (own_id, "pretrain"):
        answer = ctl("template", "save", name)
        assert answer.returncode == 2
        assert "is the id of template" in answer.stderr
    assert ctl("template", "save", own_id, "--set", "lora.lora_r=4", "--update").returncode == 0
    assert shown(ctl, "first") == {"lora": {"lora_r": 4}}


@pytest.mark.parametrize("noun", ["task", "template"])
def test_a_deletion_that_is_declined_says_so(
    ctl: Run, scene: Scene, on_terminal: OnTerminal, noun: str
) -> None:
    ctl("template", "save", "t")
    ctl("task", "create", *files(scene), "--name", "t")
    terminal = on_terminal(noun, "delete", "t")
    terminal.read_until(f"Delete {noun} t?")
    terminal.type(b"n\n")
    assert (terminal.end(), "nothing was deleted" in terminal.plain) == (1, True)
    assert ctl(noun, "show", "t").returncode == 0


def test_a_question_without_a_terminal_is_an_error_in_json(ctl: Run, scene: Scene) -> None:
    ctl("template", "save", "t")
    ctl("task", "create", *files(scene), "--name", "t")
    for command in (["template", "delete", "t"], ["task", "delete", "t"], ["task", "edit", "t"]):
        answer = ctl(*command, "--json")
        assert answer.returncode == 2
        error = json.loads(answer.stderr)["error"]
        assert error["reason"] == "NO_TERMINAL"
        assert f"finetunectl {' '.join(command)} --" in error["next"]


def test_an_edit_that_is_wrong_goes_on_with_the_kept_file(
    ctl: Run, scene: Scene, on_terminal: OnTerminal, environment: dict[str, str], tmp_path: Path
) -> None:
    ctl("task", "create", *files(scene), "--name", "t", "--set", "lora.lora_r=4")
    editor(environment, tmp_path, "sed -i 's/batch_size: .*/batch_size: 0/; /lora_r:/d' \"$f\"")
    terminal = on_terminal("task", "edit", "t")
    assert terminal.end() == 2
    assert re.search(r"^  training\.batch_size +must be", terminal.plain, re.M), terminal.plain
    found = re.search(r"^finetunectl task edit t --file (\S+)", terminal.plain, re.M)
    assert found, terminal.plain
    kept = Path(found[1])
    assert ctl("task", "edit", "t", "--file", str(kept)).returncode == 2
    kept.write_text(kept.read_text().replace("batch_size: 0", "batch_size: 4"))
    beside = ctl("task", "edit", "t", "--file", str(kept), "--device", "cpu")
    assert beside.returncode == 2
    assert "--file" in beside.stderr
    assert ctl("task", "edit", "t", "--file", str(kept)).returncode == 0
    kept.unlink()
    task = json.loads(ctl("task", "show", "t", "--json").stdout)
    assert task["parameters"]["training"]["batch_size"] == 4
    assert task["parameters"]["lora"]["lora_r"] == 16, "it was taken out"


def test_an_edit_by_file_keeps_name_and_type(ctl: Run, scene: Scene, tmp_path: Path) -> None:
    ctl("task", "create", *files(scene), "--name", "t")
    document = ctl("task", "show", "t", "--json").stdout
    data = {k: v for k, v in json.loads(document)["parameters"]["data"].items() if v}
    (tmp_path / "t.yaml").write_text(yaml.safe_dump({"data": data, "device": "cpu"}))
    edited = ctl("task", "edit", "t", "--file", "t.yaml")
    assert (edited.returncode, edited.stdout) == (0, "t\n"), edited.stderr
    (tmp_path / "u.yaml").write_text(yaml.safe_dump({"data": data, "training_type": "pretrain"}))
    other = ctl("task", "edit", "t", "--file", "u.yaml")
    assert other.returncode == 2
    assert "is sft in task t, and can't become pretrain" in other.stderr


@pytest.mark.parametrize(
    ("program", "status", "sentence"),
    [
        ("false", 1, "the editor ended with status 1; the task is as it was"),
        ("rm", 0, "t is as it was"),
        ("nosuch-editor", 1, "EDITOR=nano finetunectl task edit t"),
    ],
)
def test_an_editor_that_does_nothing_leaves_no_file(
    ctl: Run,
    scene: Scene,
    on_terminal: OnTerminal,
    environment: dict[str, str],
    tmp_path: Path,
    program: str,
    status: int,
    sentence: str,
) -> None:
    ctl("task", "create", *files(scene), "--name", "t")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    environment.pop("VISUAL", None)
    environment |= {"EDITOR": program, "TMPDIR": str(temporary)}
    terminal = on_terminal("task", "edit", "t")
    assert (terminal.end(), sentence in terminal.plain) == (status, True), terminal.plain
    assert "Traceback" not in terminal.plain
    assert list(temporary.iterdir()) == []


def test_a_completed_task_names_its_result(ctl: Run, scene: Scene) -> None:
    scene.play(steps=1)
    assert ctl("train", *files(scene), "--name", "t").returncode == 0
    found = re.search(r"^result +(\S+)$", ctl("task", "show", "t").stdout, re.M)
    assert found
    assert Path(found[1]).is_dir()
    ctl("task", "create", *files(scene), "--name", "new")
    assert not re.search(r"^result ", ctl("task", "show", "new").stdout, re.M)


@pytest.mark.parametrize("by_option", [True, False], ids=["option", "variable"])
@pytest.mark.parametrize("command", [["task", "list"], ["daemon", "start"]], ids=" ".join)
def test_an_address_of_ones_own_is_named_where_nobody_serves(
    ctl: Run, environment: dict[str, str], tmp_path: Path, command: list[str], by_option: bool
) -> None:
    address = f"unix:{tmp_path}/none.sock"
    options = ["--address", address] if by_option else []
    if not by_option:
        environment["FINETUNED_ADDRESS"] = address
    answer = ctl(*options, *command)
    assert answer.returncode == 3
    source = "--address" if by_option else "FINETUNED_ADDRESS"
    assert f"the address is that of {source}" in answer.stderr
    assert "start it: " not in answer.stderr


def test_a_hint_on_data_repeats_the_options(ctl: Run, real: Daemon, tmp_path: Path) -> None:
    data = dataset(tmp_path, '{"broken')
    given = ["--samples", "1", "--max-seq-length", "256"]
    answer = ctl("dataset", "inspect", "chats.jsonl", *given)
    assert (
        "finetunectl dataset inspect chats.jsonl --max-seq-length 256 --samples 1 --skip-bad"
        in answer.stderr
    )
    more = ctl("dataset", "inspect", data.name, *given, "--skip-bad")
    assert "--samples 1 --skip-bad --model DIR" in more.stderr


def test_texts_are_told_from_chats(ctl: Run, real: Daemon, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("once upon a time\n")
    write_jsonl(tmp_path / "t.jsonl", [{"text": "once upon a time"}])
    dataset(tmp_path)
    for name in ("t.txt", "t.jsonl"):
        answer = ctl("dataset", "inspect", name, "--samples", "1")
        assert answer.returncode == 2
        hint = f"finetunectl dataset inspect {name} --type pretrain --samples 1"
        assert answer.stderr.endswith(f"{hint}\n")
    chats = ctl("dataset", "inspect", "chats.jsonl", "--type", "pretrain")
    assert chats.stderr.endswith("finetunectl dataset inspect chats.jsonl\n")


def test_a_histogram_begins_and_ends_with_samples(ctl: Run, real: Daemon, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    dataset(tmp_path)
    answer = ctl("dataset", "inspect", "chats.jsonl", "--model", str(model), "--samples", "0")
    bins = re.findall(r"^ *[\d,]+-[\d,]+  .*  ([\d,]+)$", answer.stdout, re.M)
    assert bins[0] != "0" != bins[-1], answer.stdout
    report = json.loads(
        ctl("dataset", "inspect", "chats.jsonl", "--model", str(model), "--json").stdout
    )
    assert report["token_lengths"]["histogram"][0]["samples"] == 0, "else nothing was cut off"


def test_an_estimate_of_what_cannot_run_is_status_2(ctl: Run, real: Daemon, tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    data = dataset(tmp_path)
    command = ["estimate", "--model", str(model), "--data", str(data), "--device", "cpu"]
    # More checkpoints than the quota of 9 has left.
    answer = ctl(*command, "--set", "training.save_steps=1", "--json")
    violations = json.loads(answer.stdout)["violations"]
    is_bad = any(v["severity"] == "SEVERITY_ERROR" for v in violations)
    assert is_bad, violations
    assert answer.returncode == 2


def test_a_hint_has_the_task_by_the_name_that_was_typed(ctl: Run, scene: Scene) -> None:
    ctl("task", "create", *files(scene), "--name", "my task")
    answer = ctl("task", "stop", "my task")
    assert answer.returncode == 1
    assert answer.stderr.endswith("next: finetunectl task show 'my task'\n")

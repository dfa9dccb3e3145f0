"""`finetunectl` before a run, as a user has it: check, estimate, templates, edits, doctor, data."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from before_run import dataset, editor, files
from daemon_process import Daemon
from terminal import Terminal
from tiny import make_model

if TYPE_CHECKING:
    from conftest import Scene

Run = Callable[..., "subprocess.CompletedProcess[str]"]
OnTerminal = Callable[..., Terminal]


def fp32() -> list[str]:
    """What leaves the CPU nothing to remark."""
    return ["--set", "optimization.fp16=false"]


def long_warmup() -> list[str]:
    """Doubtful, and no error."""
    return ["--set", "training.max_steps=5", "--set", "training.warmup_steps=9"]


def test_params_shows_the_form_and_one_field_with_its_help(ctl: Run) -> None:
    form = ctl("params")
    assert form.returncode == 0
    line = r"^training\.batch_size +whole number 1 to 128 +2 +Batch size \*$"
    assert re.search(line, form.stdout, re.M)
    assert "training.max_steps" not in form.stdout
    assert re.search(r"\d+ more: finetunectl params --all", form.stderr)
    assert "training.max_steps" in ctl("params", "--all").stdout
    assert "lora.lora_r" not in ctl("params", "--all", "--type", "pretrain").stdout
    section = ctl("params", "lora", "--language", "zh").stdout
    assert "LoRA的r参数" in section
    assert "training.batch_size" not in section
    field = ctl("params", "lora_alpha").stdout
    assert field.startswith("lora.lora_alpha  ")
    assert re.search(r"^can be set +while lora\.use_lora is true and ", field, re.M)
    assert re.search(r"^default +16$", field, re.M)
    as_json = json.loads(ctl("params", "training.batch_size", "--json").stdout)
    assert (as_json["path"], as_json["default_value"], as_json["maximum"]) == (
        "training.batch_size",
        2,
        128,
    )


def test_params_knows_what_was_meant(ctl: Run) -> None:
    answer = ctl("params", "batchsize")
    assert answer.returncode == 2
    assert "did you mean training.batch_size?" in answer.stderr
    assert "sections are data, training" in ctl("params", "xyzzy").stderr
    assert "names no parameter of pretrain" in ctl("params", "lora_r", "--type", "pretrain").stderr


def test_check_shows_all_with_what_to_type_and_writes_nothing(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    wrong = ["--set", "training.batch_size=0", "--set", "training.batchsize=1"]
    answer = ctl("check", *files(scene), *wrong)
    assert answer.returncode == 2
    lines = answer.stdout.splitlines()
    assert lines[0].startswith("error    training.batchsize   is no parameter; did you mean ")
    assert re.match(
        r"error +training\.batch_size +must be .* \(try training\.batch_size = 1\)", lines[1]
    )
    assert re.match(r"notice +optimization\.fp16 ", lines[-1])
    assert "try: " not in answer.stderr, "an error would remain"
    mended = ctl("check", *files(scene), "--set", "training.batch_size=0").stderr
    assert "try: finetunectl check " in mended
    assert mended.rstrip().endswith("--set training.batch_size=1")
    assert "training.batch_size=0" not in mended, "the wrong value is replaced"
    as_json = json.loads(ctl("check", *files(scene), *wrong, "--json").stdout)
    assert as_json["valid"] is False
    assert [v["severity"] for v in as_json["violations"]] == ["error", "error", "notice"]
    assert as_json["violations"][1]["suggested_value"] == 1
    assert json.loads(ctl("task", "list", "--json").stdout) == []
    assert not (tmp_path / "finetuned-output").exists()


def test_check_takes_files_templates_and_tasks(ctl: Run, scene: Scene, tmp_path: Path) -> None:
    well = ctl("check", *files(scene), *fp32())
    assert (well.returncode, well.stdout) == (0, "")
    assert "nothing is wrong" in well.stderr
    (tmp_path / "mine.yaml").write_text("training: {batch_size: 500}\n")
    fixed = ctl("check", "mine.yaml", *files(scene), *fp32(), "--fix")
    assert fixed.returncode == 2
    assert "must be" in fixed.stderr
    (tmp_path / "fixed.yaml").write_text(fixed.stdout)
    assert ctl("check", "fixed.yaml").returncode == 0
    assert yaml.safe_load(fixed.stdout)["training"] == {"batch_size": 128}
    ctl("template", "save", "bad", "mine.yaml")
    assert "template" in ctl("check", "--template", "none").stderr
    ctl("task", "create", *files(scene), *fp32(), "--name", "one")
    assert ctl("check", "--task", "one").returncode == 0
    assert ctl("check", "--task", "one", "--set", "training.batch_size=0").returncode == 2


def test_check_counts_warnings_where_it_is_to_be_strict(ctl: Run, scene: Scene) -> None:
    doubtful = [*files(scene), *fp32(), *long_warmup()]
    answer = ctl("check", *doubtful)
    assert answer.returncode == 0
    assert answer.stdout.startswith("warning")
    assert ctl("check", *doubtful, "--strict").returncode == 2


def test_findings_come_in_the_users_language(
    ctl: Run, scene: Scene, environment: dict[str, str]
) -> None:
    environment["LC_ALL"] = "zh_CN.UTF-8"
    answer = ctl("check", *files(scene), "--set", "training.batch_size=0", "--json")
    assert "必须" in json.loads(answer.stdout)["violations"][0]["message"]


def test_before_a_start_doubts_are_shown_and_the_run_begins(ctl: Run, scene: Scene) -> None:
    scene.play(steps=1)
    answer = ctl("train", *files(scene), *long_warmup(), "-d")
    assert answer.returncode == 0
    assert re.search(r"^warning +training\.warmup_steps ", answer.stderr, re.M)
    assert re.search(r"^notice +optimization\.fp16 ", answer.stderr, re.M)


def test_a_template_is_saved_shown_used_and_deleted(ctl: Run, scene: Scene) -> None:
    saved = ctl("template", "save", "My SFT", "--set", "training.batch_size=8")
    assert (saved.returncode, saved.stdout) == (0, "My SFT\n")
    assert "finetunectl template show 'My SFT'" in saved.stderr
    again = ctl("template", "save", "My SFT", "--set", "training.batch_size=4")
    assert again.returncode == 1
    assert "--update" in again.stderr
    ctl("template", "save", "My SFT", "--set", "lora.lora_r=4", "--update")
    assert yaml.safe_load(ctl("template", "show", "My SFT").stdout) == {
        "kind": "template",
        "training_type": "sft",
        "display_name": "My SFT",
        "training": {"batch_size": 8},
        "lora": {"lora_r": 4},
    }
    every = yaml.safe_load(ctl("template", "show", "My SFT", "--all").stdout)
    assert every["training"]["num_train_epochs"] == 2
    assert yaml.safe_load(ctl("template", "show", "pretrain").stdout) == {
        "kind": "template",
        "training_type": "pretrain",
        "display_name": "Pretrain",
    }
    created = json.loads(
        ctl("task", "create", *files(scene), "--template", "My SFT", "--json").stdout
    )
    assert created["parameters"]["training"]["batch_size"] == 8
    assert re.search(r"^My SFT +\S+ +sft ", ctl("template", "list").stdout, re.M)
    assert [t["display_name"] for t in json.loads(ctl("template", "list", "--json").stdout)] == [
        "SFT",
        "Pretrain",
        "My SFT",
    ]
    unasked = ctl("template", "delete", "My SFT")
    assert unasked.returncode == 2
    assert "finetunectl template delete 'My SFT' --yes" in unasked.stderr
    assert ctl("template", "delete", "My SFT", "--yes").stdout == "My SFT deleted\n"
    gone = ctl("template", "show", "My SFT")
    assert gone.returncode == 1
    assert "finetunectl template list" in gone.stderr


def test_a_template_goes_out_as_a_file_and_comes_in_again(
    ctl: Run, scene: Scene, tmp_path: Path
) -> None:
    sets = [
        "--set",
        "lora.lora_target_modules=q_proj,v_proj",
        "--set",
        "training.learning_rate=1e-5",
    ]
    ctl("template", "save", "配置 一", *sets)
    assert "written" in ctl("template", "export", "配置 一", "out.yaml").stderr
    text = (tmp_path / "out.yaml").read_text()
    assert ctl("template", "export", "配置 一").stdout == text
    assert "配置 一" in text
    assert ctl("template", "import", "out.yaml").returncode == 1  # the name is taken
    assert ctl("template", "import", "out.yaml", "--name", "two").stdout == "two\n"
    one, two = (
        json.loads(ctl("template", "show", name, "--json").stdout) for name in ("配置 一", "two")
    )
    assert one["parameters"] == two["parameters"]
    assert one["parameters"]["lora"]["lora_target_modules"]["values"] == ["q_proj", "v_proj"]
    unnamed = ctl("task", "create", "-f", "out.yaml", *files(scene), "--json")
    assert json.loads(unnamed.stdout)["display_name"] != "配置 一"
    task = ctl("task", "create", "-f", "out.yaml", *files(scene), "--name", "t", "--json")
    assert json.loads(task.stdout)["parameters"]["training"]["learning_rate"] == 1e-5
    (tmp_path / "plain.yaml").write_text("training: {batch_size: 1}\n")
    assert ctl("template", "import", "plain.yaml").stdout == "plain\n"
    (tmp_path / "bad.yaml").write_text("training: {batchsize: 1}\n")
    assert ctl("template", "import", "bad.yaml").returncode == 2


def test_a_template_takes_a_tasks_parameters(ctl: Run, scene: Scene) -> None:
    ctl("task", "create", *files(scene), "--name", "t", "--set", "training.batch_size=8")
    ctl("template", "save", "of-t", "--task", "t", "--set", "lora.lora_r=4")
    shown = yaml.safe_load(ctl("template", "show", "of-t").stdout)
    assert shown["training"] == {"batch_size": 8}
    assert shown["lora"] == {"lora_r": 4}
    ctl("template", "save", "of-t", "--task", "t", "--update")
    assert "lora" not in yaml.safe_load(ctl("template", "show", "of-t").stdout)


def test_a_task_is_edited_by_options(ctl: Run, scene: Scene) -> None:
    sets = ["--set", "training.batch_size=8", "--set", "lora.lora_r=4"]
    ctl("task", "create", *files(scene), *sets, "--name", "t")
    edited = ctl(
        *("task", "edit", "t", "--set", "training.batch_size=2", "--unset", "lora.lora_r"),
        *("--name", "u", "--json"),
    )
    assert edited.returncode == 0, edited.stderr
    task = json.loads(edited.stdout)
    assert (task["display_name"], task["device"]) == ("u", "cpu")
    assert task["parameters"]["training"]["batch_size"] == 2
    assert task["parameters"]["lora"]["lora_r"] == 16
    wrong = ctl("task", "edit", "u", "--set", "training.batch_size=0")
    assert wrong.returncode == 2
    assert re.search(r"^  training\.batch_size +must be", wrong.stderr, re.M)
    assert ctl("task", "edit", "u", "--unset", "lora.r").returncode == 2
    refused = ctl("task", "edit", "u", "--update-template", "--device", "cpu")
    assert refused.returncode == 1
    unable = ctl("task", "edit", "u")
    assert unable.returncode == 2
    assert "finetunectl task edit u --set" in unable.stderr


def test_in_an_editor_what_is_wrong_comes_back_as_comments(
    ctl: Run, scene: Scene, on_terminal: OnTerminal, environment: dict[str, str], tmp_path: Path
) -> None:
    ctl("task", "create", *files(scene), "--name", "t", "--set", "lora.lora_r=4")
    seen = editor(
        environment,
        tmp_path,
        "sed -i 's/batch_size: .*/batch_size: 0/; /lora_r:/d' \"$f\"",
        "sed -i 's/batch_size: .*/batch_size: 4/' \"$f\"",
    )
    terminal = on_terminal("task", "edit", "t")
    assert terminal.end() == 0, terminal.written
    assert "start it: finetunectl task start t" in terminal.plain
    text = seen.read_text()
    assert "#   training.batch_size: must be from 1 to 128, not 0" in text
    assert text.count("# Task t.") == 2
    task = json.loads(ctl("task", "show", "t", "--json").stdout)
    assert task["parameters"]["training"]["batch_size"] == 4
    assert task["parameters"]["lora"]["lora_r"] == 16
    assert task["parameters"]["data"]["model_path"] == str(scene.model)


@pytest.mark.parametrize(
    ("step", "status", "sentence"),
    [
        ("true", 0, "t is as it was"),
        (': > "$f"', 0, "t is as it was"),
        ("exit 3", 1, "ended with status 3"),
        ('echo "training: [" >> "$f"', 2, "can't be read"),
        ("sed -i 's/batch_size: .*/batch_size: 0/' \"$f\"", 2, "must be from 1 to 128"),
    ],
    ids=["unchanged", "emptied", "failed", "no yaml", "wrong twice"],
)
def test_an_edit_that_comes_to_nothing_leaves_the_task_as_it_is(
    ctl: Run,
    scene: Scene,
    on_terminal: OnTerminal,
    environment: dict[str, str],
    tmp_path: Path,
    step: str,
    status: int,
    sentence: str,
) -> None:
    ctl("task", "create", *files(scene), "--name", "t")
    before = ctl("task", "show", "t", "--json").stdout
    editor(environment, tmp_path, step)
    terminal = on_terminal("task", "edit", "t")
    assert (terminal.end(), sentence in terminal.plain) == (status, True), terminal.written
    assert ctl("task", "show", "t", "--json").stdout == before


def test_a_deletion_asks_for_the_task_and_for_the_outputs(
    ctl: Run, scene: Scene, on_terminal: OnTerminal, tmp_path: Path
) -> None:
    for name in ("kept", "gone"):
        scene.play(steps=1, save_steps=1)
        assert ctl("train", *files(scene), "--name", name).returncode == 0
    output = tmp_path / "finetuned-output"
    refused = on_terminal("task", "delete", "kept")
    refused.read_until("Delete task kept?")
    refused.type(b"n\n")
    assert refused.end() == 1
    terminal = on_terminal("task", "delete", "kept")
    terminal.read_until("Delete task kept?")
    terminal.type(b"y\n")
    terminal.read_until("Delete what they wrote there too?")
    terminal.type(b"\n")
    assert terminal.end() == 0
    assert "still there" in terminal.plain
    assert list((output / "kept").rglob("manifest.json"))
    deleted = ctl("task", "delete", "gone", "--yes", "--outputs")
    assert re.search(r"^\d+ output files deleted", deleted.stdout, re.M)
    assert not list((output / "gone").rglob("manifest.json"))


def test_doctor_shows_items_and_devices(ctl: Run, environment: dict[str, str]) -> None:
    answer = json.loads(ctl("doctor", "--json").stdout)
    is_bad = answer["status"] == "CHECK_STATUS_ERROR"
    text = ctl("doctor")
    assert text.returncode == int(is_bad)
    assert re.search(r"^✓  python +\d", text.stdout, re.M)
    assert re.search(r"^DEVICE +BF16", text.stdout, re.M)
    environment["PYTHONIOENCODING"] = "ascii"
    assert re.search(r"^ok  python +\d", ctl("doctor").stdout, re.M)


def test_doctor_says_what_mends_it_and_a_start_leads_there(
    tmp_path: Path, ctl: Run, daemon: Daemon, scene: Scene
) -> None:
    daemon.stop()
    venv = tmp_path / "bare"
    subprocess.run(["python3", "-m", "venv", "--without-pip", str(venv)], check=True)
    daemon.options += ["--runner-python", str(venv / "bin" / "python")]
    daemon.start()
    answer = ctl("doctor")
    assert answer.returncode == 1
    assert re.search(r"^✗  torch ", answer.stdout, re.M)
    assert f"{venv}/bin/python -m pip install" in answer.stdout
    start = ctl("train", *files(scene), "-d")
    assert start.returncode == 1
    assert start.stderr.endswith("next: finetunectl doctor\n")


def test_a_data_file_is_shown_with_what_is_learned_of_it(
    ctl: Run, real: Daemon, tmp_path: Path, on_terminal: OnTerminal, environment: dict[str, str]
) -> None:
    model = make_model(tmp_path / "model")
    data = dataset(tmp_path)
    command = ["dataset", "inspect", str(data), "--model", str(model), "--max-seq-length", "128"]
    answer = ctl(*command, "--samples", "2")
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"^usable +yes$", answer.stdout, re.M)
    assert re.search(r"^roles +(user 40, assistant 40|assistant 40, user 40)$", answer.stdout, re.M)
    assert re.search(r"^cut +1 samples$", answer.stdout, re.M)
    assert " cut at 128 " in answer.stdout
    assert "█" in answer.stdout
    assert re.search(r"«Use `ls -l lines`.*<\|im_end\|>»", answer.stdout)
    assert "\x1b" not in answer.stdout
    report = json.loads(ctl(*command, "--json").stdout)
    assert (report["format"], report["samples"]) == ("DATA_FORMAT_MESSAGES", 40)
    assert report["token_lengths"]["maximum"] > 128
    terminal = on_terminal(*command, "--samples", "2")
    assert terminal.end() == 0
    assert "«" not in terminal.plain
    assert re.search(r"\x1b\[32mUse `ls -l lines`", terminal.written)
    environment["NO_COLOR"] = "1"
    terminal = on_terminal(*command, "--samples", "2")
    assert terminal.end() == 0
    assert "«Use `ls -l lines`" in terminal.plain


def test_a_data_file_with_bad_lines_is_refused_unless_they_are_skipped(
    ctl: Run, real: Daemon, tmp_path: Path
) -> None:
    data = dataset(tmp_path, '{"broken', '{"messages": 1}')
    answer = ctl("dataset", "inspect", str(data))
    assert answer.returncode == 2
    assert re.search(r"^usable +no: ", answer.stdout, re.M)
    assert re.search(r'^41 +\d+ +.*\{"broken', answer.stdout, re.M)
    assert "--skip-bad" in answer.stderr
    assert ctl("dataset", "inspect", str(data), "--skip-bad").returncode == 0
    nowhere = ctl("dataset", "inspect", "nowhere.jsonl")
    assert nowhere.returncode == 2
    assert "nowhere.jsonl" in nowhere.stderr


def test_ctrl_c_ends_the_reading_of_data(
    real: Daemon, tmp_path: Path, on_terminal: OnTerminal
) -> None:
    data = dataset(tmp_path)
    text = data.read_text()
    with data.open("a") as file:
        for _ in range(5000):
            file.write(text)
    terminal = on_terminal("dataset", "inspect", str(data))
    terminal.read_until("samples")
    terminal.type(b"\x03")
    assert terminal.end() == 130
    assert "usable" not in terminal.plain
    assert "Traceback" not in terminal.plain


def test_a_narrow_terminal_shows_whole_names(
    on_terminal: OnTerminal, daemon: Daemon, environment: dict[str, str]
) -> None:
    environment["COLUMNS"] = "80"
    terminal = on_terminal("params", "training")
    assert terminal.end() == 0
    assert re.search(r"^gradient_accumulation_steps +whole", terminal.plain, re.M)


def test_an_estimate_is_figures_and_the_quota_is_seen(
    ctl: Run, real: Daemon, tmp_path: Path
) -> None:
    model = make_model(tmp_path / "model")
    data = dataset(tmp_path)
    command = ["estimate", "--model", str(model), "--data", str(data), "--device", "cpu"]
    answer = ctl(*command)
    assert answer.returncode == 0, answer.stderr
    assert re.search(r"^samples +40 to train on", answer.stdout, re.M)
    assert re.search(r"^checkpoints +1 saved, 1 kept; 9 left of the quota$", answer.stdout, re.M)
    assert re.search(r"^parameters +[\d,]+ of [\d,]+ \(.*%\) trained$", answer.stdout, re.M)
    assert re.search(r"^  weights +\S+ ", answer.stdout, re.M)
    assert re.search(r"^notice +optimization\.fp16 ", answer.stderr, re.M)
    figures: dict[str, Any] = json.loads(ctl(*command, "--json").stdout)
    assert (figures["train_samples"], figures["quota_left"]) == (40, 9)
    wrong = ctl(*command, "--set", "training.batch_size=0", "--set", "a.b=1")
    assert wrong.returncode == 2
    assert ctl("estimate").returncode == 2
    status = ctl("daemon", "status")
    assert re.search(r"^quota +0 of 9 checkpoints used$", status.stdout, re.M)
    assert json.loads(ctl("daemon", "status", "--json").stdout)["quota"]["limit"] == 9

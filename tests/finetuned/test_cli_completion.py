"""Completion: in real shells on a terminal, against a real daemon, and without one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from daemon_process import Daemon
from inside import Inside, create, environment_of, shared_daemon
from terminal import CTL, Terminal

Complete = Callable[..., "list[str]"]

ODD = """odd $(touch hit) `touch hit` "; touch hit; '; touch hit; !x \\ $HOME end"""
"""A name that does all that it can to be run by a shell."""

SHELLS = {
    "bash": (["--norc", "--noprofile", "-i"], "source <(finetunectl completion bash)"),
    "zsh": (["-f", "-i"], "source <(finetunectl completion zsh)"),
    "fish": (["--no-config", "-i"], "finetunectl completion fish | source"),
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon with a task that has run, and two that have not."""
    from conftest import Scene

    root = tmp_path_factory.mktemp("completion")
    scene = Scene(root / "scene")
    with shared_daemon(root) as daemon:
        parameters = scene.play(steps=4, save_steps=2, eval_losses={"2": 0.25})
        done = create(daemon, parameters, "done-1", "done run", start=True)
        daemon.wait(done.name, "COMPLETED")
        create(daemon, scene.play(), "idle-1", "idle: one")
        create(daemon, scene.play(), "idle-2", "idle: two")
        create(daemon, scene.play(), "odd-1", ODD)
        yield daemon
    scene.close()


@pytest.fixture
def environment(served: Daemon, tmp_path: Path) -> dict[str, str]:
    """In which the daemon is the user's own, and the home is empty."""
    path = os.pathsep.join([str(Path(CTL).parent), os.environ["PATH"]])
    return {**environment_of(served), "HOME": str(tmp_path), "PATH": path, "PS1": "> "}


def ask(environment: dict[str, str], *words: str) -> list[str]:
    """What a script of a shell is answered."""
    answer = subprocess.run(
        [CTL, "_complete", "zsh", *words],
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (answer.returncode, answer.stderr) == (0, "")
    return answer.stdout.splitlines()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["task", "sh"], ["plain", "show\tShow a task with its parameters."]),
        (["task", "show", "done"], ["plain", "done run\tcompleted", "done-1\tdone run, completed"]),
        (["task", "show", "idle:"], ["plain", "idle: two\tpending", "idle: one\tpending"]),
        (["task", "show", "idle-2"], ["plain", "idle-2\tidle: two, pending"]),
        (["task", "fix", "done run", "--ye"], ["plain", "--yes\tDo not ask."]),
        (["task", "show", "--json", "--js"], ["plain"]),
        (["train", "--template", "S"], ["plain", "SFT\tpreset, sft"]),
        (["template", "show", "Pre"], ["plain", "Pretrain\tpreset, pretrain"]),
        (["task", "list", "--state", "pau"], ["plain", "paused"]),
        (["task", "list", "--state=pau"], ["plain", "--state=paused"]),
        (
            ["task", "start", "done run", "--resume", "n"],
            ["plain", "newest\tthe newest whole checkpoint"],
        ),
        (
            ["task", "delete-checkpoint", "done run", "2"],
            ["plain", "2\trun 1, eval loss 0.2500, best"],
        ),
        (["train", "--set", "training.opt"], ["open", "training.optimizer=\tOptimizer"]),
        (["train", "--set", "training.optimizer=sg"], ["plain", "training.optimizer=sgd\tSGD"]),
        (["train", "--set", "lora.use_lora=t"], ["plain", "lora.use_lora=true"]),
        (["train", "--set", "data.train_file=/x"], ["files"]),
        (["train", "--data", "x"], ["files"]),
        (["train", "--model", "x"], ["folders"]),
        (["probe", "idle: t"], ["plain", "idle: two\tpending"]),
        (["probe", "run.y"], ["files"]),
        (["params", "lor"], None),
        (["help", "task", "pau"], None),
        (["completion", "install", "z"], ["plain", "zsh"]),
        (["--address", "unix:/nowhere", "task", "show", "d"], ["plain"]),
        (["nonsense", "x"], ["plain"]),
        ([""], None),
    ],
)
def test_what_can_stand_there_is_offered(
    environment: dict[str, str], words: list[str], found: list[str] | None
) -> None:
    answer = ask(environment, *words)
    if found is not None:
        assert answer == found
    else:
        assert len(answer) > 1
        assert all(line.startswith(words[-1]) for line in answer[1:])


def test_a_device_is_offered_by_the_daemon(environment: dict[str, str]) -> None:
    answer = ask(environment, "train", "--device", "cp")
    assert answer[1].split("\t")[0] == "cpu"


def test_without_a_daemon_nothing_is_said_and_none_is_started(
    environment: dict[str, str], tmp_path: Path
) -> None:
    environment["FINETUNED_RUNTIME_DIR"] = str(tmp_path / "none")
    environment["FINETUNED_STATE_DIR"] = str(tmp_path / "no state")
    assert ask(environment, "task", "show", "") == ["plain"]
    assert ask(environment, "train", "--set", "training.opt") == ["open", "training.optimizer="]
    environment["FINETUNED_ADDRESS"] = "no address"
    assert ask(environment, "task", "show", "") == ["plain"]
    assert not (tmp_path / "none").exists()
    assert not (tmp_path / "no state").exists()


def test_a_daemon_that_hangs_is_not_waited_for(environment: dict[str, str], served: Daemon) -> None:
    assert served.process is not None
    served.process.send_signal(signal.SIGSTOP)
    try:
        assert ask(environment, "task", "show", "") == ["plain"]
    finally:
        served.process.send_signal(signal.SIGCONT)


@pytest.fixture(params=sorted(SHELLS))
def shell(
    request: pytest.FixtureRequest, environment: dict[str, str], tmp_path: Path
) -> Iterator[Terminal]:
    """A shell on a terminal, in which completion is loaded."""
    yield from _terminal(request.param, environment, tmp_path)


@pytest.fixture
def bash(environment: dict[str, str], tmp_path: Path) -> Iterator[Terminal]:
    """Bash, likewise."""
    yield from _terminal("bash", environment, tmp_path)


def _terminal(name: str, environment: dict[str, str], folder: Path) -> Iterator[Terminal]:
    program = shutil.which(name)
    if program is None:
        pytest.skip(f"{name} is not installed")
    options, load = SHELLS[name]
    (folder / "chats.jsonl").touch()
    terminal = Terminal(environment, folder, options, program=program)
    # The text is not in the line that was typed.
    terminal.type(f"{load}; echo rea''dy\n".encode())
    terminal.read_until("ready\r\n")
    yield terminal
    os.kill(terminal.pid, signal.SIGKILL)
    os.waitpid(terminal.pid, 0)
    terminal.hang_up()


def test_a_shell_completes_commands_names_parameters_and_files(shell: Terminal) -> None:
    for typed, completed in (
        ("finetunectl task checkp\t", "finetunectl task checkpoints "),
        ("finetunectl task show don\t", "finetunectl task show done"),
        ("finetunectl task show 'done r\t", "finetunectl task show 'done run'"),
        ("finetunectl task show done\\ r\t", "done\\ run"),
        ("finetunectl task show idle:\\ o\t", "one"),
        ("finetunectl train --set training.optim\t", "training.optimizer="),
        ("finetunectl train --set training.optimizer=sg\t", "training.optimizer=sgd"),
        ("finetunectl train --data cha\t", "chats.jsonl"),
        ("finetunectl train --data=cha\t", "--data=chats.jsonl"),
        ("finetunectl train --set data.train_file=cha\t", "data.train_file=chats.jsonl"),
    ):
        shell.written = ""
        shell.type(typed.encode())
        shell.read_until(completed)
        shell.type(b"\x15")  # forget the line


@pytest.mark.parametrize(
    "word", ['"odd ', "'odd ", "odd\\ ", '"od"\\d\\ ', 'o"dd ', "''\"odd $", '"odd \\$(t']
)
def test_bash_takes_a_completed_name_for_a_name_and_runs_nothing_in_it(
    bash: Terminal, tmp_path: Path, word: str
) -> None:
    bash.type(f"finetunectl task show --json {word}\t".encode())
    if word.startswith('"od"'):  # nothing is put behind a quote that is closed
        bash.type(b"\t\x15echo un''touched\n")
        bash.read_until("untouched\r\n")
    else:
        bash.type(b"\n")
        bash.read_until(f'"display_name": {json.dumps(ODD)}')
    assert not (tmp_path / "hit").exists()


def test_bash_completes_within_quotes_what_has_a_break_in_it(bash: Terminal) -> None:
    for typed, name in (('"idle: o', "one"), ("'idle: t", "two"), ("idle\\:\\ o", "one")):
        bash.written = ""
        bash.type(f"finetunectl task show --json {typed}\t\n".encode())
        bash.read_until(f'"display_name": "idle: {name}"')


def test_bash_lists_a_file_named_by_a_pattern_once(bash: Terminal, tmp_path: Path) -> None:
    for name in ("*", "a", "b"):
        (tmp_path / name).touch()
    bash.type(b"COMP_TYPE=9 COMP_LINE='finetunectl train --data ' COMP_POINT=25\n")
    bash.type(b"_finetunectl finetunectl '' --data\n")
    bash.type(b"printf '<%s>' \"${COMPREPLY[@]}\"; echo e''nd\n")
    bash.read_until(">end\r\n")
    shown = [line for line in bash.plain.splitlines() if line.endswith(">end")][-1]
    assert sorted(shown.removesuffix("end")[1:-1].split("><")) == ["*", "a", "b", "chats.jsonl"]


def test_the_script_is_installed_loaded_and_taken_away(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SHELL", "/usr/bin/zsh")
    ctl = Inside(monkeypatch, capsys)
    start = tmp_path / ".bashrc"
    start.write_bytes(b"alias a=\xff  # mine, without an end of line")
    for _ in range(2):
        answer = ctl("completion", "install", "bash", "--json")
        assert answer.status == 0
    script = tmp_path / ".local/share/finetuned/completion/finetunectl.bash"
    assert answer.json == {"shell": "bash", "files": [str(script)]}, "the line is there already"
    assert script.read_text() == ctl("completion", "bash").out
    lines = start.read_bytes().splitlines()
    assert lines[0] == b"alias a=\xff  # mine, without an end of line"
    assert len(lines) == 2
    loaded = subprocess.run(
        ["/bin/bash", "-c", f"{lines[1].decode()}\ncomplete -p finetunectl"],
        capture_output=True,
        text=True,
        env={"HOME": str(tmp_path), "PATH": os.environ["PATH"]},
    )
    assert "-F _finetunectl finetunectl" in loaded.stdout
    assert ctl("completion", "uninstall", "bash").status == 0
    assert not script.exists()
    assert start.read_bytes() == lines[0] + b"\n"

    # A file that was not there, and only that, goes again.
    for there in (False, True):
        start.unlink()
        if there:
            start.touch()
        assert ctl("completion", "install", "bash").status == 0
        assert ctl("completion", "install", "bash").status == 0
        assert ctl("completion", "uninstall", "bash").status == 0
        assert start.exists() == there
        start.touch()

    assert ctl("completion", "install").out.splitlines() == [
        f"{tmp_path}/.local/share/finetuned/completion/finetunectl.zsh written",
        f"{tmp_path}/.zshrc written",
    ]
    assert ctl("completion", "install", "fish").status == 0
    assert (tmp_path / ".config/fish/completions/finetunectl.fish").exists()
    assert json.loads(ctl("completion", "uninstall", "fish", "--json").out)["files"]
    assert ctl("completion", "install", "tcsh").status == 2

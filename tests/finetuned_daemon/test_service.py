"""`finetuned service`: what it writes for each service manager, and what it refuses.

What systemd makes of it is in `tests/e2e/test_service_systemd.py`.
"""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest

from daemon_process import Daemon
from finetuned_daemon.main import main

_SYSTEMCTL = """\
#!/bin/sh
echo "${0##*/} $*" >> "$STUB_LOG"
case "$*" in *"$STUB_FAILS"*) test -n "$STUB_FAILS" && { echo "it is broken" >&2; exit 1; } ;; esac
exit 0
"""
"""Notes what it is asked for, and does nothing."""


class Desk:
    """A home, with a service manager that does nothing and notes what it is asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = root / "home"
        self.units = self.home / ".config/systemd/user"
        self.log = root / "systemctl.log"
        tools = root / "tools"
        tools.mkdir(parents=True)
        self.home.mkdir(mode=0o700)
        for name in ("systemctl", "loginctl"):
            (tools / name).write_text(_SYSTEMCTL)
            (tools / name).chmod(0o755)
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("FINETUNED_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(self.home),
            "PATH": f"{tools}:/usr/bin:/bin",
            "STUB_LOG": str(self.log),
            "STUB_FAILS": "",
            "FINETUNED_STATE_DIR": str(root / "state"),
            "FINETUNED_RUNTIME_DIR": str(root / "run"),
        }

    def service(self, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Runs the command, in this process: a Python of its own takes half a second each time."""
        umask = os.umask(0o022)
        out, errors = io.StringIO(), io.StringIO()
        with (
            mock.patch.dict(os.environ, {**self.environment, **variables}, clear=True),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(errors),
        ):
            try:
                status = main(["service", *words])
            except SystemExit as end:
                status = int(end.code or 0)
            finally:
                os.umask(umask)
        return subprocess.CompletedProcess(words, status, out.getvalue(), errors.getvalue())

    def printed(self, *words: str, **variables: str) -> dict[str, str]:
        """The files that a dry run of `install` prints, by name; commands under the empty name."""
        done = self.service("install", "--dry-run", *words, **variables)
        assert done.returncode == 0, done.stderr
        parts = re.split(r"^# --- (.+)$", done.stdout, flags=re.MULTILINE)
        files = {
            name.replace("\\", "/").rpartition("/")[2]: re.sub(r"^\$ .*\n", "", text, flags=re.M)
            for name, text in zip(parts[1::2], parts[2::2], strict=True)
        }
        commands = re.findall(r"^\$ (.+)$", done.stdout, flags=re.MULTILINE)
        return {**{name: text[1:-1] for name, text in files.items()}, "": "\n".join(commands)}

    def asked(self) -> list[str]:
        """What it was asked to change since the last look."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        return [line.removeprefix("systemctl --user ") for line in lines if " show" not in line]


@pytest.fixture
def desk() -> Iterator[Desk]:
    with tempfile.TemporaryDirectory(prefix="ft-") as folder:  # a socket's path is short
        yield Desk(Path(folder) / "a--b")  # which no comment of XML may hold


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder."""
    return {
        str(path.relative_to(folder)): path.read_text() if path.is_file() else ""
        for path in folder.rglob("*")
    }


# --- systemd


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
@pytest.mark.parametrize("scope", ["user", "system"])
@pytest.mark.parametrize("activation", [False, True], ids=["plain", "socket"])
def test_systemd_finds_nothing_wrong_with_the_units(
    desk: Desk, scope: str, activation: bool
) -> None:
    options = ["--system"] * (scope == "system") + ["--socket-activation"] * activation
    files = desk.printed("--platform", "systemd", *options, "--", "--listen", "127.0.0.1:0")
    units = [name for name in files if name]
    assert units == ["finetuned.service", *["finetuned.socket"] * activation]
    for name in units:
        (desk.root / name).write_text(files[name])
    done = subprocess.run(
        ["systemd-analyze", f"--{scope}", "verify", *(str(desk.root / name) for name in units)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(desk.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_what_keeps_runs_alive_stands_in_every_unit(desk: Desk) -> None:
    for scope in ([], ["--system"]):
        lines = desk.printed("--platform", "systemd", *scope)["finetuned.service"].splitlines()
        for line in ("KillMode=process", "OOMPolicy=continue", "TasksMax=infinity", "Type=notify"):
            assert line in lines
        settings = {line.partition("=")[0] for line in lines if line[:1].isalpha()}
        # Each of them hides the GPU, keeps its driver from loading, or hides data.
        assert not settings & {
            *("PrivateTmp", "PrivateDevices", "DevicePolicy", "DeviceAllow", "ProtectClock"),
            *("NoNewPrivileges", "SystemCallFilter", "CapabilityBoundingSet", "ProtectHome"),
        }


def test_a_system_service_has_a_user_and_folders_of_its_own(desk: Desk) -> None:
    given = {"FINETUNED_STATE_DIR": "", "FINETUNED_RUNTIME_DIR": ""}
    files = desk.printed("--platform", "systemd", "--system", "--socket-activation", **given)
    service, socket = files["finetuned.service"], files["finetuned.socket"]
    assert "User=finetuned\n" in service
    assert "StateDirectory=finetuned finetuned/run\nStateDirectoryMode=0700\n" in service
    assert "Environment=FINETUNED_STATE_DIR=/var/lib/finetuned\n" in service
    assert "ListenStream=/var/lib/finetuned/run/finetuned.sock\nSocketMode=0600\n" in socket
    assert "SocketUser=finetuned\n" in socket
    commands = files[""].splitlines()
    assert commands[0].startswith("useradd --system --user-group")
    assert commands[1] == (
        "install -d -m 0700 -o finetuned /var/lib/finetuned /var/lib/finetuned/run"
    )


def test_options_of_serve_are_written_out_with_whole_paths(desk: Desk) -> None:
    unit = desk.printed(
        *("--platform", "systemd", "--env", 'A=50% of $HOME "x"', "--"),
        *("--tls-cert", "c.pem", "--tls-key", "k.pem", "--listen", "0.0.0.0:7411"),
        *("--training-quota", "3"),
    )["finetuned.service"]
    command = re.search(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    assert command is not None
    words = shlex.split(command[1])
    assert words[:5] == [sys.executable, "-P", "-m", "finetuned_daemon.main", "serve"]
    assert words[5:] == [
        *("--listen", "0.0.0.0:7411", "--tls-cert", str(Path.cwd() / "c.pem")),
        *("--tls-key", str(Path.cwd() / "k.pem"), "--training-quota", "3"),
    ]
    assert f"Environment=FINETUNED_STATE_DIR={desk.root}/state\n" in unit
    assert 'Environment="A=50%% of $HOME \\"x\\""\n' in unit


def command_of(unit: str) -> list[str]:
    """The words of its command line."""
    (line,) = re.findall(r"^ExecStart=(.*)$", unit, re.MULTILINE)
    return shlex.split(line)


def test_files_that_notifications_need_are_written_as_whole_paths(
    desk: Desk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service starts in another folder, and with another PATH."""
    monkeypatch.chdir(tmp_path)
    program = tmp_path / "n.sh"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    url = tmp_path / "url"
    url.write_text("https://example.com/hook")
    url.chmod(0o600)
    unit = desk.printed(
        *("--platform", "systemd", "--env", "HF_HUB_CACHE=hub", "--"),
        *("--notify-command", "./n.sh 'a b' c", "--notify-webhook", "@url"),
        HF_HOME="models",
    )["finetuned.service"]
    assert command_of(unit)[5:] == [
        *("--notify-command", f"{program} 'a b' c", "--notify-webhook", f"@{url}"),
    ]
    assert f"Environment=HF_HOME={tmp_path}/models\n" in unit
    assert f"Environment=HF_HUB_CACHE={tmp_path}/hub\n" in unit
    unit = desk.printed("--", "--notify-command", "true", "--runner-python", "python3")
    words = command_of(unit["finetuned.service"])
    for option, name in (("--notify-command", "true"), ("--runner-python", "python3")):
        found = shutil.which(name, path=desk.environment["PATH"])
        assert words[words.index(option) + 1] == found
    assert "HF_HOME=~/models" in desk.printed(HF_HOME="~/models")["finetuned.service"]


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="there is no systemd-analyze here")
def test_a_python_with_a_dollar_in_its_path_is_found(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = desk.root / "a$b${HOME} 50%" / "python"
    python.parent.mkdir()
    python.symlink_to(sys.executable)
    monkeypatch.setattr(sys, "executable", str(python))
    text = desk.printed("--platform", "systemd")["finetuned.service"]
    unit = desk.root / "finetuned.service"
    unit.write_text(text)
    done = subprocess.run(
        ["systemd-analyze", "--user", "verify", str(unit)],
        env={**os.environ, "XDG_RUNTIME_DIR": str(desk.root)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    # What the program is told of its own path, by which Python finds its environment.
    assert command_of(text)[1] == str(python).replace("%", "%%").replace("$", "$$")


# --- launchd, Windows


def test_the_property_list_for_launchd_keeps_runs_alive(desk: Desk) -> None:
    files = desk.printed("--platform", "launchd", "--", "--listen", "127.0.0.1:7411")
    content = plistlib.loads(files["org.finetuned.daemon.plist"].encode())
    assert content["AbandonProcessGroup"] is True
    assert content["RunAtLoad"] is True
    assert content["KeepAlive"] == {"SuccessfulExit": False}
    assert content["ProgramArguments"] == [
        *(sys.executable, "-P", "-m", "finetuned_daemon.main", "serve"),
        *("--listen", "127.0.0.1:7411"),
    ]
    assert content["EnvironmentVariables"]["FINETUNED_STATE_DIR"] == str(desk.root / "state")
    assert content["StandardErrorPath"] == str(desk.root / "state/daemon.log")
    assert "UserName" not in content
    system = desk.printed("--platform", "launchd", "--system", "--user", "somebody")
    assert plistlib.loads(system["org.finetuned.daemon.plist"].encode())["UserName"] == "somebody"


def test_the_task_for_windows_has_no_time_limit_and_starts_again(desk: Desk) -> None:
    files = desk.printed("--platform", "windows", "--", "--listen", "127.0.0.1:7411")
    task = ET.fromstring(files["finetuned-task.xml"])
    names = {"t": "http://schemas.microsoft.com/windows/2004/02/mit/task"}

    def text(path: str) -> str | None:
        return task.findtext("/".join(f"t:{part}" for part in path.split("/")), None, names)

    assert [child.tag.partition("}")[2] for child in task] == [
        *("RegistrationInfo", "Triggers", "Principals", "Settings", "Actions"),
    ], "the order of the schema"
    assert text("Settings/ExecutionTimeLimit") == "PT0S"
    assert text("Settings/RestartOnFailure/Interval") == "PT1M"
    assert text("Settings/StopIfGoingOnBatteries") == "false"
    assert text("Triggers/LogonTrigger/Enabled") == "true"
    assert text("Principals/Principal/RunLevel") == "LeastPrivilege"
    assert shlex.split(text("Actions/Exec/Arguments") or "") == [
        *("-P", "-m", "finetuned_daemon.main", "serve", "--listen", "127.0.0.1:7411"),
        *("--state-dir", str(desk.root / "state"), "--runtime-dir", str(desk.root / "run")),
    ]


# --- what is refused, and what is undone


def test_wrong_options_of_serve_are_named_and_nothing_is_written(desk: Desk) -> None:
    before = tree(desk.home)
    done = desk.service("install", "--", "--listen", "example.org:80")
    assert done.returncode == 2
    assert "'example.org:80' is no IP address" in done.stderr
    assert (tree(desk.home), desk.asked()) == (before, [])


def test_everything_that_is_wrong_is_named_at_once(desk: Desk) -> None:
    done = desk.service(
        *("install", "--user", "x", "--env", "1A=2", "--env", "NOT_THERE_AT_ALL"),
        *("--env", "FINETUNED_TOKEN=x", "--", "--new-database"),
    )
    assert done.returncode == 1
    for part in ("--user is for", "'1A' is no name", "NOT_THERE_AT_ALL", "TOKEN", "--new-database"):
        assert part in done.stderr
    assert desk.asked() == []


def test_a_secret_does_not_go_into_a_unit_that_everybody_can_read(desk: Desk) -> None:
    done = desk.service("install", "--system", "--dry-run", "--env", "HF_TOKEN=hf_abc")
    assert (done.returncode, "EnvironmentFile=" in done.stderr) == (1, True)
    assert "hf_abc" not in done.stdout + done.stderr
    assert "hf_abc" in desk.printed("--env", "HF_TOKEN=hf_abc")["finetuned.service"]


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "HOOK_TOKEN", "WANDB_API_KEY", "DB_PASS"])
def test_a_name_of_a_secret_is_known(desk: Desk, name: str) -> None:
    done = desk.service("install", "--system", "--dry-run", "--env", f"{name}=val-ue")
    assert (done.returncode, f"--env {name}: everybody" in done.stderr) == (1, True)
    assert "val-ue" not in done.stdout + done.stderr


def test_what_only_sounds_like_a_secret_may_be_in_a_unit_of_the_machine(desk: Desk) -> None:
    unit = desk.printed("--system", "--env", "TOKENIZERS_PARALLELISM=false")["finetuned.service"]
    assert "Environment=TOKENIZERS_PARALLELISM=false\n" in unit


def test_an_address_that_everybody_could_read_must_stand_in_a_file(desk: Desk) -> None:
    """A path is a secret in a unit of the machine; a password is one on each command line."""
    path, password = "https://h.example/hooks/SECRET", "https://me:SECRET@h.example/"
    for scope, option, value in (
        (("--system",), "--notify-webhook", path),
        (("--system",), "--notify-webhook", password),
        ((), "--notify-webhook", password),
        ((), "--notify-command", f"true {password}"),
    ):
        done = desk.service("install", "--dry-run", *scope, "--", option, value)
        assert (done.returncode, f"{option}: " in done.stderr) == (1, True), value
        assert ("@FILE" in done.stderr) is (option == "--notify-webhook")
        assert "SECRET" not in done.stdout + done.stderr
    done = desk.service("install", "--dry-run", "--system", "--env", f"HTTPS_PROXY={password}")
    assert (done.returncode, "password in a URL" in done.stderr) == (1, True)
    assert "SECRET" not in done.stdout + done.stderr
    assert path in desk.printed("--", "--notify-webhook", path)["finetuned.service"]


def test_a_secret_that_the_services_user_can_not_read_is_refused(desk: Desk) -> None:
    file = desk.root / "url"
    file.write_text("https://example.com/hook")
    file.chmod(0o600)
    words = ("install", "--dry-run", "--system", "--user")
    options = ("--", "--notify-webhook", f"@{file}")
    for user in ("nobody", "no-such-user"):
        done = desk.service(*words, user, *options)
        assert (done.returncode, f"{user}, whom the service runs as" in done.stderr) == (1, True)
        # The chown for the file comes once its folder lets in that user.
        assert re.search("can't read .*/url", done.stderr)
    assert desk.service(*words, getpass.getuser(), *options).returncode == 0


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file away")
def test_a_secret_must_be_the_services_users_own_and_root_may_install_it(desk: Desk) -> None:
    import pwd

    nobody = pwd.getpwnam("nobody")
    with tempfile.TemporaryDirectory(prefix="finetuned-test-") as folder:
        Path(folder).chmod(0o755)
        file = Path(folder) / "url"
        file.write_text("https://example.com/hook")
        file.chmod(0o600)
        words = ("install", "--dry-run", "--system", "--user", "nobody")
        options = ("--", "--notify-webhook", f"@{file}")
        done = desk.service(*words, *options)
        assert (done.returncode, f"run: chown nobody {file}" in done.stderr) == (1, True)
        os.chown(file, nobody.pw_uid, nobody.pw_gid)
        assert f"@{file}" in desk.printed(*words[2:], *options)["finetuned.service"]


@pytest.mark.parametrize("user", ["bob\nExecStartPre=/bin/evil", "-o", "%u", "bob alice", ""])
def test_a_user_can_not_bring_lines_of_its_own_into_a_unit(desk: Desk, user: str) -> None:
    done = desk.service("install", "--dry-run", "--system", f"--user={user}")
    if not user:
        assert "User=finetuned\n" in done.stdout
        return
    assert (done.returncode, done.stdout) == (1, "")
    assert "can't be the name of a user" in done.stderr


def test_a_python_can_not_bring_lines_of_its_own_into_a_unit(
    desk: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", "/a\nExecStartPre=/bin/evil/python")
    done = desk.service("install", "--dry-run")
    assert (done.returncode, done.stdout) == (1, "")
    assert "can't be written in a unit" in done.stderr


def test_a_dry_run_writes_and_runs_nothing(desk: Desk) -> None:
    before = tree(desk.home)
    assert "enable finetuned.socket" in desk.printed("--socket-activation")[""]
    assert (tree(desk.home), desk.asked()) == (before, [])


def test_an_installation_can_be_repeated_and_is_undone_as_a_whole(desk: Desk) -> None:
    before = tree(desk.home)
    assert desk.service("install").returncode == 0
    assert desk.asked() == [
        *("daemon-reload", "enable finetuned.service", "start finetuned.service"),
    ]
    assert (desk.units / "finetuned.service").stat().st_mode & 0o777 == 0o600
    once = tree(desk.home)
    again = desk.service("install")
    assert "unchanged" in again.stdout
    assert (tree(desk.home), "restart finetuned.service" in desk.asked()) == (once, False)
    assert desk.service("install", "--", "--training-quota", "5").returncode == 0
    assert "restart finetuned.service" in desk.asked(), "what is written takes effect"
    assert desk.service("install", "--no-start", "--socket-activation").returncode == 0
    assert desk.asked()[-1] == "enable finetuned.socket"
    assert set(tree(desk.units)) == {"finetuned.service", "finetuned.socket"}
    assert desk.service("uninstall").returncode == 0
    assert desk.asked()[0] == "disable --now finetuned.socket finetuned.service"
    left = {name for name, text in tree(desk.home).items() if text}
    assert left == {name for name, text in before.items() if text}
    assert desk.service("uninstall").returncode == 0, "there is nothing to undo"
    assert desk.asked() == []


def test_lingering_that_was_turned_on_is_turned_off_again(desk: Desk) -> None:
    desk.service("install")
    assert not [command for command in desk.asked() if "linger" in command], "not unasked"
    desk.service("install", "--linger")
    on = f"loginctl enable-linger {getpass.getuser()}"
    assert on in desk.asked()
    desk.service("install", "--", "--training-quota", "5")
    desk.service("uninstall")
    assert desk.asked()[-1] == on.replace("enable", "disable")


def test_a_file_of_somebody_else_is_not_touched(desk: Desk) -> None:
    desk.units.mkdir(parents=True)
    unit = desk.units / "finetuned.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    done = desk.service("install")
    assert (done.returncode, "was not written by this command" in done.stderr) == (1, True)
    assert desk.service("uninstall").returncode == 0
    assert (unit.read_text(), desk.asked()) == ("[Service]\nExecStart=/bin/true\n", [])
    done = desk.service("install", "--force")
    kept = desk.units / "finetuned.service.replaced"
    assert (done.returncode, kept.read_text()) == (0, "[Service]\nExecStart=/bin/true\n")
    assert str(kept) in done.stdout
    unit.write_text("[Service]\nExecStart=/bin/false\n")
    assert desk.service("install", "--force").returncode == 0
    assert kept.read_text() == "[Service]\nExecStart=/bin/true\n", "what was kept stays"
    second = desk.units / "finetuned.service.replaced-2"
    assert second.read_text() == "[Service]\nExecStart=/bin/false\n"


def test_a_unit_that_was_edited_is_not_overwritten_in_silence(desk: Desk) -> None:
    desk.service("install")
    unit = desk.units / "finetuned.service"
    unit.write_text(unit.read_text().replace("RestartSec=1", "RestartSec=9"))
    desk.asked()
    done = desk.service("install")
    assert (done.returncode, "systemctl --user edit" in done.stderr) == (1, True)
    assert ("RestartSec=9" in unit.read_text(), desk.asked()) == (True, [])
    assert desk.service("uninstall").returncode == 0
    assert not unit.exists()
    assert "RestartSec=9" in (desk.units / "finetuned.service.replaced").read_text()


def test_a_service_manager_that_is_not_there_leaves_everything_as_it_was(desk: Desk) -> None:
    before = tree(desk.home)
    done = desk.service("install", STUB_FAILS="show --property=Version")
    assert (done.returncode, "it is broken" in done.stderr) == (1, True)
    assert "login session" in done.stderr
    assert tree(desk.home) == before


def test_a_command_that_fails_is_named_with_its_reason(desk: Desk) -> None:
    done = desk.service("install", STUB_FAILS="enable")
    assert done.returncode == 1
    assert "systemctl --user enable finetuned.service has failed" in done.stderr
    assert "it is broken" in done.stderr


@pytest.fixture
def daemon_beside(desk: Desk) -> Iterator[Daemon]:
    daemon = Daemon(desk.root).start()
    yield daemon
    daemon.close()


def test_a_daemon_outside_the_service_is_not_pushed_aside(
    desk: Desk, daemon_beside: Daemon
) -> None:
    assert daemon_beside.process is not None
    done = desk.service("install")
    assert (done.returncode, "finetunectl daemon stop" in done.stderr) == (1, True)
    assert f"pid {daemon_beside.process.pid}" in done.stderr
    assert (desk.units.exists(), desk.asked()) == (False, [])
    status = desk.service("status", "--json")
    shown = json.loads(status.stdout)
    assert status.returncode == 4, "not installed"
    assert shown["daemon_outside"] == daemon_beside.process.pid
    assert shown["next_command"] == "finetunectl daemon stop"
    assert daemon_beside.process.poll() is None


def test_another_machine_is_only_printed_for(desk: Desk) -> None:
    done = desk.service("install", "--platform", "launchd")
    assert (done.returncode, "--dry-run" in done.stderr) == (1, True)
    assert desk.service("start").returncode == 4, "not installed"
    assert desk.service("logs").returncode == 4


def test_a_number_of_lines_that_is_none_is_refused(desk: Desk) -> None:
    assert desk.service("install").returncode == 0
    for lines in ("-1", "99999999999999999999"):
        done = desk.service("logs", "--lines", lines)
        assert (done.returncode, "--lines must be from 0" in done.stderr) == (1, True)

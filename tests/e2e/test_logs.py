"""The daemon's log, and the id of a call on its way from a client to the events of its run."""

from __future__ import annotations

import json
import logging
import os
import re
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned import Client, InternalError, NotFound
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)
from finetuned_daemon import logs
from finetuned_daemon.limits import Limits

CTL = (sys.executable, "-c", "from finetuned.cli import main; main()")
CANARY = "Zq7canaryZq7"
TOKEN_CANARY = "canarytokencanarytokencanarytoken0123456789"


def lines(daemon: Daemon) -> list[dict[str, Any]]:
    """The daemon's log."""
    return [json.loads(line) for line in daemon.paths.log_file.read_text().splitlines()]


def of(daemon: Daemon, request_id: str) -> list[dict[str, Any]]:
    """The lines of a call, the last of which comes at its end."""
    return eventually(
        lambda: [e for e in lines(daemon) if e.get("request_id") == request_id],
        f"a line of {request_id}",
    )


def identified(request_id: str) -> tuple[tuple[str, str], ...]:
    return (("request-id", request_id),)


# --- lines


def test_a_call_leaves_one_line_that_says_what_became_of_it(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.parameters())
    request = task_service_pb2.GetTaskRequest(name=task.name)
    _, call = daemon.tasks.GetTask.with_call(request, metadata=identified("my-call.1"))
    assert dict(call.trailing_metadata())["request-id"] == "my-call.1"
    (line,) = of(daemon, "my-call.1")
    assert line["method"] == "/finetuned.v1.TaskService/GetTask"
    assert (line["code"], line["peer"], line["level"]) == ("OK", "unix", "info")
    assert line["task"] == task.name
    assert line["duration_ms"] >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"])


def test_a_call_that_fails_says_why_by_its_reason(daemon: Daemon) -> None:
    request = task_service_pb2.GetTaskRequest(name=f"tasks/{CANARY}")
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.GetTask(request, metadata=identified("fails"))
    assert dict(caught.value.trailing_metadata())["request-id"] == "fails"
    (line,) = of(daemon, "fails")
    assert (line["code"], line["reason"]) == ("NOT_FOUND", "TASK_NOT_FOUND")


def test_a_stream_has_its_id_from_its_beginning_and_a_line_at_its_end(
    daemon: Daemon, scene: Scene
) -> None:
    task = daemon.create(scene.parameters())
    request = task_service_pb2.WatchTaskRequest(name=task.name)
    call = daemon.tasks.WatchTask(request, metadata=identified("a-stream"))
    next(call)
    assert dict(call.initial_metadata())["request-id"] == "a-stream"
    assert not [e for e in lines(daemon) if e.get("request_id") == "a-stream"]
    call.cancel()
    (line,) = of(daemon, "a-stream")
    assert line["code"] == "CANCELLED"


@pytest.mark.parametrize("bad", ["", "x" * 65, "a b", 'a"b', "a/b"])
def test_an_id_that_can_not_be_used_is_replaced(daemon: Daemon, bad: str) -> None:
    request = system_service_pb2.GetSystemInfoRequest()
    _, call = daemon.system.GetSystemInfo.with_call(request, metadata=identified(bad))
    given = dict(call.trailing_metadata())["request-id"]
    assert re.fullmatch("[0-9a-f]{16}", given)
    assert of(daemon, given)


def test_the_log_is_its_users_alone(daemon: Daemon) -> None:
    path = daemon.paths.log_file
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_calls_say_is_in_the_file_and_not_on_the_terminal(daemon: Daemon) -> None:
    """A service manager keeps what is written to stderr: a line a call would flood it."""
    daemon.system.GetSystemInfo(
        system_service_pb2.GetSystemInfoRequest(), metadata=identified("quiet")
    )
    assert of(daemon, "quiet")
    text = daemon.log.read_text()
    assert "serving on" in text
    assert "GetSystemInfo" not in text


# --- no secrets


def test_nothing_that_a_client_sends_or_trains_on_is_in_the_log(
    tmp_path: Path, scene: Scene
) -> None:
    """Every rpc, each text of it a canary; a token; a data file; a whole run."""
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0", "--log-level", "debug").start()
    try:
        chat = [{"role": "user", "content": CANARY}, {"role": "assistant", "content": CANARY}]
        scene.data.write_text(json.dumps({"messages": chat}) + "\n")
        failing = {"step": 1, "reason": "DATASET_INVALID", "detail": CANARY}
        task = daemon.create(
            scene.play(steps=2, console=CANARY, log=CANARY, fail=failing, garble=True),
            start=True,
            task_id="some-task",
        )
        daemon.wait(task.name, "FAILED")
        scene.data.write_text(scene.data.read_text() + CANARY + "\n")
        token = daemon.paths.token.read_text().strip()
        metadata = (("authorization", f"Bearer {TOKEN_CANARY}"), ("x-canary", CANARY))
        called = 0
        for stub, module in (
            (daemon.tasks, task_service_pb2),
            (daemon.templates, template_service_pb2),
            (daemon.parameters, parameter_service_pb2),
            (daemon.datasets, dataset_service_pb2),
            (daemon.system, system_service_pb2),
        ):
            (service,) = module.DESCRIPTOR.services_by_name.values()
            for method in service.methods:
                if method.name == "Shutdown":
                    continue
                for name in (CANARY, task.name):
                    request = getattr(module, method.input_type.name)()
                    fill(request, name)
                    ask(getattr(stub, method.name), request, metadata)
                    called += 1
        assert called > 50
        address = json.loads(daemon.paths.endpoint.read_bytes())["addresses"][1]
        with grpc.insecure_channel(address) as channel:
            call = channel.unary_unary("/finetuned.v1.SystemService/GetSystemInfo")
            for shown in (TOKEN_CANARY, token):
                ask(call, b"", (("authorization", f"Bearer {shown}"),))
        daemon.stop()
        text = daemon.paths.log_file.read_text() + daemon.log.read_text()
        assert "UNAUTHENTICATED" in text
        assert "INTERNAL" not in text
        for secret in (CANARY, TOKEN_CANARY, token):
            assert secret not in text, next(s for s in text.splitlines() if secret in s)
    finally:
        daemon.close()


def fill(message: Message, text: str, depth: int = 0) -> None:
    """Puts the text wherever a text can be."""
    for field in message.DESCRIPTOR.fields:
        if field.type == field.TYPE_STRING and field.is_repeated:
            getattr(message, field.name).append(CANARY)
        elif field.type == field.TYPE_STRING:
            is_name = field.name in ("name", "parent")
            setattr(message, field.name, text if is_name else CANARY)
        elif field.message_type is not None and not field.is_repeated and depth < 3:
            fill(getattr(message, field.name), text, depth + 1)


def ask(method: Any, request: Any, metadata: Any) -> None:
    """Calls; an error is an answer too."""
    try:
        answer = method(request, metadata=metadata, timeout=3)
        if hasattr(answer, "cancel"):
            next(answer)
            answer.cancel()
    except grpc.RpcError as error:
        code: Any = error
        assert code.code() not in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN)
    except StopIteration:
        return


def test_a_secret_that_comes_in_by_mistake_is_replaced() -> None:
    logs.keep_secret(TOKEN_CANARY)
    formatter = logs.JsonFormatter()
    for text in (
        f"a {TOKEN_CANARY} in it",
        "Authorization: Bearer abcdefghijklmnop",
        "('authorization', 'Bearer abcdefghijklmnop')",
        "HF_TOKEN=hf_abcdefghijklmnopabcdefghijklmnop",
    ):
        record = logging.LogRecord("x", logging.INFO, "x", 1, text, None, None)
        line = formatter.format(record)
        assert "[secret]" in json.loads(line)["message"]
        assert TOKEN_CANARY not in line
        assert "abcdefghijklmnop" not in line


# --- from the client to the run


def test_the_id_of_a_call_is_on_what_it_causes(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(gated=True))
    started = task_service_pb2.StartTaskRequest(name=task.name)
    daemon.tasks.StartTask(started, metadata=identified("the-start"))
    with daemon.watch(task.name) as watch:
        watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)
        scene.let_pass(1)
        watch.until_step(1)
        stop = task_service_pb2.StopTaskRequest(name=task.name)
        daemon.tasks.StopTask(stop, metadata=identified("the-stop"))
        watch.until_end()
    caused = {
        (e.WhichOneof("payload"), e.request_id)
        for e in watch.seen
        if e.WhichOneof("payload") not in ("metrics", "progress", "log_line", "checkpoint_saved")
    }
    assert caused == {
        ("state_change", "the-start"),
        ("phase_change", "the-start"),
        ("phase_change", "the-stop"),
        ("state_change", "the-stop"),
        ("result", "the-stop"),
    }
    stopping, _, stopped = [e for e in watch.seen if e.request_id == "the-stop"]
    assert stopping.phase_change.phase == task_pb2.RUN_PHASE_STOPPING
    assert stopped.state_change.new_state == task_pb2.TASK_STATE_STOPPED
    (run,) = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
    assert run.request_id == "the-start"
    spec = daemon.paths.state_dir / "runs" / task.name.partition("/")[2] / "1/spec.json"
    assert json.loads(spec.read_bytes())["request_id"] == "the-start"


def test_a_pause_and_what_follows_a_resume_have_the_ids_of_their_calls(
    daemon: Daemon, scene: Scene
) -> None:
    """Also where another daemon records it: the wish is durable with its id."""
    task = daemon.create(scene.play(steps=9, gated=True))
    started = task_service_pb2.StartTaskRequest(name=task.name)
    daemon.tasks.StartTask(started, metadata=identified("the-start"))
    with daemon.watch(task.name) as watch:
        scene.let_pass(1)
        watch.until_step(1)
    (run,) = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
    os.kill(run.pid, signal.SIGSTOP)
    pause = task_service_pb2.PauseTaskRequest(name=task.name)
    daemon.tasks.PauseTask(pause, metadata=identified("the-pause"))
    daemon.kill()
    daemon.start()
    os.kill(run.pid, signal.SIGCONT)
    daemon.wait(task.name, "PAUSED")
    resume = task_service_pb2.ResumeTaskRequest(name=task.name)
    daemon.tasks.ResumeTask(resume, metadata=identified("the-resume"))
    scene.let_pass(8)
    daemon.wait(task.name, "COMPLETED")
    changes = [e for e in daemon.events(task.name) if e.HasField("state_change")]
    named = [
        (
            task_pb2.TaskState.Name(e.state_change.new_state).removeprefix("TASK_STATE_"),
            e.request_id,
        )
        for e in changes
    ]
    assert named == [
        ("QUEUED", "the-start"),
        ("RUNNING", "the-start"),
        ("PAUSED", "the-pause"),
        ("QUEUED", "the-resume"),
        ("RUNNING", "the-resume"),
        ("COMPLETED", "the-resume"),
    ]
    caused = [
        e for e in daemon.events(task.name) if e.WhichOneof("payload") in ("phase_change", "result")
    ]
    last = [e.request_id for e in caused if e.seq > changes[3].seq]
    assert set(last) == {"the-resume"}
    (run,) = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
    assert run.request_id == "the-resume"


def test_a_run_that_waits_keeps_the_id_of_its_own_start(daemon: Daemon, scene: Scene) -> None:
    """The end of another run starts it, which is not its cause."""
    first = daemon.create(scene.play(gated=True), start=True)
    second = daemon.create(scene.parameters())
    request = task_service_pb2.StartTaskRequest(name=second.name)
    daemon.tasks.StartTask(request, metadata=identified("second"))
    stop = task_service_pb2.StopTaskRequest(name=first.name, discard=True)
    daemon.tasks.StopTask(stop, metadata=identified("stops-first"))
    scene.let_pass(5)
    daemon.wait(second.name, "COMPLETED")
    changes = [e for e in daemon.events(second.name) if e.HasField("state_change")]
    assert {e.request_id for e in changes} == {"second"}


def test_an_edit_and_an_end_in_the_queue_have_the_id_of_their_call(
    daemon: Daemon, scene: Scene
) -> None:
    daemon.create(scene.play(gated=True), start=True)
    task = daemon.create(scene.parameters())
    edit = task_service_pb2.UpdateTaskRequest(
        task=task_pb2.Task(name=task.name, display_name="other")
    )
    daemon.tasks.UpdateTask(edit, metadata=identified("edit"))
    start = task_service_pb2.StartTaskRequest(name=task.name)
    daemon.tasks.StartTask(start, metadata=identified("start"))
    stop = task_service_pb2.StopTaskRequest(name=task.name)
    daemon.tasks.StopTask(stop, metadata=identified("stop"))
    assert [(e.WhichOneof("payload"), e.request_id) for e in daemon.events(task.name)] == [
        ("task_edited", "edit"),
        ("state_change", "start"),
        ("result", "stop"),
        ("state_change", "stop"),
    ]


def test_the_client_has_the_id_on_its_errors(daemon: Daemon) -> None:
    with Client(daemon.address) as client:
        ids = set[str]()
        for _ in range(2):
            with pytest.raises(NotFound) as caught:
                client.get_task("tasks/not-there")
            ids.add(caught.value.request_id)
    assert len(ids) == 2, "each call has one of its own"
    for one in ids:
        assert of(daemon, one)[-1]["reason"] == "TASK_NOT_FOUND"


def test_an_error_of_the_daemons_own_is_told_with_what_to_do(daemon: Daemon, scene: Scene) -> None:
    """A table that is gone stands for whatever nobody has thought of."""
    task = daemon.create(scene.parameters())
    database = sqlite3.connect(daemon.paths.state_dir / "finetuned.db")
    database.execute("DROP TABLE runs")
    database.close()
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.ListRuns(
            task_service_pb2.ListRunsRequest(parent=task.name), metadata=identified("broken")
        )
    assert caught.value.code() is grpc.StatusCode.INTERNAL
    assert "request broken" in caught.value.details()
    assert "finetunectl support-bundle" in caught.value.details()
    info = error_details_pb2.ErrorInfo()
    assert rpc_status.from_call(caught.value).details[0].Unpack(info)
    assert (info.reason, info.metadata["request_id"]) == ("INTERNAL", "broken")
    *_, trace, end = of(daemon, "broken")
    assert "no such table: runs" in trace["exception"]
    assert end["code"] == "INTERNAL"
    with Client(daemon.address) as client, pytest.raises(InternalError) as error:
        list(client.list_runs(task.name))
    assert of(daemon, error.value.request_id)[-1]["code"] == "INTERNAL"
    shown = subprocess.run(
        [*CTL, "--address", daemon.address, "task", "start", task.name],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert shown.returncode == 1
    assert shown.stderr.endswith(" support-bundle\n")
    request_id = re.search(r"the next command collects \(request (\w+)\)", shown.stderr)
    assert request_id is not None, shown.stderr
    assert of(daemon, request_id[1])[-1]["code"] == "INTERNAL"


# --- files


@pytest.fixture
def log_file(tmp_path: Path) -> Iterator[Callable[[int], logging.Logger]]:
    """A logger that writes as the daemon does; files of so many bytes."""
    made = list[tuple[logging.Logger, logging.Handler]]()

    def make(most_bytes: int) -> logging.Logger:
        logger = logging.getLogger(f"log-file-{len(made)}-{tmp_path}")
        logger.propagate = False
        logger.setLevel(logging.INFO)
        handler = logs.LogFile(
            tmp_path / "daemon.jsonl",
            Limits({"log_file_bytes": most_bytes, "log_files": 3}),
            tmp_path / "daemon.log",
        )
        handler.setFormatter(logs.JsonFormatter())
        logger.addHandler(handler)
        made.append((logger, handler))
        return logger

    yield make
    for logger, handler in made:
        logger.removeHandler(handler)
        handler.close()


def test_the_log_is_bounded_and_the_newest_lines_are_there(
    tmp_path: Path, log_file: Callable[[int], logging.Logger]
) -> None:
    logger = log_file(2000)
    for number in range(200):
        logger.info("line %d", number)
    files = sorted(tmp_path.glob("daemon.jsonl*"))
    assert [f.name for f in files] == ["daemon.jsonl", "daemon.jsonl.1", "daemon.jsonl.2"]
    assert all(f.stat().st_size <= 2000 and not f.stat().st_mode & 0o077 for f in files)
    text = [line for f in reversed(files) for line in f.read_text().splitlines()]
    numbers = [int(json.loads(line)["message"].split()[1]) for line in text]
    assert numbers == list(range(numbers[0], 200)), "in order, none missing, to the newest"


def test_a_log_that_can_not_be_written_disturbs_nobody(tmp_path: Path, scene: Scene) -> None:
    daemon = Daemon(tmp_path)
    daemon.paths.log_file.mkdir(parents=True)
    daemon.paths.state_dir.chmod(0o700)
    daemon.start()
    try:
        task = daemon.create(scene.play(steps=1), start=True)
        daemon.wait(task.name, "COMPLETED")
        daemon.paths.log_file.rmdir()
        daemon.get(task.name)
        first = eventually(
            lambda: daemon.paths.log_file.exists() and lines(daemon), "there is a log again"
        )[0]
        assert first["lines_lost_before"] > 1
    finally:
        daemon.close()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_stderr_disturbs_nobody(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.log = Path("/dev/full")
    daemon.start()
    try:
        daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
        assert daemon.stop() == 0
    finally:
        daemon.close()


# --- on the command line


@pytest.fixture
def background(tmp_path: Path) -> Iterator[Callable[..., subprocess.CompletedProcess[str]]]:
    """`finetunectl` with folders of its own; ends the daemon that it has started."""
    environment = {
        **{k: v for k, v in os.environ.items() if not k.startswith("FINETUNED_")},
        "FINETUNED_STATE_DIR": str(tmp_path / "state"),
        "FINETUNED_RUNTIME_DIR": str(tmp_path / "run"),
    }

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*CTL, *arguments],
            env=environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    yield run
    run("daemon", "stop")


def test_the_log_is_shown_with_and_without_a_daemon(
    tmp_path: Path, background: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    missing = background("daemon", "logs")
    assert missing.returncode == 1
    assert "no daemon has run here" in missing.stderr
    assert background("daemon", "start").returncode == 0
    log = tmp_path / "state/logs/daemon.jsonl"
    assert f"log            {log}" in background("daemon", "status").stdout
    failed = background("task", "show", "tasks/not-there", "--json")
    request_id = json.loads(failed.stderr)["error"]["request_id"]
    shown = background("daemon", "logs", "--request", request_id)
    assert "GetTask NOT_FOUND TASK_NOT_FOUND" in shown.stdout
    assert len(shown.stdout.splitlines()) == 1
    before = (tmp_path / "state/daemon.log").read_text()
    assert background("daemon", "stop").returncode == 0
    (line,) = background("daemon", "logs", "--json", "--request", request_id).stdout.splitlines()
    assert json.loads(line)["method"] == "/finetuned.v1.TaskService/GetTask"
    assert "stopping; runs go on" in background("daemon", "logs").stdout
    assert background("daemon", "logs", "--level", "error").stdout == ""
    assert background("daemon", "logs", "--level", "loud").returncode == 2
    assert (tmp_path / "state/daemon.log").read_text() == before, "that file is for starts alone"
    assert "serving on" in before


def test_new_lines_are_followed_into_a_new_file(tmp_path: Path) -> None:
    path = tmp_path / "logs/daemon.jsonl"
    path.parent.mkdir()

    def write(message: str) -> None:
        with path.open("a") as file:
            file.write(json.dumps({"level": "info", "message": message}) + "\n")

    write("one")
    process = subprocess.Popen(
        [*CTL, "daemon", "logs", "--follow", "--json"],
        env={
            **os.environ,
            "FINETUNED_STATE_DIR": str(tmp_path),
            "FINETUNED_RUNTIME_DIR": str(tmp_path / "run"),
        },
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    try:
        assert json.loads(process.stdout.readline())["message"] == "one"
        write("two")
        path.rename(path.with_name("daemon.jsonl.1"))
        write("three")
        seen = [json.loads(process.stdout.readline())["message"] for _ in range(2)]
        assert seen == ["two", "three"]
    finally:
        process.kill()
        process.wait()
        process.stdout.close()

"""Tokens: where they lie, how they change while the daemon serves, and what never shows them."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conftest import Scene
from daemon_process import Daemon, Watch
from finetuned import AsyncClient, Client, ConnectionLost, Snapshot, Unauthenticated
from finetuned.v1 import task_pb2, task_service_pb2_grpc
from finetuned_daemon.privacy import FolderUnsafe
from finetuned_daemon.tokens import read_token, write_token
from hostile import raw
from reach import bearer, finetuned, get_info, said, status_of, tcp_address


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0").start()
    yield daemon
    daemon.close()


def rotate(daemon: Daemon, *options: str) -> subprocess.CompletedProcess[str]:
    done = finetuned(daemon, "token", "rotate", *options)
    assert done.returncode == 0, done.stderr
    return done


def test_a_token_is_random_and_one_users_alone(listening: Daemon) -> None:
    token = listening.paths.token
    assert len(token.read_text().strip()) >= 43
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert not listening.paths.read_only_token.exists(), "nobody has asked for one"


def test_the_commands_print_the_path_and_only_show_prints_the_token(listening: Daemon) -> None:
    for options, path in (
        ((), listening.paths.token),
        (("--read-only",), listening.paths.read_only_token),
    ):
        done = rotate(listening, *options)
        token = path.read_text().strip()
        assert done.stdout == f"{path}\n"
        assert token not in done.stdout + done.stderr
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert finetuned(listening, "token", "path", *options).stdout == f"{path}\n"
        assert finetuned(listening, "token", "show", *options).stdout == f"{token}\n"


def test_a_token_that_is_not_there_is_said_with_the_command_that_makes_one(tmp_path: Path) -> None:
    done = finetuned(Daemon(tmp_path), "token", "show", "--read-only")
    assert done.returncode == 1
    assert "finetuned token rotate --read-only" in done.stderr


def test_a_rotation_takes_effect_with_the_next_call(listening: Daemon) -> None:
    """The old token is of no use once the file is replaced, and nothing is restarted."""
    address = tcp_address(listening)
    old = bearer(listening.paths.token)
    assert get_info(address, old) == "OK"
    rotate(listening)
    for _ in range(5):
        write_token(listening.paths.token)
        new = bearer(listening.paths.token)
        assert get_info(address, old) == "UNAUTHENTICATED"
        assert get_info(address, new) == "OK"
        old = new


def test_a_token_that_is_removed_is_replaced_and_a_read_only_one_is_withdrawn(
    listening: Daemon,
) -> None:
    """Whoever removes a token wants it to be of no use; only the one that TCP needs comes again."""
    address = tcp_address(listening)
    rotate(listening, "--read-only")
    full, read_only = bearer(listening.paths.token), bearer(listening.paths.read_only_token)
    assert get_info(address, read_only) == "OK"
    listening.paths.read_only_token.unlink()
    assert get_info(address, read_only) == "UNAUTHENTICATED"
    assert not listening.paths.read_only_token.exists()
    listening.paths.token.unlink()
    assert get_info(address, full) == "UNAUTHENTICATED"
    assert get_info(address, bearer(listening.paths.token)) == "OK"
    assert stat.S_IMODE(listening.paths.token.stat().st_mode) == 0o600


SECRET = "s" * 43


def make_link(path: Path) -> None:
    target = path.with_name("elsewhere")
    target.write_text(SECRET)
    target.chmod(0o600)
    path.symlink_to(target)


def make_open(path: Path) -> None:
    path.write_text(SECRET)
    path.chmod(0o640)


TROUBLES: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (make_link, "is a link"),
    "FIFO": (os.mkfifo, "is no regular file"),
    "folder": (Path.mkdir, "is no regular file"),
    "open to its group": (make_open, "has mode 0640, so others may know the token"),
    "empty": (lambda path: path.touch(0o600), "is empty"),
    "short": (lambda path: (path.touch(0o600), path.write_text("abc\n")), "is shorter"),
    "not ASCII": (
        lambda path: (path.touch(0o600), path.write_text("é" * 40)),
        "one line of printable ASCII",
    ),
    "two lines": (
        lambda path: (path.touch(0o600), path.write_text("a" * 40 + "\n" + "b" * 40)),
        "one line of printable ASCII",
    ),
    "endless": (
        lambda path: (path.touch(0o600), path.write_text("a" * 2000)),
        "one line of printable ASCII",
    ),
    "another user's": (
        lambda path: (path.touch(0o600), path.write_text(SECRET), os.chown(path, 65534, 65534)),
        "belongs to another user",
    ),
}


@pytest.mark.parametrize("trouble", TROUBLES)
def test_what_is_no_token_of_this_user_is_told(tmp_path: Path, trouble: str) -> None:
    """One sentence for each, with the command that mends it and without what was read."""
    if trouble == "another user's" and os.getuid() != 0:
        pytest.skip("only the administrator can give files away")
    path = tmp_path / "token-read-only"
    make, sentence = TROUBLES[trouble]
    make(path)
    with pytest.raises(FolderUnsafe, match=sentence) as caught:
        read_token(path)
    assert "finetuned token rotate --read-only" in str(caught.value)
    assert SECRET not in str(caught.value)


@pytest.mark.parametrize("which", ["token", "token-read-only"])
def test_a_token_file_that_cannot_be_trusted_stops_the_start_with_the_remedy(
    tmp_path: Path, which: str
) -> None:
    """Also where no TCP is served: it lies there for the day when it is."""
    daemon = Daemon(tmp_path)
    daemon.paths.runtime_dir.mkdir(mode=0o700)
    make_open(daemon.paths.runtime_dir / which)
    assert daemon.spawn().wait(20) == 1
    written = daemon.log.read_text()
    assert "so others may know the token" in written
    assert "Traceback" not in written
    remedy = ["--read-only"] if which != "token" else []
    assert " ".join(["finetuned token rotate", *remedy]) in written
    rotate(daemon, *remedy)
    daemon.start().close()


@pytest.mark.parametrize("trouble", ["link", "FIFO", "short"])
def test_a_token_file_that_goes_bad_admits_nobody_until_it_is_mended(
    listening: Daemon, trouble: str
) -> None:
    """Neither by what it holds nor by the token from before; the unix socket goes on."""
    address, path = tcp_address(listening), listening.paths.token
    old = bearer(path)
    # Put in place at once, as a missing file would be made anew.
    aside = path.with_name("aside")
    TROUBLES[trouble][0](aside)
    aside.replace(path)
    for metadata in (old, bearer(SECRET), bearer("abc"), bearer("")):
        assert get_info(address, metadata) == "UNAUTHENTICATED"
    assert get_info(listening.address) == "OK"
    assert TROUBLES[trouble][1] in said(listening, "no call is admitted by this token")
    rotate(listening)
    assert get_info(address, bearer(path)) == "OK"
    assert get_info(address, old) == "UNAUTHENTICATED"


def test_streams_end_with_the_token_that_they_came_with(listening: Daemon, scene: Scene) -> None:
    """Within a second or two, though nobody calls; those with a good token go on."""
    rotate(listening, "--read-only")
    task = listening.create(scene.play(gated=True), start=True)
    full, read_only = bearer(listening.paths.token), bearer(listening.paths.read_only_token)
    with grpc.insecure_channel(tcp_address(listening)) as channel:
        stub = task_service_pb2_grpc.TaskServiceStub(channel)
        watches = [Watch(_With(stub, token), task.name, 0) for token in (full, read_only)]  # type: ignore[arg-type]
        health = health_pb2_grpc.HealthStub(channel).Watch(
            health_pb2.HealthCheckRequest(), metadata=full, timeout=60
        )
        next(health)
        over = threading.Event()
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(
            _one_and_no_end(over), metadata=full, timeout=60
        )
        next(reflection)
        with listening.watch(task.name) as local:
            rotate(listening)
            for stream in (watches[0], health, reflection):
                assert status_of(lambda: list(stream)) == "UNAUTHENTICATED"  # noqa: B023
            scene.let_pass(1)
            watches[1].until_step(1)
            local.until_step(1)
            listening.paths.read_only_token.unlink()
            assert status_of(lambda: list(watches[1])) == "UNAUTHENTICATED"
            scene.let_pass(1)
            local.until_step(2)
        over.set()


def _one_and_no_end(over: threading.Event) -> Iterator[reflection_pb2.ServerReflectionRequest]:
    yield reflection_pb2.ServerReflectionRequest(list_services="")
    over.wait(60)


class _With:
    """A stub whose calls carry metadata."""

    def __init__(self, stub: task_service_pb2_grpc.TaskServiceStub, metadata: Any) -> None:
        self._stub = stub
        self._metadata = metadata

    def WatchTask(self, request: Any, timeout: float) -> Any:  # noqa: N802
        return self._stub.WatchTask(request, timeout=timeout, metadata=self._metadata)


def test_a_stream_that_nobody_reads_ends_too(listening: Daemon, scene: Scene) -> None:
    """It waits for its reader with a message in hand, and sends little more than that one."""
    task = listening.create(scene.play(steps=2000), start=True)
    listening.wait(task.name, "COMPLETED")
    with grpc.insecure_channel(tcp_address(listening)) as channel:
        stub = task_service_pb2_grpc.TaskServiceStub(channel)
        watch = Watch(_With(stub, bearer(listening.paths.token)), task.name, 0)  # type: ignore[arg-type]
        rotate(listening)
        said(listening, "the old token is refused")
        assert status_of(lambda: list(watch)) == "UNAUTHENTICATED"


def use_folders(daemon: Daemon, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets clients of this process find the token of a daemon."""
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(daemon.paths.state_dir))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(daemon.paths.runtime_dir))


@pytest.mark.parametrize("how", ["call", "stream"])
def test_clients_of_the_same_user_go_on_with_the_new_token(
    listening: Daemon, scene: Scene, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They read the file again, so that a rotation interrupts nobody who may read it."""
    use_folders(listening, monkeypatch)
    task = listening.create(scene.play(gated=True), start=True)
    with Client(tcp_address(listening)) as client:
        if how == "call":
            assert client.get_task(task.name).name == task.name
            rotate(listening)
            assert client.get_task(task.name).name == task.name
            return
        items = client.watch(task.name, until_end=True)
        assert isinstance(next(items), Snapshot)
        rotate(listening)
        lost = next(item for item in items if isinstance(item, ConnectionLost))
        assert "token was changed" in lost.error.message
        assert isinstance(next(items), Snapshot)
        scene.let_pass(20)
        seqs = [item.seq for item in items if not isinstance(item, Snapshot | ConnectionLost)]
        assert seqs == list(range(lost.after_seq + 1, lost.after_seq + 1 + len(seqs)))
    assert listening.get(task.name).state == task_pb2.TASK_STATE_COMPLETED


def test_an_asynchronous_client_goes_on_as_well(
    listening: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    use_folders(listening, monkeypatch)

    async def use() -> None:
        async with AsyncClient(tcp_address(listening)) as client:
            await client.system_info()
            await asyncio.to_thread(rotate, listening)
            await client.system_info()

    asyncio.run(use())


def test_a_client_that_was_given_a_token_says_that_it_is_no_longer_the_one(
    listening: Daemon,
) -> None:
    token = listening.paths.token.read_text().strip()
    with Client(tcp_address(listening), token=token) as client:
        client.system_info()
        rotate(listening)
        with pytest.raises(Unauthenticated, match="finetuned token show") as caught:
            client.system_info()
    assert caught.value.reason == "TOKEN_WRONG"
    assert token not in str(caught.value)


def test_a_token_shows_up_nowhere(
    tmp_path: Path, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in argv, the environment of runs, logs, run folders, the database or answers."""
    planted = "planted-" + "t" * 40
    monkeypatch.setenv("FINETUNED_TOKEN", planted)
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0").start()
    try:
        rotate(daemon, "--read-only")
        secrets = {
            *(p.read_text().strip() for p in (daemon.paths.token, daemon.paths.read_only_token)),
            planted,
        }
        address = tcp_address(daemon)
        task = daemon.create(scene.play(gated=True), start=True)
        daemon.wait(task.name, "RUNNING")
        for secret in secrets:
            get_info(address, bearer(secret))
            get_info(address, bearer(f"{secret}x"))
        assert daemon.process is not None
        runners = psutil.Process(daemon.process.pid).children(recursive=True)
        assert runners
        for runner in runners:
            assert not [name for name in runner.environ() if name.startswith("FINETUNED_")]
            assert not [s for s in secrets if any(s in part for part in runner.cmdline())]
        assert not [s for s in secrets if any(s in p for p in daemon.process.args)]  # type: ignore[union-attr]
        scene.let_pass(20)
        daemon.wait(task.name, "COMPLETED")
        places = [daemon.log, *daemon.paths.state_dir.rglob("*"), daemon.paths.endpoint]
        for place in (p for p in places if p.is_file()):
            content = place.read_bytes()
            assert not [s for s in secrets if s.encode() in content], place
    finally:
        daemon.close()


def test_a_daemon_that_a_client_starts_gets_no_token_of_the_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("FINETUNED_TOKEN", "of-another-daemon")
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    with Client(start_daemon=True) as client:
        daemon = psutil.Process(client.system_info().pid)
        try:
            assert "FINETUNED_TOKEN" not in daemon.environ()
            assert daemon.cmdline()[0] == sys.executable
        finally:
            daemon.terminate()
            daemon.wait(20)


def test_a_call_without_a_token_is_refused_before_its_message_has_come(listening: Daemon) -> None:
    """gRPC would keep it until then: thousands of them are memory that anybody could take."""
    host, _, port = tcp_address(listening).rpartition(":")
    call = raw.call(1, b"/finetuned.v1.TaskService/CreateTask")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(raw.PREFACE + raw.frame(raw.SETTINGS, 0, 0, b"") + call)
        stream = connection.makefile("rb")
        while True:
            head = stream.read(9)
            assert len(head) == 9, "the connection was closed"
            kind, number = head[3], int.from_bytes(head[5:9], "big")
            stream.read(int.from_bytes(head[:3], "big"))
            if kind == raw.HEADERS and number == 1:
                break

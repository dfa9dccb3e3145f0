"""Who may talk to the daemon, and what it is: folders, token, health, reflection, weight."""

from __future__ import annotations

import grp
import json
import os
import pwd
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from daemon_process import Daemon
from finetuned import Client
from finetuned.v1 import system_service_pb2, system_service_pb2_grpc, task_service_pb2
from finetuned_daemon.listen import BadAddress, parse_listen
from reach import bearer, get_info, has_ipv6, tcp_address


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def info(daemon: Daemon) -> system_service_pb2.GetSystemInfoResponse:
    return daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())


def test_the_socket_is_its_users_alone(daemon: Daemon) -> None:
    assert mode(daemon.paths.socket) == 0o600
    for folder in (daemon.paths.runtime_dir, daemon.paths.state_dir):
        assert mode(folder) == 0o700
    for file in daemon.paths.state_dir.iterdir():
        assert not mode(file) & 0o077


@pytest.mark.parametrize("which", ["state", "run"])
def test_a_folder_that_others_can_reach_is_refused_with_the_remedy(
    tmp_path: Path, which: str
) -> None:
    daemon = Daemon(tmp_path)
    folder = tmp_path / which
    folder.mkdir()
    folder.chmod(0o755)
    assert daemon.spawn().wait(20) == 1
    assert f"chmod 700 {folder}" in daemon.log.read_text()


def test_a_parent_that_others_can_write_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    daemon = Daemon(tmp_path / "open")
    assert daemon.spawn().wait(20) == 1
    assert f"{tmp_path / 'open'} can be written by others" in daemon.log.read_text()


def test_a_file_in_the_place_of_a_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "state").touch()
    daemon = Daemon(tmp_path)
    assert daemon.spawn().wait(20) == 1
    assert "there is a file in its place" in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


def test_a_parent_that_the_users_own_group_can_write_is_fine(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home").chmod(0o775)
    try:
        group, user = grp.getgrgid((tmp_path / "home").stat().st_gid), pwd.getpwuid(os.getuid())
    except KeyError:
        pytest.skip("this user or its group has no name")
    if group.gr_name != user.pw_name:
        pytest.skip("this user has no group of its own")
    Daemon(tmp_path / "home").start().close()


@pytest.fixture
def listening(tmp_path: Path) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0").start()
    yield daemon
    daemon.close()


def test_tcp_is_served_to_the_token_alone(listening: Daemon) -> None:
    _, address = json.loads(listening.paths.endpoint.read_bytes())["addresses"]
    assert mode(listening.paths.token) == 0o600
    token = listening.paths.token.read_text().strip()
    with grpc.insecure_channel(address) as channel:
        call = system_service_pb2_grpc.SystemServiceStub(channel).GetSystemInfo
        request = system_service_pb2.GetSystemInfoRequest()
        for metadata in ((), (("authorization", "Bearer x"),), (("authorization", token),)):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata, timeout=10)
            assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        answer = call(request, metadata=(("authorization", f"Bearer {token}"),), timeout=10)
        assert address in answer.addresses
        health = health_pb2_grpc.HealthStub(channel)
        with pytest.raises(grpc.RpcError):
            health.Check(health_pb2.HealthCheckRequest(), timeout=10)
    assert token not in listening.log.read_text()


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        *((a, "with encryption only") for a in ("0.0.0.0:0", "192.168.1.1:80", "[::]:1")),
        *((a, "with encryption only") for a in ("[::ffff:127.0.0.1]:0", "[fe80::1%lo]:0")),
        *((a, "no IP address with a port") for a in ("localhost", ":1", "a.example:1", "::1:1")),
        *(
            (a, "no IP address with a port")
            for a in ("127.1:0", "127.0.0.1:65536", "[127.0.0.1]:1")
        ),
    ],
)
def test_no_address_but_loopback_is_served_without_tls(address: str, sentence: str) -> None:
    with pytest.raises(BadAddress, match=sentence):
        parse_listen(address, has_tls=False)


@pytest.mark.parametrize(
    ("address", "options", "sentence"),
    [
        ("192.168.1.1:80", (), "with encryption only"),
        ("localhost", (), "no IP address with a port"),
        ("127.0.0.1:0", ("--tls-cert", "x"), "--tls-cert and --tls-key go together"),
    ],
)
def test_an_address_that_is_not_served_ends_the_start_before_anything_is_made(
    tmp_path: Path, address: str, options: tuple[str, ...], sentence: str
) -> None:
    daemon = Daemon(tmp_path, "--listen", address, *options)
    assert daemon.spawn().wait(20) == 2
    assert sentence in " ".join(daemon.log.read_text().split())
    assert not daemon.paths.state_dir.exists()


@pytest.mark.parametrize("address", ["127.0.0.1:0", "localhost:0", "[::1]:0", "127.0.0.9:0"])
def test_loopback_has_several_names(tmp_path: Path, address: str) -> None:
    if address.startswith("[") and not has_ipv6():
        pytest.skip("this machine has no IPv6")
    daemon = Daemon(tmp_path, "--listen", address, "--listen", "127.0.0.1:0").start()
    try:
        for number in (0, 1):
            served = tcp_address(daemon, number)
            assert get_info(served) == "UNAUTHENTICATED"
            assert get_info(served, bearer(daemon.paths.token)) == "OK"
    finally:
        daemon.close()


def test_a_port_that_is_taken_is_an_error_in_one_sentence(
    listening: Daemon, tmp_path: Path
) -> None:
    _, address = json.loads(listening.paths.endpoint.read_bytes())["addresses"]
    (tmp_path / "other").mkdir(mode=0o700)
    other = Daemon(tmp_path / "other", "--listen", address)
    assert other.spawn().wait(20) == 1
    assert f"can't serve on {address}" in other.log.read_text()
    assert "Traceback" not in other.log.read_text()


def test_health_and_reflection_are_the_standard_ones(daemon: Daemon) -> None:
    health = health_pb2_grpc.HealthStub(daemon.channel)
    for service in ("", "finetuned.v1.TaskService", "finetuned.v1.SystemService"):
        answer = health.Check(health_pb2.HealthCheckRequest(service=service))
        assert answer.status == health_pb2.HealthCheckResponse.SERVING
    reflection = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([request]))
    names = {service.name for service in answer.list_services_response.service}
    assert {"finetuned.v1.TaskService", "finetuned.v1.SystemService"} <= names


def test_devices_are_listed_the_cpu_last(daemon: Daemon) -> None:
    devices = daemon.system.ListDevices(system_service_pb2.ListDevicesRequest()).devices
    cpu = devices[-1]
    assert cpu.id == "cpu"
    assert cpu.cores >= 1
    assert 0 < cpu.memory_free_bytes <= cpu.memory_total_bytes
    assert all(device.id.startswith("cuda:") for device in devices[:-1])


def test_the_daemon_says_what_it_is_and_holds_no_torch(daemon: Daemon) -> None:
    answer = info(daemon)
    assert daemon.process is not None
    assert answer.pid == daemon.process.pid
    assert answer.state_dir == str(daemon.paths.state_dir)
    assert list(answer.addresses) == [daemon.address]
    maps = Path(f"/proc/{answer.pid}/maps")
    if maps.exists():
        assert "libtorch" not in maps.read_text(), "a folder may be called anything"


def test_a_shutdown_answers_and_ends(daemon: Daemon) -> None:
    daemon.system.Shutdown(system_service_pb2.ShutdownRequest())
    assert daemon.process is not None
    assert daemon.process.wait(20) == 0


def test_a_message_too_large_is_refused(daemon: Daemon) -> None:
    request = task_service_pb2.GetTaskRequest(name="x" * (5 << 20))
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.GetTask(request)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_long_home_gets_a_socket_that_can_be_bound(tmp_path: Path) -> None:
    home = tmp_path / ("long" * 30)
    home.mkdir(mode=0o700)
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("FINETUNED_", "XDG_"))}
    process = subprocess.Popen(
        [sys.executable, "-m", "finetuned_daemon.main", "serve"],
        env={**keep, "FINETUNED_STATE_DIR": str(home / "s"), "XDG_RUNTIME_DIR": str(home / "r")},
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    line = next(line for line in process.stderr if "serving on" in line)
    path = Path(line.rpartition("unix:")[2].strip())
    try:
        assert len(os.fsencode(path)) < 104
        assert mode(path.parent) == 0o700
    finally:
        process.terminate()
        process.wait(20)
        process.stderr.close()
    assert not (path.parent / "token").exists(), "only TCP has one"
    (path.parent / "lock").unlink()
    path.parent.rmdir()


def test_folders_may_have_odd_names(tmp_path: Path) -> None:
    root = tmp_path / "an odd%20name é#?"
    root.mkdir(mode=0o700)
    daemon = Daemon(root).start()
    try:
        assert daemon.paths.socket.exists()
        with Client(f"unix:{daemon.paths.socket}") as client:
            assert client.system_info().state_dir == str(daemon.paths.state_dir)
    finally:
        daemon.close()

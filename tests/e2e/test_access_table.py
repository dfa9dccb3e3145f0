"""The one table of rpcs: complete, the same in the docs, and what the daemon holds calls to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FileDescriptor, MethodDescriptor
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from conftest import REPOSITORY
from daemon_process import Daemon
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    system_service_pb2,
    task_service_pb2,
    template_service_pb2,
)
from finetuned_daemon.services.access import RULES, SERVICES, Need, render
from reach import bearer, finetuned, status_of, tcp_address

FILES: tuple[FileDescriptor, ...] = (
    *(dataset_service_pb2.DESCRIPTOR, parameter_service_pb2.DESCRIPTOR),
    *(system_service_pb2.DESCRIPTOR, task_service_pb2.DESCRIPTOR),
    *(template_service_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR, reflection_pb2.DESCRIPTOR),
)
METHODS: dict[str, MethodDescriptor] = {
    f"/{service.full_name}/{method.name}": method
    for file in FILES
    for service in file.services_by_name.values()
    for method in service.methods
}


def test_every_rpc_is_in_the_table_and_nothing_else() -> None:
    """A new rpc has a need of its own, said by whoever adds it; one that is gone has none."""
    assert set(RULES) == set(METHODS)
    generated = {
        path.name for path in (REPOSITORY / "client/finetuned/v1").glob("*_service_pb2.py")
    }
    assert generated == {Path(f.name).stem + "_pb2.py" for f in FILES if "finetuned" in f.name}


def test_every_service_that_is_served_is_in_the_table(daemon: Daemon) -> None:
    """Whatever reflection lists, so a service that is only registered is noticed as well."""
    reflection = reflection_pb2_grpc.ServerReflectionStub(daemon.channel)
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    (answer,) = reflection.ServerReflectionInfo(iter([request]))
    assert {service.name for service in answer.list_services_response.service} == set(SERVICES)


def test_the_table_of_the_docs_is_this_one() -> None:
    """Written anew by `PYTHONPATH=tests python tests/e2e/test_access_table.py`."""
    assert (REPOSITORY / "docs/access.md").read_text("utf-8").endswith("\n\n" + render())


@pytest.fixture(scope="module")
def listening(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("table"), "--listen", "127.0.0.1:0").start()
    assert finetuned(daemon, "token", "rotate", "--read-only").returncode == 0
    yield daemon
    daemon.close()


def call(channel: grpc.Channel, path: str, metadata: Any) -> str:
    """Calls an rpc with an empty message; the status' name. Of a stream, one message is enough."""
    method = METHODS[path]
    request, answer = (GetMessageClass(t) for t in (method.input_type, method.output_type))
    kind = ("stream" if method.client_streaming else "unary") + (
        "_stream" if method.server_streaming else "_unary"
    )
    callable_: Any = getattr(channel, kind)(
        path, request_serializer=request.SerializeToString, response_deserializer=answer.FromString
    )
    message: Any = iter([request()]) if method.client_streaming else request()

    def run() -> None:
        response = callable_(message, metadata=metadata, timeout=20)
        if method.server_streaming:
            next(response)
            response.cancel()

    return status_of(run)


# Their answer ends the daemon, or takes seconds, and is no other for having been let in.
NOT_CALLED = {
    "/finetuned.v1.SystemService/Shutdown",
    "/finetuned.v1.SystemService/CheckEnvironment",
}


@pytest.mark.parametrize("path", sorted(METHODS))
def test_the_read_only_token_may_do_what_the_table_says(listening: Daemon, path: str) -> None:
    """Without a token nothing; with the read-only one what is READ; with the other one all."""
    refused = {"UNAUTHENTICATED", "PERMISSION_DENIED"}
    with grpc.insecure_channel(tcp_address(listening)) as channel:
        assert call(channel, path, ()) == "UNAUTHENTICATED"
        assert call(channel, path, bearer("x" * 43)) == "UNAUTHENTICATED"
        if RULES[path].need is Need.WRITE:
            read_only = bearer(listening.paths.read_only_token)
            assert call(channel, path, read_only) == "PERMISSION_DENIED"
        elif path not in NOT_CALLED:
            assert call(channel, path, bearer(listening.paths.read_only_token)) not in refused
        if path not in NOT_CALLED:
            assert call(channel, path, bearer(listening.paths.token)) not in refused
            assert call(listening.channel, path, ()) not in refused, "the unix socket needs none"


@pytest.mark.parametrize(
    "header", [("origin", "http://evil.example"), ("sec-fetch-site", "cross-site")]
)
def test_no_web_page_may_call(listening: Daemon, header: tuple[str, str]) -> None:
    """A page that has got hold of a token is refused still: browsers say where a call is from."""
    path = "/finetuned.v1.SystemService/GetSystemInfo"
    with grpc.insecure_channel(tcp_address(listening)) as channel:
        token = bearer(listening.paths.token)
        assert call(channel, path, token) == "OK"
        assert call(channel, path, (*token, header)) == "PERMISSION_DENIED"


def test_http_1_gets_no_answer_that_a_page_could_read(listening: Daemon) -> None:
    """What a browser can send to a port of this machine without TLS is HTTP/1.1: closed."""
    import http.client

    host, _, port = tcp_address(listening).rpartition(":")
    for name in (host, "evil.example"):
        connection = http.client.HTTPConnection(host, int(port), timeout=20)
        with pytest.raises((http.client.HTTPException, ConnectionError)):
            connection.request(
                "POST", "/finetuned.v1.SystemService/Shutdown", headers={"Host": name}
            )
            connection.getresponse()
        connection.close()


def test_more_than_one_authorization_is_none(listening: Daemon) -> None:
    """Two could be read differently by us and by whoever stands between."""
    path = "/finetuned.v1.SystemService/GetSystemInfo"
    with grpc.insecure_channel(tcp_address(listening)) as channel:
        token = bearer(listening.paths.token)
        assert call(channel, path, (*bearer("x" * 43), *token)) == "UNAUTHENTICATED"
        assert call(channel, path, (("authorization", "bearer " + token[0][1][7:]),)) == "OK"


def test_an_unknown_method_is_refused(listening: Daemon) -> None:
    with grpc.insecure_channel(tcp_address(listening)) as channel:
        for path in ("/finetuned.v1.TaskService/Nothing", "/x.Y/Z", "/"):
            unknown = channel.unary_unary(path)
            assert status_of(lambda: unknown(b"", timeout=20)) == "UNIMPLEMENTED"  # noqa: B023


if __name__ == "__main__":
    file = REPOSITORY / "docs/access.md"
    before, _, _ = file.read_text("utf-8").partition("| rpc | needs | why |")
    file.write_text(before + render(), "utf-8")

"""Where a client finds the daemon, and what it shows there."""

from __future__ import annotations

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from finetuned import DaemonUnavailable, InvalidArgument
from finetuned._connect import find


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A runtime folder of its own, with a token in it."""
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(tmp_path / "state"))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    monkeypatch.delenv("FINETUNED_TOKEN", raising=False)
    run = tmp_path / "run"
    run.mkdir()
    (run / "token").write_text("of-the-file\n")
    return run


def test_argument_wins_over_variable_over_socket(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert find().target == f"unix:{folders}/finetuned.sock"
    assert find().is_default
    monkeypatch.setenv("FINETUNED_ADDRESS", "127.0.0.1:5")
    assert find().target == "127.0.0.1:5"
    assert find("unix:/x.sock").target == "unix:/x.sock"
    assert not find().is_default


def test_without_unix_sockets_the_endpoint_file_tells(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(socket, "AF_UNIX")
    with pytest.raises(DaemonUnavailable):
        find()
    (folders / "daemon.json").write_text(
        json.dumps({"addresses": ["127.0.0.1:6"], "pid": os.getpid()})
    )
    assert find().target == "127.0.0.1:6"
    assert find().token == "of-the-file"
    (folders / "daemon.json").write_text('{"addr')
    with pytest.raises(DaemonUnavailable):
        find()


def test_a_unix_socket_needs_no_token_and_names_a_plain_authority() -> None:
    endpoint = find()
    assert endpoint.metadata == ()
    assert ("grpc.default_authority", "localhost") in endpoint.options


def test_the_token_comes_from_argument_variable_or_file(
    folders: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    announce(folders, "localhost:5")
    assert find("localhost:5").metadata == (("authorization", "Bearer of-the-file"),)
    monkeypatch.setenv("FINETUNED_TOKEN", "of-the-variable")
    assert find("localhost:5").token == "of-the-variable"
    assert find("localhost:5", "given").token == "given"


def announce(folders: Path, *addresses: str) -> None:
    content = {"addresses": [f"unix:{folders}/finetuned.sock", *addresses], "pid": os.getpid()}
    (folders / "daemon.json").write_text(json.dumps(content))


@pytest.mark.parametrize(
    "address", ["127.0.0.2:5", "127.0.0.1:6", "localhost:5", "[::1]:5", "127.0.0.1:05"]
)
def test_the_file_s_token_is_shown_to_our_daemon_alone(folders: Path, address: str) -> None:
    assert find(address).token == "", "no daemon has announced itself"
    announce(folders, "127.0.0.1:5")
    is_ours = address == "127.0.0.1:05"
    assert find(address).token == ("of-the-file" if is_ours else "")
    assert find(address, "given").token == "given"
    assert find("127.0.0.1:5").token == "of-the-file"


@pytest.mark.parametrize("left", [{}, {"pid": "1"}, {"pid": -1}, {"boot_id": "before"}])
def test_the_file_s_token_is_not_shown_where_the_daemon_has_gone(
    folders: Path, left: dict[str, object]
) -> None:
    """After a crash its endpoint file is still there, and anybody may have taken its port."""
    announce(folders, "127.0.0.1:5")
    file = folders / "daemon.json"
    assert find("127.0.0.1:5").token == "of-the-file"
    with subprocess.Popen(["true"]) as gone:
        gone.wait()
    file.write_text(json.dumps({**json.loads(file.read_bytes()), "pid": gone.pid, **left}))
    if "boot_id" in left:
        file.write_text(json.dumps({**json.loads(file.read_bytes()), "pid": os.getpid()}))
    assert find("127.0.0.1:5").token == ""


@pytest.mark.parametrize("token", ["é", "two\nlines", "a\udcff", "a\x00b"])
def test_what_is_no_token_is_refused_with_its_source(
    folders: Path, monkeypatch: pytest.MonkeyPatch, token: str
) -> None:
    with pytest.raises(InvalidArgument, match="the token is no token"):
        find("localhost:5", token)
    announce(folders, "localhost:5")
    (folders / "token").write_text(token, errors="surrogateescape")
    with pytest.raises(InvalidArgument, match="run/token is no token"):
        find("localhost:5")
    if "\0" not in token:
        monkeypatch.setenv("FINETUNED_TOKEN", token)
        with pytest.raises(InvalidArgument, match="FINETUNED_TOKEN is no token"):
            find("localhost:5")
    assert find("localhost:5", " given\n").token == "given"


def test_many_long_violations_fit() -> None:
    assert dict(find().options)["grpc.max_metadata_size"] == 64 * 1024
    assert dict(find().options)["grpc.absolute_max_metadata_size"] == 256 * 1024


def test_a_token_is_not_shown() -> None:
    assert "given" not in repr(find("localhost:5", "given"))


@pytest.mark.parametrize(
    "address",
    [
        *("localhost", "localhost:", ":5", "http://localhost/x", "a:b"),
        *("a:0", "a:65536", "a:\u0665", "\udcff:5", "é:5"),
    ],
)
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(InvalidArgument, match="is no address"):
        find(address)


@pytest.mark.parametrize(
    "name", ["plain.sock", "with blank.sock", "50%25.sock", "ü.sock", "\udcff.sock"]
)
def test_whoever_listens_is_found_out_by_connecting(folders: Path, name: str) -> None:
    endpoint = find(f"unix:{folders}/{name}")
    assert not endpoint.is_listening()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(folders / name))
        assert not endpoint.is_listening()
        server.listen()
        assert endpoint.is_listening()
    assert not endpoint.is_listening()


@pytest.mark.parametrize("address", ["unix:///a/b.sock", "unix:/a/b.sock", "/a/b.sock"])
def test_three_ways_to_write_a_socket(address: str) -> None:
    assert find(address).target == "unix:/a/b.sock"

"""TLS: what is checked before it serves, what clients are told, and certificates that change."""

from __future__ import annotations

import datetime as dt
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from daemon_process import Daemon
from finetuned import TLS, AsyncClient, Client, DaemonUnavailable, InvalidArgument, Unauthenticated
from finetuned_daemon.privacy import FolderUnsafe
from finetuned_daemon.tls import Certificates, TLSFiles, TLSUnusable
from reach import Pki, bearer, get_info, has_ipv6, said, tcp_address

CTL = str(Path(sys.executable).with_name("finetunectl"))


@pytest.fixture(scope="module")
def pki(tmp_path_factory: pytest.TempPathFactory) -> Pki:
    return Pki(tmp_path_factory.mktemp("pki"))


@pytest.fixture
def served(tmp_path: Path, pki: Pki) -> Iterator[Daemon]:
    """A daemon with TLS on loopback, for 127.0.0.1 and, where there is one, ::1; no other name."""
    options = pki.serve("127.0.0.1", "::1")
    second = "[::1]:0" if has_ipv6() else "127.0.0.1:0"
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0", "--listen", second, *options).start()
    yield daemon
    daemon.close()


def test_tls_and_the_token_are_both_needed(served: Daemon, pki: Pki) -> None:
    token = bearer(served.paths.token)
    for number in (0, 1):
        address = tcp_address(served, number)
        assert get_info(address, token, pki.trust()) == "OK"
        assert get_info(address, (), pki.trust()) == "UNAUTHENTICATED"
        assert get_info(address, token).startswith("UNAVAILABLE"), "no TLS, no answer"
    assert get_info(served.address) == "OK", "the unix socket has neither"


def test_the_client_takes_its_files_from_the_argument_or_the_environment(
    served: Daemon, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`finetunectl` too; the token comes from the file, as the daemon is this user's."""
    address = tcp_address(served)
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(served.paths.runtime_dir))
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(served.paths.state_dir))
    with Client(address, tls=TLS(ca=pki.ca_file)) as client:
        assert client.system_info().state_dir == str(served.paths.state_dir)
    monkeypatch.setenv("FINETUNED_TLS_CA", str(pki.ca_file))
    with Client(address) as client:
        assert client.system_info().pid
    done = subprocess.run(
        [CTL, "--address", address, "daemon", "status"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    with Client(address, token="x" * 43) as client, pytest.raises(Unauthenticated):
        client.system_info()


async def test_the_asynchronous_client_has_tls_too(served: Daemon, pki: Pki) -> None:
    token = served.paths.token.read_text()
    async with AsyncClient(tcp_address(served), token=token, tls=TLS(ca=pki.ca_file)) as client:
        assert (await client.system_info()).pid


def test_why_there_is_no_connection_is_said_with_the_next_step(
    served: Daemon, pki: Pki, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another CA and another name at once, as no waiting would help; no TLS after a while."""
    monkeypatch.setattr("finetuned._session.RETRY_SECONDS", 0.5)
    address, token = tcp_address(served), served.paths.token.read_text()
    other = Pki(tmp_path / "other")
    port = address.rpartition(":")[2]
    for where, tls, sentence in (
        (address, TLS(ca=other.ca_file), "does not come from the CA that you trust"),
        (f"localhost:{port}", TLS(ca=pki.ca_file), "is for another name"),
        (address, None, "if the daemon serves with --tls-cert, name its CA by FINETUNED_TLS_CA"),
    ):
        with (
            Client(where, token=token, tls=tls) as client,
            pytest.raises(DaemonUnavailable, match=sentence) as caught,
        ):
            client.stop_task("a")
        assert token.strip() not in str(caught.value)


def test_tls_to_a_daemon_without_it_is_said(tmp_path: Path, pki: Pki) -> None:
    plain = Daemon(tmp_path, "--listen", "127.0.0.1:0").start()
    try:
        with (
            Client(tcp_address(plain), tls=TLS(ca=pki.ca_file)) as client,
            pytest.raises(DaemonUnavailable, match="does not speak TLS"),
        ):
            client.system_info()
    finally:
        plain.close()


@pytest.mark.parametrize("address", ["192.0.2.1:7411", "gpu.example:7411", "[2001:db8::1]:7411"])
def test_no_client_calls_another_machine_in_the_clear(address: str) -> None:
    """It dials nobody, so no token and no parameter goes out."""
    with (
        Client(address, token="secret" * 8) as client,
        pytest.raises(InvalidArgument, match="another machine's, and without TLS") as caught,
    ):
        client.system_info()
    assert caught.value.reason == "TLS_NEEDED"
    assert "secret" not in str(caught.value)


def test_client_files_that_are_none_are_named(tmp_path: Path, pki: Pki) -> None:
    certificate, key = pki.issue("client@finetuned.test", file="client")
    (tmp_path / "empty").touch()
    for tls, sentence in (
        (TLS(ca=tmp_path / "absent"), "absent can't be read: No such file"),
        (TLS(ca=tmp_path / "empty"), "empty holds no certificate in PEM"),
        (TLS(ca=pki.ca_file, certificate=certificate), "go together"),
        (TLS(ca=pki.ca_file, certificate=certificate, key=certificate), "no private key in PEM"),
    ):
        with (
            Client("127.0.0.1:1", tls=tls) as client,
            pytest.raises(InvalidArgument, match=sentence),
        ):
            client.system_info()
    assert "PRIVATE" not in repr(TLS(ca=pki.ca_file, certificate=certificate, key=key))


def test_mutual_tls_wants_a_certificate_of_its_ca_and_the_token(
    tmp_path: Path, pki: Pki, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Who closes the connection may be a daemon that starts, so it is called again for a while.
    monkeypatch.setattr("finetuned._session.RETRY_SECONDS", 0.5)
    ours, other = Pki(tmp_path / "clients"), Pki(tmp_path / "others")
    daemon = Daemon(
        tmp_path,
        *("--listen", "127.0.0.1:0", "--tls-client-ca", str(ours.ca_file)),
        *pki.serve("127.0.0.1"),
    ).start()
    try:
        address, token = tcp_address(daemon), bearer(daemon.paths.token)
        good = ours.issue("alice@finetuned.test", file="alice")
        bad = other.issue("alice@finetuned.test", file="alice")
        assert get_info(address, token, pki.trust(good)) == "OK"
        assert get_info(address, (), pki.trust(good)) == "UNAUTHENTICATED"
        assert get_info(address, token, pki.trust()).startswith("UNAVAILABLE")
        assert get_info(address, token, pki.trust(bad)).startswith("UNAVAILABLE")
        given = token[0][1].removeprefix("Bearer ")
        tls = TLS(pki.ca_file, *good)
        with Client(address, token=given, tls=tls) as client:
            assert client.system_info().pid
        with (
            Client(address, token=given, tls=TLS(ca=pki.ca_file)) as client,
            pytest.raises(DaemonUnavailable, match="FINETUNED_TLS_CERT, FINETUNED_TLS_KEY"),
        ):
            client.delete_task("a")
    finally:
        daemon.close()


def test_a_new_certificate_is_shown_without_a_restart(served: Daemon, pki: Pki) -> None:
    """And a pair of which only one half is there yet changes nothing."""
    address, token = tcp_address(served), bearer(served.paths.token)
    by_name = f"localhost:{address.rpartition(':')[2]}"
    key = Path(served.options[served.options.index("--tls-key") + 1])
    assert get_info(by_name, token, pki.trust()).startswith("UNAVAILABLE")
    whole = key.read_bytes()
    key.write_text("torn")
    assert get_info(address, token, pki.trust()) == "OK"
    said(served, "the certificate from before stays in use")
    key.write_bytes(whole)
    pki.issue("localhost")
    assert get_info(by_name, token, pki.trust()) == "OK"
    assert get_info(address, token, pki.trust()).startswith("UNAVAILABLE"), "the old one is gone"


YESTERDAY = dt.datetime.now(dt.UTC) - dt.timedelta(days=1)
TOMORROW = dt.datetime.now(dt.UTC) + dt.timedelta(days=1)


def encrypted(pki: Pki) -> TLSFiles:
    from cryptography.hazmat.primitives import serialization

    certificate, key = pki.issue("localhost", file="encrypted")
    private = serialization.load_pem_private_key(key.read_bytes(), None)
    key.write_bytes(
        private.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"passphrase"),
        )
    )
    return TLSFiles(certificate, key)


def test_what_cannot_be_shown_is_refused_with_the_reason(tmp_path: Path, pki: Pki) -> None:
    """Before anything is served, and in words about files: a failed handshake says neither."""
    good, key = pki.issue("localhost", file="good")
    other, _ = pki.issue("localhost", file="another")
    expired = pki.issue("localhost", file="expired", not_after=YESTERDAY)
    early = pki.issue("localhost", file="early", not_before=TOMORROW)
    empty, absent = tmp_path / "empty", tmp_path / "absent"
    empty.touch(0o600)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    for files, sentence in (
        (TLSFiles(absent, key), "absent can't be read: No such file"),
        (TLSFiles(good, absent), "absent can't be read: No such file"),
        (TLSFiles(empty, key), "empty holds no certificate in PEM"),
        (TLSFiles(good, empty), "good.pem and .*empty can't be used"),
        (TLSFiles(other, key), "good.key is not the private key of .*another.pem"),
        (TLSFiles(*expired), "expired.pem can't be shown to clients: certificate has expired"),
        (TLSFiles(*early), "early.pem can't be shown to clients: certificate is not yet valid"),
        (TLSFiles(good, key, empty), "empty holds no certificates in PEM"),
        (TLSFiles(good, key, absent), "absent can't be read"),
        (encrypted(pki), "needs a passphrase"),
        (TLSFiles(pipe, key), "pipe is no file in PEM"),
        (TLSFiles(Path("/dev/zero"), key), "/dev/zero is no file in PEM"),
    ):
        with pytest.raises(TLSUnusable, match=sentence):
            Certificates(files)
    key.chmod(0o640)
    with pytest.raises(FolderUnsafe, match=f"run: chmod 600 {key}"):
        Certificates(TLSFiles(good, key))


def test_a_start_with_what_cannot_be_shown_ends_in_one_sentence(tmp_path: Path, pki: Pki) -> None:
    certificate, key = pki.issue("localhost", file="expired", not_after=YESTERDAY)
    options = ("--tls-cert", str(certificate), "--tls-key", str(key))
    daemon = Daemon(tmp_path, "--listen", "127.0.0.1:0", *options)
    assert daemon.spawn().wait(20) == 1
    assert "certificate has expired" in daemon.log.read_text()
    assert "Traceback" not in daemon.log.read_text()


def test_every_address_means_those_of_both_kinds(tmp_path: Path, pki: Pki) -> None:
    """`0.0.0.0` is no less than `[::]`, as gRPC binds it; the docs say so."""
    if not has_ipv6():
        pytest.skip("this machine has no IPv6")
    options = pki.serve("127.0.0.1", "::1")
    for address in ("0.0.0.0:0", "[::]:0"):
        (tmp_path / address).mkdir(mode=0o700)
        daemon = Daemon(tmp_path / address, "--listen", address, *options).start()
        try:
            port = tcp_address(daemon).rpartition(":")[2]
            for host in ("127.0.0.1", "[::1]"):
                where = f"{host}:{port}"
                assert get_info(where, bearer(daemon.paths.token), pki.trust()) == "OK"
                assert get_info(where, (), pki.trust()) == "UNAUTHENTICATED"
                assert get_info(where, bearer(daemon.paths.token)).startswith("UNAVAILABLE")
        finally:
            daemon.close()

"""Ways to reach a daemon over TCP: addresses, tokens, certificates."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc
import trustme

from daemon_process import Daemon, eventually
from finetuned.v1 import system_service_pb2, system_service_pb2_grpc


def tcp_address(daemon: Daemon, number: int = 0) -> str:
    """The address of the `number`th `--listen`."""
    return str(json.loads(daemon.paths.endpoint.read_bytes())["addresses"][1 + number])


def has_ipv6() -> bool:
    """Whether this machine has the loopback address of IPv6; many containers have not."""
    try:
        with socket.socket(socket.AF_INET6) as one:
            one.bind(("::1", 0))
    except OSError:
        return False
    return True


def bearer(token: str | Path) -> tuple[tuple[str, str], ...]:
    """The metadata of a call, with a token or the one in a file."""
    text = token.read_text().strip() if isinstance(token, Path) else token
    return (("authorization", f"Bearer {text}"),)


def get_info(
    address: str,
    metadata: tuple[tuple[str, str], ...] = (),
    credentials: grpc.ChannelCredentials | None = None,
) -> str:
    """Calls the daemon once; the status' name, and for UNAVAILABLE what gRPC says of it."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    channel = (
        grpc.insecure_channel(address, options)
        if credentials is None
        else grpc.secure_channel(address, credentials, options)
    )
    with channel:
        call = system_service_pb2_grpc.SystemServiceStub(channel).GetSystemInfo
        return status_of(
            lambda: call(system_service_pb2.GetSystemInfoRequest(), metadata=metadata, timeout=10)
        )


def status_of(call: Callable[[], Any]) -> str:
    """The name of the status that a call ends with."""
    try:
        call()
    except grpc.RpcError as error:
        failed: Any = error
        code = str(failed.code().name)
        return f"{code}: {failed.details()}" if code == "UNAVAILABLE" else code
    return "OK"


def finetuned(daemon: Daemon, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A subcommand of `finetuned` on the daemon's folders."""
    folders = (
        *("--state-dir", str(daemon.paths.state_dir)),
        *("--runtime-dir", str(daemon.paths.runtime_dir)),
    )
    command = [sys.executable, "-m", "finetuned_daemon.main", *arguments, *folders]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def said(daemon: Daemon, text: str) -> str:
    """Waits until the daemon's own log or its output has said something; all of it."""

    def look() -> str | None:
        files = [daemon.log, *daemon.paths.state_dir.rglob("*.log*")]
        written = "".join(file.read_text(errors="replace") for file in files if file.is_file())
        return written if text in written else None

    return eventually(look, f"the daemon says {text!r}")


@dataclass
class Pki:
    """A CA, and files of certificates that it has issued."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.ca_file = self.folder / "ca.pem"
        self.ca.cert_pem.write_to_path(str(self.ca_file))

    def issue(self, *names: str, file: str = "daemon", **options: Any) -> tuple[Path, Path]:
        """Certificate and key in PEM files; replaced at once where they are there already."""
        issued = self.ca.issue_cert(*names, **options)
        certificate, key = self.folder / f"{file}.pem", self.folder / f"{file}.key"
        for path, content in (
            (certificate, b"".join(pem.bytes() for pem in issued.cert_chain_pems)),
            (key, issued.private_key_pem.bytes()),
        ):
            new = path.with_suffix(".new")
            new.write_bytes(content)
            new.chmod(0o600)
            new.replace(path)
        return certificate, key

    def serve(self, *names: str) -> list[str]:
        """Options for a daemon that has a certificate for these names."""
        certificate, key = self.issue(*names)
        return ["--tls-cert", str(certificate), "--tls-key", str(key)]

    def trust(self, pair: tuple[Path, Path] | None = None) -> grpc.ChannelCredentials:
        """What a client needs that trusts this CA, and shows a certificate of its own or none."""
        certificate, key = pair or (None, None)
        return grpc.ssl_channel_credentials(
            self.ca_file.read_bytes(),
            key.read_bytes() if key else None,
            certificate.read_bytes() if certificate else None,
        )

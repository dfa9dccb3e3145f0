"""A machine beside this one, for tests: a second network namespace on a cable to the first.

`python -m second_network FOLDER` makes both, serves in the first one, calls from the second one,
and prints how each call ended as JSON. Run it by `unshare --net`, so that this machine's network is
left alone. `python -m second_network --call` makes the calls that stdin names.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc

from daemon_process import Daemon, eventually
from reach import Pki, bearer, get_info, tcp_address

HERE, THERE = "10.213.87.1", "10.213.87.2"


def ip(*arguments: str, inside: tuple[str, ...] = ()) -> None:
    """Runs `ip`."""
    subprocess.run([*inside, "ip", *arguments], check=True)


def namespace(pid: int | str) -> str:
    """What identifies the network of a process."""
    return str(Path(f"/proc/{pid}/ns/net").readlink())


def lay_cable(pid: int) -> tuple[str, ...]:
    """Connects this network with that of a process; the command that runs others in it."""
    inside = ("nsenter", f"--net=/proc/{pid}/ns/net")
    ip("link", "set", "lo", "up")
    ip("link", "set", "lo", "up", inside=inside)
    ip("link", "add", "here", "type", "veth", "peer", "name", "there", "netns", str(pid))
    ip("addr", "add", f"{HERE}/30", "dev", "here")
    ip("link", "set", "here", "up")
    ip("addr", "add", f"{THERE}/30", "dev", "there", inside=inside)
    ip("link", "set", "there", "up", inside=inside)
    return inside


def main(folder: Path) -> None:
    """Serves here and calls from there."""
    machine = subprocess.Popen(["unshare", "--net", "sleep", "600"])
    daemons: list[Daemon] = []
    try:
        own = namespace("self")
        eventually(lambda: namespace(machine.pid) != own, "the second network is there")
        inside = lay_cable(machine.pid)
        pki, clients, strangers = (Pki(folder / n) for n in ("pki", "clients", "strangers"))
        good, bad = (p.issue("a@finetuned.test", file="client") for p in (clients, strangers))
        for name in ("plain", "tls", "mutual"):
            (folder / name).mkdir(mode=0o700)
        tls = ("--listen", f"{HERE}:0", *pki.serve(HERE, "127.0.0.1"))
        plain = Daemon(folder / "plain", "--listen", "127.0.0.1:0")
        public = Daemon(folder / "tls", *tls)
        mutual = Daemon(folder / "mutual", *tls, "--tls-client-ca", str(clients.ca_file))
        daemons += (plain, public, mutual)
        for daemon in daemons:
            daemon.start()
        loopback, port = tcp_address(plain).rpartition(":")[::2]

        def call(address: str, token: str, *, ca: bool = True, pair: Any = None) -> dict[str, Any]:
            return {
                "address": address,
                "token": token,
                "ca": str(pki.ca_file) if ca else None,
                "pair": [str(path) for path in pair] if pair else None,
            }

        token, secret = (d.paths.token.read_text().strip() for d in (public, mutual))
        at, mutual_at = tcp_address(public), tcp_address(mutual)
        read = plain.paths.token.read_text().strip()
        calls = {
            "loopback": call(f"{loopback}:{port}", read, ca=False),
            "loopback by the cable": call(f"{HERE}:{port}", read, ca=False),
            "TLS and token": call(at, token),
            "TLS, no token": call(at, ""),
            "TLS, another daemon's token": call(at, secret),
            "token, no TLS": call(at, token, ca=False),
            "mutual TLS and token": call(mutual_at, secret, pair=good),
            "mutual TLS, no token": call(mutual_at, "", pair=good),
            "token, no client certificate": call(mutual_at, secret),
            "token, a stranger's certificate": call(mutual_at, secret, pair=bad),
        }
        done = subprocess.run(
            [*inside, sys.executable, "-m", "second_network", "--call"],
            input=json.dumps(calls),
            capture_output=True,
            text=True,
            check=True,
            timeout=100,
        )
        results: dict[str, str] = json.loads(done.stdout)
        results["loopback, from here"] = get_info(tcp_address(plain), bearer(read))
        json.dump(results, sys.stdout)
    finally:
        for daemon in daemons:
            daemon.close()
        machine.kill()
        machine.wait()


def make_calls() -> None:
    """Makes the calls of stdin; how each ended goes to stdout."""
    results = dict[str, str]()
    for name, call in json.load(sys.stdin).items():
        credentials = None
        if call["ca"]:
            certificate, key = (
                [Path(p).read_bytes() for p in call["pair"]] if call["pair"] else (None, None)
            )
            credentials = grpc.ssl_channel_credentials(
                Path(call["ca"]).read_bytes(), key, certificate
            )
        metadata = bearer(call["token"]) if call["token"] else ()
        results[name] = get_info(call["address"], metadata, credentials)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    if sys.argv[1] == "--call":
        make_calls()
    else:
        main(Path(sys.argv[1]))

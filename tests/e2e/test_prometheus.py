"""Metrics for Prometheus: what they say, to whom, and that no scraper is in anybody's way."""

from __future__ import annotations

import http.client
import re
import socket
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from subprocess import run

import pytest
from prometheus_client.openmetrics.parser import (
    text_string_to_metric_families as parse_openmetrics,
)
from prometheus_client.parser import text_string_to_metric_families as parse_text

from conftest import REPOSITORY, Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import task_service_pb2
from finetuned_daemon.limits import BY_NAME
from pauses import stop

OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that serves metrics; nothing else makes calls to it."""
    root = tmp_path_factory.mktemp("prometheus")
    daemon = Daemon(root, "--prometheus", "127.0.0.1:0").start()
    yield daemon
    daemon.close()


def port(daemon: Daemon) -> int:
    found = re.findall(r"metrics on http://127\.0\.0\.1:(\d+)/metrics", daemon.log.read_text())
    return int(found[-1])


def ask(
    daemon: Daemon, path: str = "/metrics", method: str = "GET", **headers: str
) -> tuple[int, str, str]:
    """Status, content type and body."""
    with closing(http.client.HTTPConnection("127.0.0.1", port(daemon), timeout=20)) as connection:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()


def samples(text: str) -> Samples:
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in parse_text(text)
        for sample in family.samples
    }


class Scrape:
    """One look."""

    def __init__(self, daemon: Daemon) -> None:
        status, _, self.text = ask(daemon)
        assert status == 200
        self._samples = samples(self.text)

    def value(self, name: str, **labels: str) -> float | None:
        """None: there is no such sample."""
        return self._samples.get((name, frozenset(labels.items())))

    def number(self, name: str, **labels: str) -> float:
        return self._samples[name, frozenset(labels.items())]

    def labels(self, name: str) -> list[dict[str, str]]:
        return [dict(labels) for found, labels in self._samples if found == name]


def until(daemon: Daemon, value: float, name: str, **labels: str) -> Scrape:
    """The first look that has it; scrapes of the same moment get the same."""

    def look() -> Scrape | None:
        scrape = Scrape(daemon)
        return scrape if scrape.value(name, **labels) == value else None

    return eventually(look, f"{name} {labels} {value}")


def test_both_formats_say_the_same(daemon: Daemon) -> None:
    _, content_type, text = ask(daemon)
    assert content_type.startswith("text/plain; version=0.0.4")
    status, content_type, other = ask(daemon, Accept=OPENMETRICS)
    assert (status, content_type.partition(";")[0]) == (200, "application/openmetrics-text")
    assert other.endswith("# EOF\n")
    assert ask(daemon, Accept="application/openmetrics-text; version=x")[0] == 200
    families = list(parse_openmetrics(other))
    told = {(x.name, frozenset(x.labels.items())) for f in families for x in f.samples}
    assert told == set(samples(text))
    for family in families:
        assert re.fullmatch("(finetuned|process)(_[a-z]+)+", family.name), family.name
        assert family.documentation, family.name


def test_the_docs_have_them_all(daemon: Daemon) -> None:
    endings = {"counter": "_total", "info": "_info"}
    families = parse_openmetrics(ask(daemon, Accept=OPENMETRICS)[2])
    told = {family.name + endings.get(family.type, "") for family in families}
    section = (REPOSITORY / "docs/operations.md").read_text().partition("\n## Prometheus\n")[2]
    documented = set[str]()
    for row in re.findall(r"^\| (`(?:finetuned|process)_.*?) \|", section, re.MULTILINE):
        first, *others = re.findall(r"`([a-z_*]+)`", row)
        of = "_".join(first.split("_")[:2])
        documented |= {first, *(of + name if name[0] == "_" else name for name in others)}
    assert documented - {"process_*"} == {name for name in told if not name.startswith("process_")}


def test_it_tells_tasks_runs_queue_and_ends(daemon: Daemon, scene: Scene) -> None:
    task = daemon.create(scene.play(steps=5, gated=True), start=True, task_id="told-of")
    edited = daemon.create(scene.parameters(), start=True)
    scene.let_pass(2)
    daemon.watch(task.name).until_step(2)
    labels = {"task": task.name, "run": "1"}
    scrape = until(daemon, 2, "finetuned_run_step", **labels)
    assert scrape.value("finetuned_tasks", state="running") == 1
    assert scrape.value("finetuned_tasks", state="queued") == 1
    assert scrape.value("finetuned_tasks", state="failed") == 0
    assert scrape.value("finetuned_queue_length", device="cpu") == 1
    assert scrape.value("finetuned_device_busy", device="cpu") == 1
    assert scrape.value("finetuned_run_total_steps", **labels) == 5
    assert scrape.value("finetuned_run_epoch", **labels) == pytest.approx(2 / 5)
    (info,) = scrape.labels("finetuned_run_info")
    assert info == {
        **labels,
        "display_name": task.display_name,
        "training_type": "sft",
        "device": "cpu",
        "phase": "training",
    }
    ended = scrape.number("finetuned_runs_ended_total", end_reason="finished")
    stop(daemon, edited.name)
    scene.let_pass(3)
    daemon.wait(task.name, "COMPLETED")
    scrape = until(daemon, ended + 1, "finetuned_runs_ended_total", end_reason="finished")
    assert scrape.value("finetuned_runs_ended_total", end_reason="stopped_by_user") == 1
    assert scrape.number("finetuned_events_written_total", kind="metrics") >= 5
    assert not scrape.labels("finetuned_run_step"), "what does not run has no series"


def test_it_tells_of_the_daemon_itself(daemon: Daemon, scene: Scene) -> None:
    request = task_service_pb2.GetTaskRequest(name="tasks/no-such")
    for _ in range(3):
        with pytest.raises(Exception, match="NOT_FOUND"):
            daemon.tasks.GetTask(request)
    with daemon.watch(daemon.create(scene.parameters()).name):
        call = {"service": "TaskService", "method": "GetTask"}
        scrape = until(daemon, 3, "finetuned_grpc_calls_total", code="NOT_FOUND", **call)
        scrape = until(daemon, 1, "finetuned_open_streams")
    assert scrape.number("finetuned_grpc_call_duration_seconds_count", **call) >= 3
    assert scrape.number("finetuned_limit_used", limit="tasks") >= 1
    assert {each["limit"] for each in scrape.labels("finetuned_limit")} == set(BY_NAME)
    assert scrape.number("finetuned_database_size_bytes", file="database") >= 4096
    assert scrape.number("finetuned_device_memory_total_bytes", device="cpu") > 1 << 28
    assert not scrape.labels("finetuned_last_backup_timestamp_seconds"), "there is none yet"
    assert scrape.labels("finetuned_build_info")
    if sys.platform == "linux":
        assert scrape.number("process_resident_memory_bytes") > 1 << 24


def test_odd_names_stand_as_they_are(daemon: Daemon, scene: Scene) -> None:
    """A display name may hold what the format itself uses."""
    name = 'one "odd" \\ name {x="1"} 名'
    task = daemon.create(scene.play(gated=True))
    task.display_name = name
    daemon.tasks.UpdateTask(task_service_pb2.UpdateTaskRequest(task=task))
    daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=task.name))
    eventually(
        lambda: [i for i in Scrape(daemon).labels("finetuned_run_info") if i["task"] == task.name],
        "it runs",
    )
    assert name in [i["display_name"] for i in Scrape(daemon).labels("finetuned_run_info")]
    stop(daemon, task.name, discard=True)
    daemon.wait(task.name, "STOPPED")


@pytest.mark.parametrize(
    ("path", "method", "headers", "status"),
    [
        ("/metrics?x=1", "GET", {"Host": "localhost:9464"}, 200),
        ("/metrics", "GET", {"Host": "[::1]"}, 200),
        ("/", "GET", {}, 404),
        ("/metrics/", "GET", {}, 404),
        ("/metrics", "POST", {}, 405),
        ("/metrics", "GET", {"Host": "evil.example"}, 403),
        ("/metrics", "GET", {"Host": "evil.example:9464"}, 403),
        ("/metrics", "GET", {"Origin": "http://evil.example"}, 403),
        ("/metrics", "GET", {"Sec-Fetch-Site": "cross-site"}, 403),
    ],
)
def test_one_path_for_scrapers_of_this_machine_and_no_page(
    daemon: Daemon, path: str, method: str, headers: dict[str, str], status: int
) -> None:
    found, _, body = ask(daemon, path, method, **headers)
    assert found == status
    assert ("finetuned_tasks" in body) is (status == 200)


@pytest.mark.parametrize(("path", "status"), [("/metrics", 200), ("/", 404)])
def test_head_is_answered_without_a_body(daemon: Daemon, path: str, status: int) -> None:
    with socket.create_connection(("127.0.0.1", port(daemon)), timeout=20) as one:
        one.sendall(f"HEAD {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        head, _, body = one.makefile("rb").read().partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    assert re.search(rb"\r\nContent-Length: [1-9]", head)
    assert not body


def test_who_holds_all_places_keeps_no_scraper_out(daemon: Daemon) -> None:
    """One more has the place of the one that has kept the daemon waiting longest."""
    address = ("127.0.0.1", port(daemon))
    silent = [socket.create_connection(address) for _ in range(32)]
    for _ in range(3):
        assert ask(daemon)[0] == 200
    assert _is_closed(silent[0]), "the oldest made room"
    assert not _is_closed(silent[-1]), "no more than had to"
    for one in silent:
        one.close()


def test_a_scraper_that_does_not_read_or_does_not_ask_disturbs_nobody(
    daemon: Daemon, scene: Scene
) -> None:
    """It holds a place, of which there are 32, for seconds; calls are answered meanwhile."""
    address = ("127.0.0.1", port(daemon))
    silent = [socket.create_connection(address) for _ in range(4)]
    deaf = [socket.create_connection(address) for _ in range(3)]
    for one in deaf:
        one.sendall(b"GET /metrics HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert Scrape(daemon).value("finetuned_open_streams") == 0
    assert daemon.create(scene.parameters()).name
    crowd = [socket.create_connection(address) for _ in range(60)]
    eventually(lambda: _answers(daemon), "who asks is answered")
    closed = [one for one in crowd[:20] if _is_closed(one)]
    assert len(closed) == 20, "beyond 32 the oldest are turned out"
    for one in (*silent, *deaf, *crowd):
        one.close()
    eventually(lambda: _answers(daemon), "the places are free again")
    garbage = socket.create_connection(address)
    garbage.sendall(b"\x16\x03\x01" + b"\xff" * 20_000)
    assert _is_closed(garbage)
    garbage.close()


def _is_closed(connection: socket.socket) -> bool:
    connection.settimeout(0.5)
    try:
        return connection.recv(1) == b""
    except TimeoutError:
        return False
    except ConnectionError:
        return True


def _answers(daemon: Daemon) -> bool:
    try:
        return ask(daemon)[0] == 200
    except (ConnectionError, http.client.HTTPException):
        return False


def serve(tmp_path: Path, address: str, python_path: str = "") -> tuple[int, str]:
    """Exit status and what was said of a daemon that does not start."""
    folders = ("--state-dir", str(tmp_path / "state"), "--runtime-dir", str(tmp_path / "run"))
    result = run(
        [
            *(sys.executable, "-m", "finetuned_daemon.main", "serve"),
            *(*folders, "--prometheus", address),
        ],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={"PYTHONPATH": python_path, "PATH": "/usr/bin:/bin"},
    )
    return result.returncode, result.stderr


@pytest.mark.parametrize("address", ["0.0.0.0:9464", "192.168.1.20:9464", "[::]:9464"])
def test_other_machines_are_never_served(tmp_path: Path, address: str) -> None:
    status, said = serve(tmp_path, address)
    assert status == 2
    assert "reverse proxy" in said
    assert not (tmp_path / "state").exists()


def test_an_address_that_is_taken_is_said(daemon: Daemon, tmp_path: Path) -> None:
    status, said = serve(tmp_path, f"127.0.0.1:{port(daemon)}")
    assert status == 1
    assert "can't serve metrics on 127.0.0.1" in said
    assert "Traceback" not in said


def test_without_its_package_the_start_says_how_to_get_it(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\nsys.modules['prometheus_client'] = None\n"
    )
    status, said = serve(tmp_path, "127.0.0.1:0", str(tmp_path))
    assert status == 1
    assert f"{sys.executable} -m pip install 'finetuned[prometheus]'" in said
    assert "Traceback" not in said


def test_a_daemon_that_is_not_asked_to_serves_none(tmp_path: Path) -> None:
    other = Daemon(tmp_path).start()
    try:
        assert "metrics on" not in other.log.read_text()
    finally:
        other.close()

"""The benchmark of growth asks for everything, of a history that is a whole one."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import system_service_pb2, task_service_pb2
from finetuned_daemon.store import integrity

BENCH = Path(__file__).parent / "bench"


@pytest.fixture(autouse=True)
def bench_is_importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its modules name one another as scripts do."""
    monkeypatch.setattr(sys, "path", [str(BENCH), *sys.path])


def test_every_rpc_is_measured() -> None:
    """A new one can't be forgotten."""
    import growth

    assert growth.asked() == growth.rpcs()


def test_a_history_is_what_a_daemon_serves(tmp_path: Path, scene: Scene) -> None:
    """Whole to every check of ours, with as much as was asked for, in a spread of states."""
    import history

    daemon = Daemon(tmp_path)
    path = daemon.paths.state_dir / "finetuned.db"
    size = history.Size(tasks=60, events=4000, long_tasks=0, templates=5)
    history.write(path, size, scene.model, scene.data)
    with contextlib.closing(integrity.open_read_only(path)) as connection:
        assert integrity.check(connection, thorough=True) == integrity.Verdict()
        (events,) = connection.execute("SELECT count(*) FROM events").fetchone()
        assert events == pytest.approx(size.events, rel=0.2)
    try:
        daemon.start()
        listed = task_service_pb2.ListTasksRequest(page_size=1000)
        tasks = daemon.tasks.ListTasks(listed).tasks
        assert len(tasks) == size.tasks
        assert len({task.state for task in tasks}) == 4
        request = task_service_pb2.GetMetricsRequest(name=f"tasks/{history.PROBE}")
        assert {one.metric for one in daemon.tasks.GetMetrics(request).series} >= {"loss"}
        task = daemon.create(scene.play(), start=True)
        daemon.wait(task.name, "COMPLETED")
        assert daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest()).pid
    finally:
        daemon.close()

"""The daemon that hostile requests are sent to: real, with tasks that stand still."""

from __future__ import annotations

import hashlib
import os
import sqlite3
import time
from pathlib import Path

import grpc
import psutil

from conftest import Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import (
    parameters_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)

HELD = "tasks/held"
"""Is in the middle of a run, and stays there."""
IDLE = "tasks/idle"
"""Has run, and has a checkpoint; it could be started."""
BARE = "tasks/bare"
"""Names neither data nor model."""
TEMPLATE = "templates/custom"

_QUIET_SECONDS = 0.05
_LEAVING = "SELECT 1 FROM runs WHERE state = 'RUNNING' AND (stop IS NOT NULL OR pause IS NOT NULL)"
"""A run that was told to end, and is about to."""
_UNDER_WAY = ("QUEUED", "RUNNING")
_COMPLAINTS = ("Traceback", "Exception", "CRITICAL", "ERROR", '"level": "error"')
_MOST_TASKS = 40
_PASSING = (".tmp", "-wal", "-shm", "-journal", ".log")
"""Ends of the names of files that come and go on their own."""
_ALIVE = ("heartbeat", "console.log", "events.jsonl", "process.json", "result.json")
"""Files of a run folder that its runner writes."""


class Victim:
    """A daemon, what it owns, and a hand to put it back in order."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.scene = Scene(root / "scene")
        self.daemon = Daemon(root)
        self.daemon.start()
        self.restarts = 0
        self._reader: sqlite3.Connection | None = None
        self._make()

    def close(self) -> None:
        """Ends the daemon and all runners."""
        if self._reader is not None:
            self._reader.close()
        self.daemon.close()
        self.scene.close()

    # --- what there is

    def _make(self) -> None:
        parameters = self.scene.play(steps=2, save_steps=1)
        self.daemon.create(parameters, start=True, task_id="idle")
        self.daemon.wait(IDLE, "COMPLETED")
        self.daemon.create(parameters_pb2.Parameters(), task_id="bare")
        self._make_template()
        self.daemon.create(self.scene.play(gated=True, steps=1000), start=True, task_id="held")
        self.daemon.wait(HELD, "RUNNING")
        # A runner that is on its way still writes events.
        with self.daemon.watch(HELD) as watch:
            watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)

    def _make_template(self) -> None:
        template = template_service_pb2.Template(
            display_name="custom", training_type=task_pb2.TRAINING_TYPE_SFT
        )
        request = template_service_pb2.CreateTemplateRequest(
            template=template, template_id="custom"
        )
        self.daemon.templates.CreateTemplate(request, timeout=30)

    def names(self) -> list[str]:
        """Names of all that there is."""
        found = [f"tasks/{row[0]}" for row in self.query("SELECT task_id FROM tasks")]
        return [*found, TEMPLATE, "templates/sft", f"{IDLE}/runs/1", f"{IDLE}/runs/1/checkpoints/1"]

    # --- what is written

    def query(self, sql: str) -> list[tuple[object, ...]]:
        """Rows, through a connection that can't write."""
        if self._reader is None:
            path = self.daemon.paths.state_dir / "finetuned.db"
            self._reader = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        return self._reader.execute(sql).fetchall()

    def commits(self) -> object:
        """Changes with every commit of the daemon."""
        return self.query("PRAGMA data_version")[0][0]

    def content(self) -> dict[str, str]:
        """Digests of all rows, by table."""
        found = dict[str, str]()
        for (table,) in self.query("SELECT name FROM sqlite_master WHERE type = 'table'"):
            digest = hashlib.sha256()
            for row in self.query(f'SELECT * FROM "{table}" ORDER BY 1, 2'):
                digest.update(repr(row).encode())
            found[str(table)] = digest.hexdigest()
        return found

    def listing(self) -> list[tuple[str, int, int]]:
        """Everything in the state folder and around the outputs: name, mode, size."""
        found = list[tuple[str, int, int]]()
        for top in (self.daemon.paths.state_dir, self.scene.root):
            for folder, names, files in os.walk(top):
                names[:] = [n for n in names if n not in ("__pycache__", "logs", "backups")]
                for name in [*names, *files]:
                    if name.endswith(_PASSING) or name.startswith("."):
                        continue
                    path = os.path.join(folder, name)  # noqa: PTH118 - thousands of times
                    status = os.lstat(path)
                    alive = name in _ALIVE or name.startswith("finetuned.db")
                    is_file = name in files and not alive
                    found.append((path, status.st_mode, status.st_size if is_file else 0))
        return sorted(found)

    def memory(self) -> int:
        """Resident bytes of the daemon."""
        assert self.daemon.process is not None
        return int(psutil.Process(self.daemon.process.pid).memory_info().rss)

    # --- back in order

    def is_up(self) -> bool:
        """Whether the daemon process lives."""
        assert self.daemon.process is not None
        return self.daemon.process.poll() is None

    def mend(self) -> bool:
        """Puts back what a request has changed; whether there was anything."""
        if not self.is_up() or self._is_ending():
            assert self.daemon.process is not None
            self.daemon.process.wait(30)
            self.daemon.kill()
            self.daemon.start()
            self.restarts += 1
        states = {f"tasks/{i}": str(s) for i, s in self.query("SELECT task_id, state FROM tasks")}
        under_way = {name for name, state in states.items() if state in _UNDER_WAY}
        if under_way == {HELD} and states[HELD] == "RUNNING" and self._is_whole(states):
            return False
        for name in sorted(under_way - {HELD}):
            self._stop(name)
        for name in states:
            if name not in (HELD, IDLE, BARE) and len(states) > _MOST_TASKS:
                self._delete(name)
        self._restore(states)
        return True

    def _is_whole(self, states: dict[str, str]) -> bool:
        templates = {row[0] for row in self.query("SELECT template_id FROM templates")}
        wanted = {HELD, IDLE, BARE} <= set(states) and "custom" in templates
        return wanted and len(states) <= _MOST_TASKS

    def _restore(self, states: dict[str, str]) -> None:
        if BARE not in states:
            self.daemon.create(parameters_pb2.Parameters(), task_id="bare")
        if IDLE not in states:
            self.daemon.create(self.scene.parameters(), task_id="idle")
        if not any(row[0] == "custom" for row in self.query("SELECT template_id FROM templates")):
            self._make_template()
        if states.get(HELD) == "RUNNING":
            return
        if states.get(HELD) not in (None, "RUNNING"):
            self._stop(HELD)
            self._delete(HELD)
        self.daemon.create(self.scene.play(gated=True, steps=1000), start=True, task_id="held")
        self.daemon.wait(HELD, "RUNNING")
        with self.daemon.watch(HELD) as watch:
            watch.until(lambda e: e.phase_change.phase == task_pb2.RUN_PHASE_TRAINING)

    def _stop(self, name: str) -> None:
        try:
            self.daemon.tasks.StopTask(
                task_service_pb2.StopTaskRequest(name=name, discard=True), timeout=30
            )
        except grpc.RpcError as error:
            if error.code() not in (
                grpc.StatusCode.FAILED_PRECONDITION,
                grpc.StatusCode.NOT_FOUND,
            ):
                raise
            return
        self.daemon.wait(name, "STOPPED", "COMPLETED", "FAILED")

    def _delete(self, name: str) -> None:
        try:
            self.daemon.tasks.DeleteTask(
                task_service_pb2.DeleteTaskRequest(name=name, allow_missing=True), timeout=30
            )
        except grpc.RpcError as error:
            if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                raise

    def _is_ending(self) -> bool:
        """Whether it was told to shut down."""
        try:
            self.daemon.system.GetQuota(system_service_pb2.GetQuotaRequest(), timeout=10)
        except grpc.RpcError as error:
            return error.code() is grpc.StatusCode.UNAVAILABLE
        return False

    def settle(self) -> None:
        """Waits until nothing is under way but what is held, and all is in order again."""

        def is_quiet() -> bool:
            if not self.is_up() or self._is_ending():
                return True
            before = self.commits()
            time.sleep(_QUIET_SECONDS)
            return self.commits() == before and not self.query(_LEAVING)

        eventually(is_quiet, "the daemon writes no more")
        while self.mend():
            eventually(is_quiet, "the daemon writes no more")

    def answers(self) -> None:
        """Raises where the daemon does not answer somebody else."""
        request = task_service_pb2.GetTaskRequest(name=HELD)
        with grpc.insecure_channel(
            self.daemon.address, options=[("grpc.use_local_subchannel_pool", 1)]
        ) as channel:
            call = channel.unary_unary(
                "/finetuned.v1.TaskService/GetTask",
                request_serializer=task_service_pb2.GetTaskRequest.SerializeToString,
                response_deserializer=task_service_pb2.GetTaskResponse.FromString,
            )
            assert call(request, timeout=30).task.name == HELD

    def complaints(self) -> list[str]:
        """Lines of the daemon's log and output that tell of an exception."""
        told = list[str]()
        state = self.daemon.paths.state_dir
        logs = [self.daemon.log, *state.glob("*.log"), *state.glob("logs/*")]
        for log in logs:
            for line in log.read_text("utf-8", "replace").splitlines():
                if any(sign in line for sign in _COMPLAINTS):
                    told.append(line)
        return told

"""Databases of every earlier version come up to date, whole, whenever it is cut short.

`tests/data/databases` holds dumps of databases that daemons of those versions made, with what they
said of them over the API. Schemas 3, 5 and 6 were never the newest of any version; the dump of
schema 3 is that of schema 2, migrated.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import json_format

from conftest import REPOSITORY, Scene
from daemon_process import Daemon, eventually
from finetuned.v1 import system_service_pb2, task_service_pb2, template_service_pb2

DATABASES = REPOSITORY / "tests/data/databases"
MIGRATIONS = REPOSITORY / "daemon/finetuned_daemon/store/migrations"
NEWEST = max(int(path.name.split("_")[0]) for path in MIGRATIONS.glob("*.sql"))
VERSIONS = (1, 2, 3, 4, 7, 8)

# Each child is killed before one more statement than the one before it.
SWEEP = """
import json, os, shutil, signal, sqlite3, sys
from pathlib import Path
from finetuned_daemon.store.database import Database

source, work = Path(sys.argv[1]), Path(sys.argv[2])
connect = sqlite3.connect
outcomes = []
while not outcomes or outcomes[-1] != "done":
    left = len(outcomes)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir()
    shutil.copy(source, work / "finetuned.db")

    def count(statement):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def counting(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.set_trace_callback(count)
        return connection

    child = os.fork()
    if not child:
        sqlite3.connect = counting
        Database(work / "finetuned.db", backups=work / "backups").close()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    with_log = connect(work / "finetuned.db")
    version = with_log.execute("PRAGMA user_version").fetchone()[0]
    assert with_log.execute("PRAGMA integrity_check").fetchone()[0] == "ok"
    with_log.close()
    Database(work / "finetuned.db", backups=work / "backups").close()
    again = connect(work / "finetuned.db")
    rows = [
        again.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
        for table in ("tasks", "runs", "events")
    ]
    again.close()
    outcomes.append("done" if not status else [version, rows])
print(json.dumps(outcomes))
"""


def load(version: int, path: Path) -> None:
    """Makes a database of an earlier version, as it was."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript((DATABASES / f"schema-{version}.sql").read_text("utf-8"))
        connection.execute("PRAGMA journal_mode = WAL")
    path.chmod(0o600)


def said_then(version: int) -> Any:
    """What the daemon of that version said of its database."""
    return json.loads((DATABASES / f"schema-{2 if version == 3 else version}.json").read_text())


def is_part(old: Any, new: Any) -> bool:
    """Whether all that was said then is said now; more may be."""
    if isinstance(old, dict):
        return all(key in new and is_part(value, new[key]) for key, value in old.items())
    if isinstance(old, list):
        return len(old) == len(new) and all(map(is_part, old, new))
    return bool(old == new)


def said(message: Any) -> Any:
    """A message as it was written down then."""
    return json_format.MessageToDict(message, preserving_proto_field_name=True)


@pytest.mark.parametrize("version", VERSIONS)
def test_a_database_of_an_earlier_version_is_all_there(
    tmp_path: Path, scene: Scene, version: int
) -> None:
    """Tasks, runs, events, templates and the quota, over the API; and work goes on."""
    daemon = Daemon(tmp_path, "--training-quota", "50")
    load(version, daemon.paths.state_dir / "finetuned.db")
    try:
        daemon.start()
        then = said_then(version)
        request = task_service_pb2.ListTasksRequest(page_size=100)
        tasks = list(daemon.tasks.ListTasks(request).tasks)
        assert [task.name for task in tasks] == [old["task"]["name"] for old in then["tasks"]]
        for old, task in zip(then["tasks"], tasks, strict=True):
            assert is_part(old["task"], said(task))
            runs = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
            assert is_part(old["runs"], [said(run) for run in runs])
            assert is_part(old["events"], [said(event) for event in daemon.events(task.name)])
        templates = daemon.templates.ListTemplates(template_service_pb2.ListTemplatesRequest())
        by_name = {template.name: said(template) for template in templates.templates}
        for old in then["templates"]:
            if "create_time" in old:  # the others stand in the code
                assert is_part(old, by_name[old["name"]])
        quota = daemon.system.GetQuota(system_service_pb2.GetQuotaRequest())
        assert quota.used == then.get("quota_used", 0)

        (backup,) = (daemon.paths.state_dir / "backups").iterdir()
        assert backup.name.endswith(f"-schema-{version}-migration.db")
        info = daemon.system.GetSystemInfo(system_service_pb2.GetSystemInfoRequest())
        assert info.schema_version == NEWEST
        task = daemon.create(scene.play(), start=True)
        daemon.wait(task.name, "COMPLETED")
    finally:
        daemon.close()


def test_a_kill_at_any_statement_leaves_a_version_from_which_it_goes_on(tmp_path: Path) -> None:
    """The one before or one after, never something between; and no row is lost."""
    load(1, tmp_path / "source.db")
    with contextlib.closing(sqlite3.connect(tmp_path / "source.db")) as connection:
        expected = [
            connection.execute(f"SELECT count(*) FROM {table}").fetchone()[0]
            for table in ("tasks", "runs", "events")
        ]
    swept = subprocess.run(
        [sys.executable, "-c", SWEEP, str(tmp_path / "source.db"), str(tmp_path / "work")],
        stdout=subprocess.PIPE,
        check=True,
    )
    *killed, last = json.loads(swept.stdout)
    assert last == "done"
    versions = [version for version, _ in killed]
    assert versions == sorted(versions)
    assert set(versions) == set(range(1, NEWEST + 1)), "every version was left once"
    assert [rows for _, rows in killed] == [expected] * len(killed)


def test_a_migration_without_room_for_its_backup_changes_nothing(tmp_path: Path) -> None:
    """It says what is missing, and goes through once there is room."""
    source = tmp_path / "source.db"
    load(4, source)
    with contextlib.closing(sqlite3.connect(source)) as connection:
        # Of a size for which the small disk has room once, and not twice.
        connection.execute("CREATE TABLE filler AS SELECT zeroblob(15000000) AS bytes")
        connection.commit()
    script = """
        set -e
        umask 077
        cd "$1"
        mount -t tmpfs -o size=40m tmpfs small
        chmod 700 small
        cp source.db small/finetuned.db
        sha256sum < small/finetuned.db
        status=0
        "$2" -m finetuned_daemon.main serve --state-dir small --runtime-dir run || status=$?
        echo "status $status"
        sha256sum < small/finetuned.db
        find small/backups -type f
    """
    (tmp_path / "small").mkdir(mode=0o700)
    if any(shutil.which(tool) is None for tool in ("unshare", "bash", "mount")):
        pytest.skip("needs unshare, bash and mount, for a disk that is small")
    result = subprocess.run(
        ["unshare", "-Urm", "bash", "-c", script, "bash", str(tmp_path), sys.executable],
        capture_output=True,
        text=True,
        check=False,
    )
    if "unshare" in result.stderr or "mount:" in result.stderr:
        pytest.skip("no disk can be made small here")
    before, status, after, *backups = result.stdout.splitlines()
    assert status == "status 1"
    assert "too little room on the disk" in result.stderr
    assert "nothing was changed" in result.stderr
    assert before == after
    assert backups == []


def test_a_backup_that_fails_is_tried_again_and_disturbs_nobody(
    tmp_path: Path, scene: Scene
) -> None:
    """The daemon serves on; the log says why there is none."""
    daemon = Daemon(tmp_path, "--backup-hours", str(0.2 / 3600))
    daemon.paths.state_dir.mkdir(mode=0o700)
    (daemon.paths.state_dir / "backups").write_text("a file in the place of the folder")
    (daemon.paths.state_dir / "backups").chmod(0o600)
    try:
        daemon.start()
        task = daemon.create(scene.play(), start=True)
        eventually(lambda: "it is tried again" in daemon.log.read_text(), "the failure is logged")
        daemon.wait(task.name, "COMPLETED")
        (daemon.paths.state_dir / "backups").unlink()
        eventually(
            lambda: list((daemon.paths.state_dir / "backups").glob("finetuned-*")), "a backup"
        )
    finally:
        daemon.close()

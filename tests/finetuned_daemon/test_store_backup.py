"""Backups and the files of a database: whole or not there, bounded, never in the way."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest

from finetuned_daemon.store import backup, integrity
from finetuned_daemon.store.backup import BackupFailed, Cause
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.files import file_system_of, parse_mountinfo, set_aside


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return Database(tmp_path / "x.db")


def test_a_backup_holds_what_is_only_in_the_log_yet(database: Database, tmp_path: Path) -> None:
    """A copy of the file alone would not."""
    with database.transaction(durable=True) as connection:
        connection.execute("INSERT INTO meta VALUES ('marked', 'yes')")
    made = backup.make(database.path, tmp_path / "to", Cause.DAILY)
    with contextlib.closing(integrity.open_read_only(made.path, immutable=True)) as copy:
        assert copy.execute("SELECT value FROM meta WHERE key = 'marked'").fetchone()[0] == "yes"
    assert made.path.stat().st_mode & 0o077 == 0
    assert list((tmp_path / "to").iterdir()) == [made.path]


def test_the_oldest_of_a_cause_go_once_there_is_a_newer_one(
    database: Database, tmp_path: Path
) -> None:
    """Those of other causes stay."""
    folder = tmp_path / "to"
    manual = backup.make(database.path, folder, Cause.MANUAL)
    made = [backup.make(database.path, folder, Cause.DAILY, keep=2) for _ in range(3)]
    assert backup.backups(folder) == [made[2], made[1], manual]


def test_of_a_backup_that_is_cut_short_nothing_stays(database: Database, tmp_path: Path) -> None:
    """Neither of one that is cancelled, nor, after the next, of one that was killed."""
    folder = tmp_path / "to"
    with pytest.raises(BackupFailed, match="cancelled"):
        backup.make(database.path, folder, Cause.DAILY, is_cancelled=lambda: True)
    assert list(folder.iterdir()) == []
    left = folder / ".finetuned-20260101T000000000000Z-schema-1-daily.db"
    left.write_bytes(b"half")
    assert backup.backups(folder) == []
    made = backup.make(database.path, folder, Cause.DAILY)
    assert list(folder.iterdir()) == [made.path]


def test_the_newest_whole_backup_is_not_always_the_newest(
    database: Database, tmp_path: Path
) -> None:
    """One that is damaged by now is passed over; so is a file that is no database of ours."""
    old = backup.make(database.path, tmp_path, Cause.DAILY)
    new = backup.make(database.path, tmp_path, Cause.DAILY)
    assert backup.newest_whole(tmp_path) == new
    new.path.write_bytes(new.path.read_bytes()[:5000])
    assert backup.newest_whole(tmp_path) == old
    with contextlib.closing(sqlite3.connect(tmp_path / "other.db")) as other:
        other.execute("CREATE TABLE x (y)")
    assert integrity.check_file(tmp_path / "other.db").problems


def test_a_check_that_runs_out_of_time_says_so(database: Database) -> None:
    with database.transaction(durable=True) as connection:
        connection.executemany(
            "INSERT INTO meta VALUES (?, ?)", [(f"{n}", "x" * 100) for n in range(20_000)]
        )
    with contextlib.closing(integrity.open_read_only(database.path)) as connection:
        assert not integrity.check(
            connection, thorough=True, budget=integrity.Budget(0)
        ).is_complete
        assert integrity.check(connection, thorough=True) == integrity.Verdict()


def test_a_database_is_set_aside_with_its_log(database: Database, tmp_path: Path) -> None:
    with database.transaction(durable=True) as connection:
        connection.execute("INSERT INTO meta VALUES ('marked', 'yes')")
    names = [path.name for path in set_aside(database.path, "now")]
    assert names == ["x-now.db", "x-now.db-wal", "x-now.db-shm"]
    assert not list(tmp_path.glob("x.db*"))
    aside = Database(tmp_path / "set-aside" / "x-now.db")
    assert aside.query("SELECT value FROM meta WHERE key = 'marked'")[0][0] == "yes"


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/home/u/.local/state", "ext4"),
        ("/net/my share/finetuned", "nfs4"),
        ("/network", "ext4"),
        ("/net/my share/local/x", "tmpfs"),
        ("/mnt/twice/x", "fuse.sshfs"),
    ],
)
def test_the_file_system_of_a_folder_is_that_of_the_mount_nearest_to_it(
    path: str, kind: str
) -> None:
    mounts = parse_mountinfo(
        "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "40 22 0:40 / /net/my\\040share rw - nfs4 server:/x rw,vers=4.2\n"
        "41 40 0:41 / /net/my\\040share/local rw shared:3 master:2 - tmpfs tmpfs rw\n"
        "42 22 0:42 / /mnt/twice rw - ext4 /dev/sdb1 rw\n"
        "43 42 0:43 / /mnt/twice rw - fuse.sshfs u@h: rw\n"
    )
    assert file_system_of(Path(path), mounts) == kind

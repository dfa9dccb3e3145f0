"""What must be one user's alone: modes, owners and access lists."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path

import pytest

from finetuned._paths import paths
from finetuned_daemon.config import Config
from finetuned_daemon.instance import Instance
from finetuned_daemon.privacy import FolderUnsafe, check_private, make_private

NOBODY = 65534
USER_OBJ, USER, GROUP_OBJ, MASK, OTHER = 0x01, 0x02, 0x04, 0x10, 0x20
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def give(path: Path, attribute: str, permissions: int, who: int = NOBODY) -> None:
    """Lets a named user at a file or folder, as `setfacl -m u:NAME:...` does."""
    none = 0xFFFFFFFF
    entries = (
        *((USER_OBJ, 7, none), (USER, permissions, who), (GROUP_OBJ, 0, none)),
        *((MASK, permissions, none), (OTHER, 0, none)),
    )
    data = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    try:
        os.setxattr(path, attribute, data)
    except OSError as error:
        if error.errno == errno.ENOTSUP:
            pytest.skip("this file system has no access lists")
        raise


@pytest.fixture
def config(tmp_path: Path) -> Config:
    tmp_path.chmod(0o700)
    return Config(paths=paths(tmp_path / "state", tmp_path / "run"))


def take(config: Config) -> None:
    """As `finetuned serve` does."""
    Instance(config.paths, config.private).close()


def test_a_folder_of_ones_own_is_taken_again(config: Config) -> None:
    take(config)
    take(config)


@pytest.mark.parametrize(
    ("name", "mode", "remedy"),
    [
        *(("finetuned.db", mode, "600") for mode in (0o640, 0o604, 0o622)),
        *((f"finetuned.db-{side}", 0o644, "600") for side in ("wal", "shm")),
        *((name, mode, "700") for name in ("runs", "backups") for mode in (0o755, 0o701)),
    ],
)
def test_what_is_too_open_is_refused_with_the_remedy(
    config: Config, name: str, mode: int, remedy: str
) -> None:
    """At every start, and the command that is named helps."""
    take(config)
    path = config.paths.state_dir / name
    path.mkdir() if remedy == "700" else path.touch()
    path.chmod(mode)
    with pytest.raises(FolderUnsafe, match=f"run: chmod {remedy} {path}"):
        take(config)
    path.chmod(int(remedy, 8))
    take(config)


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give files away")
def test_what_is_another_users_is_refused(config: Config) -> None:
    take(config)
    path = config.database
    path.touch(0o600)
    os.chown(path, NOBODY, NOBODY)
    with pytest.raises(FolderUnsafe, match="belongs to another user"):
        take(config)


def test_an_access_list_that_opens_a_folder_is_refused_with_the_remedy(config: Config) -> None:
    """Its mode shows the most that the list gives, and the remedy takes the list away."""
    take(config)
    give(config.paths.state_dir, ACCESS, 0o5)
    with pytest.raises(FolderUnsafe, match=f"setfacl -b {config.paths.state_dir} && chmod 700"):
        take(config)
    os.removexattr(config.paths.state_dir, ACCESS)
    config.paths.state_dir.chmod(0o700)
    take(config)


def test_an_access_list_for_new_files_is_refused(config: Config) -> None:
    """Whatever the umask, what is made in such a folder is open to whom the list names."""
    take(config)
    give(config.paths.state_dir, DEFAULT, 0o4)
    with pytest.raises(FolderUnsafe, match=f"setfacl -b -k {config.paths.state_dir}"):
        take(config)


def test_an_access_list_of_the_parent_does_not_reach_a_folder_of_our_making(
    config: Config, tmp_path: Path
) -> None:
    give(tmp_path, DEFAULT, 0o7)
    take(config)
    take(config)
    (config.paths.state_dir / "new").touch(0o666)
    assert not (config.paths.state_dir / "new").stat().st_mode & 0o020


def test_a_parent_that_a_named_user_can_write_is_refused(tmp_path: Path) -> None:
    """The bits of a group of one's own say nothing where an access list uses them."""
    parent = tmp_path / "home"
    parent.mkdir(mode=0o700)
    give(parent, ACCESS, 0o5)
    make_private(parent / "state")
    give(parent, ACCESS, 0o7)
    with pytest.raises(FolderUnsafe, match=f"through its access list.*setfacl -b {parent}"):
        make_private(parent / "state")


def test_an_access_list_that_names_nobody_else_is_no_trouble(tmp_path: Path) -> None:
    give(tmp_path, ACCESS, 0o7, who=os.getuid())
    tmp_path.chmod(0o700)
    check_private(tmp_path)
    make_private(tmp_path / "state")

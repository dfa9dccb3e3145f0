"""What must be one user's alone: folders and files, by owner, mode and access lists."""

from __future__ import annotations

import errno
import grp
import os
import pwd
import stat
import struct
from pathlib import Path

from finetuned._paths import RUNTIME_DIR_VARIABLE, STATE_DIR_VARIABLE
from finetuned_daemon.runs.contract import make_dirs, sync_dir

_OTHERS = 0o077

# Access lists as Linux keeps them: a version, then tag, permissions and id of each entry.
_ACCESS = "system.posix_acl_access"
_DEFAULT = "system.posix_acl_default"
_ACL_ENTRY = struct.Struct("<HHI")
_ACL_HEAD = 4
_USER, _GROUP_OF_FILE, _GROUP, _MASK, _OTHER = 0x02, 0x04, 0x08, 0x10, 0x20
_WRITE = 0o2


class FolderUnsafe(Exception):
    """A folder or file can be reached by others, or is not ours; the message has the remedy."""


def make_private(folder: Path) -> None:
    """Makes a folder for this user alone, or checks the one that is there.

    Raises:
        FolderUnsafe: Another user could read or replace what lies in it.
        OSError: It can't be made.
    """
    try:
        make_dirs(folder.parent, 0o700)
        try:
            folder.mkdir(mode=0o700)
        except FileExistsError:
            _refuse_planted_link(folder)
            if not folder.is_dir():
                raise
        else:
            _forget_inherited(folder)
            sync_dir(folder.parent)
    except (FileExistsError, NotADirectoryError) as error:
        raise FolderUnsafe(f"{folder} can't be a folder: there is a file in its place") from error
    _refuse_planted_link(folder)
    check_private(folder)
    _check_ancestors(folder)


def _refuse_planted_link(folder: Path) -> None:
    """A link of our own is a user's choice; somebody else's is an attack in a shared folder.

    It is looked at before it is followed, which Linux may refuse without saying why.
    """
    status = folder.lstat()
    if stat.S_ISLNK(status.st_mode) and status.st_uid != os.getuid():
        raise FolderUnsafe(f"{folder} is a link of another user's; remove it")


def check_private(path: Path, *, may_be_roots: bool = False, owner: int | None = None) -> None:
    """Checks that a file or folder is this user's alone; one that is not there is.

    Args:
        path: The file or folder; links are followed.
        may_be_roots: The system's administrator may own it.
        owner: Whose it must be; None: this user's.

    Raises:
        FolderUnsafe: Others can get at it.
    """
    try:
        status = path.stat()
    except FileNotFoundError:
        return
    owner = os.getuid() if owner is None else owner
    if status.st_uid != owner and not (may_be_roots and status.st_uid == 0):
        raise FolderUnsafe(f"{path} belongs to another user; move it away or choose another place")
    is_folder = stat.S_ISDIR(status.st_mode)
    if is_folder and _default_is_open(path):
        raise FolderUnsafe(
            f"{path} has an access list that opens new files in it to others; "
            f"run: setfacl -b -k {path}"
        )
    if status.st_mode & _OTHERS:
        remedy = f"chmod {'700' if is_folder else '600'} {path}"
        if _named(path, 0o7):
            remedy = f"setfacl -b {path} && {remedy}"
        raise FolderUnsafe(
            f"{path} has mode {stat.S_IMODE(status.st_mode):04o}, so others can get at "
            f"{'the daemon' if is_folder else 'what is in it'}; run: {remedy}"
        )


def _check_ancestors(folder: Path) -> None:
    """Whoever can write in a parent can put another folder in place of ours."""
    for parent in folder.resolve().parents:
        status = parent.stat()
        if status.st_uid not in (0, os.getuid()):
            raise FolderUnsafe(
                f"{parent} belongs to another user, so {folder} is not safe in it; choose another "
                f"folder by {STATE_DIR_VARIABLE} and {RUNTIME_DIR_VARIABLE}"
            )
        if status.st_mode & stat.S_ISVTX:  # there nobody can move what is not his
            continue
        # The bits of a group are also those that an access list gives at most, so a private group
        # says nothing where there is one.
        if _named(parent, _WRITE):
            raise FolderUnsafe(
                f"{parent} can be written by others through its access list, so {folder} is not "
                f"safe in it; run: setfacl -b {parent}"
            )
        if status.st_mode & (0o002 if _is_private_group(status.st_gid) else 0o022):
            raise FolderUnsafe(
                f"{parent} can be written by others, so {folder} is not safe in it; "
                f"run: chmod go-w {parent}"
            )


def _is_private_group(gid: int) -> bool:
    """Whether a group is its user's alone, as many distributions make one for each user."""
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(gid)
    except KeyError:
        return False
    return (
        gid == user.pw_gid
        and group.gr_name == user.pw_name
        and not set(group.gr_mem) - {user.pw_name}
    )


def _acl(path: Path, attribute: str) -> list[tuple[int, int, int]]:
    """Tag, permissions and id of each entry; empty where there is no access list."""
    if not hasattr(os, "getxattr"):
        return []
    try:
        data = os.getxattr(path, attribute)
    except OSError as error:
        if error.errno in (errno.ENODATA, errno.ENOTSUP):
            return []
        raise
    whole = (len(data) - _ACL_HEAD) // _ACL_ENTRY.size * _ACL_ENTRY.size
    return list(_ACL_ENTRY.iter_unpack(data[_ACL_HEAD : _ACL_HEAD + whole]))


def _named(path: Path, permissions: int) -> bool:
    """Whether an access list gives one of these permissions to somebody whom it names."""
    entries = _acl(path, _ACCESS)
    mask = next((given for tag, given, _ in entries if tag == _MASK), 0o7)
    return any(
        given & mask & permissions
        for tag, given, who in entries
        if (tag == _USER and who not in (0, os.getuid())) or tag == _GROUP
    )


def _default_is_open(folder: Path) -> bool:
    """Whether files made in it are open to others whatever the umask is."""
    return any(
        given
        for tag, given, _ in _acl(folder, _DEFAULT)
        if tag in (_USER, _GROUP_OF_FILE, _GROUP, _OTHER)
    )


def _forget_inherited(folder: Path) -> None:
    """Takes from a folder of our own making what its parent's access list has put on it."""
    for attribute in (_ACCESS, _DEFAULT):
        if _acl(folder, attribute):
            os.removexattr(folder, attribute)
    folder.chmod(0o700)

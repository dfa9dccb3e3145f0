"""Rules for a path alone: a file or folder that is there and can be read."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetuned._paths import Paths
from finetuned_daemon.errors import Violation
from finetuned_daemon.json_file import NotJson, read_json_file
from finetuned_daemon.texts import Text

_MOST_CHARACTERS = 4096
"""No system follows a longer path; to take one apart costs the square of its length."""


def check_path(field: str, text: str) -> list[Violation]:
    """An absolute path."""
    if len(text) > _MOST_CHARACTERS:
        sentence = Text(
            f"has {len(text):,} characters; a path may have {_MOST_CHARACTERS:,}",
            f"有 {len(text):,} 个字符；路径最多 {_MOST_CHARACTERS:,} 个",
        )
        return [Violation(field, sentence, "NOT_A_PATH")]
    if "\0" in text:
        return [Violation(field, Text("holds a NUL character", "含有 NUL 字符"), "NOT_A_PATH")]
    if not Path(text).is_absolute():
        sentence = Text(
            f"must be an absolute path, not {text!r}", f"必须是绝对路径，而不是 {text!r}"
        )
        return [Violation(field, sentence, "NOT_ABSOLUTE")]
    return []


def own_folders(paths: Paths) -> tuple[str, ...]:
    """The daemon's own folders, with no link in them."""
    return tuple(os.path.realpath(folder) for folder in (paths.state_dir, paths.runtime_dir))


def check_outside(field: str, text: str, own: Sequence[str]) -> list[Violation]:
    """A path that leads into none of the daemon's own folders, by whatever links."""
    if check_path(field, text):  # said by another check
        return []
    try:
        real = os.path.realpath(text)
    except OSError as error:  # a link of /proc that leads into somebody else's process
        return [unusable(field, text, error)]
    if not any(real == folder or real.startswith(f"{folder}{os.sep}") for folder in own):
        return []
    sentence = Text(
        f"{text} lies in a folder of the daemon's own, which holds its database and its token",
        f"{text} 位于守护进程自己的目录内，其中有数据库和令牌",
    )
    return [Violation(field, sentence, "IN_DAEMON_FOLDER")]


def check_file(field: str, text: str) -> list[Violation]:
    """A file that can be read."""
    found = check_path(field, text)
    if found:
        return found
    path = Path(text)
    try:
        if path.is_dir():
            sentence = Text(f"must be a file; {text} is a folder", f"必须是文件；{text} 是文件夹")
            return [Violation(field, sentence, "NOT_A_FILE")]
        if not path.exists():
            sentence = Text(f"there is no file {text}", f"文件 {text} 不存在")
            return [Violation(field, sentence, "FILE_NOT_FOUND")]
        if not path.is_file() or _is_of_the_kernel(text):
            sentence = Text(f"{text} is no ordinary file", f"{text} 不是普通文件")
            return [Violation(field, sentence, "NOT_A_FILE")]
    except OSError as error:  # a name too long, a loop of links
        return [unusable(field, text, error)]
    return _check_readable(field, path, os.R_OK)


def check_folder(field: str, text: str) -> list[Violation]:
    """A folder that can be read."""
    found = check_path(field, text)
    if found:
        return found
    path = Path(text)
    try:
        if not path.exists():
            sentence = Text(f"there is no folder {text}", f"文件夹 {text} 不存在")
            return [Violation(field, sentence, "FOLDER_NOT_FOUND")]
        if not path.is_dir():
            sentence = Text(f"must be a folder; {text} is a file", f"必须是文件夹；{text} 是文件")
            return [Violation(field, sentence, "NOT_A_FOLDER")]
    except OSError as error:
        return [unusable(field, text, error)]
    return _check_readable(field, path, os.R_OK | os.X_OK)


def _is_of_the_kernel(text: str) -> bool:
    """Whether a file is none of a disk: those of /proc tell secrets of processes."""
    return os.path.realpath(text).startswith(("/proc/", "/sys/"))


def _check_readable(field: str, path: Path, mode: int) -> list[Violation]:
    if os.access(path, mode):
        return []
    sentence = Text(f"{path} can't be read: no permission", f"无法读取 {path}：没有权限")
    return [Violation(field, sentence, "NOT_READABLE")]


def unusable(field: str, text: str, error: OSError) -> Violation:
    """A path that the system can't follow."""
    why = error.strerror or str(error)
    return Violation(
        field, Text(f"{text} can't be used: {why}", f"无法使用 {text}：{why}"), "NOT_A_PATH"
    )


def starts_with(path: Path, magic: bytes) -> bool:
    """Whether a file begins so."""
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def read_json(path: Path) -> Any:
    """The JSON in a file; None where there is none that can be read."""
    try:
        return read_json_file(path)
    except (OSError, NotJson):
        return None

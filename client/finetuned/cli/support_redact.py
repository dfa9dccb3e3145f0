"""What of a support bundle is replaced: names, paths, texts, secrets.

The same value gets the same replacement within one bundle, and another one in the next: nobody can
look a replacement up. What is not known to be harmless is left out.
"""

from __future__ import annotations

import getpass
import hashlib
import json
import platform
import re
import secrets
from pathlib import Path, PurePath
from typing import Any

_SECRET = re.compile(
    r"(?i)((?:authorization[\"']?\s*[:=,]\s*[\"']?)?bearer\s+"
    r"|authorization[\"']?\s*[:=,]\s*[\"']?(?!bearer)|\b\w*(?:token|secret|password|api_?key)"
    r"\w*[\"']?\s*[:=]\s*[\"']?)[^\s\"',;]{6,}"
    r"|\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{16,}"
    # Long random text, such as a token on its own.
    r"|(?<![\w/.-])(?=[\w-]*\d)(?=[\w-]*[A-Z])(?=[\w-]*[a-z])[\w-]{40,}(?![\w/.-])"
)
_URL = re.compile(r"\b[a-z][a-z0-9+.-]*://[^\s\"'<>)\]}]+")
_PATH = re.compile(r"(?<![\w.<~-])~?/(?:[^\s\"'`,:;()<>\[\]{}|]|(?<=\\) )+")
_WORD = re.compile(r"[A-Za-z0-9_.+-]{1,40}")
_LIBRARY = re.compile(r".*/(?:site-packages|dist-packages|lib/python\d[\d.]*)/")
_FRAME = re.compile(r'\s*File "(?P<file>[^"]+)", line (?P<line>\d+), in (?P<name>[\w<>.]+)')
_ERROR = re.compile(r"[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit|Warning)(?=:|$)")
_NAMES_A_THING = ("path", "file", "dir", "folder", "name", "checkpoint", "python", "text", "prompt")
_SHORTEST_NAME = 3


def _home() -> str:
    try:
        return str(Path.home())
    except RuntimeError:  # neither HOME nor a user of this number, as in a container
        return ""


def _user() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # this number has no name, as in a container
        return ""


class Redactor:
    """Replaces what is a user's own."""

    def __init__(self, *, with_names: bool) -> None:
        self._with_names = with_names
        self._salt = secrets.token_bytes(16)
        self._known: dict[str, str] = {}
        self._exact: re.Pattern[str] | None = None
        for value, word in ((_home(), "~"), (_user(), "USER"), (platform.node(), "HOST")):
            if len(value) >= _SHORTEST_NAME:
                self._learn(value, word)

    def name(self, value: str) -> str:
        """A display name, or an id that somebody may have chosen."""
        if not value or self._with_names:
            return self.text(value)
        known = self._known.get(value)
        if known is None:
            known = f"name-{self._digest(value)}"
            if len(value) >= _SHORTEST_NAME:
                self._learn(value, known)
        return known

    def task(self, value: str) -> str:
        """`tasks/{task_id}`."""
        prefix, slash, task_id = value.rpartition("/")
        return f"{prefix}{slash}{self.name(task_id)}"

    def path(self, value: str) -> str:
        """A path; what a library's file is called is kept."""
        if not value:
            return value
        if _LIBRARY.match(value):
            return _LIBRARY.sub("", value)
        if self._with_names:
            return self._replaced(value)
        known = self._known.get(value)
        if known is None:
            suffix = PurePath(value).suffix
            suffix = suffix if re.fullmatch(r"\.[a-z0-9]{1,12}", suffix) else ""
            known = f"path-{self._digest(value)}{suffix}"
            self._learn(value, known)
        return known

    def text(self, value: str) -> str:
        """A sentence of the daemon's: names and paths in it are replaced."""
        value = _SECRET.sub(lambda m: f"{m[1] or ''}[secret]", value)
        value = self._replaced(value)
        if self._with_names:
            return value
        value = _URL.sub("[address]", value)
        return _PATH.sub(lambda m: self.path(m[0].rstrip(".")), value)

    def value(self, field: str, value: Any) -> Any:
        """A value of a record, by the name of its field; texts that are no words are replaced."""
        if isinstance(value, dict):
            return {k: self.value(str(k), v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.value(field, item) for item in value]
        if not isinstance(value, str) or not value:
            return value
        if self._with_names:
            return self.text(value)
        if any(field.endswith(word) for word in _NAMES_A_THING) or not _WORD.fullmatch(value):
            return self.path(value)
        return self.text(value)

    def traceback(self, text: str) -> list[str]:
        """Where an error came from: files of programs, lines, functions and its kind; no values."""
        result = list[str]()
        for line in text.splitlines():
            frame = _FRAME.match(line)
            if frame is not None:
                file = self.path(frame["file"])
                result.append(f"{file}:{frame['line']} {frame['name']}")
            elif error := _ERROR.match(line):
                result.append(error[0])
        return result

    def json(self, value: Any) -> bytes:
        """A record as a file."""
        return json.dumps(value, indent=1, ensure_ascii=False).encode() + b"\n"

    def _replaced(self, value: str) -> str:
        if self._exact is None:
            names = sorted(self._known, key=len, reverse=True)
            self._exact = re.compile(rf"(?<!\w)(?:{'|'.join(map(re.escape, names))})(?!\w)")
        return self._exact.sub(lambda m: self._known[m[0]], value) if self._known else value

    def _learn(self, value: str, replacement: str) -> None:
        self._known[value] = replacement
        self._exact = None

    def _digest(self, value: str) -> str:
        return hashlib.sha256(self._salt + value.encode()).hexdigest()[:10]

"""Tokens of training data in a file, and the cache of such files by content.

Four bytes a token, whether it is learned included; nothing of it has to be in memory, processes
share it, and it can be read while it is written.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import struct
import tempfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt
import psutil

CACHE_BYTES = 8 << 30
"""Most bytes in the cache; what was not used for longest goes first."""

_FORMAT = 2
"""Goes into every key, as does the code that makes tokens: other code may make others."""
_CODE = ("chat_mask*.py", "encod*.py", "pieces.py", "../finetuned_daemon/dataset/*.py")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
_TOKENS = "tokens"
_INDEX = "index.npz"
_HASH, _LARGEST = "sha256", "largest"
_UNREADABLE = (OSError, ValueError, KeyError, EOFError, BadZipFile, struct.error, zlib.error)
"""What an index raises of which a loss of power has left a part."""
_NEW = ".new-"

_logger = logging.getLogger(__name__)

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]


@dataclass
class Index:
    """Where each sample stands among the tokens of a file, in the order of the data."""

    starts: Int64
    """First token; -1: not there yet."""
    lengths: Int32
    """Tokens, before they are cut."""
    first_learned: Int32
    """Place in the sample of the first learned token that can be predicted; -1: there is none."""
    lines: Int32
    """Line of the data file."""

    @classmethod
    def empty(cls, lines: Iterable[int]) -> Index:
        """An index of samples of which no token is there yet."""
        at = np.fromiter(lines, np.int32)
        absent = np.full(len(at), -1, np.int64)
        return cls(absent, np.zeros(len(at), np.int32), np.full(len(at), -1, np.int32), at)


class TokenStore:
    """A file of tokens: appended by one thread at a time, read by any thread or process."""

    def __init__(self, path: Path) -> None:
        """Opens a file, which is made if it isn't there. Raises OSError."""
        self.path = path
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        self.num_tokens = os.fstat(self._descriptor).st_size // 4

    def __getstate__(self) -> Path:
        return self.path

    def __setstate__(self, path: Path) -> None:
        self.__init__(path)  # type: ignore[misc]

    def append(self, data: bytes) -> int:
        """Adds tokens as `pack` gives them; returns the place of the first. Raises OSError."""
        start = self.num_tokens
        written = 0
        while written < len(data):
            written += os.pwrite(self._descriptor, data[written:], start * 4 + written)
        self.num_tokens += len(data) // 4
        return start

    def read(self, start: int, length: int) -> tuple[Int64, npt.NDArray[np.bool_]]:
        """Token ids of a stretch, and which are learned; each of shape (length)."""
        data = np.frombuffer(os.pread(self._descriptor, length * 4, start * 4), np.int32)
        learned = data < 0
        return np.where(learned, ~data, data).astype(np.int64), learned

    def close(self) -> None:
        """Closes the file."""
        os.close(self._descriptor)


def pack(tokens: list[int], learned: bytes | bytearray | None) -> bytes:
    """Tokens as the store keeps them: those that are learned inverted; None: all are."""
    ids = np.array(tokens, np.int32)
    if learned is None:
        return (~ids).tobytes()
    return np.where(np.frombuffer(learned, np.uint8).astype(bool), ~ids, ids).tobytes()


# --- the cache


class TokenCache:
    """Finished files of tokens, by what they were made of."""

    def __init__(self, folder: Path) -> None:
        """A cache in a folder, which is made if it isn't there. Raises OSError."""
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._folder = folder

    def key(self, data: str, tokenizer: Path, *, kind: str, max_samples: int) -> str:
        """What tokens depend on: the data, the tokenizer with its template, and how they are made.

        Args:
            data: SHA-256 of the data file.
            tokenizer: Folder of the tokenizer.
            kind: What is made of the data.
            max_samples: Samples of the file at most; 0: all.

        Raises:
            OSError: A file can't be read.
        """
        versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
        digest = hashlib.sha256(json.dumps([_FORMAT, kind, max_samples, *versions]).encode())
        for code in sorted(path for glob in _CODE for path in Path(__file__).parent.glob(glob)):
            digest.update(hashlib.sha256(code.read_bytes()).digest())
        digest.update(data.encode())
        for name in _TOKENIZER_FILES:
            path = tokenizer / name
            if path.is_file():
                digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def find(self, key: str) -> tuple[TokenStore, Index, int] | None:
        """The tokens of a key with the largest id among them, if they are there."""
        folder = self._folder / key
        try:
            # Opened here: numpy leaves a file open that it can't read.
            with (folder / _INDEX).open("rb") as file, np.load(file) as arrays:
                index = Index(**{name: arrays[name] for name in Index.__dataclass_fields__})
                digest, largest = bytes(arrays[_HASH]), int(arrays[_LARGEST])
            if _digest(folder / _TOKENS) != digest:
                raise ValueError("they are not what was written")
            store = TokenStore(folder / _TOKENS)
        except _UNREADABLE as error:
            if folder.exists():  # damaged: made anew, as if it weren't there
                _logger.warning("tokens in the cache can't be read (%s); they are made anew", error)
                shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)
        return store, index, largest

    def begin(self) -> TokenStore:
        """A new file of tokens, which `keep` gives its key. Raises OSError."""
        self._remove_orphans()
        prefix = f"{_NEW}{os.getpid()}-"
        return TokenStore(Path(tempfile.mkdtemp(prefix=prefix, dir=self._folder)) / _TOKENS)

    def _remove_orphans(self) -> None:
        """Removes what was begun by processes that are gone."""
        for folder in self._folder.glob(f"{_NEW}*"):
            owner = folder.name.removeprefix(_NEW).partition("-")[0]
            if not (owner.isdecimal() and psutil.pid_exists(int(owner))):
                shutil.rmtree(folder, ignore_errors=True)

    def keep(self, key: str, store: TokenStore, index: Index, largest: int) -> None:
        """Gives a finished file its key, and makes room."""
        made = store.path.parent
        try:
            digest = np.frombuffer(_digest(store.path), np.uint8)
            arrays: dict[str, Any] = vars(index) | {_HASH: digest, _LARGEST: np.array(largest)}
            np.savez(made / _INDEX, **arrays)
            os.replace(made, self._folder / key)
        except OSError as error:  # no room, or another run was faster: this one has its tokens
            _logger.info("the tokens are not kept: %s", error)
            return
        store.path = self._folder / key / _TOKENS
        self._make_room()

    @staticmethod
    def drop(store: TokenStore) -> None:
        """Removes a file that was begun and not kept; it can still be read where it is open."""
        if store.path.parent.name.startswith(_NEW):
            shutil.rmtree(store.path.parent, ignore_errors=True)

    def _make_room(self) -> None:
        entries = []
        for folder in self._folder.iterdir():
            if folder.name.startswith(_NEW):  # of a run that is at work
                continue
            with contextlib.suppress(OSError):  # another run removes it at this moment
                size = sum(path.stat().st_size for path in folder.iterdir())
                entries.append((folder.stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= CACHE_BYTES:
                return
            shutil.rmtree(folder, ignore_errors=True)
            total -= size


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()

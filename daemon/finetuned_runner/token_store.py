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
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import numpy.typing as npt

CACHE_BYTES = 8 << 30
"""Most bytes in the cache; what was not used for longest goes first."""

_FORMAT = 1
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
_SIZE = "num_tokens"

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

    def largest_token(self) -> int:
        """The largest token id; -1 if there is none."""
        largest = -1
        for start in range(0, self.num_tokens, 1 << 22):
            tokens, _ = self.read(start, min(1 << 22, self.num_tokens - start))
            largest = max(largest, int(tokens.max()))
        return largest

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

    def key(self, file: Path, tokenizer: Path, *, kind: str, max_samples: int) -> str:
        """What tokens depend on: the data, the tokenizer with its template, and how they are made.

        Raises OSError.
        """
        versions = [importlib.metadata.version(name) for name in ("tokenizers", "transformers")]
        digest = hashlib.sha256(json.dumps([_FORMAT, kind, max_samples, *versions]).encode())
        for code in sorted(path for glob in _CODE for path in Path(__file__).parent.glob(glob)):
            digest.update(hashlib.sha256(code.read_bytes()).digest())
        with file.open("rb") as data:
            digest.update(hashlib.file_digest(data, "sha256").digest())
        for name in _TOKENIZER_FILES:
            path = tokenizer / name
            if path.is_file():
                digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()

    def find(self, key: str) -> tuple[TokenStore, Index] | None:
        """The tokens of a key, if they are there."""
        folder = self._folder / key
        try:
            # Opened here: numpy leaves a file open that it can't read.
            with (folder / _INDEX).open("rb") as file, np.load(file) as arrays:
                index = Index(**{name: arrays[name] for name in Index.__dataclass_fields__})
                size = int(arrays[_SIZE])
            store = TokenStore(folder / _TOKENS)
            if store.num_tokens != size:
                raise ValueError(f"{store.num_tokens} tokens, not {size}")
        except (OSError, ValueError, KeyError, BadZipFile) as error:
            if folder.exists():  # damaged: made anew, as if it weren't there
                _logger.warning("tokens in the cache can't be read (%s); they are made anew", error)
                shutil.rmtree(folder, ignore_errors=True)
            return None
        os.utime(folder)
        return store, index

    def begin(self) -> TokenStore:
        """A new file of tokens, which `keep` gives its key. Raises OSError."""
        return TokenStore(Path(tempfile.mkdtemp(prefix=".new-", dir=self._folder)) / _TOKENS)

    def keep(self, key: str, store: TokenStore, index: Index) -> None:
        """Gives a finished file its key, and makes room."""
        made = store.path.parent
        try:
            arrays: dict[str, Any] = vars(index) | {_SIZE: np.array(store.num_tokens)}
            np.savez(made / _INDEX, **arrays)
            os.replace(made, self._folder / key)
        except OSError as error:  # no room, or another run was faster: this one has its tokens
            _logger.info("the tokens are not kept: %s", error)
            return
        store.path = self._folder / key / _TOKENS
        self._make_room()

    @staticmethod
    def drop(store: TokenStore) -> None:
        """Removes a file that was begun and not kept."""
        if store.path.parent.name.startswith(".new-"):
            shutil.rmtree(store.path.parent, ignore_errors=True)

    def _make_room(self) -> None:
        entries = []
        for folder in self._folder.iterdir():
            with contextlib.suppress(OSError):  # another run removes it at this moment
                size = sum(path.stat().st_size for path in folder.iterdir())
                entries.append((folder.stat().st_mtime, size, folder))
        total = sum(size for _, size, _ in entries)
        for _, size, folder in sorted(entries):
            if total <= CACHE_BYTES:
                return
            shutil.rmtree(folder, ignore_errors=True)
            total -= size

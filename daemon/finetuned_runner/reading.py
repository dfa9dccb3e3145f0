"""Goes through a data file, sample by sample, and counts what goes by."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

from pydantic import BaseModel

from finetuned_daemon.dataset.formats import Chat, DataFormat, Document, message_text
from finetuned_daemon.dataset.reader import BadLine, read_chats, read_documents
from finetuned_daemon.dataset.report import MOST_BAD_LINES, Progress
from finetuned_daemon.runs.contract import TrainingType

_PROGRESS_SECONDS = 0.25

Send = Callable[[BaseModel], None]
"""Sends a message to the daemon."""


class Reading:
    """Hands out the good samples of a file, and counts everything that goes by."""

    def __init__(
        self, path: Path, training_type: TrainingType, max_samples: int, send: Send | None = None
    ) -> None:
        """Raises OSError."""
        self.size = path.stat().st_size
        self.samples = 0
        self.characters = 0
        self.formats = Counter[DataFormat]()
        self.bad: list[BadLine] = []
        """The first bad lines."""
        self.bad_count = 0
        self._send = send
        self._said = 0.0
        is_sft = training_type is TrainingType.SFT
        items: Iterator[Chat | Document | BadLine] = (
            read_chats(path) if is_sft else read_documents(path)
        )
        self._items = islice(items, max_samples or None)

    def chats(self) -> Iterator[Chat]:
        """The chats that are left. Raises OSError."""
        for item in self._good():
            if isinstance(item, Chat):
                self.characters += sum(len(message_text(message)) for message in item.messages)
                yield item

    def documents(self) -> Iterator[Document]:
        """The documents that are left. Raises OSError."""
        for item in self._good():
            if isinstance(item, Document):
                self.characters += len(item.text)
                yield item

    def tell(self, bytes_read: int, *, at_once: bool = False) -> None:
        """Says how far the reading is, unless that was said a moment ago."""
        now = time.monotonic()
        if self._send is None or (now - self._said < _PROGRESS_SECONDS and not at_once):
            return
        self._said = now
        self._send(
            Progress(
                bytes_read=min(bytes_read, self.size),
                bytes_total=self.size,
                samples=self.samples,
                bad_lines=self.bad_count,
            )
        )

    def _good(self) -> Iterator[Chat | Document]:
        for item in self._items:
            self.tell(item.byte_offset)
            if isinstance(item, BadLine):
                self.bad_count += 1
                if len(self.bad) < MOST_BAD_LINES:
                    self.bad.append(item)
                continue
            self.samples += 1
            self.formats[item.format] += 1
            yield item

"""Samples that a run trains on or is scored by: stretches of a file of tokens."""

from __future__ import annotations

import threading
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from finetuned_daemon.runs.contract import EndReason
from finetuned_runner.failures import RunFailed
from finetuned_runner.token_store import Index, Int64, TokenStore

IGNORED = -100
"""Label of a token that is not learned; the one that torch's cross entropy passes over."""

Sample = dict[str, Int64]
"""`input_ids` and `labels`, each of shape (tokens); where packed also `lengths`, of the parts."""


@dataclass(frozen=True)
class Place:
    """Where the tokens of a sample stand."""

    start: int
    length: int


@dataclass(frozen=True)
class Row:
    """Several samples that are packed into one, each a document of its own."""

    places: tuple[Place, ...]

    @property
    def length(self) -> int:
        """Tokens of all."""
        return sum(place.length for place in self.places)


Where = Place | Row


class Samples:
    """Samples by index; also by place, which a data loader's process needs no index for."""

    def __init__(self, store: TokenStore) -> None:
        self.store = store

    def __len__(self) -> int:
        """Number of samples."""
        raise NotImplementedError

    def place(self, index: int) -> Where:
        """Where a sample stands. Waits until it is there, and raises what came between."""
        raise NotImplementedError

    def prefer(self, indices: Sequence[int]) -> None:
        """Says which samples are wanted next, in this order, where they are still in the making."""

    def line(self, index: int) -> int:
        """Line of the data file that a sample comes from; 0: from more than one."""
        raise NotImplementedError

    def __getstate__(self) -> dict[str, object]:
        # To a data loader's process, which asks by place.
        return {"store": self.store}

    def __getitem__(self, index: int | Where) -> Sample:
        place = self.place(index) if isinstance(index, int) else index
        if isinstance(place, Row):
            return _joined([self[part] for part in place.places])
        tokens, learned = self.store.read(place.start, place.length)
        return {"input_ids": tokens, "labels": np.where(learned, tokens, IGNORED)}


class Chats(Samples):
    """Chats, cut to a length; those that teach nothing within it are left out.

    They may still be made while the run trains. Then `place` waits for its sample.
    """

    def __init__(
        self,
        store: TokenStore,
        index: Index,
        kept: Int64,
        max_length: int,
        changed: threading.Condition,
        failure: Callable[[], BaseException | None],
        prefer: Callable[[Sequence[int]], None],
    ) -> None:
        """Samples of an index.

        Args:
            store: Their tokens.
            index: Where they stand; filled by others.
            kept: Which of the index' samples there are, in order.
            max_length: Tokens after which they are cut.
            changed: Is notified when the index has more.
            failure: What ended the making.
            prefer: Asks the makers for some of the index' samples before others.
        """
        super().__init__(store)
        self._index = index
        self._kept = kept
        self._max_length = max_length
        self._changed = changed
        self._failure = failure
        self._prefer = prefer

    def prefer(self, indices: Sequence[int]) -> None:
        """Says which samples are wanted next."""
        self._prefer(self._kept[np.asarray(indices, np.int64)].tolist())

    def __len__(self) -> int:
        return len(self._kept)

    def place(self, index: int) -> Place:
        """Where a sample stands."""
        at, starts = self._kept[index], self._index.starts
        if starts[at] < 0:
            with self._changed:
                self._changed.wait_for(lambda: starts[at] >= 0 or self._failure())
        failure = self._failure()
        if failure is not None:
            raise failure
        length = min(int(self._index.lengths[at]), self._max_length)
        return Place(int(starts[at]), length)

    def line(self, index: int) -> int:
        """Line of the data file; 0: of more than one."""
        return int(self._index.lines[self._kept[index]])


class Blocks(Samples):
    """Blocks of equal length of a stream of tokens; the last may be shorter, but not one token."""

    def __init__(self, store: TokenStore, block_length: int) -> None:
        super().__init__(store)
        self._block_length = block_length
        whole, rest = divmod(store.num_tokens, block_length)
        self._count = whole + (rest > 1)

    def __len__(self) -> int:
        return self._count

    def place(self, index: int) -> Place:
        """Where a sample stands."""
        start = index * self._block_length
        return Place(start, min(self._block_length, self.store.num_tokens - start))

    def line(self, index: int) -> int:
        """Line of the data file; 0: of more than one."""
        return 0


class Part(Samples):
    """Some of other samples."""

    def __init__(self, whole: Samples, indices: Sequence[int]) -> None:
        super().__init__(whole.store)
        self._whole = whole
        self._indices = indices

    def prefer(self, indices: Sequence[int]) -> None:
        """Says which samples are wanted next."""
        self._whole.prefer([self._indices[index] for index in indices])

    def __len__(self) -> int:
        return len(self._indices)

    def place(self, index: int) -> Where:
        """Where a sample stands."""
        return self._whole.place(self._indices[index])

    def line(self, index: int) -> int:
        """Line of the data file; 0: of more than one."""
        return self._whole.line(self._indices[index])


class Packed(Samples):
    """Samples put together into rows of at most so many tokens, the longest first (best fit)."""

    def __init__(self, samples: Samples, row_length: int) -> None:
        """Waits until all samples are there, and raises what came between."""
        super().__init__(samples.store)
        places: list[Place] = []
        for index in range(len(samples)):
            place = samples.place(index)
            assert isinstance(place, Place)
            places.append(place)
        self._rows = _fit(places, row_length)

    def __len__(self) -> int:
        return len(self._rows)

    def place(self, index: int) -> Row:
        """Where the samples of a row stand."""
        return self._rows[index]

    def line(self, index: int) -> int:
        """0: a row has several lines."""
        return 0


def _fit(places: list[Place], row_length: int) -> list[Row]:
    """Puts each sample into the fullest row that has room."""
    rows: list[list[Place]] = []
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    """Sorted: rooms that some row has."""
    for place in sorted(places, key=lambda place: (-place.length, place.start)):
        at = bisect_left(rooms, place.length)
        if at < len(rooms):
            room = rooms[at]
            number = by_room[room].pop()
            if not by_room[room]:
                del by_room[room], rooms[at]
            rows[number].append(place)
        else:
            room, number = row_length, len(rows)
            rows.append([place])
        left = room - place.length
        if left not in by_room:
            by_room[left] = []
            insort(rooms, left)
        by_room[left].append(number)
    return [Row(tuple(row)) for row in rows]


def _joined(parts: list[Sample]) -> Sample:
    return {
        "input_ids": np.concatenate([part["input_ids"] for part in parts]),
        "labels": np.concatenate([part["labels"] for part in parts]),
        "lengths": np.array([len(part["input_ids"]) for part in parts]),
    }


def split(samples: Samples, ratio: float, seed: int) -> tuple[Part, Part]:
    """Takes a share of the samples, drawn by `seed`, for evaluation: (rest, share), in file order.

    Raises:
        RunFailed: DATASET_INVALID, where nothing would be left to train on.
    """
    size = max(1, round(len(samples) * ratio))
    if size >= len(samples):
        raise RunFailed(
            EndReason.DATASET_INVALID,
            f"data.eval_ratio {ratio:g} of {len(samples)} samples leaves none to train on; lower "
            "it.",
        )
    chosen = set(Random(seed).sample(range(len(samples)), size))  # noqa: S311 - no secret
    rest = [index for index in range(len(samples)) if index not in chosen]
    return Part(samples, rest), Part(samples, sorted(chosen))

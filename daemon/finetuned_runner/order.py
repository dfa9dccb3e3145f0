"""In which order samples are trained on, and which of them are computed together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

from finetuned_runner.samples import Samples, Where


class Order(Sampler[Where]):
    """A seeded order of samples, in which those of an optimizer step are put together by length.

    Which samples a step has is what the plain Trainer draws. Within a step their order is free: it
    takes the sum of all their gradients. So padded batches are made of samples of like length, and
    rows of documents of such that all are about equally long, which takes the least memory.
    """

    def __init__(
        self,
        samples: Samples,
        seed: int,
        *,
        batch_size: int,
        step_size: int,
        reshuffle: bool,
        is_padded: bool,
    ) -> None:
        """An order.

        Args:
            samples: What is ordered.
            seed: Of the order.
            batch_size: Samples that are computed together.
            step_size: Samples of an optimizer step.
            reshuffle: A new order in each epoch; else one for all.
            is_padded: Whether the samples computed together are padded to the longest.
        """
        self._samples = samples
        self._seed = seed
        self._batch_size = batch_size
        self._step_size = step_size
        self._reshuffle = reshuffle
        self._is_padded = is_padded
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """The epoch that comes next, from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._samples)

    def drawn(self, epoch: int) -> list[int]:
        """The samples of an epoch, step after step, as the plain Trainer draws them."""
        seed = self._seed + (epoch if self._reshuffle else 0)
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = torch.randperm(len(self._samples), generator=generator).tolist()
        return drawn

    def lines(self, number: int) -> list[int]:
        """Lines of the data file of an optimizer step's samples; steps from 1 over all epochs."""
        steps = -(-len(self._samples) // self._step_size)
        epoch, place = divmod(number - 1, steps)
        step = self.drawn(epoch)[place * self._step_size : (place + 1) * self._step_size]
        return sorted({line for index in step if (line := self._samples.line(index))})

    def __iter__(self) -> Iterator[Where]:
        drawn = self.drawn(self._epoch)
        self._samples.prefer(drawn)
        for start in range(0, len(drawn), self._step_size):
            step = drawn[start : start + self._step_size]
            places = [self._samples.place(index) for index in step]
            lengths = [place.length for place in places]
            order = by_length(lengths) if self._is_padded else balanced(lengths, self._batch_size)
            yield from (places[number] for number in order)


class InOrder(Sampler[Where]):
    """The samples as they stand."""

    def __init__(self, samples: Samples) -> None:
        self._samples = samples

    def __len__(self) -> int:
        return len(self._samples)

    def __iter__(self) -> Iterator[Where]:
        self._samples.prefer(range(len(self._samples)))
        return map(self._samples.place, range(len(self._samples)))


def by_length(lengths: Sequence[int]) -> list[int]:
    """Places of samples in batches of like length, the longest first: what fails, fails early."""
    return sorted(range(len(lengths)), key=lambda place: -lengths[place])


def balanced(lengths: Sequence[int], batch_size: int) -> list[int]:
    """Places of samples in batches with about the same number of tokens.

    The longest sample that is left goes to the batch with the fewest tokens that has room.
    """
    count = -(-len(lengths) // batch_size)
    room = [batch_size] * count
    room[-1] = len(lengths) - batch_size * (count - 1)
    batches: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        batch = min(
            (batch for batch in range(count) if len(batches[batch]) < room[batch]),
            key=tokens.__getitem__,
        )
        batches[batch].append(place)
        tokens[batch] += lengths[place]
    return [place for batch in batches for place in batch]

"""From data files to samples of tokens with a mask of what is to be learned."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import TypeVar

import torch
from torch.utils.data import Dataset, Subset
from transformers import PreTrainedTokenizerBase

from finetuned_daemon.dataset.formats import Chat, Document
from finetuned_daemon.dataset.reader import BadLine, read_chats, read_documents
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import EndReason, RunPhase
from finetuned_runner import encoding
from finetuned_runner.failures import RunFailed
from finetuned_runner.report import Report

IGNORED = -100
"""Label of a token that is not learned; the one that torch's cross entropy passes over."""

_BAD_LINES_SHOWN = 5
_REPORT_SECONDS = 2.0
_PAD_MULTIPLE = 8

_logger = logging.getLogger(__name__)

Sample = dict[str, list[int]]
_Item = TypeVar("_Item", Chat, Document)


class TokenDataset(Dataset[Sample]):
    """Samples of tokens, packed: five bytes a token, where lists of numbers take 16 to 72."""

    def __init__(self) -> None:
        self._tokens = array("i")
        self._learned = bytearray()
        self._ends = array("q", [0])

    def append(self, tokens: list[int], learned: bytes | bytearray) -> None:
        """Adds a sample; `learned` has a byte, 0 or 1, for each token."""
        self._tokens.extend(tokens)
        self._learned += learned
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int) -> Sample:
        start, end = self._ends[index], self._ends[index + 1]
        tokens = self._tokens[start:end].tolist()
        learned = self._learned[start:end]
        labels = [
            token if is_learned else IGNORED
            for token, is_learned in zip(tokens, learned, strict=True)
        ]
        return {"input_ids": tokens, "labels": labels}

    @property
    def num_tokens(self) -> int:
        """All tokens of all samples."""
        return len(self._tokens)

    @property
    def largest_token(self) -> int:
        """The largest token id; -1 if there is none."""
        return max(self._tokens, default=-1)


Samples = TokenDataset | Subset[Sample]


@dataclass(frozen=True)
class Collator:
    """Pads the samples of a batch to the longest, rounded up to a multiple of 8.

    Gives `input_ids`, `attention_mask` and `labels`, int64 of shape (samples, length), padded on
    the right.
    """

    pad_id: int

    def __call__(self, samples: list[Sample]) -> dict[str, torch.Tensor]:
        """Pads a batch."""
        longest = max(len(sample["input_ids"]) for sample in samples)
        length = -(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE
        shape = (len(samples), length)
        input_ids = torch.full(shape, self.pad_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, IGNORED, dtype=torch.int64)
        for row, sample in enumerate(samples):
            size = len(sample["input_ids"])
            input_ids[row, :size] = torch.tensor(sample["input_ids"])
            attention_mask[row, :size] = 1
            labels[row, :size] = torch.tensor(sample["labels"])
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# --- tokens


def encode_chats(
    chats: list[Chat], tokenizer: PreTrainedTokenizerBase, max_length: int, report: Report
) -> TokenDataset:
    """Tokens of chats, of which the assistant's are learned; longer ones are cut on the right.

    Raises:
        RunFailed: DATASET_INVALID, where it is not certain which tokens are the assistant's or none
            is left to learn.
    """
    dataset = TokenDataset()
    cut = empty = done = 0
    said = time.monotonic()
    try:
        mask = encoding.chat_mask(tokenizer)
        for batch in encoding.encode_chats(chats, tokenizer, mask):
            for chat in batch:
                cut += len(chat.learned) > max_length
                if chat.teaches(max_length):
                    dataset.append(chat.encoding.ids[:max_length], chat.learned[:max_length])
                else:
                    empty += 1
            done += len(batch)
            if time.monotonic() - said > _REPORT_SECONDS:
                said = time.monotonic()
                report.phase(RunPhase.PREPARING_DATA, f"{done} of {len(chats)} samples")
    except encoding.TokenizerUnusable as error:
        raise RunFailed(EndReason.DATASET_INVALID, f"{error}.") from error
    if not len(dataset):
        raise RunFailed(
            EndReason.DATASET_INVALID,
            f"No sample has an assistant's token within training.max_seq_length ({max_length}): "
            "nothing to learn.",
        )
    if cut:
        report.notice(
            "training.max_seq_length",
            "SAMPLES_CUT",
            f"{cut} of {len(chats)} samples are longer than {max_length} tokens and were cut.",
        )
    if empty:
        report.notice(
            "training.max_seq_length",
            "SAMPLES_DROPPED",
            f"{empty} of {len(chats)} samples have no assistant's token within {max_length} "
            "tokens and were left out.",
        )
    return dataset


def encode_documents(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, max_length: int, report: Report
) -> TokenDataset:
    """Blocks of `max_length` tokens, all learned: documents, each with the end-of-text token.

    A document may span blocks and a block several documents; the last block may be shorter.

    Raises:
        RunFailed: MODEL_UNLOADABLE without an end-of-text token; DATASET_INVALID if there is no
            text.
    """
    try:
        end = encoding.end_of_text(tokenizer)
    except encoding.TokenizerUnusable as error:
        raise RunFailed(EndReason.MODEL_UNLOADABLE, f"{error}.") from error
    dataset = TokenDataset()
    tokens: list[int] = []
    done = 0
    said = time.monotonic()
    for batch in encoding.encode_documents(documents, tokenizer):
        for piece in batch:
            tokens += piece.encoding.ids
            if piece.ends:
                tokens.append(end)
                done += 1
        whole = len(tokens) - len(tokens) % max_length
        for begin in range(0, whole, max_length):
            dataset.append(tokens[begin : begin + max_length], b"\1" * max_length)
        del tokens[:whole]
        if time.monotonic() - said > _REPORT_SECONDS:
            said = time.monotonic()
            report.phase(RunPhase.PREPARING_DATA, f"{done} of {len(documents)} documents")
    if len(tokens) > 1:  # a single token predicts nothing
        dataset.append(tokens, b"\1" * len(tokens))
    if not len(dataset):
        raise RunFailed(EndReason.DATASET_INVALID, "The training data holds no text.")
    return dataset


# --- files and splits


def load_chats(path: Path, limit: int = 0) -> list[Chat]:
    """The first `limit` chats of a file; 0: all.

    Raises:
        RunFailed: DATASET_INVALID, naming the first lines that can't be used.
    """
    return _collect(path, read_chats(path), limit)


def load_documents(path: Path, limit: int = 0) -> list[Document]:
    """The first `limit` documents of a file; 0: all.

    Raises:
        RunFailed: DATASET_INVALID, naming the first lines that can't be used.
    """
    return _collect(path, read_documents(path), limit)


def _collect(path: Path, items: Iterator[_Item | BadLine], limit: int) -> list[_Item]:
    good: list[_Item] = []
    bad: list[BadLine] = []
    try:
        for item in islice(items, limit or None):
            if isinstance(item, BadLine):
                bad.append(item)
            else:
                good.append(item)
    except OSError as error:
        raise RunFailed(
            EndReason.DATASET_INVALID, f"{path} can't be read: {error.strerror}."
        ) from error
    if bad:
        more = f"; and {len(bad) - _BAD_LINES_SHOWN} more" if len(bad) > _BAD_LINES_SHOWN else ""
        lines = "; ".join(map(str, bad[:_BAD_LINES_SHOWN]))
        raise RunFailed(EndReason.DATASET_INVALID, f"{path.name}: {lines}{more}.")
    if not good:
        raise RunFailed(EndReason.DATASET_INVALID, f"{path} holds no sample.")
    return good


def split(dataset: TokenDataset, ratio: float, seed: int) -> tuple[Subset[Sample], Subset[Sample]]:
    """Takes a share of the samples, drawn by `seed`, for evaluation: (rest, share), in file order.

    Raises:
        RunFailed: DATASET_INVALID, where nothing would be left to train on.
    """
    size = max(1, round(len(dataset) * ratio))
    if size >= len(dataset):
        raise RunFailed(
            EndReason.DATASET_INVALID,
            f"data.eval_ratio {ratio:g} of {len(dataset)} samples leaves none to train on; lower "
            "it.",
        )
    chosen = set(Random(seed).sample(range(len(dataset)), size))  # noqa: S311 - no secret
    rest = [index for index in range(len(dataset)) if index not in chosen]
    return Subset(dataset, rest), Subset(dataset, sorted(chosen))


def evaluates(parameters: Parameters, report: Report) -> bool:
    """Whether the run evaluates; says so where data and strategy don't match."""
    data, training = parameters.data, parameters.training
    has_data = bool(data.eval_file) or data.eval_ratio > 0
    wanted = training.eval_strategy != "no"
    if wanted and not has_data:
        report.notice(
            "training.eval_strategy",
            "NO_EVALUATION_DATA",
            "There is no evaluation: neither data.eval_file nor data.eval_ratio is set.",
        )
    if has_data and not wanted:
        report.notice(
            "data.eval_file" if data.eval_file else "data.eval_ratio",
            "EVALUATION_OFF",
            'The evaluation data is not used: training.eval_strategy is "no".',
        )
    if training.early_stopping_patience > 0 and not (wanted and has_data):
        report.notice(
            "training.early_stopping_patience",
            "EARLY_STOPPING_WITHOUT_EVALUATION",
            "The run does not stop early: early stopping needs evaluations.",
        )
    if wanted and data.eval_file and data.eval_ratio > 0:
        report.notice(
            "data.eval_ratio",
            "EVALUATION_FILE_WINS",
            "No samples are taken from the training data: data.eval_file is set.",
        )
    return wanted and has_data

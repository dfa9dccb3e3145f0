"""What the worker is asked and what it answers: one JSON object a line, on stdin and stdout.

Imported by the runner: nothing here may need grpc or torch.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter

from finetuned_daemon.dataset.formats import DataFormat
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.texts import Text

MOST_BAD_LINES = 100
"""Bad lines that a report names."""
LONGEST = 256
"""Lengths that a measurement names."""


class BadLinePolicy(StrEnum):
    """What becomes of bad lines; names as in `finetuned.v1.BadLinePolicy`."""

    FAIL = "FAIL"
    SKIP = "SKIP"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)


# --- requests


class InspectRequest(_Record):
    """Asks for a report on a file."""

    kind: Literal["inspect"] = "inspect"
    training_type: TrainingType
    path: str
    tokenizer_path: str = ""
    """Folder of a tokenizer; empty: tokens are not counted."""
    max_seq_length: int = 512
    bad_line_policy: BadLinePolicy = BadLinePolicy.FAIL
    max_rendered_samples: int = 3
    max_samples: int = 0
    """Samples to read, from the first; 0: all."""


class MeasureRequest(_Record):
    """Asks for the lengths of the samples that a run would train on."""

    kind: Literal["measure"] = "measure"
    training_type: TrainingType
    train_file: str
    eval_file: str | None = None
    tokenizer_path: str
    max_seq_length: int
    max_samples: int = 0
    """Samples of the training file to read, from the first; 0: all."""


Request = Annotated[InspectRequest | MeasureRequest, Field(discriminator="kind")]
REQUEST: TypeAdapter[InspectRequest | MeasureRequest] = TypeAdapter(
    Request, config=ConfigDict(defer_build=True)
)

# --- answers


class Progress(_Record):
    """How far the reading is; fields as in `finetuned.v1.InspectionProgress`."""

    kind: Literal["progress"] = "progress"
    bytes_read: int
    bytes_total: int
    samples: int
    bad_lines: int


class FormatCount(_Record):
    """Samples of a format."""

    format: DataFormat
    samples: int


class BadDataLine(_Record):
    """A line that can't be used; fields as in `reader.BadLine`."""

    line: int
    byte_offset: int
    reason: str
    message: Text
    excerpt: str


class RoleCount(_Record):
    """Turns of a role."""

    role: str
    turns: int


class TurnCount(_Record):
    """Chats of a length."""

    turns: int
    samples: int
    or_more: bool = False


class HistogramBin(_Record):
    """Samples of a range of lengths, `end` exclusive."""

    start: int
    end: int
    samples: int


class TokenLengths(_Record):
    """Distribution of lengths in tokens, before cutting. Percentiles by nearest rank."""

    minimum: int
    maximum: int
    mean: float
    p50: int
    p90: int
    p95: int
    p99: int
    histogram: tuple[HistogramBin, ...]


class RenderedPiece(_Record):
    """A piece of a rendered sample."""

    text: str
    learned: bool


class RenderedSample(_Record):
    """A sample as the model sees it, as far as it is not cut off."""

    line: int
    pieces: tuple[RenderedPiece, ...]
    tokens: int
    learned_tokens: int
    cut: bool


class Report(_Record):
    """What is in a data file; fields as in `finetuned.v1.DatasetReport`."""

    kind: Literal["report"] = "report"
    format: DataFormat | None
    formats: tuple[FormatCount, ...]
    problem: Text
    """Why a run can't use the file; empty: it can."""
    samples: int
    size_bytes: int
    bad_line_count: int
    bad_lines: tuple[BadDataLine, ...]
    duplicates: int
    roles: tuple[RoleCount, ...]
    turns: tuple[TurnCount, ...]
    token_lengths: TokenLengths | None = None
    cut_samples: int = 0
    empty_samples: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    train_samples: int = 0
    rendered_samples: tuple[RenderedSample, ...] = ()
    tokenizer_problem: Text
    is_uncertain: bool = False
    """The problem is that it is not certain which tokens are learned."""


class MeasuredFile(_Record):
    """Samples of a file as a run has them: chats as cut, or blocks."""

    samples: int
    """What is trained on; samples with nothing to learn are left out."""
    cut: int = 0
    """Samples, among those read, that are longer than the longest allowed."""
    dropped: int = 0
    """Samples left out, because nothing is to be learned in them."""
    tokens: int = 0
    """Of all `samples`, as cut."""
    learned_tokens: int = 0
    """Of these, those that are learned."""
    longest: tuple[tuple[int, int], ...] = ()
    """Tokens and learned tokens of the longest samples, longest first; 256 at most."""

    @property
    def mean_length(self) -> float:
        """Tokens of a sample."""
        return self.tokens / self.samples if self.samples else 0.0


class Measured(_Record):
    """The samples of a run."""

    kind: Literal["measured"] = "measured"
    exact: bool
    """Every sample was looked at; else numbers are extrapolated from the first ones."""
    train: MeasuredFile
    evaluation: MeasuredFile | None = None
    """Of the evaluation file; None: there is none."""

    @property
    def train_samples(self) -> int:
        """Samples of the training file, before any share is taken for evaluation."""
        return self.train.samples

    @property
    def eval_samples(self) -> int:
        """Samples of the evaluation file; 0 without one."""
        return self.evaluation.samples if self.evaluation else 0


class Failure(_Record):
    """Why the question can't be answered: a field of the request is wrong."""

    kind: Literal["failure"] = "failure"
    field: str
    reason: str
    message: Text
    is_uncertain: bool = False
    """It is not certain which tokens are learned: data and template don't go together."""


Answer = Annotated[Progress | Report | Measured | Failure, Field(discriminator="kind")]
ANSWER: TypeAdapter[Progress | Report | Measured | Failure] = TypeAdapter(
    Answer, config=ConfigDict(defer_build=True)
)

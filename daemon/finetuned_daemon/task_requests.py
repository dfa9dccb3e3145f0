"""What is asked of the manager: a task to create, an edit, a start. Knows no gRPC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from finetuned_daemon.errors import Violation
from finetuned_daemon.requests import Given
from finetuned_daemon.runs.contract import TrainingType


class ResumeChoice(StrEnum):
    """Which of a task's checkpoints to go on from; names as in `finetuned.v1.ResumeChoice`."""

    NEWEST_CHECKPOINT = "NEWEST_CHECKPOINT"
    BEST_CHECKPOINT = "BEST_CHECKPOINT"


@dataclass(frozen=True, kw_only=True)
class NewTask:
    """A task as asked for."""

    training_type: TrainingType | None
    parameters: Given
    display_name: str = ""
    device: str = ""
    template: str = ""
    """Resource name of the template that absent parameters come from."""
    task_id: str = ""
    wrong: Sequence[Violation] = ()
    """What was found wrong as the request was read."""


@dataclass(frozen=True, kw_only=True)
class Edit:
    """A change of a task as asked for."""

    parameters: Given
    display_name: str = ""
    device: str = ""
    template: str = ""
    paths: Sequence[str] = ()
    """What to change; empty: what is given."""

    def changes(self, field: str) -> bool:
        """Whether the edit is about this field of the task."""
        return field in self.paths if self.paths else bool(getattr(self, field))


@dataclass(frozen=True, kw_only=True)
class StartOptions:
    """How a task is to be started, beside what its parameters say. The task's own stay."""

    resume: ResumeChoice | None = None
    """The checkpoint to go on from; None: as `resume_path` or the parameters say."""
    resume_path: str = ""
    """Folder of the checkpoint to go on from. Empty: as the parameters say."""
    probe: bool = False
    """Only measure what a run takes."""

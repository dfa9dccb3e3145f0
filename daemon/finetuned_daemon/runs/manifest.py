"""What a run writes into its output folder, as records: what a checkpoint holds, and what is whose.

Beside the run folder's contract, as both sides read it: the runner verifies before it resumes, the
daemon before it starts one, and when it deletes what a run left. Nothing here may need torch.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

MANIFEST = "manifest.json"
MANIFEST_VERSION = 1

STATE_FILES = ("trainer_state.json", "optimizer.pt", "scheduler.pt", "rng_state.pth")
"""What a run can't be continued exactly without; the weights' names vary."""

MODEL_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
"""Where both kinds are there, the first is read."""
MODEL_SETTINGS = ("*.json", "*.jinja", "*.model", "*.txt")
"""Configuration and tokenizer."""

OUTPUTS = "outputs.jsonl"
"""File of the run folder: one `WrittenFolder` a line, durable before the folder has its name."""

OUTPUT_NAMES = r"checkpoint-\d+|final|merged|tensorboard|wandb|mlflow|trackio|swanlab"
"""Names of the folders that a run makes in its output folder."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class FileEntry(_Record):
    """A file of a checkpoint."""

    size: int
    sha256: str


class DataFile(_Record):
    """A file of data or model as the run found it: enough to tell whether it was changed since."""

    path: str
    size: int
    changed: int
    """When it was last changed, in ns."""

    @classmethod
    def of(cls, path: str) -> DataFile | None:
        """The file as it is now; None where there is none."""
        try:
            status = Path(path).stat()
        except OSError:
            return None
        return cls(path=path, size=status.st_size, changed=status.st_mtime_ns)


class Manifest(_Record):
    """What a checkpoint holds, and what of the run's state transformers doesn't keep.

    Fields with a default are absent in checkpoints of earlier versions.
    """

    format_version: int = MANIFEST_VERSION
    step: int
    total_steps: int = 0
    """Optimizer steps of the whole training, as its run was made; 0: not known."""
    epoch: float = 0.0
    """Passes over the training data done, with fraction."""
    num_tokens: int = 0
    """Tokens trained on so far, without padding."""
    best_eval_loss: float | None = None
    """For early stopping: the loss to improve on."""
    evaluations_without_gain: int = 0
    optimizer: str = ""
    """As the parameter `training.optimizer` has it; empty: not known."""
    eval_loss: float | None = None
    """Evaluation loss at its very step; None where no evaluation took place there."""
    best_checkpoint: str = ""
    """Folder of the checkpoint with the lowest evaluation loss up to this one, which it may be."""
    best_checkpoint_loss: float | None = None
    """Its evaluation loss."""
    parameters: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """The parameters of its run, by section and name; empty: not known."""
    data_files: dict[str, DataFile] = Field(default_factory=dict)
    """The files that its run read, by the parameter that names them.

    Those of a folder by parameter and name, as `data.model_path/config.json`.
    """
    num_samples: int = 0
    """Samples trained on in an epoch; 0: not known."""
    files: dict[str, FileEntry] = Field(default_factory=dict)
    """By path relative to the checkpoint, with forward slashes."""

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(entry.size for entry in self.files.values())


def strange_names(folder: Path, names: Iterable[str]) -> list[str]:
    """Names in a manifest that are no file of its checkpoint: they leave it, or are links.

    Who makes a checkpoint of his own could have files elsewhere read by them.
    """
    found = list[str]()
    for name in names:
        path = PurePosixPath(name)
        inside = name and not path.is_absolute() and ".." not in path.parts and "\0" not in name
        if not inside or any((folder / p).is_symlink() for p in (path, *path.parents[:-1])):
            found.append(name)
    return found


class WrittenFolder(_Record):
    """A folder that a run is about to give its name, and the files in it."""

    name: str
    """Of the folder within the output folder, such as `checkpoint-100`."""
    files: dict[str, int]
    """By path relative to the folder, with forward slashes: when it was last changed, in ns.

    A file that was changed later is somebody else's work.
    """
    path: str
    """Of the output folder, with no link in it: through another way nobody means this folder."""
    device: int
    """`st_dev` of the output folder."""
    inode: int
    """`st_ino` of the output folder: another one of the same name is somebody else's."""


def model_files(folder: Path, *, weights: bool = True) -> list[Path]:
    """The files in the folder of a model that a run can read: with `weights`, or the tokenizer."""
    found = sorted(path for kind in MODEL_SETTINGS for path in folder.glob(kind))
    if not weights:
        return found
    return found + next(filter(None, (sorted(folder.glob(kind)) for kind in MODEL_WEIGHTS)), [])

"""How much room a run needs on its disks to go on, and whether it is there."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from finetuned_daemon.devices import list_devices
from finetuned_daemon.planning.disk import plan_disk
from finetuned_daemon.planning.model_files import ModelUnreadable, base_folder, read_model
from finetuned_daemon.planning.schedule import plan_schedule
from finetuned_daemon.planning.setup import plan_setup
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.tasks import Run

LEAST_BYTES = 64 << 20
"""Without this much a disk counts as full, however little the run writes."""


@dataclass(frozen=True)
class Need:
    """Bytes that have to be free in a folder."""

    folder: Path
    bytes: int

    def __str__(self) -> str:
        return f"{-(-self.bytes >> 20):,} MiB are free in {self.folder}"

    @property
    def is_met(self) -> bool:
        """Whether they are."""
        try:
            return shutil.disk_usage(_standing(self.folder)).free >= self.bytes
        except OSError:  # the disk is gone; there is no room where nothing is
            return False


def needs_of(run: Run, training_type: TrainingType, run_dirs: Path) -> list[Need]:
    """What has to be free for a run to go on, disk by disk. Reads files.

    Where it writes its results: one more checkpoint, as large as its newest or else as planned, and
    the final model. Where the daemon keeps run folders: a little.
    """
    parameters = run.parameters
    output = Path(run.output_dir or parameters.data.output_dir or "/")
    checkpoint, final = _planned(run, training_type)
    needed = max(LEAST_BYTES, (_size(Path(run.last_checkpoint)) or checkpoint) + final)
    needs = [Need(output, needed)]
    if _device(output) != _device(run_dirs):
        needs.append(Need(run_dirs, LEAST_BYTES))
    return needs


def _planned(run: Run, training_type: TrainingType) -> tuple[int, int]:
    """Planned bytes of a checkpoint, and of what stands at the end; 0 where nothing can be said."""
    parameters = run.parameters
    device = next((device for device in list_devices() if device.id == run.device), None)
    if device is None:
        return 0, 0
    try:
        model = read_model(base_folder(Path(parameters.data.model_path or "")))
        setup = plan_setup(parameters, training_type, device, model)
        # Their logs, for which samples would have to be counted, weigh nothing here.
        disk = plan_disk(parameters, setup, plan_schedule(parameters.training, 1, evaluates=False))
    except (ModelUnreadable, OSError):
        return 0, 0
    return disk.checkpoint_bytes, disk.final_bytes + disk.merged_bytes


def _size(folder: Path) -> int:
    """Bytes of the files in a checkpoint; 0 where it is gone."""
    if not folder.name or not folder.is_dir():
        return 0
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _device(folder: Path) -> int:
    return _standing(folder).stat().st_dev


def _standing(folder: Path) -> Path:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder

"""A deletion never leaves the folders that a run recorded, whoever moves things about meanwhile."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import Scene
from daemon_process import Daemon
from finetuned.v1 import task_service_pb2
from finetuned_daemon.runs import deleted
from finetuned_daemon.runs.manifest import OUTPUTS, WrittenFolder
from finetuned_daemon.runs.outputs import delete_outputs, remove_leftovers
from finetuned_runner.checkpoint import remove_folder

NAMES = ("weights", "state/optimizer")

_SWAPPER = """
import os, sys
folder, aside, treasure = sys.argv[1:]
print("swaps", flush=True)
while True:
    try:
        os.rename(folder, aside)
        os.symlink(treasure, folder)
        os.unlink(folder)
        os.rename(aside, folder)
    except OSError:
        pass
"""


class Ground:
    """A run with outputs, and somebody else's folder that looks the same, file for file."""

    def __init__(self, root: Path) -> None:
        self.run_dir, self.output = root / "run", root / "out" / "run-1"
        self.run_dir.mkdir()
        self.treasure = root / "treasure"
        self.fill(self.treasure / "checkpoint-1")
        self.renew()

    def renew(self) -> None:
        """Puts the outputs back, and the record of them."""
        shutil.rmtree(self.output.parent, ignore_errors=True)
        self.fill(self.output / "checkpoint-1")
        self.record("checkpoint-1", dict.fromkeys(NAMES, 1000000000))

    @staticmethod
    def fill(folder: Path) -> None:
        """The same names, sizes and times everywhere: they tell nothing apart."""
        for name in NAMES:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(bytes(10))
            os.utime(path, ns=(1_000_000_000, 1_000_000_000))

    def record(self, name: str, files: dict[str, int]) -> None:
        status = self.output.stat()
        line = WrittenFolder(
            name=name,
            files=files,
            path=os.path.realpath(self.output),
            device=status.st_dev,
            inode=status.st_ino,
        )
        (self.run_dir / OUTPUTS).write_text(line.model_dump_json() + "\n")

    def delete(self) -> None:
        delete_outputs([(self.run_dir, self.output)])

    @property
    def is_untouched(self) -> bool:
        """Everything that is somebody else's is there."""
        return all((self.treasure / "checkpoint-1" / name).is_file() for name in NAMES)


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@pytest.mark.parametrize("place", ["output", "checkpoint", "part", "parent"])
def test_whoever_swaps_folders_for_links_meanwhile_leads_it_nowhere(
    ground: Ground, place: str
) -> None:
    """A process that does nothing else, against a hundred deletions."""
    checkpoint = ground.output / "checkpoint-1"
    folder, target = {
        "output": (ground.output, ground.treasure),
        "checkpoint": (checkpoint, ground.treasure / "checkpoint-1"),
        "part": (checkpoint / "state", ground.treasure / "checkpoint-1" / "state"),
        "parent": (ground.output.parent, ground.treasure.parent),
    }[place]
    aside = ground.treasure.parent / "aside"
    with subprocess.Popen(
        [sys.executable, "-c", _SWAPPER, str(folder), str(aside), str(target)],
        stdout=subprocess.PIPE,
    ) as swapper:
        try:
            assert swapper.stdout is not None
            assert swapper.stdout.readline()
            for _ in range(100):
                ground.delete()
                assert ground.is_untouched
                try:
                    ground.renew()
                except OSError:  # the swapper was in the way; the next round finds what is there
                    shutil.rmtree(aside, ignore_errors=True)
        finally:
            swapper.kill()
    assert ground.is_untouched


@pytest.mark.parametrize("place", ["output", "checkpoint"])
def test_a_link_in_the_place_of_a_folder_is_not_followed(ground: Ground, place: str) -> None:
    checkpoint = ground.output / "checkpoint-1"
    folder, target = {
        "output": (ground.output, ground.treasure),
        "checkpoint": (checkpoint, ground.treasure / "checkpoint-1"),
    }[place]
    shutil.rmtree(folder)
    folder.symlink_to(target)
    ground.delete()
    assert ground.is_untouched


def test_a_hard_link_loses_one_name_and_its_file_none_of_its_content(ground: Ground) -> None:
    weights = ground.output / "checkpoint-1" / "weights"
    weights.unlink()
    os.link(ground.treasure / "checkpoint-1" / "weights", weights)
    ground.delete()
    assert ground.is_untouched
    assert not weights.exists()


@pytest.mark.parametrize(
    "name",
    ["../../../treasure/checkpoint-1/weights", "/etc/hostname", "a\0b", "a" * 5000, "", ".", "..",
     "weights/", "weights/x", "\n", "\x1b[31m", "state/../../../../treasure/checkpoint-1/weights"],
)  # fmt: skip
def test_a_record_of_a_strange_name_deletes_nothing_else(ground: Ground, name: str) -> None:
    ground.record("checkpoint-1", {name: 1_000_000_000})
    ground.delete()
    assert ground.is_untouched
    if name != "weights/":
        assert (ground.output / "checkpoint-1" / "weights").is_file()


def test_another_folder_of_the_same_name_stays_even_where_it_is_empty(ground: Ground) -> None:
    ground.output.rename(ground.output.with_name("moved"))
    ground.output.mkdir()
    ground.delete()
    assert ground.output.is_dir()
    assert (ground.output.with_name("moved") / "checkpoint-1" / "weights").is_file()


def test_leftovers_are_removed_where_the_run_wrote_and_nowhere_else(ground: Ground) -> None:
    """What was about to be written goes; a link of its name, or in the folder's place, does not."""
    (ground.output / ".tmp-checkpoint-2" / "x").mkdir(parents=True)
    (ground.output / ".tmp-link").symlink_to(ground.treasure)
    (ground.treasure / ".tmp-mine").mkdir()
    remove_leftovers(ground.output, keep_folder=False)
    assert not (ground.output / ".tmp-checkpoint-2").exists()
    assert (ground.output / ".tmp-link").is_symlink()
    assert ground.is_untouched
    shutil.rmtree(ground.output)
    ground.output.symlink_to(ground.treasure)
    remove_leftovers(ground.output, keep_folder=False)
    assert (ground.treasure / ".tmp-mine").is_dir()


def test_a_run_folder_that_is_a_link_goes_alone(ground: Ground, tmp_path: Path) -> None:
    folder = tmp_path / "task.deleted"
    folder.symlink_to(ground.treasure)
    deleted.remove(folder)
    assert not folder.is_symlink()
    assert ground.is_untouched
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "link").symlink_to(ground.treasure)
    deleted.remove(tmp_path / "real")
    assert not (tmp_path / "real").exists()
    assert ground.is_untouched


def test_a_checkpoint_that_is_a_link_by_now_is_pruned_as_a_link(ground: Ground) -> None:
    """Whoever has put it on another disk keeps it; the run goes on."""
    checkpoint = ground.output / "checkpoint-1"
    shutil.rmtree(checkpoint)
    checkpoint.symlink_to(ground.treasure / "checkpoint-1")
    remove_folder(checkpoint)
    assert not checkpoint.is_symlink()
    assert ground.is_untouched


@pytest.mark.parametrize("what", ["task", "checkpoint"])
def test_the_daemon_deletes_nothing_behind_a_link(
    daemon: Daemon, scene: Scene, tmp_path: Path, what: str
) -> None:
    """By the rpcs themselves: files of the same names and times behind a link stay."""
    task = daemon.create(scene.play(steps=1, save_steps=1), start=True)
    daemon.wait(task.name, "COMPLETED")
    [run] = daemon.tasks.ListRuns(task_service_pb2.ListRunsRequest(parent=task.name)).runs
    checkpoint = Path(run.output_dir) / "checkpoint-1"
    treasure = tmp_path / "treasure"
    checkpoint.rename(treasure)
    checkpoint.symlink_to(treasure)
    before = sorted(treasure.iterdir())
    assert before
    if what == "task":
        daemon.tasks.DeleteTask(
            task_service_pb2.DeleteTaskRequest(name=task.name, delete_outputs=True)
        )
    else:
        daemon.tasks.DeleteCheckpoint(
            task_service_pb2.DeleteCheckpointRequest(name=f"{run.name}/checkpoints/1")
        )
    assert sorted(treasure.iterdir()) == before
    assert checkpoint.is_symlink()

"""Deleting what runs wrote: what they recorded goes, and nothing else, whatever is in the way."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from finetuned_daemon.runs.manifest import OUTPUTS, WrittenFolder
from finetuned_daemon.runs.outputs import Deleted, delete_outputs


class Output:
    """A run folder and an output folder with one recorded checkpoint."""

    def __init__(self, root: Path) -> None:
        self.run_dir = root / "run"
        self.folder = root / "out" / "run-1"
        self.run_dir.mkdir()
        (self.folder / "checkpoint-1" / "state").mkdir(parents=True)
        (self.folder / "checkpoint-1" / "weights").write_bytes(bytes(10))
        (self.folder / "checkpoint-1" / "state" / "optimizer").write_bytes(bytes(5))
        self.record("checkpoint-1", "weights", "state/optimizer")

    def record(self, name: str, *files: str, inode: int = 0) -> None:
        status = self.folder.stat()
        line = WrittenFolder(
            name=name,
            files={file: self.changed(name, file) for file in files},
            path=os.path.realpath(self.folder),
            device=status.st_dev,
            inode=inode or status.st_ino,
        )
        with open(self.run_dir / OUTPUTS, "a") as file:
            file.write(line.model_dump_json() + "\n")

    def changed(self, name: str, file: str) -> int:
        path = self.folder / name / file
        return path.stat().st_mtime_ns if path.exists() else 0

    def delete(self) -> Deleted:
        return delete_outputs([(self.run_dir, self.folder)])


@pytest.fixture
def output(tmp_path: Path) -> Output:
    return Output(tmp_path)


def test_what_was_recorded_goes_with_its_empty_folders(output: Output) -> None:
    deleted = output.delete()
    assert (deleted.files, deleted.bytes, deleted.left) == (2, 15, [])
    assert not output.folder.exists()
    assert output.folder.parent.is_dir(), "the folder that the user named stays"


def test_files_of_anybody_else_stay_and_their_folder_is_told(output: Output) -> None:
    notes = output.folder / "checkpoint-1" / "notes.txt"
    notes.write_text("mine")
    deleted = output.delete()
    assert deleted.files == 2
    assert deleted.left == [str(output.folder)]
    assert notes.read_text() == "mine"


def test_a_file_that_was_changed_since_stays(output: Output) -> None:
    weights = output.folder / "checkpoint-1" / "weights"
    weights.write_text("edited by hand")
    deleted = output.delete()
    assert (deleted.files, deleted.left) == (1, [str(output.folder)])
    assert weights.read_text() == "edited by hand"


@pytest.mark.parametrize(
    "names",
    [("checkpoint-2/../../..", "x"), ("checkpoint-1", "../../../treasure"), ("checkpoint-1", "/x")],
)
def test_a_record_reaches_nothing_outside(output: Output, names: tuple[str, str]) -> None:
    treasure = output.folder.parent.parent / "treasure"
    treasure.write_text("kept")
    output.record(*names)
    output.delete()
    assert treasure.read_text() == "kept"


def test_no_link_is_followed(output: Output, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights").write_text("kept")
    (output.folder / "checkpoint-2").symlink_to(elsewhere)
    (output.folder / "checkpoint-1" / "link").symlink_to(elsewhere / "weights")
    output.record("checkpoint-2", "weights")
    output.record("checkpoint-1", "link")
    deleted = output.delete()
    assert (elsewhere / "weights").read_text() == "kept"
    assert deleted.left == [str(output.folder)]


def test_another_folder_of_the_same_name_is_left_alone(output: Output, tmp_path: Path) -> None:
    output.folder.rename(tmp_path / "moved")
    (output.folder / "checkpoint-1").mkdir(parents=True)
    (output.folder / "checkpoint-1" / "weights").write_text("of somebody else")
    deleted = output.delete()
    assert deleted.files == 0
    assert (output.folder / "checkpoint-1" / "weights").exists()
    assert (tmp_path / "moved" / "checkpoint-1" / "weights").exists()


def test_an_output_folder_that_is_a_link_by_now_is_left_alone(
    output: Output, tmp_path: Path
) -> None:
    output.folder.rename(tmp_path / "moved")
    output.folder.symlink_to(tmp_path / "moved")
    deleted = output.delete()
    assert deleted.files == 0
    assert (tmp_path / "moved" / "checkpoint-1" / "weights").exists()


def test_a_folder_that_is_reached_through_a_link_by_now_is_left_alone(
    output: Output, tmp_path: Path
) -> None:
    output.folder.parent.rename(tmp_path / "moved")
    output.folder.parent.symlink_to(tmp_path / "moved")
    deleted = output.delete()
    assert (deleted.files, deleted.left) == (0, [str(output.folder)])


def test_a_torn_record_and_files_that_are_gone_are_passed_over(output: Output) -> None:
    (output.folder / "checkpoint-1" / "weights").unlink()
    with open(output.run_dir / OUTPUTS, "a") as file:
        file.write('{"name": "checkpoint-3", "fil')
    deleted = output.delete()
    assert (deleted.files, deleted.left) == (1, [])

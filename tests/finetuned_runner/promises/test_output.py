"""What `data.output_dir` does: through the daemon, which makes a run's folder of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned.v1 import task_service_pb2 as pb2


def files(root: Path) -> set[str]:
    """Every file below a folder."""
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


@pytest.mark.proves("data.output_dir")
def test_each_run_writes_into_a_folder_of_its_own_below(
    daemon: Daemon, scene: Any, train: Any, shop: Any
) -> None:
    """The daemon makes `run-1`, `run-2` in it, and a run writes its results there and nowhere else.

    What lay there before stays as it was.
    """
    scene.output.mkdir()
    (scene.output / "mine.txt").write_text("mine")
    task = daemon.create(scene.play(steps=1), start=True)
    task = daemon.wait(task.name, "COMPLETED")
    first = {name: (scene.output / name).read_bytes() for name in files(scene.output)}
    daemon.tasks.StartTask(pb2.StartTaskRequest(name=task.name))
    daemon.watch(task.name, task.last_seq).until_end()
    runs = daemon.tasks.ListRuns(pb2.ListRunsRequest(parent=task.name)).runs
    folders = [scene.output / "run-2", scene.output / "run-1"]
    assert [Path(run.output_dir) for run in runs] == folders
    assert {path.name for path in scene.output.iterdir()} == {"run-1", "run-2", "mine.txt"}
    assert {name: (scene.output / name).read_bytes() for name in first} == first

    before = files(shop.root)
    run = train(lora={"merge_lora": True}, training={"max_steps": 1, "save_strategy": "steps"})
    assert {path.name for path in run.output.iterdir()} == {"checkpoint-1", "final", "merged"}
    places = (run.output, run.folder)
    new = files(shop.root) - before - {"chats.jsonl"}
    assert all(any((shop.root / name).is_relative_to(p) for p in places) for name in new)

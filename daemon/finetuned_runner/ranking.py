"""The evaluation losses of a run's checkpoints: which is the best, and which may go.

A checkpoint has the evaluation loss of its very step, and none where no evaluation took place
there: nothing is saved for the sake of an evaluation, which the training quota would have to pay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from finetuned_daemon.runs.contract import BestCheckpoint, RunPhase
from finetuned_daemon.runs.manifest import MANIFEST, Manifest
from finetuned_runner import checkpoint
from finetuned_runner.report import Report
from finetuned_runner.room import GivenUp, Room

_MANIFEST_BYTES = 64 << 10


class Ranking:
    """Compares the checkpoints of a run, and with the best of those that it goes on from."""

    def __init__(self, report: Report, room: Room):
        self._report = report
        self._room = room
        self._evaluated: tuple[int, float] | None = None
        self._losses: dict[int, float] = {}
        self._last: tuple[Path, Manifest] | None = None
        self.best_path = ""
        """Folder of the best checkpoint so far; empty: none was evaluated."""
        self.best_loss: float | None = None
        """Its evaluation loss."""

    def restore(self, manifest: Manifest) -> None:
        """Goes on from a checkpoint."""
        self.best_path, self.best_loss = manifest.best_checkpoint, manifest.best_checkpoint_loss

    def evaluated(self, step: int, loss: float, manifest: Manifest) -> None:
        """Takes the loss of an evaluation.

        Where its step was saved before it was evaluated, as with saving by steps and evaluation at
        the epoch's end, the checkpoint's manifest is brought up to date.

        Args:
            step: Of the evaluation.
            loss: May be not finite; then the checkpoint has none.
            manifest: With what the evaluation has changed, for early stopping.
        """
        self._evaluated = (step, loss) if math.isfinite(loss) else None
        if self._last is None or self._last[1].step != step or not self._last[0].is_dir():
            return
        folder, last = self._last
        manifest = self.rank(manifest, folder).model_copy(update={"files": last.files})

        def reseal() -> None:
            self._report.phase(RunPhase.EVALUATING)
            checkpoint.reseal(folder, manifest, self._report)

        try:
            self._room.write(folder / MANIFEST, lambda: _MANIFEST_BYTES, reseal)
        except GivenUp:  # the checkpoint stands as it was
            return
        self.saved(folder, manifest)

    def rank(self, manifest: Manifest, folder: Path) -> Manifest:
        """The manifest of a checkpoint that will stand in `folder`, with its place among all."""
        loss = None
        if self._evaluated is not None and self._evaluated[0] == manifest.step:
            loss = self._evaluated[1]
        is_best = loss is not None and (self.best_loss is None or loss < self.best_loss)
        return manifest.model_copy(
            update={
                "eval_loss": loss,
                "best_checkpoint": str(folder) if is_best else self.best_path,
                "best_checkpoint_loss": loss if is_best else self.best_loss,
            }
        )

    def saved(self, folder: Path, manifest: Manifest) -> None:
        """Takes a ranked checkpoint that stands, and reports it where it is the best."""
        self._last = (folder, manifest)
        if manifest.eval_loss is None:
            return
        self._losses[manifest.step] = manifest.eval_loss
        if manifest.best_checkpoint != self.best_path:
            self.best_path, self.best_loss = str(folder), manifest.eval_loss
            self._report.emit(
                BestCheckpoint(path=str(folder), step=manifest.step, eval_loss=manifest.eval_loss)
            )

    def surplus(self, found: Sequence[tuple[int, Path]], limit: int) -> list[tuple[int, Path]]:
        """Which of a run's checkpoints go, so that `limit` are left; oldest first.

        Neither the newest goes nor the best of the run: as with Hugging Face, the best counts
        within the limit, and with a limit of 1 it is kept beside the newest.
        """
        there = {step: self._losses[step] for step, _ in found if step in self._losses}
        # Of a process before a pause of this run.
        best = {step: self.best_loss for step, path in found if str(path) == self.best_path}
        there |= {step: loss for step, loss in best.items() if loss is not None}
        kept = {found[-1][0]} if found else set[int]()
        if there:
            kept.add(min(there, key=lambda step: (there[step], step)))
        others = [(step, path) for step, path in found if step not in kept]
        return others[: max(0, len(found) - max(limit, len(kept)))]

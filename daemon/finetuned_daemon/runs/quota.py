"""The training quota: each checkpoint that a run saves uses one.

The limit is the operator's (`--training-quota`), no client changes it. What is used stands in a
ledger of the database and stays used, whatever becomes of task and checkpoint. What runs that are
not over, paused ones too, were planned to save and have not saved yet is reserved for them.
"""

from __future__ import annotations

from finetuned_daemon.store.ledger import Ledger
from finetuned_daemon.store.records import Records
from finetuned_daemon.tasks import Run


class Quota:
    """Limit, use, and who may save how many."""

    def __init__(self, limit: int | None, ledger: Ledger, records: Records) -> None:
        self.limit = limit
        """Checkpoints in all; None: any number."""
        self._ledger = ledger
        self._records = records

    @property
    def used(self) -> int:
        """Checkpoints saved so far."""
        return self._ledger.used()

    def reserved(self, but: Run | None = None) -> int:
        """Planned and not saved yet, of all runs that are not over `but` one."""
        return sum(
            max(0, run.planned_checkpoints - run.saved_checkpoints)
            for run in (*self._records.active_runs(), *self._records.paused_runs())
            if but is None or run.key != but.key
        )

    def left(self) -> int | None:
        """What a new run may plan with; None: any number."""
        if self.limit is None:
            return None
        return max(0, self.limit - self.used - self.reserved())

    def of(self, run: Run) -> int | None:
        """Checkpoints that a run's process may save in all, those it has saved included."""
        if self.limit is None:
            return None
        return max(0, run.saved_checkpoints + self.limit - self.used - self.reserved(but=run))

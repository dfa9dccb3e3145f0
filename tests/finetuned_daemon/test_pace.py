"""How often a run is looked at: by a clock that the test sets."""

from __future__ import annotations

import pytest

from finetuned_daemon.runs import pace as module
from finetuned_daemon.runs.pace import Pace


def test_a_run_that_reports_is_looked_at_more_often_while_it_is_watched(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And as seldom as any other once it has been quiet for a while, or nobody watches."""
    now = 1000.0
    monkeypatch.setattr(module.time, "monotonic", lambda: now)
    pace = Pace(0.1)
    assert pace.next(10, is_watched=False) == 0.1
    assert pace.next(10, is_watched=True) == 0.02
    now += 1.0
    assert pace.next(10, is_watched=True) == 0.1
    assert pace.next(20, is_watched=True) == 0.02
    assert Pace(0.01).next(10, is_watched=True) == 0.01, "never less often than without a watcher"

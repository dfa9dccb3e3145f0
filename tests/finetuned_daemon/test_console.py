"""The console of a run is bounded, and its newest lines are there."""

from __future__ import annotations

from pathlib import Path

from finetuned_daemon.runs.bundle import Bundle


def test_a_long_console_begins_anew_and_keeps_its_end(tmp_path: Path) -> None:
    bundle = Bundle(tmp_path)
    bundle.bound_console(100)  # there is none
    with bundle.console.open("ab", buffering=0) as runner:
        runner.write(b"first\n" + b"x" * 200 + b"\nlast\n")
        bundle.bound_console(1000)
        assert bundle.console.stat().st_size == 212
        bundle.bound_console(100)
        assert bundle.console.stat().st_size == 0
        assert (tmp_path / "console.log.1").read_bytes().endswith(b"\nlast\n")
        runner.write(b"after\n")
    assert bundle.console.read_bytes() == b"after\n", "the runner's descriptor stays good"

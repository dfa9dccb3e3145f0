"""The standby of a daemon: what its time may be."""

from __future__ import annotations

import pytest

from finetuned_daemon.main import main


@pytest.mark.parametrize("minutes", ["-1", "nan", "inf", "1e300", "soon"])
def test_a_time_that_is_none_is_refused(
    minutes: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An idle time is some minutes from 0 on, and what is wrong with another is said."""
    monkeypatch.setattr("os.umask", lambda mask: 0o022)
    with pytest.raises(SystemExit) as left:
        main(["serve", f"--standby-idle-minutes={minutes}"])
    assert left.value.code == 2
    assert "must be minutes from 0 to" in capsys.readouterr().err

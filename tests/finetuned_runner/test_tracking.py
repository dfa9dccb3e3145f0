"""Tools of `extensions.report_to`: what they get, and that nothing they do costs a run anything.

Most tools here are made for the test, as packages of the names that the real ones have.
`tests/e2e/test_trackers.py` has the real ones.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.parameters.needs import REPORT_TO
from finetuned_daemon.runs.contract import EndReason, Notice
from finetuned_daemon.runs.manifest import OUTPUTS, WrittenFolder
from finetuned_runner import reporting
from finetuned_runner.trackers import TRACKERS

VARIABLES = (
    *("WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT", "WANDB_SILENT"),
    *("SWANLAB_TERMINAL_PROXY_TYPE", "SWANLAB_PROBE_RUNTIME", "SWANLAB_PROBE_GIT"),
    *("SWANLAB_MODE", "SWANLAB_LOG_DIR", "SWANLAB_PROJECT", "TRACKIO_DIR", "TRACKIO_PROJECT"),
    *("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "MLFLOW_ALLOW_FILE_STORE"),
    *("MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_HTTP_REQUEST_MAX_RETRIES", "GIT_PYTHON_REFRESH"),
)

# Keeps what it is told in a file below the folder that its variable names.
TRACKIO = """
import json, os, pathlib

class Run:
    def __init__(self, **settings):
        self.say(settings)

    def say(self, what):
        with pathlib.Path(os.environ["TRACKIO_DIR"], "told.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\\n")

    def log(self, values, step):
        self.say([step, values])

    def finish(self):
        self.say("finished")

def init(**settings):
    return Run(**settings)
"""


@pytest.fixture(autouse=True)
def _own_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder of packages that come before those that are installed."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("trackio", "wandb"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield folder
    for name in ("trackio", "wandb"):
        sys.modules.pop(name, None)


def notices(run: Any) -> list[Notice]:
    return [notice for notice in run.events(Notice) if notice.field == "extensions.report_to"]


@pytest.mark.proves("extensions.report_to")
def test_the_tool_gets_the_metrics_in_a_folder_of_the_run(shop: Any, packages: Path) -> None:
    """The losses that the run reports, below its output; and they go when its outputs go."""
    (packages / "trackio.py").write_text(TRACKIO)
    run = shop.here(shop.make(extensions={"report_to": "trackio"}))
    assert run.result.end_reason is EndReason.FINISHED
    file = run.output / "trackio" / "told.jsonl"
    settings, *told, last = [json.loads(line) for line in file.read_text().splitlines()]
    assert settings["project"] == "finetuned"
    assert settings["name"].endswith(" run 1")
    assert (
        settings["config"]["data.model_path"] == Path(run.spec.parameters.data.model_path).name
    ), "no folder of this machine"
    assert "data.output_dir" not in settings["config"]
    losses = {step: values["train/loss"] for step, values in told if "train/loss" in values}
    assert losses == pytest.approx(run.losses())
    assert last == "finished"
    records = map(
        WrittenFolder.model_validate_json, (run.folder / OUTPUTS).read_text().splitlines()
    )
    (record,) = [record for record in records if record.name == "trackio"]
    assert record.files["told.jsonl"] == file.stat().st_mtime_ns
    assert notices(run) == []


@pytest.mark.parametrize(
    ("source", "says"),
    [
        (None, "it is not installed; pip install wandb"),
        ("raise ImportError('built for another Python')", "built for another Python"),
        ("import sys; sys.exit('license')", "license"),
        (
            "class Settings:\n    def __init__(self, **_): 1 / 0\ndef init(**_): ...",
            "division by zero",
        ),
        (
            "import os; raise OSError(os.environ['WANDB_API_KEY'] + ' at https://me:pw@host/')",
            "[secret] at https://[secret]@host/",
        ),
    ],
)
def test_a_tool_that_is_missing_or_broken_costs_a_notice(
    shop: Any,
    packages: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str | None,
    says: str,
) -> None:
    """The run is as whole as without it, and no key comes into its log."""
    monkeypatch.setenv("WANDB_API_KEY", "a-key-of-somebody")
    if source is None:
        found = reporting.importlib.util.find_spec
        monkeypatch.setattr(
            "importlib.util.find_spec", lambda name: None if name == "wandb" else found(name)
        )
    else:
        (packages / "wandb.py").write_text(source)
    run = shop.here(shop.make(extensions={"report_to": "wandb"}))
    assert run.result.end_reason is EndReason.FINISHED
    (notice,) = notices(run)
    assert notice.reason == "TRACKER_FAILED"
    assert notice.message == f"The run goes on without wandb, which failed: {says}"
    assert "a-key-of-somebody" not in (run.folder / "events.jsonl").read_text()
    assert not (run.output / "wandb").exists(), "nothing is left of it"


@pytest.mark.parametrize("where", ["begin", "log", "end"])
def test_a_tool_that_never_answers_holds_up_nothing(
    shop: Any, packages: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """The end waits for it a bounded time, and says so."""
    monkeypatch.setattr(reporting, "_END_SECONDS", 0.2)
    method = {"begin": "def __init__(self, **settings):", "log": "def log(self", "end": "def fini"}
    at = TRACKIO.index("\n", TRACKIO.index(method[where]))
    (packages / "trackio.py").write_text(
        f"{TRACKIO[:at]}\n        __import__('threading').Event().wait(){TRACKIO[at:]}"
    )
    run = shop.here(shop.make(extensions={"report_to": "trackio"}))
    assert run.result.end_reason is EndReason.FINISHED
    assert [notice.reason for notice in notices(run)] == ["TRACKER_BEHIND"]


def test_every_tool_that_can_be_chosen_is_there() -> None:
    assert TRACKERS.keys() == REPORT_TO.keys()


@pytest.mark.proves("extensions.report_to")
@pytest.mark.parametrize("tool", TRACKERS)
def test_every_tool_writes_below_the_output_and_uploads_nothing_unless_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str
) -> None:
    """By the tool's own variables, of which those that say where to upload are the user's."""
    before = dict(os.environ)
    TRACKERS[tool].prepare(tmp_path)
    now = os.environ
    places = {
        "tensorboard": True,
        "wandb": now.get("WANDB_DIR") == str(tmp_path) and now.get("WANDB_MODE") == "offline",
        "mlflow": str(tmp_path) in now.get("MLFLOW_TRACKING_URI", ""),
        "trackio": now.get("TRACKIO_DIR") == str(tmp_path),
        "swanlab": now.get("SWANLAB_LOG_DIR") == str(tmp_path)
        and now.get("SWANLAB_MODE") in ("local", "offline"),
    }
    assert places[tool]
    for name in now.keys() - before.keys():
        monkeypatch.delenv(name)
    for name in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        monkeypatch.setenv(name, "theirs")
    TRACKERS[tool].prepare(tmp_path)
    for name in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR"):
        assert os.environ[name] == "theirs"
    for name in VARIABLES:
        os.environ.pop(name, None)

"""The harness of `make bench`: its parts, its tables, its JSON and its exit status. No figure."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCH = Path(__file__).parent / "bench"

FAKE = """\
from table import Options, Part, Row

def run(options: Options) -> Part:
    assert options.quick and options.rounds == 2 and not any(options.folder.iterdir())
    (options.folder / "left").write_text("what a part leaves behind goes away")
    print("work under way")
    return Part("{name}", "one against another", [
        Row("a cost that holds", 1.0, "ms", 2.0, "bare", 0.5),
        Row("a speed", 3.0, "calls/s", 4.0, "bare", {bar}, is_cost=False),
        Row("shown for itself", 12345.0, "MB"),
        Row("nothing to hold it against", 1.0, "s", None, "what is not installed", 1.0),
    ], ["a note on what was left out"])
"""
RAISES = "def run(options):\n    raise ValueError('no such thing')\n"
ENDS = "import os\ndef run(options):\n    os._exit(3)\n"


def bench(
    folder: Path, parts: dict[str, str], *more: str
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """A run of parts that are made here; what it printed and wrote."""
    for name, text in parts.items():
        (folder / f"{name}.py").write_text(text)
    work, file = folder / "work", folder / "found.json"
    work.mkdir()
    command = [sys.executable, str(BENCH / "bench.py"), "--parts", " ".join(parts), "--quick"]
    command += ["--rounds", "2", "--json", str(file), "--folder", str(work), *more]
    command += ["--trial", " ".join(parts)]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert not any(work.iterdir()), "its folders are gone"
    return done, json.loads(file.read_text())


def test_every_row_is_shown_with_its_limit_its_ratio_and_whether_its_bar_is_met(
    tmp_path: Path,
) -> None:
    """The table and the JSON have each figure, and the end has those with bars once more."""
    done, found = bench(tmp_path, {"good": FAKE.format(name="good", bar=0.75)})
    assert done.returncode == 0, done.stderr
    table, _, bars = done.stdout.partition("\nbars\n")
    for line in (
        r"a cost that holds +1\.00 ms +2\.00 +0\.50 +<= 0\.5 +yes +bare",
        r"a speed +3\.00 calls/s +4\.00 +0\.75 +>= 0\.75 +yes +bare",
        r"nothing to hold it against +1\.00 s +<= 1 +what is not installed",
        r"a note on what was left out",
    ):
        assert re.search(line, table), line
    assert "12,345 MB" in table
    assert "good: a speed" in bars
    assert "shown for itself" not in bars
    assert "all bars are met" in bars
    assert (found["is_met"], found["missed"], found["failed"]) == (True, [], [])
    assert {"cpu", "cores", "memory_bytes", "kernel", "python", "versions"} <= set(found["machine"])
    assert found["options"] == {"parts": ["good"], "rounds": 2, "quick": True}
    part = found["parts"][0]
    assert {"load_average", "cores_used_by_others", "seconds"} <= set(part)
    assert [(row["ratio"], row["is_met"]) for row in part["rows"]] == [
        (0.5, True),
        (0.75, True),
        (None, None),
        (None, None),
    ]


def test_a_part_that_fails_is_told_and_stops_no_other(tmp_path: Path) -> None:
    """Its error and the others' figures are there, and the exit status is 1."""
    parts = {"raises": RAISES, "ends": ENDS, "good": FAKE.format(name="good", bar=0.8)}
    done, found = bench(tmp_path, parts)
    assert done.returncode == 1
    assert found["failed"] == ["raises", "ends"]
    assert "ValueError: no such thing (raises.py:2)" in done.stdout
    assert "ended with 3" in done.stdout
    assert found["missed"] == ["good: a speed: 0.75 of bare, not at least 0.8"]
    assert f"missed: {found['missed'][0]}" in done.stdout


def test_a_missed_bar_decides_the_exit_status_unless_the_run_is_quick(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a quick run measures says nothing, so that its bars are shown and no more."""
    monkeypatch.syspath_prepend(str(BENCH))
    from table import Part, Row

    import bench as harness

    row = Row("slow", 3.0, "ms", 1.0, "bare", 2.0)
    measured = harness.Measured("one", Part("one", "about", [row]))
    monkeypatch.setattr(harness, "measure", lambda *_, **__: measured)
    assert harness.main(["--parts", "cli"]) == 1
    assert harness.main(["--parts", "cli", "--quick"]) == 0


@pytest.mark.parametrize("name", ["nothing_like_it", "json", "streams", "a.b"])
def test_a_part_that_there_is_not_is_refused(name: str) -> None:
    """The names of those that there are stand in the message; another module is no part."""
    command = [sys.executable, str(BENCH / "bench.py"), "--parts", name]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert f"no such part: {name}; there are cli start train api idle growth" in done.stderr


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    """Twenty minutes later would be too late."""
    command = [sys.executable, str(BENCH / "bench.py"), "--json", str(tmp_path / "none/found")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "can't be written: No such file or directory" in done.stderr
    assert not done.stdout


def test_a_file_that_can_no_longer_be_written_stops_no_part(tmp_path: Path) -> None:
    """The table is printed to its end, and the exit status tells it."""
    (tmp_path / "results").mkdir()
    gone = (
        "import shutil\ndef run(options):\n"
        f"    shutil.rmtree({str(tmp_path / 'results')!r})\n    raise ValueError('gone')\n"
    )
    parts = {"gone": gone, "good": FAKE.format(name="good", bar=0.75)}
    for name, text in parts.items():
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "work").mkdir()
    command = [sys.executable, str(BENCH / "bench.py"), "--quick", "--rounds", "2"]
    command += ["--parts", "gone good", "--trial", "gone good", "--folder", str(tmp_path / "work")]
    command += ["--json", str(tmp_path / "results/found.json")]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.count("found.json can't be written") == 2
    assert "a cost that holds" in done.stdout
    assert "FAILED: gone" in done.stdout


def test_each_part_that_is_promised_is_there_and_described() -> None:
    """A module with `run` that can be imported, and a section of the README."""
    code = (
        f"import sys; sys.path[:0] = [{str(BENCH)!r}, {str(BENCH.parent)!r}]\n"
        "import bench, importlib\n"
        "for name in bench.PARTS: assert callable(importlib.import_module(name).run), name\n"
        "assert 'torch' not in sys.modules\n"
        "print(*bench.PARTS)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    readme = (BENCH / "README.md").read_text()
    for name in done.stdout.split():
        assert f"\n## {name}" in readme, name

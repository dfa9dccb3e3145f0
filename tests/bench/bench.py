"""`make bench`: measures the parts, prints a table of each, and says which bars are missed.

    python tests/bench/bench.py [--parts "start api"] [--rounds 3] [--quick] [--json FILE]

A part is a module of this folder with `run`, as `table.py` has it. Each runs in a process and a
folder of its own: what one leaves behind, or how it ends, is no matter of the next.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]

from table import Options, Part, Row  # noqa: E402

PARTS = ("cli", "start", "train", "api", "idle", "growth", "fanout")
"""In the order in which they are measured."""

VERSIONS = (
    *("finetuned", "grpcio", "protobuf", "pydantic", "psutil"),
    *("torch", "transformers", "peft", "tokenizers", "trl"),
)
"""Distributions whose versions the figures depend on."""

_QUIET = 0.1
"""Cores that others may use: more is said beside the figures."""
_COLUMNS = ("", "figure", "limit", "ratio", "bar", "met", "against", "")
_MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs")


@dataclass
class Measured:
    """What came of one part."""

    name: str
    part: Part | None = None
    """None: it failed."""
    error: str = ""
    seconds: float = 0.0
    load: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The system's load averages over 1, 5 and 15 minutes, before it."""
    others: float = 0.0
    """Cores that others used before it."""

    @property
    def missed(self) -> list[Row]:
        """Rows whose bar is not met."""
        return [row for row in self.part.rows if row.is_met is False] if self.part else []


@dataclass
class Results:
    """All parts, and what they were measured on."""

    options: dict[str, Any]
    machine: dict[str, Any]
    date: str
    parts: list[Measured] = field(default_factory=list)

    @property
    def failed(self) -> list[str]:
        """Parts that ended by an error."""
        return [measured.name for measured in self.parts if measured.part is None]

    @property
    def missed(self) -> list[str]:
        """A line for each bar that is not met."""
        return [
            f"{measured.name}: {row.what}: {row.ratio:.2f} of {row.against or 'the limit'}, not "
            f"{'at most' if row.is_cost else 'at least'} {row.bar:g}"
            for measured in self.parts
            for row in measured.missed
        ]

    def to_json(self) -> dict[str, Any]:
        """As it is written; `format` goes up when a name goes away or changes its meaning."""
        return {
            "format": 1,
            "date": self.date,
            "machine": self.machine,
            "options": self.options,
            "is_met": not self.missed and not self.failed,
            "missed": self.missed,
            "failed": self.failed,
            "parts": [
                {
                    "name": measured.name,
                    "about": measured.part.about if measured.part else "",
                    "seconds": round(measured.seconds, 1),
                    "load_average": measured.load,
                    "cores_used_by_others": round(measured.others, 3),
                    "error": measured.error,
                    "notes": measured.part.notes if measured.part else [],
                    "rows": [
                        {**asdict(row), "ratio": row.ratio, "is_met": row.is_met}
                        for row in (measured.part.rows if measured.part else [])
                    ],
                }
                for measured in self.parts
            ],
        }


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures; 0 when all bars are met and no part failed, of a quick run when none failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--parts", default=" ".join(PARTS), help="names, separated by blanks")
    parser.add_argument("--rounds", type=int, default=3, help="of each measurement, in turns")
    parser.add_argument("--quick", action="store_true", help="whether it works, not how fast it is")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes all that was measured")
    parser.add_argument(
        "--folder",
        type=Path,
        help="where the parts may write; by default the system's temporary folder, or where that "
        "lies in memory the home folder",
    )
    parser.add_argument("--trial", default="", metavar="PARTS", help=argparse.SUPPRESS)
    parser.add_argument("--in-process", metavar="PART", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.in_process:
        return _run_here(given.in_process, Options(given.rounds, given.quick, given.folder))
    names = given.parts.replace(",", " ").split()
    unknown = [name for name in names if name not in (*PARTS, *given.trial.split())]
    if unknown or not names:
        parser.error(f"no such part: {' '.join(unknown)}; there are {' '.join(PARTS)}")
    if given.rounds < 1:
        parser.error("--rounds is at least 1")
    try:
        _check_writable(given.json)
    except OSError as error:
        parser.error(f"--json {given.json} can't be written: {error.strerror}")
    root = given.folder or disk_folder()
    results = Results(
        {"parts": names, "rounds": given.rounds, "quick": given.quick},
        machine(root),
        datetime.now(UTC).isoformat(timespec="seconds"),
    )
    print(told(results.machine), flush=True)
    is_written = True
    try:
        for name in names:
            results.parts.append(measure(name, given.rounds, quick=given.quick, root=root))
            print(report(results.parts[-1]), flush=True)
            is_written = _write(given.json, results)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    print(summary(results, quick=given.quick))
    is_bad = results.failed or (results.missed and not given.quick) or not is_written
    return 1 if is_bad else 0


def measure(name: str, rounds: int, *, quick: bool, root: Path) -> Measured:
    """Runs one part in a process and a new folder of its own, and waits for it."""
    print(f"\n{name} ...", flush=True)
    # Before the folder is made: what is measured is what others do.
    measured = Measured(name, load=os.getloadavg(), others=others(0.1 if quick else 2.0))
    if measured.others > _QUIET:
        print(f"  others use {measured.others:.1f} cores: compare ratios, not figures", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(
        prefix="ft-bench-", dir=root, ignore_cleanup_errors=True
    ) as folder:
        command = [sys.executable, str(FOLDER / "bench.py"), "--in-process", name]
        command += ["--rounds", str(rounds), "--folder", folder, *(["--quick"] if quick else [])]
        answer = Path(folder) / "answer.json"
        (Path(folder) / "work").mkdir()
        status = subprocess.run(command).returncode
        try:
            said = json.loads(answer.read_bytes())
        except (OSError, ValueError):
            said = {"error": f"its process ended with {status} and without an answer"}
    measured.seconds = time.monotonic() - began
    measured.error = said.get("error", "")
    if not measured.error:
        part = said["part"]
        part["rows"] = [Row(**row) for row in part["rows"]]
        measured.part = Part(**part)
    return measured


def _run_here(name: str, options: Options) -> int:
    folder = options.folder
    try:
        run = importlib.import_module(name).run
        part = run(Options(options.rounds, options.quick, folder / "work"))
        answer = {"part": asdict(part)}
    # A part that ends itself by sys.exit("why") has failed as well.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        traceback.print_exc()
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        said = " ".join(str(error).split())[:300]
        answer = {"error": f"{type(error).__name__}: {said} ({place})"}
    (folder / "answer.json").write_text(json.dumps(answer))
    return 1 if "error" in answer else 0


def _check_writable(path: Path | None) -> None:
    """Raises OSError where the file can't be written; leaves what is there as it is."""
    if path is not None:
        was_there = path.exists()
        path.open("a").close()
        if not was_there:
            path.unlink()


def _write(path: Path | None, results: Results) -> bool:
    """After each part, so that an interruption leaves what was measured; False: it can't be."""
    if path is None:
        return True
    try:
        path.write_text(json.dumps(results.to_json(), indent=1, ensure_ascii=False) + "\n")
    except OSError as error:  # what is measured is printed all the same
        print(f"{path} can't be written: {error.strerror}", file=sys.stderr, flush=True)
        return False
    return True


# --- what is printed


def report(measured: Measured) -> str:
    """What came of one part, as a table."""
    if measured.part is None:
        return f"{measured.name} FAILED: {measured.error}"
    lines = [measured.part.about, *grid([(row.what, row) for row in measured.part.rows])]
    lines += [f"  {note}" for note in measured.part.notes]
    return "\n".join([*lines, f"  {measured.seconds:.0f} s"])


def summary(results: Results, *, quick: bool = False) -> str:
    """All rows that have a bar, and what is missed."""
    rows = [
        (f"{measured.name}: {row.what}", replace(row, detail=""))
        for measured in results.parts
        if measured.part
        for row in measured.part.rows
        if row.bar is not None
    ]
    lines = ["", "bars", *grid(rows)] if rows else [""]
    lines += [f"FAILED: {m.name}: {m.error}" for m in results.parts if m.part is None]
    lines += [f"missed: {line}" for line in results.missed]
    if not results.missed and not results.failed:
        lines.append("all bars are met")
    if quick:
        lines.append("a quick run: the figures say nothing, and no bar decides the exit status")
    return "\n".join(lines)


def grid(rows: Sequence[tuple[str, Row]]) -> list[str]:
    """Lines of a table, with a line of titles."""
    cells = [_COLUMNS, *(_cells(title, row) for title, row in rows)]
    widths = [max(len(line[place]) for line in cells) for place in range(len(_COLUMNS))]
    result = list[str]()
    for line in cells:
        words = [
            word.ljust(width) if place == 0 or place > 5 else word.rjust(width)
            for place, (word, width) in enumerate(zip(line, widths, strict=True))
        ]
        result.append("  ".join(words).rstrip())
    return result


def _cells(title: str, row: Row) -> tuple[str, ...]:
    met = {None: "", True: "yes", False: "NO"}[row.is_met]
    bar = "" if row.bar is None else f"{'<=' if row.is_cost else '>='} {row.bar:g}"
    return (
        title,
        f"{number(row.figure)} {row.unit}".rstrip(),
        "" if row.limit is None else number(row.limit),
        "" if row.ratio is None else f"{row.ratio:.2f}",
        bar,
        met,
        row.against,
        row.detail,
    )


def number(value: float) -> str:
    """Three digits that count, without an exponent."""
    if value == 0 or abs(value) >= 100:
        return f"{value:,.0f}"
    if abs(value) < 0.001:
        return f"{value:.1e}"
    return f"{value:.{2 if abs(value) < 10 else 1}f}" if abs(value) >= 0.1 else f"{value:.4f}"


def told(found: dict[str, Any]) -> str:
    """The machine, in two lines."""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    return (
        f"{found['cores']} cores of {found['cpu']}, {found['memory_bytes'] / 2**30:.0f} GiB, "
        f"{found['kernel']}, Python {found['python']}, {found['file_system']}\n{versions}"
    )


# --- the machine


def machine(root: Path) -> dict[str, Any]:
    """What the figures depend on beside the program."""
    import psutil

    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1,
        "memory_bytes": psutil.virtual_memory().total,
        "kernel": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "file_system": _file_system(root),
        "versions": {name: version for name in VERSIONS if (version := _version(name))},
    }


def others(seconds: float) -> float:
    """Cores that are in use while this process does nothing."""
    import psutil

    before, began = psutil.cpu_times(), time.monotonic()
    time.sleep(seconds)
    after, lasted = psutil.cpu_times(), time.monotonic() - began
    # Time that another machine took (`steal`) is not there for us either.
    idle = ("idle", "iowait", "guest", "guest_nice")
    busy = sum(
        getattr(after, name) - getattr(before, name) for name in after._fields if name not in idle
    )
    return max(0.0, busy / lasted)


def disk_folder() -> Path:
    """Where the parts may write: on a disk, as what a commit costs is part of what is measured."""
    usual = Path(tempfile.gettempdir())
    return usual if _file_system(usual) not in _MEMORY_FILE_SYSTEMS else Path.home()


def _file_system(folder: Path) -> str:
    import psutil

    resolved = folder.resolve()
    holding = [p for p in psutil.disk_partitions(all=True) if resolved.is_relative_to(p.mountpoint)]
    return max(holding, key=lambda p: len(p.mountpoint)).fstype if holding else "?"


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())

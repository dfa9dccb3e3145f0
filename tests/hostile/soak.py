"""Hostile input at length: `python tests/hostile/soak.py --examples 10000 --seed S`.

Prints the seed first and a table last; the exit status is 1 where anything was answered or written
that must not be.
"""

from __future__ import annotations

import argparse
import json
import secrets
import sys
import tempfile
import zlib
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from hostile.fuzz import Fuzzer, Row, sweep, table
from hostile.victim import Victim

_MOST_GROWTH = 300 << 20
"""Bytes: a thousand streams that were open once leave 110 MB in gRPC's pools."""


def main() -> int:
    """Runs all surfaces."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=10_000)
    parser.add_argument("--seed", default="", help="as an earlier soak has printed it, or any text")
    parser.add_argument("--only", default="", help="surfaces whose name contains this")
    parser.add_argument("--json", type=Path, default=None, help="write the rows here as well")
    arguments = parser.parse_args()
    number = _number(arguments.seed or str(secrets.randbelow(1 << 31)))
    print(f"seed {number}", flush=True)
    rows = list[Row]()
    with tempfile.TemporaryDirectory(prefix="hostile-") as root:
        victim = Victim(Path(root))
        try:
            before = victim.memory()
            for row in sweep(Fuzzer(victim), arguments.examples, number, arguments.only):
                rows.append(row)
                if row.first:
                    print(f"{row.surface}: {row.first}\n", flush=True)
            told, after = victim.complaints(), victim.memory()
        finally:
            victim.close()
    print(table(rows))
    print(f"daemon: {before >> 20} MiB before, {after >> 20} MiB after")
    for line in told[:20]:
        print(f"in its log: {line}")
    if arguments.json:
        plain = [{**vars(row), "codes": dict(row.codes)} for row in rows]
        arguments.json.write_text(json.dumps(plain, indent=1))
    if after - before > _MOST_GROWTH:
        print(f"the daemon has grown by more than {_MOST_GROWTH >> 20} MiB")
    if after - before > _MOST_GROWTH or any(row.failures for row in rows) or told:
        print(
            f"again: python tests/hostile/soak.py --examples {arguments.examples} --seed {number}"
        )
        return 1
    return 0


def _number(seed: str) -> int:
    """Hypothesis wants a number; the seeds of the faults are texts."""
    return int(seed) if seed.isdecimal() else zlib.crc32(seed.encode())


if __name__ == "__main__":
    sys.exit(main())

"""Many rounds of every fault, and the table of what came of them.

    python tests/faults/soak.py --rounds 100 --seed S --only NAME --json FILE

The exit status is 0 only where nothing was lost and no state was wrong.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import secrets
import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from faults import registry

_COLUMNS = ("rounds", "acknowledged", "lost", "wrong states", "adoption p50", "p99", "skipped")


def main() -> int:
    """Plays the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=100, help="of each fault")
    parser.add_argument("--first", type=int, default=0, help="number of the first round")
    parser.add_argument("--seed", default="", help="as an earlier soak has printed it")
    parser.add_argument("--only", default="", help="faults with this in their name")
    parser.add_argument("--json", type=Path, help="write all rounds into this file")
    parser.add_argument("--modules", default="", help="of these modules alone, such as kills,files")
    parser.add_argument("--jobs", type=int, default=2, help="rounds at once")
    arguments = parser.parse_args()
    seed = arguments.seed or secrets.token_hex(4)
    modules = arguments.modules.split(",") if arguments.modules else registry.MODULES
    faults = [
        name
        for name, one in registry.load(modules).items()
        if arguments.only in name and one.play.__module__.split(".")[-1] in modules
    ]
    print(f"seed {seed}: {arguments.rounds} rounds of {len(faults)} faults", flush=True)
    began = time.monotonic()
    numbers = range(arguments.first, arguments.first + arguments.rounds)
    rounds = _play(faults, seed, numbers, arguments.jobs, modules)
    print(table(rounds))
    print(f"seed {seed}, {time.monotonic() - began:.0f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(one) for one in rounds], indent=1))
    return 0 if rounds and all(one.is_good for one in rounds) else 1


def _play(
    faults: Sequence[str], seed: str, numbers: Sequence[int], jobs: int, modules: Sequence[str]
) -> list[registry.Round]:
    rounds = list[registry.Round]()
    # Not forked: gRPC has threads.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        waiting: set[Future[registry.Round]] = {
            pool.submit(one_round, name, seed, number, modules)
            for number in numbers
            for name in faults
        }
        try:
            for future in as_completed(waiting):
                one = future.result()
                rounds.append(one)
                if not one.is_good:
                    print(one, flush=True)
        except KeyboardInterrupt:  # what there is so far
            print(f"interrupted after {len(rounds)} of {len(waiting)} rounds", flush=True)
            pool.shutdown(wait=True, cancel_futures=True)
    return rounds


def one_round(name: str, seed: str, number: int, modules: Sequence[str]) -> registry.Round:
    """One round, in a process of the pool."""
    return registry.play(registry.load(modules)[name], seed, number)


def table(rounds: Sequence[registry.Round]) -> str:
    """The rounds as a table in Markdown, a line a fault."""
    lines = ["| fault | " + " | ".join(_COLUMNS) + " |", "|---" * (len(_COLUMNS) + 1) + "|"]
    names = dict.fromkeys(sorted(one.fault for one in rounds))
    lines += [_line(name, [one for one in rounds if one.fault == name]) for name in names]
    lines.append(_line("all", rounds))
    return "\n".join(lines)


def _line(name: str, rounds: Sequence[registry.Round]) -> str:
    adoptions = sorted(seconds for one in rounds for seconds in one.adoptions)
    played = [one for one in rounds if not one.skipped]
    p50, p99 = "", ""
    if adoptions:
        p50 = f"{statistics.median(adoptions):.2f} s"
        p99 = f"{adoptions[min(len(adoptions) - 1, round(0.99 * len(adoptions)))]:.2f} s"
    cells = (
        name,
        str(len(played)),
        str(sum(one.acknowledged for one in played)),
        str(sum(len(one.lost) for one in played)),
        str(sum(len(one.wrong) for one in played)),
        p50,
        p99,
        "; ".join(sorted({one.skipped for one in rounds if one.skipped})),
    )
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    sys.exit(main())

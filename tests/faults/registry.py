"""The faults: each a function that plays one round of it in a world of its own.

A fault does something to real processes, and tells the oracle of its world whatever a client was
told. `play` runs one round and asks the oracle. A round depends on its seed, its number and the
moods of the machine alone, and can be played again.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import random
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from conftest import Scene
from daemon_process import Daemon, eventually
from faults.oracle import ENDED, SECONDS, Oracle
from finetuned.v1 import task_pb2, task_service_pb2

MODULES = (
    *("kills", "pauses", "runners", "upkeep", "files", "processes"),
    *("power", "disks", "clocks", "namespaces"),
)

_GOLDEN = (5**0.5 - 1) / 2

Play = Callable[["World"], None]


class CanNotBeDone(Exception):
    """This machine can't play the fault; the message says what it lacks."""


@dataclass(frozen=True)
class Fault:
    """One way in which things go wrong."""

    name: str
    play: Play
    short_rounds: int
    """Rounds in `make test`."""


FAULTS: dict[str, Fault] = {}


def fault(name: str, *, short_rounds: int = 1) -> Callable[[Play], Play]:
    """Registers a fault."""

    def register(play: Play) -> Play:
        assert name not in FAULTS, name
        FAULTS[name] = Fault(name, play, short_rounds)
        return play

    return register


def load(modules: Sequence[str] = MODULES) -> dict[str, Fault]:
    """All faults of these modules, by name."""
    for name in modules:
        if importlib.util.find_spec(f"faults.{name}") is not None:
            importlib.import_module(f"faults.{name}")
    return FAULTS


class World:
    """Folders, daemons, clients and chance of one round."""

    def __init__(self, root: Path, rng: random.Random, spread: float) -> None:
        self.root = root
        self.rng = rng
        self.spread = spread
        """Where in the life of an operation this round strikes, from 0 to 1."""
        self.oracle = Oracle()
        self.adoptions: list[float] = []
        self._daemons: list[Daemon] = []
        self._scenes: list[Scene] = []
        self._cleanups = contextlib.ExitStack()

    def daemon(
        self, *options: str, root: Path | None = None, runner_module: str = "fake_runner"
    ) -> Daemon:
        """A daemon with a state folder below the root; not started yet."""
        daemon = Daemon(root or self.root, *options, runner_module=runner_module)
        self._daemons.append(daemon)
        return daemon

    def scene(self, name: str = "scene") -> Scene:
        """Model, data and output folder for runs of the fake runner."""
        scene = Scene(self.root / name)
        self._scenes.append(scene)
        return scene

    def finally_(self, clean: Callable[[], object]) -> None:
        """Calls `clean` when the round is over, after the daemons are closed."""
        self._cleanups.callback(clean)

    def adopted(self, seconds: float) -> None:
        """Notes the time from the end of a daemon to the next one's answer with its run."""
        self.adoptions.append(seconds)

    def skip(self, reason: str) -> None:
        """Ends the round: the machine can't play it."""
        raise CanNotBeDone(reason)

    def restart(
        self,
        daemon: Daemon,
        *,
        lives: tuple[str, int] | None = None,
        since: float | None = None,
        may_end: bool = False,
    ) -> None:
        """Kills the daemon where it still lives, and starts the next.

        Args:
            daemon: Its folders.
            lives: Name of a task and pid of its runner, which has to live on: the time to its
                adoption is noted.
            since: When the daemon died (monotonic), where it is dead already.
            may_end: The run may come to its end meanwhile.
        """
        assert daemon.process is not None
        if since is None or daemon.process.poll() is None:
            since = time.monotonic()
        daemon.kill()
        daemon.start()
        if lives is None:
            return
        name, pid = lives

        def adopted() -> bool:
            request = task_service_pb2.ListRunsRequest(parent=name)
            run = daemon.tasks.ListRuns(request, timeout=30, wait_for_ready=True).runs[0]
            assert run.pid in (0, pid), f"{name} was started again: pid {run.pid}, not {pid}"
            ended = may_end and run.state in ENDED
            return ended or (run.pid == pid and run.state == task_pb2.TASK_STATE_RUNNING)

        eventually(adopted, f"{name} is adopted", SECONDS)
        self.adopted(time.monotonic() - since)

    def close(self) -> None:
        """Ends all that is left of the round."""
        for daemon in self._daemons:
            daemon.close()
        for scene in self._scenes:
            scene.close()
        self._cleanups.close()


@dataclass
class Round:
    """What came of one round."""

    fault: str
    seed: str
    number: int
    acknowledged: int = 0
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    skipped: str = ""
    adoptions: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Whether nothing was lost and nothing is wrong."""
        return not self.lost and not self.wrong

    def __str__(self) -> str:
        found = "\n".join(["LOST " + text for text in self.lost] + self.wrong)
        return (
            f"{self.fault}, round {self.number}:\n{found}\n"
            f"again: python tests/faults/soak.py --seed {self.seed} --only '{self.fault}' "
            f"--first {self.number} --rounds 1"
        )


def play(fault: Fault, seed: str, number: int) -> Round:
    """Plays one round of a fault in a fresh folder; never raises for what the fault found."""
    rng = random.Random(f"{seed}/{fault.name}/{number}")
    # Steps of the golden section from a place of the seed's: few rounds or many are spread evenly.
    spread = (random.Random(f"{seed}/{fault.name}").random() + number * _GOLDEN) % 1
    result = Round(fault.name, seed, number)
    root = Path(tempfile.mkdtemp(prefix="ft-"))
    began = time.monotonic()
    world = World(root, rng, spread)
    try:
        with _closed(world):
            fault.play(world)
    except CanNotBeDone as error:
        result.skipped = str(error)
    except Exception:  # noqa: BLE001 - whatever went wrong is what was looked for
        world.oracle.wrong.append(traceback.format_exc() + _last_words(root))
    finally:
        shutil.rmtree(root, ignore_errors=True)
    result.acknowledged = world.oracle.acknowledged
    result.lost, result.wrong = world.oracle.lost, world.oracle.wrong
    result.adoptions = world.adoptions
    result.seconds = time.monotonic() - began
    return result


@contextlib.contextmanager
def _closed(world: World) -> Iterator[None]:
    try:
        yield
    finally:
        world.close()


def _last_words(root: Path) -> str:
    """The end of what the daemons have logged."""
    return "".join(
        f"\n--- {log.relative_to(root)}\n" + "\n".join(log.read_text().splitlines()[-25:])
        for log in root.rglob("daemon.log")
    )

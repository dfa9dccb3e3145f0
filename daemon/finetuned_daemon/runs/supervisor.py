"""Starts runners, takes over those of an earlier daemon, stops them step by step.

And notices every end.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import psutil

from finetuned_daemon.config import Config
from finetuned_daemon.errors import DiskFull
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import (
    DISK_FULL_ERRNOS,
    Control,
    EndReason,
    ProcessIdentity,
    Result,
    Spec,
    StopWish,
    sync_dir,
)
from finetuned_daemon.runs.keeper import Keeper
from finetuned_daemon.runs.outcome import Evidence, decide
from finetuned_daemon.runs.process import Exit, RunnerProcess
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.tasks import Run

_log = logging.getLogger(__name__)

_DISK_FULL_RETRY_SECONDS = 2.0
_PROBE_PREFIX = ".finetuned-probe-"


@dataclass
class _Live:
    """A run whose process is watched."""

    run: Run
    bundle: Bundle
    process: RunnerProcess
    was_alive: bool
    """Whether the process lived when this daemon first saw it."""
    stop_since: float = 0.0
    """Monotonic time from which the deadlines of a stop count.

    After a restart of the daemon they count anew.
    """
    signals: list[signal.Signals] = field(default_factory=list)
    checkpoint_quota: int | None = None
    """What it was last told that it may save."""
    watcher: asyncio.Task[None] | None = None


class Supervisor:
    """The runs that are alive, each watched by one asyncio task."""

    def __init__(
        self, config: Config, keeper: Keeper, quota: Quota, on_end: Callable[[], None]
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._quota = quota
        self._on_end = on_end
        self._live: dict[int, _Live] = {}
        self._endings: set[asyncio.Task[None]] = set()

    def start(self, run: Run) -> None:
        """Starts the process of a queued run. A run that can't be started ends with the reason.

        Nothing is raised for it.
        """
        task = self._keeper.task_of(run)
        run_dir = self._config.runs_dir / task.task_id / str(run.number)
        run = self._keeper.starting(replace(run, run_dir=str(run_dir)))
        self._spawn(run)

    def recover(self, run: Run) -> None:
        """Takes over a run that was RUNNING when the last daemon ended."""
        bundle = Bundle(Path(run.run_dir))
        identity = run.identity
        if identity is None:
            # The last daemon ended between its intent and the record of the process.
            spec = bundle.read_spec()
            if spec is not None:  # its folder is made already
                run = replace(run, output_dir=spec.output_dir)
            claimed = bundle.read_process()
            identity = claimed.identity if claimed else _find_runner(run.run_dir)
            if identity is None:
                _log.info(
                    "run %d of task %d had not begun; it is started again", run.number, run.task_key
                )
                self._spawn(run)
                return
            run = self._keeper.started(run, identity)
        process = RunnerProcess.adopt(identity)
        live = _Live(run, bundle, process, was_alive=not process.gone.is_set())
        if run.stop is not None:
            # The wish is durable before the file is written; the daemon may have died between the
            # two.
            self._tell(live)
        self._watch(live)
        _log.info(
            "run %d of task %d: %s",
            run.number,
            run.task_key,
            "adopted" if live.was_alive else "had ended",
        )

    def stop(self, run: Run, wish: StopWish) -> Run:
        """Asks a live run to end; returns once the wish is durable."""
        live = self._live.get(run.key)
        if live is None:  # it could not be started, and its end is about to be recorded
            return run
        before = live.run
        live.run = self._keeper.stopping(live.run, wish, self._patience(wish))
        if live.run is not before:
            self._tell(live)
        return live.run

    def share_quota(self) -> None:
        """Tells each live run what it may save, where that has changed with the other runs."""
        for live in self._live.values():
            quota = None if live.run.is_probe else self._quota.of(live.run)
            if quota is not None and quota != live.checkpoint_quota and live.run.stop is None:
                live.checkpoint_quota = quota
                self._write_control(live)

    async def close(self) -> None:
        """Stops watching. Runs go on; the next daemon takes them over."""
        watchers = [live.watcher for live in self._live.values() if live.watcher]
        for watcher in watchers:
            watcher.cancel()
        await asyncio.gather(*watchers, return_exceptions=True)
        for live in self._live.values():
            live.process.close()

    # --- start

    def _spawn(self, run: Run) -> None:
        bundle = Bundle(Path(run.run_dir))
        try:
            task = self._keeper.task_of(run)
            if not run.output_dir:
                claim = _claim_probe_dir if run.is_probe else _claim_output_dir
                run = replace(run, output_dir=str(claim(run)))
            spec = Spec(
                task=task.name,
                run=run.number,
                training_type=task.training_type,
                device=run.device,
                num_threads=_num_threads(),
                output_dir=run.output_dir,
                checkpoint_quota=None if run.is_probe else self._quota.of(run),
                cache_dir=str(self._config.cache_dir / "tokens"),
                probe=run.is_probe,
                parameters=run.parameters,
            )
            bundle.create(spec)
            process = RunnerProcess.start(
                [self._config.runner_python, "-P", "-m", self._config.runner_module, run.run_dir],
                cwd=bundle.path,
                console=bundle.console,
                env=_environment(spec),
                umask=self._config.runner_umask,
            )
        except OSError as error:
            reason = (
                EndReason.DISK_FULL if error.errno in DISK_FULL_ERRNOS else EndReason.RUNNER_CRASHED
            )
            outcome = Result(end_reason=reason, message=f"The runner can't be started: {error}.")
            ending = asyncio.get_running_loop().create_task(self._end(run, outcome, Exit()))
            self._endings.add(ending)
            ending.add_done_callback(self._endings.discard)
            return
        try:
            run = self._keeper.started(run, process.identity)
        except DiskFull as error:
            # It runs; who it is stands in process.json too, and is recorded with its first events.
            _log.error("%s", error)
            run = replace(run, identity=process.identity)
        self._watch(
            _Live(run, bundle, process, was_alive=True, checkpoint_quota=spec.checkpoint_quota)
        )

    # --- watch

    def _watch(self, live: _Live) -> None:
        self._live[live.run.key] = live
        live.watcher = asyncio.get_running_loop().create_task(self._follow(live))

    async def _follow(self, live: _Live) -> None:
        while True:
            # The order matters: what was written before the end is read after the end was seen.
            gone = live.process.gone.is_set()
            more = await self._ingest(live)
            if gone and not more:
                break
            if more:
                await asyncio.sleep(0)  # a long file is taken over in chunks; others get their turn
                continue
            self._urge(live)
            try:
                async with asyncio.timeout(self._config.ingest_seconds):
                    await live.process.gone.wait()
            except TimeoutError:
                pass
        await self._finish(live)

    async def _ingest(self, live: _Live) -> bool:
        try:
            live.run, more = self._keeper.ingest(live.run, live.bundle)
        except DiskFull as error:
            # The events wait in the run folder; nothing is lost by trying again.
            _log.error("%s; trying again", error)
            await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)
            return False
        return more

    async def _finish(self, live: _Live) -> None:
        run = live.run
        outcome = decide(
            Evidence(
                result=live.bundle.read_result(),
                exit=live.process.exit,
                was_watched=live.was_alive,
                stop=run.stop,
                was_forced=bool(live.signals),
                step=run.progress.step,
                last_checkpoint=run.last_checkpoint,
                console_tail=live.bundle.console_tail(),
            )
        )
        if live.bundle.read_result() is None:
            _remove_leftovers(Path(run.output_dir))
        await self._end(run, outcome, live.process.exit)

    async def _end(self, run: Run, outcome: Result, exit_: Exit) -> None:
        if run.is_probe and run.output_dir:
            await asyncio.to_thread(_remove_probe_dir, Path(run.output_dir))
            run = replace(run, output_dir="")
        while True:
            try:
                self._keeper.ended(run, outcome, exit_)
                break
            except DiskFull as error:
                _log.error("%s; trying again", error)
                await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)
        self._live.pop(run.key, None)
        _log.info("run %d of task %d ended: %s", run.number, run.task_key, outcome.end_reason)
        self._on_end()

    # --- stop

    def _tell(self, live: _Live) -> None:
        live.stop_since = time.monotonic()
        if not self._write_control(live):  # the signal says the same: save and end
            live.signals.append(signal.SIGTERM)
            live.process.signal_group(signal.SIGTERM)

    def _write_control(self, live: _Live) -> bool:
        try:
            live.bundle.write_control(
                Control(stop=live.run.stop, checkpoint_quota=live.checkpoint_quota)
            )
        except OSError as error:  # a full disk
            _log.warning("run %d can't be told anything: %s", live.run.key, error)
            return False
        return True

    def _patience(self, wish: StopWish) -> float:
        if wish is StopWish.SAVE:
            return self._config.save_deadline_seconds
        return self._config.discard_deadline_seconds

    def _urge(self, live: _Live) -> None:
        """The ladder of a stop: the wish, then SIGTERM to the group, then SIGKILL."""
        if live.run.stop is None:
            return
        waited = time.monotonic() - live.stop_since
        patience = self._patience(live.run.stop)
        ladder = (
            (patience, signal.SIGTERM),
            (patience + self._config.kill_deadline_seconds, signal.SIGKILL),
        )
        for deadline, number in ladder:
            if waited >= deadline and number not in live.signals:
                _log.warning(
                    "run %d: not ended after %.0f s, %s", live.run.key, waited, number.name
                )
                live.signals.append(number)
                live.process.signal_group(number)


def _claim_output_dir(run: Run) -> Path:
    """Makes the first free `run-N` below the task's output folder.

    No run ever writes over another's results.
    """
    parent = Path(run.parameters.data.output_dir or "")
    parent.mkdir(parents=True, exist_ok=True)
    number = run.number
    while True:
        folder = parent / f"run-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            sync_dir(parent)
            return folder


def _claim_probe_dir(run: Run) -> Path:
    """Makes the folder of a probe on the disk that a run writes to, and nothing else there."""
    parent = Path(run.parameters.data.output_dir or "").absolute()
    while not parent.is_dir():
        parent = parent.parent
    return Path(tempfile.mkdtemp(prefix=_PROBE_PREFIX, dir=parent))


def _remove_probe_dir(folder: Path) -> None:
    """Removes the folder of a probe, with what a killed runner has left in it."""
    try:
        if folder.name.startswith(_PROBE_PREFIX):
            shutil.rmtree(folder)
    except FileNotFoundError:
        pass
    except OSError as error:
        _log.warning("what a probe has left in %s stays: %s", folder, error)


def _remove_leftovers(output_dir: Path) -> None:
    """Removes what a killed runner was about to write, and its folder if there is nothing in it."""
    try:
        for path in output_dir.glob(".tmp-*"):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
        if not any(output_dir.iterdir()):
            output_dir.rmdir()
    except OSError as error:  # the output may be gone or read-only by now; nothing depends on it
        _log.warning("leftovers in %s stay: %s", output_dir, error)


def _num_threads() -> int:
    """OpenMP threads of a run.

    As many as `OMP_NUM_THREADS` says where the daemon was started with it; else the cores that this
    process may use, hyperthreads not counted twice.
    """
    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _environment(spec: Spec) -> dict[str, str]:
    """The runner's environment.

    The daemon's, without its secrets, and what torch must find before it is imported.
    """
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("FINETUNED_")},
        # Spinning barriers collapse twelvefold as soon as anything else wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(spec.num_threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }


def _find_runner(run_dir: str) -> ProcessIdentity | None:
    """Looks for a runner that has started but not yet written who it is."""
    for process in psutil.process_iter(["cmdline"]):
        cmdline = process.info["cmdline"] or []
        if cmdline and cmdline[-1] == run_dir:
            return ProcessIdentity.of(process.pid)
    return None

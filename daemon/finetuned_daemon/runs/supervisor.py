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
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from finetuned_daemon import logs
from finetuned_daemon.checkpoints import resuming
from finetuned_daemon.config import Config
from finetuned_daemon.errors import DiskFull
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.runs import starts
from finetuned_daemon.runs.aside import write_task
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import (
    DISK_FULL_ERRNOS,
    Control,
    EndReason,
    Notice,
    Result,
    RunPhase,
    Spec,
    StopWish,
    make_dirs,
    sync_dir,
)
from finetuned_daemon.runs.keeper import Keeper
from finetuned_daemon.runs.launch import Launcher, num_threads
from finetuned_daemon.runs.outcome import (
    Evidence,
    decide,
    pause_of,
    paused,
    waiting_for_room,
)
from finetuned_daemon.runs.outputs import remove_leftovers
from finetuned_daemon.runs.pace import Pace
from finetuned_daemon.runs.process import Exit, RunnerProcess, find_runner
from finetuned_daemon.runs.pulse import Pulse
from finetuned_daemon.runs.quota import Quota
from finetuned_daemon.runs.standby import StandbyStatus
from finetuned_daemon.tasks import PauseReason, Run

if TYPE_CHECKING:
    from finetuned_daemon.runs.room import Need

_log = logging.getLogger(__name__)

_DISK_FULL_RETRY_SECONDS = 2.0
_FAULT_RETRY_SECONDS = 1.0
_LONGEST_REST_SECONDS = 0.25
_TRAINING = (RunPhase.TRAINING, RunPhase.EVALUATING, RunPhase.SAVING)
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
    saves: int = 0
    """How often it was asked to save at once."""
    was_hung: bool = False
    """Whether it was told by a signal to end, for want of signs of life."""
    watcher: asyncio.Task[None] | None = None


class Supervisor:
    """The runs that are alive, each watched by one asyncio task."""

    def __init__(
        self,
        config: Config,
        keeper: Keeper,
        quota: Quota,
        on_end: Callable[[], None],
        is_watched: Callable[[int], bool],
    ) -> None:
        """Takes also what is called when a run has ended, and who says if a task is watched."""
        self._config = config
        self._keeper = keeper
        self._quota = quota
        self._on_end = on_end
        self._is_watched = is_watched
        self._launcher = Launcher(config)
        self._live: dict[int, _Live] = {}
        self._resting = asyncio.Lock()
        self._endings: set[asyncio.Task[None]] = set()

    @property
    def standby(self) -> StandbyStatus:
        """What is to be seen of the standby."""
        return self._launcher.standby.status()

    def begin(self) -> None:
        """Sees to orphans; before the first run."""
        self._launcher.begin()

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
        bundle = Bundle(run.attempt_dir)
        identity = run.identity
        if identity is None:
            # The last daemon ended between its intent and the record of the process.
            spec = bundle.read_spec()
            if spec is not None:  # its folder is made already
                run = replace(run, output_dir=spec.output_dir)
            claimed = bundle.read_process()
            if claimed and not claimed.identity.is_alive() and bundle.has_not_begun():
                bundle.clear()
                claimed = None
            identity = claimed.identity if claimed else find_runner(str(run.attempt_dir))
            if identity is None:
                self._end_later(self._recover_start(run))
                return
            run = self._keeper.started(run, identity)
        process = RunnerProcess.adopt(identity, run.attempt_dir)
        live = _Live(run, bundle, process, was_alive=not process.gone.is_set())
        live.saves = bundle.read_control().save
        live.was_hung = bundle.is_marked_hung()
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

    def pause(self, run: Run) -> Run:
        """Asks a live run to save and to free its device; returns once the wish is durable."""
        live = self._live.get(run.key)
        if live is None:  # as above
            return run
        live.run = self._keeper.pausing(live.run, self._patience(StopWish.SAVE))
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
        await self._launcher.close()

    # --- start

    def _spawn(self, run: Run) -> None:
        bundle = Bundle(run.attempt_dir)
        try:
            task = self._keeper.task_of(run)
            if not run.output_dir:
                claim = _claim_probe_dir if run.is_probe else _claim_output_dir
                run = replace(run, output_dir=str(claim(run)))
            spec = Spec(
                task=task.name,
                run=run.number,
                display_name=task.display_name,
                training_type=task.training_type,
                device=run.device,
                num_threads=num_threads(),
                output_dir=run.output_dir,
                checkpoint_quota=None if run.is_probe else self._quota.of(run),
                cache_dir=str(self._config.cache_dir / "tokens"),
                probe=run.is_probe,
                attempt=run.attempt,
                request_id=run.request_id,
                disk_wait_seconds=self._config.disk_wait_seconds,
                parameters=run.parameters,
            )
            if run.resume_path:
                own = resuming(run.parameters, task.training_type, run.resume_path)
                update = {"parameters": own, "run_parameters": run.parameters}
                spec = spec.model_copy(update=update)
            bundle.create(spec)
            write_task(Path(run.run_dir).parent, task, run)
            process = self._launcher.start(spec, bundle)
        except OSError as error:
            reason = (
                EndReason.DISK_FULL if error.errno in DISK_FULL_ERRNOS else EndReason.RUNNER_CRASHED
            )
            outcome = Result(end_reason=reason, message=f"The runner can't be started: {error}.")
            self._end_later(self._end(run, outcome, Exit()))
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

    def _end_later(self, ending: Coroutine[None, None, None]) -> None:
        task = asyncio.get_running_loop().create_task(ending)
        self._endings.add(task)
        task.add_done_callback(self._endings.discard)

    async def _recover_start(self, run: Run) -> None:
        """Starts a run once more whose start the last daemon did not survive."""
        if run.stop is not None:
            await self._end(run, starts.STOPPED, Exit())
            return
        if run.starts >= starts.MOST_STARTS:
            await self._end(run, starts.daemon_gave_up(run), Exit())
            return
        _log.info("run %d of task %d had not begun; it is started again", run.number, run.task_key)
        self._spawn(await self._restarting(run, starts.after_daemon(run)))

    async def _restarting(self, run: Run, notice: Notice) -> Run:
        """Counts one more start, durably before the process exists."""
        while True:
            try:
                return self._keeper.restarting(run, notice)
            except DiskFull as error:
                _log.error("%s; trying again", error)
                await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)

    async def _start_again(self, live: _Live) -> Result | None:
        """Starts a run once more that crashed at once; a result: it was stopped before."""
        pause = starts.pause(self._config.restart_pause_seconds, live.run.starts)
        console = live.bundle.console_tail()
        notice = starts.again(live.run, live.process.exit, console, pause)
        _log.warning("run %d of task %d: %s", live.run.number, live.run.task_key, notice.message)
        live.run = await self._restarting(live.run, notice)
        live.bundle.clear()
        until = time.monotonic() + pause
        while live.run.stop is None:
            left = until - time.monotonic()
            if left <= 0:
                live.bundle.clear()  # its quota may have been told to nobody meanwhile
                self._spawn(live.run)
                return None
            await asyncio.sleep(min(left, self._config.ingest_seconds))
        return starts.STOPPED

    # --- watch

    def _watch(self, live: _Live) -> None:
        self._live[live.run.key] = live
        live.watcher = asyncio.get_running_loop().create_task(self._keep_following(live))

    async def _keep_following(self, live: _Live) -> None:
        """Follows a run to its end, whatever goes wrong on the way: nobody else would notice it."""
        while True:
            try:
                await self._follow(live)
                return
            except Exception:  # noqa: BLE001 - a fault of ours; the run must not stay RUNNING
                _log.exception("run %d can't be followed; trying again", live.run.key)
            if self._live.get(live.run.key) is not live:
                return
            await asyncio.sleep(_FAULT_RETRY_SECONDS)

    async def _follow(self, live: _Live) -> None:
        task, run = self._keeper.task_of(live.run), live.run
        logs.ABOUT.set(logs.About(request_id=run.request_id, task=task.name, run=run.number))
        pulse = Pulse(self._config, live.bundle.path, live.process.identity)
        pace = Pace(self._config.ingest_seconds)
        while True:
            # The order matters: what was written before the end is read after the end was seen.
            gone = live.process.gone.is_set()
            began = time.monotonic()
            more = await self._ingest(live)
            if gone and not more:
                break
            if more:
                if not gone:
                    self._urge(live)
                await self._rest(time.monotonic() - began)
                continue
            live.bundle.bound_console(BY_NAME["console_bytes"].default)
            self._urge(live)
            self._feel(live, pulse)
            is_watched = self._is_watched(live.run.task_key)
            wait = pace.next(live.run.ingested_bytes, is_watched=is_watched)
            try:
                async with asyncio.timeout(wait):
                    await live.process.gone.wait()
            except TimeoutError:
                pass
        await self._finish(live)

    async def _rest(self, seconds: float) -> None:
        """Leaves the loop to others for as long as a chunk of a long file has held it.

        One run after the other, so that half of the time is others' however many runs catch up.
        """
        async with self._resting:
            await asyncio.sleep(min(seconds, _LONGEST_REST_SECONDS))

    async def _ingest(self, live: _Live) -> bool:
        try:
            live.run, more = self._keeper.ingest(live.run, live.bundle)
        except DiskFull as error:
            # The events wait in the run folder; nothing is lost by trying again.
            gone = live.process.gone.is_set()
            _log.error("%s; trying again", error)
            await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)
            return gone  # its end is not recorded before its events
        except OSError as error:
            _log.error("the events of run %d can't be read: %s", live.run.key, error)
            await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)
            return False
        return more

    async def _finish(self, live: _Live) -> None:
        exit_, console = live.process.exit, live.bundle.console_tail()
        result = live.bundle.read_result()
        if result is None and exit_.code == starts.EXIT_CLAIMED and self._take_over(live):
            return
        crashed = (
            result is None
            and not live.was_hung
            and starts.crashed_at_once(live.run, exit_, console)
        )
        if crashed and live.run.starts < starts.MOST_STARTS:
            result = await self._start_again(live)
            if result is None:
                return
        run = live.run
        outcome = decide(
            Evidence(
                result=result,
                exit=exit_,
                was_watched=live.was_alive,
                stop=run.stop,
                was_forced=bool(live.signals),
                was_hung=live.was_hung,
                step=run.progress.step,
                last_checkpoint=run.last_checkpoint,
                console_tail=console,
            )
        )
        if crashed and result is None:
            outcome = starts.given_up(outcome, run.starts, console)
        if live.bundle.read_result() is None:
            remove_leftovers(Path(run.output_dir), keep_folder=run.pause is not None)
        await self._end(run, outcome, live.process.exit)

    async def _end(self, run: Run, outcome: Result, exit_: Exit) -> None:
        if run.is_probe and run.output_dir:
            await asyncio.to_thread(_remove_probe_dir, Path(run.output_dir))
            run = replace(run, output_dir="")
        from finetuned_daemon.runs.room import needs_of  # a daemon starts sooner without

        needs: list[Need] = []
        if outcome.end_reason is EndReason.DISK_FULL and not run.is_probe:
            task = self._keeper.task_of(run)
            needs = await asyncio.to_thread(
                needs_of, run, task.training_type, self._config.runs_dir
            )
        while True:
            try:
                live = self._live.get(run.key)
                if live is not None and not run.is_probe:
                    run = live.run  # somebody may have asked for a stop meanwhile
                self._record_end(run, outcome, exit_, needs)
                break
            except DiskFull as error:
                _log.error("%s; trying again", error)
                await asyncio.sleep(_DISK_FULL_RETRY_SECONDS)
        ended = self._live.pop(run.key, None)
        if ended is not None and ended.was_alive and not self._trains():
            self._launcher.warm(run.parameters.data.model_path or "")
        _log.info("run %d of task %d ended: %s", run.number, run.task_key, outcome.end_reason)
        self._on_end()

    def _trains(self) -> bool:
        """Whether the runs that are left need all the cores."""
        cores = os.cpu_count() or 1
        needed = sum(num_threads() if i.run.device == "cpu" else 1 for i in self._live.values())
        return bool(self._live) and needed >= cores

    def _record_end(self, run: Run, outcome: Result, exit_: Exit, needs: Sequence[Need]) -> None:
        reason = pause_of(run, outcome)
        if reason is None:
            self._keeper.ended(run, outcome, exit_)
            return
        if reason is PauseReason.DISK_FULL:
            message = waiting_for_room(run, outcome, needs)
        else:
            message = paused(run, outcome, exit_)
        outcome = outcome.model_copy(update={"message": message})
        self._keeper.paused(run, outcome, exit_, reason)

    def _take_over(self, live: _Live) -> bool:
        """Watches the process that has the folder in place of ours; False: there is none."""
        claimed = live.bundle.read_process()
        if claimed is None or not claimed.identity.is_alive():
            return False
        # A daemon before this one had started it, and ended before the process could be seen.
        _log.warning("run %d is process %d's", live.run.key, claimed.identity.pid)
        run = replace(live.run, identity=claimed.identity)
        process = RunnerProcess.adopt(claimed.identity, run.attempt_dir)
        other = replace(live, run=run, process=process, signals=[], was_alive=True)
        if run.stop is not None:
            self._tell(other)
        self._watch(other)
        return True

    def _feel(self, live: _Live, pulse: Pulse) -> None:
        """Says where a runner gives no sign of life, and ends it where that lasts too long."""
        notice = pulse.look(has_begun=live.run.ingested_seq > 0)
        if notice is not None:
            _log.warning("run %d: %s", live.run.key, notice.message)
            try:
                self._keeper.notice(live.run, notice)
            except DiskFull as error:  # the log of the daemon has it
                _log.error("%s", error)
        number = pulse.due
        if number is not None and number not in live.signals:
            _log.warning("run %d gives no sign of life: %s", live.run.key, number.name)
            live.was_hung = True
            try:
                live.bundle.mark_hung()
            except OSError as error:  # a full disk; this daemon knows it all the same
                _log.warning("%s", error)
            live.signals.append(number)
            live.process.signal_group(number)

    async def save_now(self, seconds: float) -> None:
        """Asks each live run for a checkpoint, and waits for them, but no longer than this.

        One that has not begun to train, or that is about to end, has none to save or saves anyway.
        """
        waiting = dict[int, int]()
        for key, live in self._live.items():
            if live.run.is_probe or live.run.stop is not None:
                continue
            live.saves += 1
            phase = self._keeper.task_of(live.run).phase
            if self._write_control(live) and phase in _TRAINING:
                waiting[key] = live.run.saved_checkpoints
        until = time.monotonic() + seconds
        while waiting and time.monotonic() < until:
            await asyncio.sleep(min(0.02, seconds))
            waiting = {
                key: saved
                for key, saved in waiting.items()
                if key in self._live and self._live[key].run.saved_checkpoints == saved
            }
        if waiting:
            _log.warning("%d runs had no time to save before the machine sleeps", len(waiting))

    # --- stop

    def _tell(self, live: _Live) -> None:
        live.stop_since = time.monotonic()
        if not self._write_control(live):  # the signal says the same: save and end
            live.signals.append(signal.SIGTERM)
            live.process.signal_group(signal.SIGTERM)

    def _write_control(self, live: _Live) -> bool:
        try:
            live.bundle.write_control(
                Control(
                    stop=live.run.stop,
                    checkpoint_quota=live.checkpoint_quota,
                    save=live.saves,
                )
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
    make_dirs(parent)
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

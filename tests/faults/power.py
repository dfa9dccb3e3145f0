"""Loss of power, and reboots: what no sync covered is dropped, and no process lives.

One recording of a daemon and its runs gives many disks: power is lost at any point of it.
"""

from __future__ import annotations

import bisect
import copy
import logging
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc

from daemon_process import Daemon
from faults import real
from faults.oracle import Oracle, Watcher
from faults.recorder.machine import Machine
from faults.recorder.replay import Disk, Node, Op, Record, answered_by, read
from faults.registry import World, fault
from finetuned._paths import paths
from finetuned.v1 import (
    parameters_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import EVENTS, RESULT, SPEC
from finetuned_daemon.runs.manifest import OUTPUTS, WrittenFolder
from finetuned_runner.checkpoint import CheckpointBroken, verify_checkpoint
from finetuned_runner.token_store import TokenCache

_OPERATIONS = 14
_CUTS = 2
_CUTS_WITHOUT_DAEMON = 40

Say = Callable[[Oracle], object]


@dataclass
class _Told:
    """An answer, and where in the record it was there."""

    position: int
    done: Say
    tried: Say | None


@dataclass
class Story:
    """What clients were told, held against the record; takes the place of an oracle.

    Whoever tells an oracle something (`created`, `saw` ...) can tell it a story.
    """

    log: Path
    told: list[_Told] = field(default_factory=list)
    epoch_may_change = False

    def tell(self, done: Say, tried: Say | None = None) -> None:
        """Notes an answer that has just come.

        Args:
            done: Tells an oracle of it.
            tried: Tells an oracle that it may have come about, where nobody was told.
        """
        self.told.append(_Told(self.log.stat().st_size, done, tried))

    def saw(self, name: str, event: Any) -> None:
        """As of an oracle."""
        self.tell(lambda oracle: oracle.saw(name, event))

    def saw_epoch(self, epoch: str) -> None:
        """As of an oracle."""
        self.tell(lambda oracle: oracle.saw_epoch(epoch))

    def must(self, holds: object, sentence: str) -> None:
        """As of an oracle."""
        if not holds:
            self.tell(lambda oracle: oracle.must(holds, sentence))

    def at(self, records: list[Record], cut: int) -> Oracle:
        """What an oracle has heard when the power goes; `cut` is a place in the record."""
        oracle = Oracle()
        oracle.steps_are_dense = False  # the end of an event file may be lost
        for one in self.told:
            if answered_by(records, one.position) <= cut:
                one.done(oracle)
            elif one.tried is not None:
                one.tried(oracle)
        return oracle


class _Recorded:
    """A disk, and the daemon whose folders are on it."""

    def __init__(self, world: World, *options: str, runner_module: str = "fake_runner") -> None:
        self.world = world
        self.root = world.root / "disk"
        self.root.mkdir(mode=0o700)
        self.daemon = world.daemon(*options, runner_module=runner_module)
        # Folders that are not there yet: their parents have to last too.
        self.daemon.paths = paths(self.root / "var" / "lib" / "state", world.root / "run")
        self.output = self.root / "home" / "user" / "out"
        self.machine = Machine(world, self.daemon)
        self.log = self.machine.record(self.root)
        self.log.touch()
        self._strict = Disk(self.root, ordered=False)
        self._ordered = Disk(self.root, ordered=True)
        self.story = Story(self.log)
        self.records = list[Record]()

    def end(self) -> None:
        """Ends all processes and reads what was recorded."""
        _end(self.daemon)
        self.machine.record_no_more()
        self.records = read(self.log)
        whole = copy.deepcopy(self._strict)
        for record in self.records:
            whole.apply(record)
        whole.compare()

    def cut(self, index: int) -> Disk:
        """Puts a disk in place as it may be if power is lost after a record.

        Returns the disk as processes saw it.
        """
        rng = self.world.rng
        disk = copy.deepcopy(self._ordered if rng.random() < 0.5 else self._strict)
        for record in self.records[: index + 1]:
            disk.apply(record)
        shutil.rmtree(self.root)
        disk.lose_power(rng, self.root)
        self.machine.reboot()
        return disk

    def some_cut(self) -> int:
        """Where power is lost: anywhere, or just when a client was answered."""
        rng = self.world.rng
        if rng.random() < 0.5:
            position = answered_by(self.records, rng.choice(self.story.told).position)
            return bisect.bisect_left([record.at for record in self.records], position)
        return rng.randrange(len(self.records))

    def removed(self, index: int) -> set[str]:
        """The folders that had lost their names at a cut."""
        return {r.path for r in self.records[: index + 1] if r.op is Op.RENAME}

    def told_by(self, index: int) -> Oracle:
        """What clients had been told at a cut."""
        return self.story.at(self.records, self.records[index].at)


def _end(daemon: Daemon) -> None:
    """Ends all processes at once, as the end of power does."""
    daemon.close()


def _if_known(name: str, say: Say) -> Say:
    """Says it to an oracle that knows the task or template."""

    def said(oracle: Oracle) -> None:
        if oracle.knows(name):
            say(oracle)

    return said


def _judge(recorded: _Recorded, index: int) -> None:
    """Starts a daemon on the disk that is in place, and compares."""
    daemon, oracle = recorded.daemon, recorded.told_by(index)
    oracle.pruned(recorded.removed(index))  # by save_total_limit, before it was reported
    daemon.start()
    try:
        tasks = daemon.tasks.ListTasks(task_service_pb2.ListTasksRequest(page_size=1)).tasks
        seen = oracle.epoch
        epoch = seen
        if tasks:
            request = task_service_pb2.ListEventsRequest(parent=tasks[0].name, page_size=1)
            epoch = daemon.tasks.ListEvents(request).log_epoch
        oracle.epoch_may_change = True
        oracle.check(daemon, events=epoch == seen)
        if epoch != seen:
            oracle.must(not seen or epoch, "a log has no epoch")
    finally:
        _end(daemon)
        _merge(recorded.world.oracle, oracle, f"power lost after record {index}")


def _merge(into: Oracle, oracle: Oracle, where: str) -> None:
    into.acknowledged += oracle.acknowledged
    into.lost += [f"{where}: {text}" for text in oracle.lost]
    into.wrong += [f"{where}: {text}" for text in oracle.wrong]


# --- with the fake runner: every kind of answer


class _Client:
    """Does what clients do, at random, and tells the story."""

    def __init__(self, recorded: _Recorded) -> None:
        self._daemon, self._story = recorded.daemon, recorded.story
        self._rng = recorded.world.rng
        scene = recorded.world.scene()
        self._parameters = scene.play(
            steps=self._rng.randint(2, 30), save_steps=self._rng.randint(1, 9), durable=True
        )
        self._parameters.data.output_dir = str(recorded.output)
        self._tasks = dict[str, task_pb2.Task]()
        self._templates = dict[str, Any]()
        self._watchers = list[Watcher]()

    def act(self) -> None:
        """One operation."""
        ways = [self.create, self.create, self.template]
        if self._tasks:
            ways += [self.edit, self.start, self.start, self.stop, self.pause, self.delete]
            ways += [self.wait, self.wait]
        if self._templates:
            ways += [self.edit_template, self.delete_template]
        try:
            self._rng.choice(ways)()
        except grpc.RpcError as error:  # the state forbids it; nothing was promised
            code = error.code()
            allowed = (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.ABORTED)
            if code not in allowed:
                raise

    def leave(self) -> None:
        """Ends the watches."""
        for watcher in self._watchers:
            watcher.leave()

    def _some(self) -> task_pb2.Task:
        return self._tasks[self._rng.choice(sorted(self._tasks))]

    def create(self) -> None:
        task = self._daemon.create(self._parameters, start=self._rng.random() < 0.5)
        self._tasks[task.name] = task
        self._story.tell(
            lambda oracle: oracle.created(task), lambda oracle: oracle.tried_create(task.name)
        )
        watcher = Watcher(self._story, self._daemon, task.name)  # type: ignore[arg-type]
        watcher.start()
        self._watchers.append(watcher)

    def edit(self) -> None:
        name = self._some().name
        edit = task_pb2.Task(name=name, display_name=f"named {self._rng.randint(0, 999)}")
        request = task_service_pb2.UpdateTaskRequest(task=edit)
        request.update_mask.paths.append("display_name")
        task = self._daemon.tasks.UpdateTask(request).task
        self._story.tell(
            lambda oracle: oracle.edited(task),
            _if_known(name, lambda oracle: oracle.tried_edit(task)),
        )

    def start(self) -> None:
        request = task_service_pb2.StartTaskRequest(name=self._some().name)
        task = self._daemon.tasks.StartTask(request).task
        self._story.tell(lambda oracle: oracle.started(task))

    def stop(self) -> None:
        name = self._some().name
        request = task_service_pb2.StopTaskRequest(name=name, discard=self._rng.random() < 0.5)
        self._daemon.tasks.StopTask(request)
        self._story.tell(lambda oracle: oracle.stop_wished(name))

    def pause(self) -> None:
        name = self._some().name
        try:
            self._daemon.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=name))
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return
            raise
        self._story.tell(lambda oracle: oracle.stop_wished(name))

    def delete(self) -> None:
        name = self._some().name
        self._daemon.tasks.DeleteTask(task_service_pb2.DeleteTaskRequest(name=name))
        del self._tasks[name]
        self._story.tell(
            lambda oracle: oracle.deleted(name), lambda oracle: oracle.tried_delete(name)
        )

    def wait(self) -> None:
        name = self._some().name
        if self._daemon.get(name).state in (
            task_pb2.TASK_STATE_QUEUED,
            task_pb2.TASK_STATE_RUNNING,
        ):
            self._daemon.wait(name, "COMPLETED", "STOPPED", "FAILED", "PAUSED")

    def template(self) -> None:
        request = template_service_pb2.CreateTemplateRequest(
            template=template_service_pb2.Template(
                display_name=f"template {len(self._templates)}",
                training_type=task_pb2.TRAINING_TYPE_SFT,
                parameters=self._parameters_of_template(),
            )
        )
        template = self._daemon.templates.CreateTemplate(request).template
        self._templates[template.name] = template
        self._story.tell(lambda oracle: oracle.template(template))

    def edit_template(self) -> None:
        name = self._rng.choice(sorted(self._templates))
        request = template_service_pb2.UpdateTemplateRequest(
            template=template_service_pb2.Template(
                name=name, parameters=self._parameters_of_template()
            )
        )
        request.update_mask.paths.append("parameters")
        template = self._daemon.templates.UpdateTemplate(request).template
        self._templates[name] = template
        self._story.tell(
            lambda oracle: oracle.template(template),
            _if_known(name, lambda oracle: oracle.tried_template(template)),
        )

    def delete_template(self) -> None:
        name = self._rng.choice(sorted(self._templates))
        request = template_service_pb2.DeleteTemplateRequest(name=name)
        self._daemon.templates.DeleteTemplate(request)
        del self._templates[name]
        self._story.tell(
            lambda oracle: oracle.template_deleted(name),
            lambda oracle: oracle.tried_template_delete(name),
        )

    def _parameters_of_template(self) -> parameters_pb2.Parameters:
        return parameters_pb2.Parameters(
            training=parameters_pb2.TrainingParameters(max_steps=self._rng.randint(1, 999))
        )


@fault("power lost", short_rounds=2)
def power_lost(world: World) -> None:
    """Power goes at any point of what clients do."""
    recorded = _Recorded(world)
    recorded.daemon.start()
    client = _Client(recorded)
    for _ in range(_OPERATIONS):
        client.act()
    client.leave()
    if world.rng.random() < 0.2:
        recorded.daemon.stop()
    recorded.end()
    for _ in range(_CUTS):
        index = recorded.some_cut()
        recorded.cut(index)
        _judge(recorded, index)


@fault("machine reboots", short_rounds=1)
def machine_reboots(world: World) -> None:
    """Runs are interrupted, the queue begins, and what was paused stays paused."""
    daemon = world.daemon()
    machine = Machine(world, daemon)
    daemon.start()
    scenes = [world.scene(name) for name in ("runs", "waits", "paused", "pending")]
    tasks = list[task_pb2.Task]()
    for scene in scenes:
        parameters = scene.play(steps=4, gated=scene is scenes[0], save_steps=1)
        task = daemon.create(parameters, start=scene is not scenes[-1])
        world.oracle.created(task)
        tasks.append(task)
    runs, waits, paused, pending = (task.name for task in tasks)
    daemon.tasks.PauseTask(task_service_pb2.PauseTaskRequest(name=paused))
    world.oracle.stop_wished(paused)
    steps = world.rng.randint(0, 3)
    scenes[0].let_pass(steps)
    if steps:
        with daemon.watch(runs) as watch:
            watch.until_step(steps)
    if world.rng.random() < 0.5:
        daemon.stop()
    _end(daemon)
    machine.reboot()
    daemon.start()
    for name, state in ((runs, "FAILED"), (waits, "COMPLETED"), (paused, "PAUSED")):
        task = daemon.wait(name, "COMPLETED", "FAILED", "STOPPED", "PAUSED")
        world.oracle.must(
            task.state == task_pb2.TaskState.Value(f"TASK_STATE_{state}"),
            f"{name} is not {state} after a reboot: {task}",
        )
        is_interrupted = task.end_reason == task_pb2.END_REASON_INTERRUPTED
        world.oracle.must(is_interrupted == (name == runs), f"{name} ended otherwise: {task}")
    world.oracle.must(
        daemon.get(pending).state == task_pb2.TASK_STATE_PENDING, "who did not start begins"
    )
    daemon.tasks.ResumeTask(task_service_pb2.ResumeTaskRequest(name=paused))
    daemon.wait(paused, "COMPLETED")
    world.oracle.check(daemon)


# --- with the real runner: checkpoints, result, tokens


@fault("power lost with a real run")
def power_lost_with_a_real_run(world: World) -> None:
    """Power goes at any point of a real run: what was reported as saved is whole."""
    recorded = _Recorded(world, runner_module="finetuned_runner")
    daemon = recorded.daemon.start()
    parameters = real.parameters(
        world, recorded.output, max_steps=9, save_steps=3, save_total_limit=2
    )
    task = daemon.create(parameters, start=True)
    recorded.story.tell(
        lambda oracle: oracle.created(task), lambda oracle: oracle.tried_create(task.name)
    )
    watcher = Watcher(recorded.story, daemon, task.name)  # type: ignore[arg-type]
    watcher.start()
    stops_early = world.rng.random() < 0.3
    if stops_early:
        with daemon.watch(task.name) as watch:
            watch.until_step(world.rng.randint(1, 8))
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=task.name))
        recorded.story.tell(lambda oracle: oracle.stop_wished(task.name))
    task = daemon.wait(task.name, "COMPLETED", "STOPPED", "FAILED")
    world.oracle.must(
        task.state in (task_pb2.TASK_STATE_COMPLETED, task_pb2.TASK_STATE_STOPPED),
        f"the run itself went wrong: {task}",
    )
    watcher.until(task.last_seq)
    watcher.leave()
    recorded.end()
    for number in range(_CUTS_WITHOUT_DAEMON):
        index = recorded.some_cut()
        seen = recorded.cut(index)
        where = f"power lost after record {index} (disk {number})"
        found = list(_what_is_wrong(recorded, index, seen))
        world.oracle.lost += [f"{where}: {text}" for text in found]
    last = recorded.some_cut()
    recorded.cut(last)
    _judge(recorded, last)


def _what_is_wrong(recorded: _Recorded, index: int, seen: Disk) -> Iterator[str]:
    """What is missing or half there in the folders of the run, without a daemon."""
    removed = recorded.removed(index)
    for path in recorded.told_by(index).checkpoints:
        if path not in removed and not Path(path).is_dir():
            yield f"{path} was reported and is not there"
    written = dict(seen.files())
    run_dirs = [spec.parent for spec in recorded.daemon.paths.state_dir.glob(f"runs/*/*/{SPEC}")]
    listed = {name for run_dir in run_dirs for name in _listed(run_dir / OUTPUTS)}
    for folder in recorded.output.glob("*/*"):
        if folder.name.startswith(".tmp-") or not folder.is_dir():
            continue
        if folder.name not in listed:
            yield f"{folder} is there, and {OUTPUTS} does not name it"
        if folder.name.startswith("checkpoint-"):
            try:
                verify_checkpoint(folder)
            except CheckpointBroken as error:
                yield f"half a checkpoint: {error}"
            continue
        prefix = str(folder.relative_to(recorded.root)) + "/"
        for name, node in written.items():
            left = recorded.root / name
            if (
                name.startswith(prefix)
                and node.kind == stat.S_IFREG
                and (not left.is_file() or left.read_bytes() != bytes(node.content))
            ):
                yield f"{left} is not what was written"
    for run_dir in run_dirs:
        result = Bundle(run_dir).read_result()
        if (run_dir / RESULT).exists() and result is None:
            yield f"{run_dir / RESULT} can't be read"
        name = str((run_dir / EVENTS).relative_to(recorded.root))
        if result is not None and (run_dir / EVENTS).read_bytes() != bytes(written[name].content):
            yield f"{run_dir} has a result, and not all events"
        if result is not None and result.output_path and not Path(result.output_path).is_dir():
            yield f"{run_dir} has a result, and no {result.output_path}"
    yield from _wrong_tokens(recorded, written)


def _wrong_tokens(recorded: _Recorded, written: dict[str, Node]) -> Iterator[str]:
    logging.getLogger(TokenCache.__module__).setLevel(logging.ERROR)  # it says what is damaged
    folder = recorded.daemon.paths.state_dir / "cache" / "tokens"
    if not folder.is_dir():
        return
    cache = TokenCache(folder)
    for kept in list(folder.iterdir()):
        if kept.name.startswith("."):
            continue
        found = cache.find(kept.name)  # what is damaged is not there, and nothing is raised
        if found is None:
            continue
        found[0].close()
        name = str((kept / "tokens").relative_to(recorded.root))
        if (recorded.root / name).read_bytes() != bytes(written[name].content):
            yield f"{kept} has other tokens than were kept"


def _listed(outputs: Path) -> list[str]:
    """The folders that a run recorded writing."""
    if not outputs.exists():
        return []
    lines = outputs.read_bytes().split(b"\n")[:-1]
    return [WrittenFolder.model_validate_json(line).name for line in lines if line.strip(b"\0")]

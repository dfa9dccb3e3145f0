"""The client's side of the story, and whether the daemon's is the same afterwards.

A fault calls a method here for each answer that a client got; `check` compares through the API
alone. What was tried but not answered may be there or not, and is told by `tried_...` beforehand.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Set
from pathlib import Path
from typing import Any

import grpc
import psutil

from daemon_process import Daemon, eventually
from finetuned.v1 import event_pb2, task_pb2, task_service_pb2, template_service_pb2

SECONDS = 30.0
"""How long a call may take, and what has to come of itself."""

ENDED = frozenset(
    {
        task_pb2.TASK_STATE_COMPLETED,
        task_pb2.TASK_STATE_STOPPED,
        task_pb2.TASK_STATE_FAILED,
    }
)
_PAGE = 1000


class Oracle:
    """What was acknowledged to clients in one round. Safe to use from several threads."""

    def __init__(self) -> None:
        self.acknowledged = 0
        """Answers and events that a client got."""
        self.lost: list[str] = []
        """Sentences on what was acknowledged and is not there."""
        self.wrong: list[str] = []
        """Sentences on states that must not be."""
        self.steps_are_dense = True
        """Each run reports each of its steps once, as the fake runner does while nobody tampers
        with its events and it is not paused."""
        self.epoch_may_change = False
        """After a loss of power, or a backup that was put back."""
        self._lock = threading.Lock()
        self._tasks: dict[str, list[task_pb2.Task]] = {}  # what it may be, the last one first
        self._tried: set[str] = set()
        self._deleted: set[str] = set()
        self._maybe_deleted: set[str] = set()
        self._runs: dict[str, int] = {}
        self._to_end: set[str] = set()
        self._templates: dict[str, list[template_service_pb2.Template]] = {}
        self._maybe_templates: set[str] = set()
        self._seen: dict[str, dict[int, bytes]] = defaultdict(dict)
        self._epoch = ""
        self._queue: list[str] = []
        self._checkpoints: dict[str, set[str]] = defaultdict(set)

    # --- what a client was told

    def created(self, task: task_pb2.Task) -> None:
        """CreateTask answered."""
        with self._lock:
            self.acknowledged += 1
            self._tasks[task.name] = [task]
            self._tried.discard(task.name)
            if task.run:
                self._runs[task.name] = task.run

    def tried_create(self, name: str) -> None:
        """CreateTask was called; the answer may never come."""
        self._tried.add(name)

    def edited(self, task: task_pb2.Task) -> None:
        """UpdateTask answered."""
        with self._lock:
            self.acknowledged += 1
            self._tasks[task.name] = [task]

    def tried_edit(self, task: task_pb2.Task) -> None:
        """UpdateTask was called; with this, if it came through."""
        with self._lock:
            self._tasks[task.name].append(task)

    def deleted(self, name: str) -> None:
        """DeleteTask answered."""
        with self._lock:
            self.acknowledged += 1
            self._deleted.add(name)
            self._forget(name)

    def tried_delete(self, name: str) -> None:
        """DeleteTask was called."""
        self._maybe_deleted.add(name)

    def started(self, task: task_pb2.Task) -> None:
        """StartTask answered."""
        with self._lock:
            self.acknowledged += 1
            self._runs[task.name] = max(task.run, self._runs.get(task.name, 0))

    def queued(self, names: Iterable[str]) -> None:
        """The queue of a device was shown in this order."""
        self._queue = list(names)

    def stop_wished(self, name: str) -> None:
        """StopTask or PauseTask answered: the run does not go on for ever."""
        with self._lock:
            self.acknowledged += 1
            self._to_end.add(name)

    def template(self, template: template_service_pb2.Template) -> None:
        """CreateTemplate or UpdateTemplate answered."""
        with self._lock:
            self.acknowledged += 1
            self._templates[template.name] = [template]

    def tried_template(self, template: template_service_pb2.Template) -> None:
        """UpdateTemplate was called; with this, if it came through."""
        self._templates[template.name].append(template)

    def template_deleted(self, name: str) -> None:
        """DeleteTemplate answered."""
        with self._lock:
            self.acknowledged += 1
            self._templates.pop(name, None)
            self._deleted.add(name)

    def tried_template_delete(self, name: str) -> None:
        """DeleteTemplate was called."""
        self._maybe_templates.add(name)

    def saw(self, name: str, event: event_pb2.Event) -> None:
        """A watcher of a task was sent an event."""
        body = event.SerializeToString(deterministic=True)
        with self._lock:
            self.acknowledged += 1
            before = self._seen[name].setdefault(event.seq, body)
            if before != body:
                self.wrong.append(f"{name}: event {event.seq} was sent with two contents")
            if event.HasField("checkpoint_saved"):
                self._checkpoints[name].add(event.checkpoint_saved.path)
            if event.HasField("checkpoint_deleted"):
                self._checkpoints[name].discard(event.checkpoint_deleted.path)

    def saw_epoch(self, epoch: str) -> None:
        """A watcher was told which log it reads."""
        if self._epoch and epoch != self._epoch and not self.epoch_may_change:
            self.wrong.append(f"the log epoch has changed from {self._epoch} to {epoch}")
        self._epoch = epoch

    @property
    def epoch(self) -> str:
        """Of the log that was read last."""
        return self._epoch

    def knows(self, name: str) -> bool:
        """Whether a client was told of a task or template, and of no deletion."""
        return name in self._tasks or name in self._templates

    @property
    def checkpoints(self) -> set[str]:
        """Those that watchers heard of, of all tasks."""
        return set[str]().union(*self._checkpoints.values())

    def must(self, holds: object, sentence: str) -> None:
        """Holds a fault's own promise."""
        if not holds:
            self.wrong.append(sentence)

    def _forget(self, name: str) -> None:
        for kept in (self._tasks, self._runs, self._seen, self._checkpoints):
            kept.pop(name, None)
        self._to_end.discard(name)
        self._maybe_deleted.discard(name)

    # --- what is there

    def check(self, daemon: Daemon, *, events: bool = True, outputs: bool = True) -> None:
        """Compares what was acknowledged with what a daemon that serves has.

        With `events` False what watchers saw is left out: power was lost, or a backup put back.
        With `outputs` False so are checkpoints: they are on another machine.
        """
        tasks = {task.name: task for task in all_tasks(daemon)}
        self._check_tasks(tasks)
        self._check_templates(daemon)
        for name in tasks:
            self._check_ends(daemon, name)
            self._check_runs(daemon, name)
            self._check_events(daemon, name, compare=events)
            if outputs:
                self._check_checkpoints(daemon, name)
        self._check_queue(daemon)

    def _check_tasks(self, tasks: dict[str, task_pb2.Task]) -> None:
        for name, may_be in self._tasks.items():
            task = tasks.get(name)
            if task is None:
                if name not in self._maybe_deleted:
                    self.lost.append(f"{name} is not there")
                continue
            if all(_values(task) != _values(one) for one in may_be):
                self.lost.append(f"{name} has other values:\n{_values(task)}\nnot\n{may_be}")
        self.lost.extend(f"{name} was deleted and is there" for name in self._deleted & set(tasks))
        unknown = set(tasks) - set(self._tasks) - self._tried - self._maybe_deleted
        self.wrong.extend(f"{name} was never created" for name in unknown)

    def _check_templates(self, daemon: Daemon) -> None:
        request = template_service_pb2.ListTemplatesRequest(page_size=1000)
        templates = daemon.templates.ListTemplates(request, timeout=SECONDS).templates
        there = {template.name: template for template in templates}
        for name, may_be in self._templates.items():
            template = there.get(name)
            if template is None:
                if name not in self._maybe_templates:
                    self.lost.append(f"{name} is not there")
            elif all(template.parameters != one.parameters for one in may_be):
                self.lost.append(f"{name} has other values: {template}")
        self.lost.extend(f"{name} was deleted and is there" for name in self._deleted & set(there))

    def _check_ends(self, daemon: Daemon, name: str) -> None:
        """A stop that was acknowledged takes place."""
        if name not in self._to_end:
            return
        under_way = {task_pb2.TASK_STATE_QUEUED, task_pb2.TASK_STATE_RUNNING}
        try:
            eventually(lambda: _get(daemon, name).state not in under_way, "its end", SECONDS)
        except AssertionError:
            self.lost.append(f"{name} was to be stopped and still runs")

    def _check_runs(self, daemon: Daemon, name: str) -> None:
        request = task_service_pb2.ListRunsRequest(parent=name, page_size=_PAGE)
        runs = daemon.tasks.ListRuns(request, timeout=SECONDS).runs
        acknowledged = self._runs.get(name, 0)
        if acknowledged and acknowledged not in [run.number for run in runs]:
            self.lost.append(f"{name} was started as run {acknowledged}, and has no such run")
        for run in runs:
            what = f"run {run.number} of {name}"
            if run.state == task_pb2.TASK_STATE_RUNNING:

                def lives(number: int = run.number) -> bool:
                    now = _run(daemon, name, number)
                    # Between the intent and the process there is none yet.
                    return now.state != task_pb2.TASK_STATE_RUNNING or is_alive(now.pid)

                self._soon(lives, f"{what} is RUNNING without a process")
                if len(processes_of(run.run_dir)) > 1:
                    self.wrong.append(f"{what} has two processes")
            if run.state in ENDED:
                if not run.end_reason:
                    self.wrong.append(f"{what} ended without a reason")
                if run.state == task_pb2.TASK_STATE_COMPLETED and run.exit_code:
                    self.wrong.append(f"{what} is COMPLETED with exit status {run.exit_code}")
                if run.run_dir and processes_of(run.run_dir):
                    self.wrong.append(f"{what} has ended and its process lives")

    def _check_events(self, daemon: Daemon, name: str, *, compare: bool) -> None:
        task = _get(daemon, name)
        events, epoch = _all_events(daemon, name)
        self.saw_epoch(epoch)
        seqs = [event.seq for event in events]
        if seqs != list(range(1, len(seqs) + 1)):
            self.wrong.append(f"{name}: events are not numbered from 1 without gap: {seqs}")
        if len(seqs) < task.last_seq:
            self.lost.append(f"{name}: {len(seqs)} events of {task.last_seq}")
        there = {event.seq: event.SerializeToString(deterministic=True) for event in events}
        if compare:
            for seq, body in self._seen[name].items():
                if there.get(seq) != body:
                    self.lost.append(f"{name}: a watcher saw another event {seq} than is there")
        self._check_story(task, events)

    def _check_story(self, task: task_pb2.Task, events: list[event_pb2.Event]) -> None:
        """State changes follow one another, and each end has its result."""
        state = task_pb2.TASK_STATE_PENDING
        results = defaultdict[int, int](int)
        steps = defaultdict[int, list[int]](list)
        for event in events:
            if event.HasField("result"):
                results[event.run] += 1
            if event.HasField("progress"):
                steps[event.run].append(event.progress.step)
            if not event.HasField("state_change"):
                continue
            change = event.state_change
            if change.old_state != state:
                self.wrong.append(
                    f"{task.name}: event {event.seq} goes on from {_name(change.old_state)}, "
                    f"and it was {_name(state)}"
                )
            state = change.new_state
            if state == task_pb2.TASK_STATE_PAUSED:
                results.pop(event.run, None)  # each process of a run has its own
            if state == task_pb2.TASK_STATE_COMPLETED and results[event.run] != 1:
                self.wrong.append(f"{task.name}: run {event.run} is COMPLETED without a result")
        if len(events) == task.last_seq and state != task.state:
            self.wrong.append(f"{task.name} is {_name(task.state)}; its events say {_name(state)}")
        for run, count in results.items():
            if count != 1:
                self.wrong.append(f"{task.name}: run {run} has {count} results")
        for run, numbers in steps.items():
            if self.steps_are_dense and numbers != list(range(1, len(numbers) + 1)):
                self.wrong.append(f"{task.name}: run {run} reports the steps {numbers}")

    def pruned(self, paths: Set[str]) -> None:
        """The run has begun to remove these checkpoints, whether it was reported or not."""
        for checkpoints in self._checkpoints.values():
            checkpoints -= paths

    def _check_checkpoints(self, daemon: Daemon, name: str) -> None:
        wanted = self._checkpoints.get(name)
        if not wanted:
            return
        request = task_service_pb2.ListCheckpointsRequest(parent=name, page_size=_PAGE)
        found = daemon.tasks.ListCheckpoints(request, timeout=SECONDS).checkpoints
        whole = {checkpoint.path for checkpoint in found if checkpoint.is_whole}
        self.lost.extend(
            f"{name}: {path} was reported and is not there whole" for path in wanted - whole
        )

    def _check_queue(self, daemon: Daemon) -> None:
        tasks = all_tasks(daemon)
        running = defaultdict[str, list[str]](list)
        for task in tasks:
            if task.state == task_pb2.TASK_STATE_RUNNING:
                running[task.device].append(task.name)
        self.wrong.extend(
            f"{device} has {len(names)} runs at once: {names}"
            for device, names in running.items()
            if len(names) > 1
        )
        waiting = [task for task in tasks if task.state == task_pb2.TASK_STATE_QUEUED]
        waiting.sort(key=lambda task: task.queue_position)
        places = [task.queue_position for task in waiting]
        if places != list(range(1, len(places) + 1)):
            self.wrong.append(f"places in the queue: {places}")
        names = [task.name for task in waiting]
        order = [name for name in self._queue if name in names]
        if [name for name in names if name in order] != order:
            self.lost.append(f"the queue is {names}; it was {self._queue}")

    def _soon(self, look: Callable[[], bool], sentence: str) -> None:
        try:
            eventually(look, sentence, SECONDS)
        except AssertionError:
            self.wrong.append(sentence)


class Watcher(threading.Thread):
    """A client that watches a task through everything: comes back, and goes on from its cursor.

    Each event reaches it once and in order, or the oracle hears of it.
    """

    def __init__(self, oracle: Oracle, daemon: Daemon, name: str) -> None:
        super().__init__(daemon=True)
        self.task_name = name
        self.last_seq = 0
        self.connections = 0
        self._oracle = oracle
        self._address = daemon.address
        self._call: Any = None
        self._left = False
        self._over = threading.Event()

    def run(self) -> None:
        """Until `leave`."""
        epoch = ""
        while not self._left:
            options = [("grpc.use_local_subchannel_pool", 1)]
            with grpc.insecure_channel(self._address, options=options) as channel:
                epoch = self._one_connection(channel, epoch)
            self._over.wait(0.01)

    def _one_connection(self, channel: grpc.Channel, epoch: str) -> str:
        from finetuned.v1 import task_service_pb2_grpc

        request = task_service_pb2.WatchTaskRequest(
            name=self.task_name, after_seq=self.last_seq, log_epoch=epoch
        )
        self._call = task_service_pb2_grpc.TaskServiceStub(channel).WatchTask(request, timeout=120)
        try:
            for response in self._call:
                if response.HasField("snapshot"):
                    self.connections += 1
                    epoch = response.snapshot.log_epoch
                    self._oracle.saw_epoch(epoch)
                if response.HasField("event"):
                    seq = response.event.seq
                    self._oracle.must(
                        seq == self.last_seq + 1,
                        f"{self.task_name}: a watcher at {self.last_seq} was sent event {seq}",
                    )
                    self.last_seq = seq
                    self._oracle.saw(self.task_name, response.event)
        except grpc.RpcError as error:
            code = error.code()
            if code in (grpc.StatusCode.OUT_OF_RANGE, grpc.StatusCode.INTERNAL):
                self._oracle.must(self._oracle.epoch_may_change, f"a watch ended: {error}")
                self._left = True
            elif code is grpc.StatusCode.NOT_FOUND:
                self._left = True
        return epoch

    def come_again(self) -> None:
        """Drops the connection; it is made anew."""
        if self._call is not None:
            self._call.cancel()

    def until(self, seq: int) -> None:
        """Waits until it has seen an event."""
        eventually(lambda: self.last_seq >= seq, f"a watcher sees event {seq}", SECONDS)

    def leave(self) -> None:
        """Ends it."""
        self._left = True
        self._over.set()
        while self.is_alive():
            self.come_again()
            self.join(0.05)


def is_alive(pid: int) -> bool:
    """Whether there is such a process, and no zombie."""
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE if pid else False
    except psutil.NoSuchProcess:
        return False


def processes_of(run_dir: str) -> list[int]:
    """The runners of a run folder, attempts included."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        command = process.info["cmdline"] or [""]
        if process.info["status"] != psutil.STATUS_ZOMBIE and (
            command[-1] == run_dir or Path(run_dir) == Path(command[-1]).parent
        ):
            found.append(process.pid)
    return found


def _values(task: task_pb2.Task) -> tuple[object, ...]:
    """What a client has put into a task."""
    return (
        task.display_name,
        task.training_type,
        task.device,
        task.template,
        task.parameters.SerializeToString(deterministic=True),
    )


def _name(state: task_pb2.TaskState.ValueType) -> str:
    return task_pb2.TaskState.Name(state).removeprefix("TASK_STATE_")


def _get(daemon: Daemon, name: str) -> task_pb2.Task:
    return daemon.tasks.GetTask(task_service_pb2.GetTaskRequest(name=name), timeout=SECONDS).task


def _run(daemon: Daemon, name: str, number: int) -> task_pb2.Run:
    request = task_service_pb2.ListRunsRequest(parent=name, page_size=_PAGE)
    runs = daemon.tasks.ListRuns(request, timeout=SECONDS).runs
    return next(run for run in runs if run.number == number)


def all_tasks(daemon: Daemon) -> list[task_pb2.Task]:
    """All that a daemon has."""
    tasks, token = list[task_pb2.Task](), ""
    while True:
        request = task_service_pb2.ListTasksRequest(page_size=_PAGE, page_token=token)
        answer = daemon.tasks.ListTasks(request, timeout=SECONDS)
        tasks += answer.tasks
        token = answer.next_page_token
        if not token:
            return tasks


def _all_events(daemon: Daemon, name: str) -> tuple[list[event_pb2.Event], str]:
    events = list[event_pb2.Event]()
    while True:
        request = task_service_pb2.ListEventsRequest(
            parent=name, page_size=_PAGE, after_seq=events[-1].seq if events else 0
        )
        answer = daemon.tasks.ListEvents(request, timeout=SECONDS)
        if not answer.events:
            return events, answer.log_epoch
        events += answer.events

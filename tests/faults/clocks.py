"""A wall clock that jumps, by hours and by years, forwards and backwards.

Deadlines and durations go by the monotonic clock, order by sequence numbers, identity by what the
kernel says: nothing that is due comes early, and nothing waits for a time that is far away.
"""

from __future__ import annotations

import uuid

from daemon_process import Watch, eventually
from faults.recorder.machine import Machine
from faults.registry import World, fault
from faults.stage import LiveRun, run_of
from finetuned.v1 import task_pb2, task_service_pb2

_HOUR = 3600
_YEAR = 365 * 24 * _HOUR
_JUMPS = (-20 * _YEAR, -_YEAR, -26 * _HOUR, -_HOUR, _HOUR, 26 * _HOUR, _YEAR, 10 * _YEAR)
_FORWARDS = tuple(seconds for seconds in _JUMPS if seconds > 0)
_BEATS = 3


def _jump(world: World, machine: Machine) -> None:
    machine.jump_to(world.rng.choice(_JUMPS))


@fault("clock jumps under a run", short_rounds=1)
def clock_jumps_under_a_run(world: World) -> None:
    """A run, its watchers, the queue and the next daemon go on as if the clock were right."""
    daemon = world.daemon("--hang-notice-seconds", "30", "--hang-deadline-seconds", "60")
    machine = Machine(world, daemon)
    daemon.start()
    live = LiveRun(world, daemon)
    next_up = world.scene("next")
    waiting = daemon.create(next_up.play(steps=3, crash=[1, 1]), start=True)
    world.oracle.created(waiting)
    again = task_service_pb2.CreateTaskRequest(
        task=task_pb2.Task(
            training_type=task_pb2.TRAINING_TYPE_SFT, display_name="asked for twice"
        ),
        request_id=str(uuid.uuid4()),
    )
    twice = daemon.tasks.CreateTask(again).task
    world.oracle.created(twice)
    with daemon.watch(live.name) as watch:
        for _ in range(3):
            _jump(world, machine)
            _beats(watch, 2)
            live.go(3)
            watch.until_step(1)
            more = daemon.create(live.scene.parameters(), request_id=str(uuid.uuid4()))
            world.oracle.created(more)
    world.oracle.must(
        daemon.tasks.CreateTask(again).task.name == twice.name,
        "a request was forgotten when the clock jumped, and its repeat made another task",
    )
    live.adopt()
    _jump(world, machine)
    live.finish()
    task = daemon.wait(waiting.name, "COMPLETED", "FAILED", "STOPPED")
    world.oracle.must(
        task.state == task_pb2.TASK_STATE_COMPLETED,
        f"the task that waited in the queue has not had its turn: {task.end_message}",
    )
    world.oracle.check(daemon)


@fault("clock jumps in a stop", short_rounds=1)
def clock_jumps_in_a_stop(world: World) -> None:
    """The ladder of a stop is climbed when its time has come, whatever the clock says."""
    daemon = world.daemon(
        "--save-deadline-seconds",
        "600",
        "--discard-deadline-seconds",
        "0.5",
        "--kill-deadline-seconds",
        "0.5",
    )
    machine = Machine(world, daemon)
    daemon.start()
    scene = world.scene()
    patient = daemon.create(scene.play(steps=3, gated=True, deaf=True), start=True)
    world.oracle.created(patient)
    daemon.wait(patient.name, "RUNNING")
    scene.let_pass(1)
    with daemon.watch(patient.name) as watch:
        watch.until_step(1)
        daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=patient.name))
        world.oracle.stop_wished(patient.name)
        pid = run_of(daemon, patient.name).pid
        for seconds in (world.rng.choice(_FORWARDS), world.rng.choice(_JUMPS)):
            machine.jump_to(seconds)
            _beats(watch, _BEATS)
        run = run_of(daemon, patient.name)
        world.oracle.must(
            run.state == task_pb2.TASK_STATE_RUNNING and run.pid == pid,
            f"a stop with ten minutes to save was cut short by the clock: {run}",
        )
        # A wish to discard shortens nothing once a save is wished for; the run ends by itself.
        scene.let_pass(2)
        watch.until_end()
    machine.jump_to(0)
    hasty = daemon.create(scene.play(steps=3, gated=True, deaf=True), start=True)
    world.oracle.created(hasty)
    daemon.wait(hasty.name, "RUNNING")
    eventually(lambda: run_of(daemon, hasty.name).pid, "it has a process")
    daemon.tasks.StopTask(task_service_pb2.StopTaskRequest(name=hasty.name, discard=True))
    world.oracle.stop_wished(hasty.name)
    machine.jump_to(-world.rng.choice([_HOUR, _YEAR]))
    daemon.wait(hasty.name, "COMPLETED", "FAILED", "STOPPED")
    world.oracle.check(daemon)


def _beats(watch: Watch, count: int) -> None:
    """Reads on until a quiet stream has shown so many signs of life.

    Heartbeats of a stream whose timer went by the clock would not come for a year.
    """
    for _ in range(count):
        seen = len(watch.heartbeats)
        for response in watch.call:
            if response.HasField("heartbeat"):
                watch.heartbeats.append(response.heartbeat.last_seq)
                break
        assert len(watch.heartbeats) > seen, "the stream ended"

"""`kill -9` of runners, fake and real, and of daemon and runner at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

from daemon_process import Daemon, eventually
from faults.oracle import Watcher, is_alive
from faults.registry import World, fault
from faults.stage import STEPS, LiveRun, arm_runner, disarm, new_task, pid_of, run_of
from finetuned.v1 import event_pb2, parameters_pb2, task_pb2, task_service_pb2
from tiny import chats, make_model, write_jsonl

ENDS = ("COMPLETED", "STOPPED", "FAILED")
_AT_ONCE = ("--restart-pause-seconds", "0.05")
"""A runner that ends before it has begun is started again without much of a wait."""


@fault("runner killed in each phase", short_rounds=3)
def runner_killed_in_each_phase(world: World) -> None:
    """A runner that is killed has failed with the signal, unless it had left its result before."""
    told = world.root / "lines"
    daemon = world.daemon(*_AT_ONCE)
    arm_runner(world, daemon, until="fake_runner.py:end", tell=str(told))
    daemon.start()
    scene = world.scene()
    scene.play(steps=4, save_steps=2)
    name = daemon.create(scene.parameters(), start=True).name
    world.oracle.created(daemon.get(name))
    daemon.wait(name, "COMPLETED")
    # `end` is where counting ends, and a tenth of it all at most.
    arm_runner(world, daemon, lines=1 + int(world.spread * 1.1 * int(told.read_text())))
    watcher = Watcher(world.oracle, daemon, name)
    watcher.start()
    world.finally_(watcher.leave)
    started = daemon.tasks.StartTask(task_service_pb2.StartTaskRequest(name=name), timeout=30)
    world.oracle.started(started.task)
    ended = daemon.wait(name, *ENDS)
    disarm(world)
    _check_account(world, daemon, name)
    if ended.state == task_pb2.TASK_STATE_FAILED:
        run = run_of(daemon, name)
        world.oracle.must(
            (run.end_reason, run.signal) == (task_pb2.END_REASON_RUNNER_KILLED, "SIGKILL"),
            f"a killed runner ended with {run.end_reason} {run.signal!r}",
        )
    _start_again(world, daemon, name)
    watcher.until(daemon.get(name).last_seq)
    world.oracle.check(daemon)


def _check_account(world: World, daemon: Daemon, name: str) -> None:
    """Nothing is COMPLETED that has not said so itself."""
    run = run_of(daemon, name)
    has_result = (Path(run.run_dir) / "result.json").exists()
    completed = run.state == task_pb2.TASK_STATE_COMPLETED
    world.oracle.must(
        completed == has_result,
        f"run {run.number} {'left' if has_result else 'left no'} result, and is "
        f"{task_pb2.TaskState.Name(run.state)}",
    )


def _start_again(world: World, daemon: Daemon, name: str) -> None:
    """The device is free, and the task goes on from its newest whole checkpoint."""
    request = task_service_pb2.ListCheckpointsRequest(parent=name)
    found = daemon.tasks.ListCheckpoints(request, timeout=30).checkpoints
    start = task_service_pb2.StartTaskRequest(name=name)
    if any(checkpoint.is_whole for checkpoint in found):
        start.resume = task_pb2.RESUME_CHOICE_NEWEST_CHECKPOINT
    world.oracle.started(daemon.tasks.StartTask(start, timeout=30).task)
    ended = daemon.wait(name, *ENDS)
    world.oracle.must(
        ended.state == task_pb2.TASK_STATE_COMPLETED,
        f"the run after it ended otherwise: {ended.end_message}",
    )


@fault("daemon and runner killed at once")
def daemon_and_runner_killed_at_once(world: World) -> None:
    """The run has ended, is never called completed, and the queue goes on."""
    daemon = world.daemon(*_AT_ONCE).start()
    live = LiveRun(world, daemon)
    waiting = world.scene("waiting")
    request = new_task(waiting.parameters(), "waiting-task")
    request.start = True
    world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
    live.go(world.rng.randint(0, 20))
    time.sleep(0.2 * world.spread)
    kills: list[Callable[[], None]] = [daemon.kill, lambda: os.kill(live.pid, signal.SIGKILL)]
    world.rng.shuffle(kills)
    kills[0]()
    time.sleep(world.rng.choice([0, 0, 0.001, 0.01, 0.1]))
    kills[1]()
    eventually(lambda: not is_alive(live.pid), "the runner is dead")
    daemon.start()
    # One that was killed before it had said who it is has not begun, and is started again.
    live.go(STEPS)
    daemon.wait(live.name, *ENDS)
    _check_account(world, daemon, live.name)
    daemon.wait("tasks/waiting-task", "COMPLETED")
    live.watcher.until(daemon.get(live.name).last_seq)
    world.oracle.check(daemon)


@fault("real runner killed")
def real_runner_killed(world: World) -> None:
    """Its checkpoints are whole, and a resume from the newest comes to the end."""
    daemon = world.daemon(runner_module="finetuned_runner").start()
    make_model(world.root / "model", layers=1)
    write_jsonl(world.root / "chats.jsonl", chats(32))
    parameters = parameters_pb2.Parameters(
        data=parameters_pb2.DataParameters(
            train_file=str(world.root / "chats.jsonl"),
            model_path=str(world.root / "model"),
            output_dir=str(world.root / "out"),
            dataloader_num_workers=0,
        ),
        training=parameters_pb2.TrainingParameters(
            batch_size=2,
            gradient_accumulation_steps=1,
            max_seq_length=128,
            max_steps=12,
            save_strategy="steps",
            save_steps=2,
        ),
        lora=parameters_pb2.LoraParameters(lora_r=4),
        optimization=parameters_pb2.OptimizationParameters(gradient_checkpointing=False),
        logging=parameters_pb2.LoggingParameters(logging_steps=1),
    )
    name = daemon.create(parameters, start=True).name
    world.oracle.created(daemon.get(name))
    watcher = Watcher(world.oracle, daemon, name)
    watcher.start()
    world.finally_(watcher.leave)
    pid = pid_of(daemon, name)
    # From the first sign of life to the final weights: about as many events as that.
    strike_at = 2 + int(world.spread * 50)
    _nth_event(daemon, name, strike_at)
    time.sleep(0.1 * world.rng.random())
    if world.rng.random() < 0.3:
        world.restart(daemon, lives=(name, pid) if is_alive(pid) else None, may_end=True)
    if is_alive(pid):
        os.kill(pid, signal.SIGKILL)
    ended = daemon.wait(name, *ENDS)
    _check_account(world, daemon, name)
    if ended.state == task_pb2.TASK_STATE_FAILED:
        _start_again(world, daemon, name)
    world.oracle.steps_are_dense = False  # it begins behind the checkpoint
    request = task_service_pb2.ListCheckpointsRequest(parent=name, verify=True)
    found = daemon.tasks.ListCheckpoints(request, timeout=60).checkpoints
    world.oracle.must(found, "there is no checkpoint in the end")
    for checkpoint in found:
        world.oracle.must(checkpoint.is_whole, f"{checkpoint.path}: {checkpoint.problem}")
    watcher.until(daemon.get(name).last_seq)
    world.oracle.check(daemon)


def _nth_event(daemon: Daemon, name: str, number: int) -> None:
    """Waits for so many events, or the end of the run."""

    def is_it(event: event_pb2.Event) -> bool:
        return event.seq >= number or event.HasField("result")

    with daemon.watch(name) as watch:
        watch.until(is_it)

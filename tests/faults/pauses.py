"""`kill -9` of the daemon while it pauses, resumes and moves runs, and ends one that hangs."""

from __future__ import annotations

from faults.oracle import Watcher, is_alive
from faults.registry import World, fault
from faults.stage import LiveRun, arm, cut, killed, new_task, pid_of
from finetuned.v1 import task_pb2, task_service_pb2

ENDS = ("COMPLETED", "STOPPED", "FAILED")


@fault("daemon killed in pause")
def daemon_killed_in_pause(world: World) -> None:
    """A pause that was answered takes place; the same run goes on from where it was saved."""
    _paused_and_resumed(world, "run_manager.py:pause")


@fault("daemon killed in resume")
def daemon_killed_in_resume(world: World) -> None:
    """A resume that was answered takes place once, as the same run, in one process."""
    _paused_and_resumed(world, "run_manager.py:resume")


def _paused_and_resumed(world: World, at: str) -> None:
    daemon = world.daemon()
    arm(world, daemon, at, place=world.spread, until="keeper.py:ended")
    daemon.start()
    world.oracle.steps_are_dense = False  # a step that was not saved is taken again
    names = [f"tasks/task-{number}" for number in (1, 2)]
    for number, name in enumerate(names):
        scene = world.scene(f"scene-{number}")
        scene.play(steps=6, gated=True, save_steps=2)
        request = new_task(scene.parameters(), name.removeprefix("tasks/"))
        request.start = True
        world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
        scene.let_pass(3)
        with daemon.watch(name) as watch:
            watch.until_step(3)
        watcher = Watcher(world.oracle, daemon, name)
        watcher.start()
        world.finally_(watcher.leave)
        pause = task_service_pb2.PauseTaskRequest(name=name)
        resume = task_service_pb2.ResumeTaskRequest(name=name, request_id=f"resume {name}")
        scene.let_pass(12)
        is_dead = cut(lambda pause=pause: daemon.tasks.PauseTask(pause, timeout=30)) is None  # type: ignore[misc]
        if not is_dead:
            world.oracle.stop_wished(name)
            is_dead = cut(lambda name=name: daemon.wait(name, "PAUSED", *ENDS)) is None  # type: ignore[misc]
        if not is_dead and cut(lambda name=name: daemon.get(name).state) == _PAUSED:  # type: ignore[misc]
            cut(lambda resume=resume: daemon.tasks.ResumeTask(resume, timeout=30))  # type: ignore[misc]
        if number == 0:
            daemon.wait(name, *ENDS)
    world.restart(daemon, since=killed(world, daemon))
    # Whatever was cut off is asked for again.
    name = names[1]
    daemon.wait(name, "PAUSED", *ENDS)
    if daemon.get(name).state == _PAUSED:
        daemon.tasks.ResumeTask(resume, timeout=30)
    for name in names:
        ended = daemon.wait(name, *ENDS)
        world.oracle.must(
            ended.state == task_pb2.TASK_STATE_COMPLETED and ended.run == 1,
            f"{name}: run {ended.run} ended otherwise: {ended.end_message}",
        )
    watcher.until(daemon.get(names[1]).last_seq)
    world.oracle.check(daemon)


_PAUSED = task_pb2.TASK_STATE_PAUSED


@fault("daemon killed in move")
def daemon_killed_in_move(world: World) -> None:
    """The queue is in the old order or in the new one, and nobody is lost from it."""
    daemon = world.daemon()
    arm(world, daemon, "run_manager.py:move", place=world.spread)
    daemon.start()
    live = LiveRun(world, daemon)
    scene = world.scene()
    names = []
    for number in range(4):
        request = new_task(scene.parameters(), f"task-{number}")
        request.start = True
        world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
        names.append(f"tasks/task-{number}")

    def move(name: str, position: int) -> task_pb2.Task:
        request = task_service_pb2.MoveTaskRequest(name=name, position=position)
        return daemon.tasks.MoveTask(request, timeout=30).task

    def moved(order: list[str], name: str, position: int) -> list[str]:
        rest = [other for other in order if other != name]
        return [*rest[: position - 1], name, *rest[position - 1 :]]

    move(names[3], 1)
    before = moved(names, names[3], 1)
    name, position = world.rng.choice(before), world.rng.randint(1, 4)
    after = moved(before, name, position)
    answer = cut(lambda: move(name, position))
    live.adopt(killed(world, daemon))
    there = sorted(names, key=lambda name: daemon.get(name).queue_position)
    world.oracle.must(
        there == after or (answer is None and there == before),
        f"the queue is {there}; it was {before}, and {after} was asked for",
    )
    world.oracle.queued(there)
    world.oracle.check(daemon)
    live.finish()
    for name in names:
        daemon.wait(name, "COMPLETED")
    world.oracle.check(daemon)


@fault("runner hangs and daemon is killed")
def runner_hangs_and_daemon_is_killed(world: World) -> None:
    """A runner without a sign of life is ended, also where the daemon that saw it first is gone."""
    daemon = world.daemon(
        *("--hang-notice-seconds", "0.3", "--hang-deadline-seconds", "1"),
        *("--kill-deadline-seconds", "0.5"),
    )
    arm(world, daemon, "supervisor.py:_feel", nth=1 + int(world.spread * 12), place=0.5)
    daemon.start()
    scene = world.scene()
    scene.play(steps=9, save_steps=1, beats=1, gated=True, deaf=True)
    request = new_task(scene.parameters(), "hanging-task")
    request.start = True
    world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
    waiting = world.scene("waiting")
    behind = new_task(waiting.parameters(), "waiting-task")
    behind.start = True
    answer = cut(lambda: daemon.tasks.CreateTask(behind, timeout=30))
    pid = cut(lambda: pid_of(daemon, "tasks/hanging-task"))
    scene.let_pass(1)
    assert daemon.process is not None
    daemon.process.wait(30)
    world.restart(daemon, since=killed(world, daemon))
    if answer is None:
        answer = daemon.tasks.CreateTask(behind, timeout=30)
    world.oracle.created(answer.task)
    ended = daemon.wait("tasks/hanging-task", *ENDS)
    world.oracle.must(
        ended.end_reason == task_pb2.END_REASON_RUNNER_HUNG,
        f"a run that hung ended otherwise: {ended.end_message}",
    )
    world.oracle.must(not is_alive(pid or 0), "the runner that hung lives")
    daemon.wait("tasks/waiting-task", "COMPLETED")
    world.oracle.check(daemon)

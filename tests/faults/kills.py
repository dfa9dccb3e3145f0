"""`kill -9` of the daemon in what clients ask for, swept over the whole life of each operation."""

from __future__ import annotations

import time

from daemon_process import Daemon, eventually
from faults.oracle import Watcher
from faults.registry import World, fault
from faults.stage import STEPS, LiveRun, arm, cut, killed, new_task
from finetuned.v1 import (
    parameters_pb2,
    task_pb2,
    task_service_pb2,
    template_service_pb2,
)

ENDS = ("COMPLETED", "STOPPED", "FAILED")


def _struck(world: World, at: str, **strike: object) -> tuple[Daemon, LiveRun]:
    """A daemon that dies in its second call of `at`, and a run that lives on."""
    daemon = world.daemon()
    arm(world, daemon, at, place=world.spread, **strike)
    daemon.start()
    return daemon, LiveRun(world, daemon)


@fault("daemon killed in create")
def daemon_killed_in_create(world: World) -> None:
    """A task is there with all its values or not at all, and a repeat makes no second one."""
    daemon, live = _struck(world, "manager.py:create")
    scene = world.scene()
    live.go(3)
    request = new_task(scene.parameters(batch_size=5), "second-task")
    request.start = world.rng.random() < 0.5
    world.oracle.tried_create("tasks/second-task")
    answer = cut(lambda: daemon.tasks.CreateTask(request, timeout=30))
    if answer is not None:
        world.oracle.created(answer.task)
    live.adopt(killed(world, daemon))
    again = daemon.tasks.CreateTask(request, timeout=30).task
    if answer is not None:
        world.oracle.must(again == answer.task, f"a repeat got {again}, not {answer}")
    world.oracle.created(again)
    live.finish()
    if request.start:
        daemon.wait(again.name, "COMPLETED")
        world.oracle.must(again.run == 1, "it was started twice")
    world.oracle.check(daemon)


@fault("daemon killed in edit")
def daemon_killed_in_edit(world: World) -> None:
    """An edit of a task and its template is there as a whole, or not at all."""
    daemon, live = _struck(world, "manager.py:update")
    scene = world.scene()
    template = daemon.templates.CreateTemplate(
        template_service_pb2.CreateTemplateRequest(
            template=template_service_pb2.Template(
                display_name="mine", training_type=task_pb2.TRAINING_TYPE_SFT
            ),
            template_id="mine",
        ),
        timeout=30,
    ).template
    world.oracle.template(template)
    new = new_task(scene.parameters(), "edited-task")
    new.task.template = template.name
    task = daemon.tasks.CreateTask(new, timeout=30).task
    world.oracle.created(task)

    def edit(batch_size: int, name: str) -> task_service_pb2.UpdateTaskRequest:
        return task_service_pb2.UpdateTaskRequest(
            task=task_pb2.Task(
                name=task.name,
                display_name=name,
                parameters=parameters_pb2.Parameters(
                    training=parameters_pb2.TrainingParameters(batch_size=batch_size)
                ),
            ),
            update_template=True,
        )

    def expected(batch_size: int, name: str) -> tuple[task_pb2.Task, template_service_pb2.Template]:
        task_then, template_then = task_pb2.Task(), template_service_pb2.Template()
        task_then.CopyFrom(task)
        task_then.display_name = name
        task_then.parameters.training.batch_size = batch_size
        template_then.CopyFrom(template)
        template_then.parameters.training.batch_size = batch_size
        return task_then, template_then

    world.oracle.edited(daemon.tasks.UpdateTask(edit(3, "once"), timeout=30).task)
    world.oracle.template(expected(3, "once")[1])
    live.go(2)
    task_then, template_then = expected(5, "twice")
    world.oracle.tried_edit(task_then)
    world.oracle.tried_template(template_then)
    answer = cut(lambda: daemon.tasks.UpdateTask(edit(5, "twice"), timeout=30))
    if answer is not None:
        world.oracle.edited(answer.task)
        world.oracle.template(template_then)
    live.adopt(killed(world, daemon))
    there = daemon.get(task.name).parameters.training.batch_size
    request = template_service_pb2.GetTemplateRequest(name=template.name)
    kept = daemon.templates.GetTemplate(request, timeout=30).template
    world.oracle.must(
        there == kept.parameters.training.batch_size, "task and template were changed apart"
    )
    live.finish()
    world.oracle.check(daemon)


@fault("daemon killed in delete")
def daemon_killed_in_delete(world: World) -> None:
    """A task that is half deleted can be deleted again, and nothing of it comes back."""
    daemon = world.daemon()
    arm(world, daemon, "manager.py:delete", place=world.spread)
    daemon.start()
    names = []
    for number in (1, 2):
        scene = world.scene(f"scene-{number}")
        scene.play(steps=2, save_steps=1)
        request = new_task(scene.parameters(), f"task-{number}")
        request.start = True
        world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)
        names.append(f"tasks/task-{number}")
    daemon.wait(names[1], *ENDS)
    live = LiveRun(world, daemon)
    live.go(3)

    def delete(name: str) -> task_service_pb2.DeleteTaskResponse:
        request = task_service_pb2.DeleteTaskRequest(
            name=name, delete_outputs=True, allow_missing=True
        )
        return daemon.tasks.DeleteTask(request, timeout=30)

    delete(names[0])
    world.oracle.deleted(names[0])
    world.oracle.tried_delete(names[1])
    if cut(lambda: delete(names[1])) is not None:
        world.oracle.deleted(names[1])
    live.adopt(killed(world, daemon))
    world.oracle.check(daemon)
    delete(names[1])
    world.oracle.deleted(names[1])
    left = [path.name for path in (daemon.paths.state_dir / "runs").iterdir()]
    world.oracle.must(left == ["live-run"], f"run folders of deleted tasks are left: {left}")
    outputs = list(world.root.glob("scene-*/out/*"))
    world.oracle.must(not outputs, f"outputs of deleted tasks are left: {outputs}")
    live.finish()
    world.oracle.check(daemon)


@fault("daemon killed in start", short_rounds=2)
def daemon_killed_in_start(world: World) -> None:
    """A start that was answered takes place once; one that was not, once it is repeated."""
    daemon = world.daemon()
    arm(world, daemon, "manager.py:start", place=world.spread)
    daemon.start()
    for number in (1, 2):
        scene = world.scene(f"scene-{number}")
        scene.play(steps=3, save_steps=2)
        request = new_task(scene.parameters(), f"task-{number}")
        world.oracle.created(daemon.tasks.CreateTask(request, timeout=30).task)

    def start(name: str) -> task_pb2.Task:
        request = task_service_pb2.StartTaskRequest(name=name, request_id=f"start {name}")
        return daemon.tasks.StartTask(request, timeout=30).task

    world.oracle.started(start("tasks/task-1"))
    daemon.wait("tasks/task-1", *ENDS)
    watcher = Watcher(world.oracle, daemon, "tasks/task-2")
    watcher.start()
    world.finally_(watcher.leave)
    answer = cut(lambda: start("tasks/task-2"))
    if answer is not None:
        world.oracle.started(answer)
        # The rest of its life is swept too.
        eventually(lambda: _is_over(daemon, "tasks/task-2"), "the strike, or the end")
    since = killed(world, daemon)
    world.restart(daemon, since=since)
    again = start("tasks/task-2")
    if answer is not None:
        world.oracle.must(again == answer, f"a repeat got {again}, not {answer}")
    world.oracle.started(again)
    for name in ("tasks/task-1", "tasks/task-2"):
        ended = daemon.wait(name, *ENDS)
        world.oracle.must(
            ended.state == task_pb2.TASK_STATE_COMPLETED and ended.run == 1,
            f"{name} is run {ended.run}, {ended.end_message}",
        )
    watcher.until(daemon.get("tasks/task-2").last_seq)
    world.oracle.check(daemon)


def _is_over(daemon: Daemon, name: str) -> bool:
    assert daemon.process is not None
    if daemon.process.poll() is not None:
        return True
    task = cut(lambda: daemon.get(name))
    return task is None or task.state in (
        task_pb2.TASK_STATE_COMPLETED,
        task_pb2.TASK_STATE_FAILED,
    )


@fault("daemon killed in stop")
def daemon_killed_in_stop(world: World) -> None:
    """A stop that was answered saves and ends the run, whoever is there to see it."""
    daemon = world.daemon()
    arm(world, daemon, "manager.py:stop", place=world.spread, until="keeper.py:ended")
    daemon.start()
    for number in (1, 2):
        scene = world.scene(f"scene-{number}")
        scene.play(steps=9, gated=True)
        request = new_task(scene.parameters(), f"task-{number}")
        request.start = True
        task = daemon.tasks.CreateTask(request, timeout=30).task
        world.oracle.created(task)
        scene.let_pass(1)
        with daemon.watch(task.name) as watch:
            watch.until_step(1)
        stop = task_service_pb2.StopTaskRequest(name=task.name)
        answer = cut(lambda stop=stop: daemon.tasks.StopTask(stop, timeout=30))  # type: ignore[misc]
        if answer is not None:
            world.oracle.stop_wished(task.name)
        if number == 1:
            daemon.wait(task.name, "STOPPED")
    world.restart(daemon, since=killed(world, daemon))
    if answer is None:
        cut_off = daemon.get(task.name)
        if cut_off.state == task_pb2.TASK_STATE_RUNNING:
            daemon.tasks.StopTask(stop, timeout=30)
    for name in ("tasks/task-1", "tasks/task-2"):
        ended = daemon.wait(name, *ENDS)
        world.oracle.must(
            ended.state == task_pb2.TASK_STATE_STOPPED
            and ended.last_checkpoint.endswith("checkpoint-1"),
            f"{name} did not save and stop: {ended.end_message} {ended.last_checkpoint}",
        )
    world.oracle.check(daemon)


@fault("daemon killed in template save")
def daemon_killed_in_template_save(world: World) -> None:
    """A template is there with all its values or not at all."""
    operation = world.rng.choice(["create", "update", "delete"])
    daemon, live = _struck(world, f"template_manager.py:{operation}")

    def template(name: str, batch_size: int) -> template_service_pb2.Template:
        return template_service_pb2.Template(
            name=f"templates/{name}",
            display_name=name,
            training_type=task_pb2.TRAINING_TYPE_SFT,
            parameters=parameters_pb2.Parameters(
                training=parameters_pb2.TrainingParameters(batch_size=batch_size)
            ),
        )

    def create(name: str) -> template_service_pb2.Template:
        request = template_service_pb2.CreateTemplateRequest(
            template=template(name, 3), template_id=name
        )
        return daemon.templates.CreateTemplate(request, timeout=30).template

    def update(name: str) -> template_service_pb2.Template:
        request = template_service_pb2.UpdateTemplateRequest(template=template(name, 5))
        return daemon.templates.UpdateTemplate(request, timeout=30).template

    def delete(name: str) -> template_service_pb2.DeleteTemplateResponse:
        request = template_service_pb2.DeleteTemplateRequest(name=f"templates/{name}")
        return daemon.templates.DeleteTemplate(request, timeout=30)

    live.go(2)
    world.oracle.template(create("first"))
    if operation == "create":
        answer = cut(lambda: create("second"))
        if answer is not None:
            world.oracle.template(answer)
    else:
        second = create("second")
        world.oracle.template(second)
        if operation == "update":
            world.oracle.template(update("first"))
            updated = template_service_pb2.Template()
            updated.CopyFrom(second)
            updated.parameters.training.batch_size = 5
            world.oracle.tried_template(updated)
            new = cut(lambda: update("second"))
            if new is not None:
                world.oracle.template(new)
        else:
            delete("first")
            world.oracle.template_deleted("templates/first")
            world.oracle.tried_template_delete("templates/second")
            if cut(lambda: delete("second")) is not None:
                world.oracle.template_deleted("templates/second")
    live.adopt(killed(world, daemon))
    live.finish()
    world.oracle.check(daemon)


@fault("daemon killed in ingest", short_rounds=2)
def daemon_killed_in_ingest(world: World) -> None:
    """What a run reports while the daemon dies, is taken over once."""
    daemon = world.daemon()
    arm(
        world,
        daemon,
        "keeper.py:ingest",
        nth=world.rng.randint(1, 12),
        place=world.spread,
    )
    daemon.start()
    name = "tasks/live-run"
    world.oracle.tried_create(name)
    live = cut(lambda: LiveRun(world, daemon))
    assert live is not None
    deadline = time.monotonic() + 20
    assert daemon.process is not None
    while daemon.process.poll() is None and time.monotonic() < deadline:
        if live.left > STEPS // 4:
            live.go(1)
        time.sleep(0.05 * world.rng.random())
        if world.rng.random() < 0.1:
            live.watcher.come_again()
    live.adopt(killed(world, daemon))
    live.finish()
    world.oracle.check(daemon)

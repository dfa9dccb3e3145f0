"""`finetunectl train`, and the options that `task create` shares with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.settings import JsonOption, Settings, one_file, say, settings, task_command

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.cli.params import Draft, Wish
    from finetuned.v1.task_pb2 import Task

TypeOption = Annotated[
    str | None,
    typer.Option("--type", metavar="TYPE", help="sft (on chats) or pretrain (on text). [sft]"),
]
ModelOption = Annotated[
    str | None,
    typer.Option("--model", metavar="DIR", help="Folder of the base model, Hugging Face format."),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="FILE", help="Training data: JSONL, or text.")
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output",
        metavar="DIR",
        help="Folder for checkpoints and result. [./finetuned-output/NAME]",
    ),
]
NameOption = Annotated[
    str | None,
    typer.Option("--name", metavar="NAME", help="Display name of the task. [type and time]"),
]
DeviceOption = Annotated[
    str | None,
    typer.Option("--device", metavar="DEVICE", help="cpu, cuda:0 ... [the first GPU, or cpu]"),
]
FileOption = Annotated[
    Path | None,
    typer.Option("-f", "--file", metavar="FILE", help="Parameters in YAML or JSON, by section."),
]
TemplateOption = Annotated[
    str | None,
    typer.Option("--template", metavar="TEMPLATE", help="Template for what is not given here."),
]
LikeOption = Annotated[
    str | None,
    typer.Option("--like", metavar="TASK", help="Take type and parameters of another task."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        help="One parameter, such as training.batch_size=4; again for more.",
    ),
]


def train(
    ctx: typer.Context,
    file_argument: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="The same as --file FILE; - is stdin.")
    ] = None,
    training_type: TypeOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output: OutputOption = None,
    name: NameOption = None,
    device: DeviceOption = None,
    file: FileOption = None,
    like: LikeOption = None,
    template: TemplateOption = None,
    assignments: SetOption = None,
    detach: Annotated[
        bool, typer.Option("-d", "--detach", help="Start it and return; do not watch.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Create a task, start it, and watch it to its end.

    Starts the daemon if none runs. Ctrl-C ends the watching, not the run. Options win over --file,
    --file over --template, and --set over all.
    """
    file = one_file(file_argument, file)
    with settings(ctx).client() as client:
        wish = wish_of(
            client,
            training_type=training_type,
            model=model,
            data=data,
            output=output,
            name=name,
            device=device,
            file=file,
            like=like,
            template=template,
            assignments=assignments,
        )
        task = create(client, settings(ctx), wish, start=True)
        if detach:
            show_created(task, as_json)
            return
        from finetuned.cli.follow import follow

        raise typer.Exit(follow(client, task, as_json=as_json))


def wish_of(
    client: Client,
    *,
    training_type: str | None = None,
    model: str | None = None,
    data: str | None = None,
    output: str | None = None,
    name: str | None = None,
    device: str | None = None,
    file: Path | None = None,
    like: str | None = None,
    template: str | None = None,
    assignments: list[str] | None = None,
) -> Wish:
    """What the options ask for."""
    from finetuned._errors import InvalidArgument
    from finetuned._parameters import is_utf8, not_utf8
    from finetuned.cli.params import Wish, read_file

    wish = read_file(file) if file is not None else Wish()
    if like is not None:
        if not is_utf8(like):
            raise InvalidArgument("--like is no name", violations=[not_utf8("--like")])
        _fill_from(client.get_task(like), wish)
    wish.training_type = training_type or wish.training_type
    if name:
        wish.display_name, wish.kind = name, None
    wish.device = device or wish.device
    wish.template = template or wish.template
    wish.put("data.model_path", model)
    wish.put("data.train_file", data)
    wish.put("data.output_dir", output)
    wish.set_all(assignments or [])
    return wish


def create(client: Client, options: Settings, wish: Wish, *, start: bool) -> Task:
    """Create the task.

    Raises:
        InvalidArgument: Everything that is wrong, here and in the daemon's eyes, in one answer.
    """
    from finetuned._launch import start_daemon
    from finetuned.cli.params import draft
    from finetuned.cli.recorded import warn_of_other_files

    wish.for_task()
    plan = draft(wish)
    if not plan.violations:
        start_daemon(options.address, on_start=lambda log: say(f"starting the daemon (log: {log})"))
        plan = draft_with_template(client, wish)
    if plan.violations:
        raise _everything_wrong(client, plan, start=start)
    warn_of_other_files(wish, plan)
    if start and not options.json:
        _show_doubts(client, plan)
    return client.create_task(
        plan.training_type,
        plan.parameters,
        display_name=plan.display_name,
        device=plan.device,
        template=plan.template,
        start=start,
    )


def draft_with_template(client: Client, wish: Wish, *, output_default: bool = True) -> Draft:
    """The task that a wish stands for, its type and output folder the template's if it has one.

    Raises:
        NotFound: No such template.
    """
    from finetuned.cli.output import type_word
    from finetuned.cli.params import draft

    if wish.template:
        template = client.get_template(wish.template)
        wish.training_type = wish.training_type or type_word(template.training_type)
        output_default = output_default and not template.parameters.data.output_dir
    return draft(wish, output_default=output_default)


def show_created(task: Task, as_json: bool) -> None:
    """The new task on stdout: its name alone, for scripts; what to type next on stderr."""
    from finetuned.cli.output import print_json
    from finetuned.v1.task_pb2 import TaskState

    if as_json:
        print_json(task)
        return
    print(task.display_name)
    verb = "start" if task.state == TaskState.TASK_STATE_PENDING else "watch"
    say(f"{verb} it: {task_command(verb, task)}")


def _fill_from(task: Task, wish: Wish) -> None:
    """Put what another task has under what the wish says."""
    from finetuned._parameters import flatten
    from finetuned.cli.output import type_word

    wish.training_type = wish.training_type or type_word(task.training_type)
    wish.device = wish.device or task.device
    for path, value in flatten(task.parameters).items():
        section, _, field = path.partition(".")
        if field not in wish.sections.get(section, {}):
            wish.put(path, value)


def _show_doubts(client: Client, plan: Draft) -> None:
    """Show what speaks against a start without forbidding it; errors come with the start."""
    from finetuned.cli.violations import print_violations

    doubts = client.validate(
        plan.training_type, plan.parameters, device=plan.device, template=plan.template
    )
    if all(doubt.severity != "error" for doubt in doubts):
        print_violations(doubts, to_stderr=True)


def _everything_wrong(client: Client, plan: Draft, *, start: bool) -> Exception:
    from finetuned._errors import FinetunedError, InvalidArgument
    from finetuned.cli.params import refused

    violations = list(plan.violations)
    known = {violation.field for violation in violations}
    try:
        # What could be read goes to the daemon, which writes nothing: one answer names it all.
        client.create_task(
            plan.training_type,
            plan.parameters,
            display_name=plan.display_name,
            device=plan.device,
            template=plan.template,
            start=start,
            validate_only=True,
        )
    except InvalidArgument as error:
        violations += [
            violation
            for violation in error.violations
            if violation.field.removeprefix("task.").removeprefix("parameters.") not in known
        ]
    except FinetunedError:
        pass  # no daemon, or another trouble: what is known is bad enough
    return refused(violations)

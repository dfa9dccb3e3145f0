"""`finetunectl template`: named sets of parameters to begin tasks with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.settings import (
    Exit,
    JsonOption,
    confirm,
    say,
    settings,
    show_error,
    template_command,
)
from finetuned.cli.train import SetOption, TypeOption, wish_of

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.cli.params import Draft, Wish
    from finetuned.v1.template_service_pb2 import Template

app = typer.Typer(no_args_is_help=True, help="Templates: named parameters to begin tasks with.")

NameArgument = Annotated[
    str, typer.Argument(metavar="TEMPLATE", help="Display name or id of the template.")
]
AllOption = Annotated[
    bool, typer.Option("--all", help="All parameters, those at their default too.")
]
UpdateOption = Annotated[
    bool, typer.Option("--update", help="Change the template of that name, if there is one.")
]


@app.command("list")
def list_templates(
    ctx: typer.Context, training_type: TypeOption = None, as_json: JsonOption = False
) -> None:
    """List templates: presets, then your own by name."""
    from finetuned.cli.output import print_json, print_table, time_text, type_word

    with settings(ctx).client(start=True) as client:
        templates = list(client.list_templates(training_type))
    if as_json:
        print_json(templates)
        return
    print_table(
        ("name", "id", "type", "changed"),
        (
            (
                template.display_name,
                template.name.removeprefix("templates/"),
                type_word(template.training_type),
                "preset" if template.preset else time_text(template.update_time),
            )
            for template in templates
        ),
    )


@app.command()
def show(
    ctx: typer.Context, name: NameArgument, every: AllOption = False, as_json: JsonOption = False
) -> None:
    """Show a template as YAML: what differs from the defaults, or --all."""
    from finetuned.cli.output import print_json

    with settings(ctx).client(start=True) as client:
        template = client.get_template(name)
        text = "" if as_json else _text(client, template, every)
    if as_json:
        print_json(template)
    else:
        print(text, end="")


@app.command()
def save(
    ctx: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help="Display name of the template.")],
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="Parameters in YAML or JSON, by section."),
    ] = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="Take type and parameters of this task."),
    ] = None,
    training_type: TypeOption = None,
    assignments: SetOption = None,
    update: UpdateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Save a template: from a task, a file, or --set. With --update, what is given is changed.

    --set wins over the file, and both over the task.
    """
    with settings(ctx).client(start=True) as client:
        wish = wish_of(client, training_type=training_type, file=file, assignments=assignments)
        wish.display_name = name
        _save(client, wish, task or "", update, as_json)


@app.command()
def delete(
    ctx: typer.Context,
    name: NameArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a template. Tasks made from it stay as they are."""
    with settings(ctx).client(start=True) as client:
        template = client.get_template(name)
        command = template_command("delete", name, "--yes")
        if not yes and not confirm(f"Delete template {template.display_name}?", command):
            raise typer.Exit(Exit.FAILED)
        client.delete_template(template.name, etag=template.etag)
    print("{}" if as_json else f"{template.display_name} deleted")


@app.command("export")
def export_template(
    ctx: typer.Context,
    name: NameArgument,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="File to write. [stdout]")
    ] = None,
    every: AllOption = False,
) -> None:
    """Write a template as a YAML file, which `import` and `train --file` read."""
    with settings(ctx).client(start=True) as client:
        text = _text(client, client.get_template(name), every)
    if file is None:
        print(text, end="")
    else:
        file.write_text(text, encoding="utf-8")
        say(f"{file} written")


@app.command("import")
def import_template(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="YAML or JSON, as of `export`.")],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Display name. [that in the file]"),
    ] = None,
    update: UpdateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a template of a file."""
    with settings(ctx).client(start=True) as client:
        wish = wish_of(client, file=file, name=name)
        # A file without a name lends its own.
        wish.display_name = wish.display_name or file.stem
        _save(client, wish, "", update, as_json)


def _save(client: Client, wish: Wish, task: str, update: bool, as_json: bool) -> None:
    from finetuned._errors import AlreadyExists
    from finetuned.cli.output import print_json
    from finetuned.cli.params import draft, refused

    was_typed = wish.training_type is not None
    plan = draft(wish, output_default=False)
    if plan.violations:
        raise refused(plan.violations)
    present = _present(client, plan.display_name) if update else None
    if present is not None:
        template = _update(client, present, plan, task)
    else:
        try:
            template = client.create_template(
                plan.display_name,
                plan.training_type if was_typed or not task else None,
                plan.parameters,
                task=task,
            )
        except AlreadyExists as error:
            show_error(error, as_json)
            if not as_json:
                say("change that one: the same command with --update")
            raise typer.Exit(Exit.FAILED) from error
    if as_json:
        print_json(template)
        return
    print(template.display_name)
    say(f"look at it: {template_command('show', template.display_name)}")


def _update(client: Client, present: Template, plan: Draft, task: str) -> Template:
    from finetuned._parameters import flatten
    from finetuned.v1.parameters_pb2 import Parameters

    if not task:
        return client.update_template(present.name, plan.parameters, etag=present.etag)
    # Like a new template from the task: nothing of the old parameters stays.
    parameters = Parameters()
    parameters.CopyFrom(client.get_task(task).parameters)
    parameters.MergeFrom(plan.parameters)
    return client.update_template(
        present.name, parameters, reset=flatten(present.parameters), etag=present.etag
    )


def _present(client: Client, display_name: str) -> Template | None:
    from finetuned._errors import NotFound

    try:
        return client.get_template(display_name)
    except NotFound:
        return None


def _text(client: Client, template: Template, every: bool) -> str:
    from finetuned._documents import template_document
    from finetuned.cli.yaml_text import yaml_text

    schema = None if every else client.parameter_schema(template.training_type)
    document = template_document(template, schema)
    parameters = document.pop("parameters")
    return yaml_text({**document, **parameters})

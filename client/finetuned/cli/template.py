"""`finetunectl template`: named sets of parameters to begin tasks with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.group import Commands
from finetuned.cli.settings import (
    Exit,
    JsonOption,
    TemplateArgument,
    confirm,
    input_file,
    one_file,
    say,
    settings,
    template_command,
)
from finetuned.cli.train import FileOption, SetOption, TypeOption, wish_of

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.cli.params import Draft, Wish
    from finetuned.v1.template_service_pb2 import Template

app = typer.Typer(cls=Commands, help="Templates: named parameters to begin tasks with.")

AllOption = Annotated[
    bool, typer.Option("--all", help="All parameters, those at their default too.")
]
UpdateOption = Annotated[
    bool, typer.Option("--update", help="Change the template of that name, if there is one.")
]
OnlyTypeOption = Annotated[
    str | None,
    typer.Option("--type", metavar="TYPE", help="Only templates of sft or of pretrain. [all]"),
]


@app.command("list")
def list_templates(
    ctx: typer.Context, training_type: OnlyTypeOption = None, as_json: JsonOption = False
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
    ctx: typer.Context,
    name: TemplateArgument,
    every: AllOption = False,
    as_json: JsonOption = False,
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
        typer.Argument(metavar="[FILE]", help="The same as --file FILE; - is stdin."),
    ] = None,
    file_option: FileOption = None,
    task: Annotated[
        str | None,
        typer.Option("--task", metavar="TASK", help="Take type and parameters of this task."),
    ] = None,
    training_type: TypeOption = None,
    assignments: SetOption = None,
    update: UpdateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Save a template: from a task, a file, or --set.

    --set wins over the file, and both over the task. With --update, a file or a task replaces all
    that the template has, and --set alone changes these parameters.
    """
    given = one_file(file, file_option)
    with settings(ctx).client(start=True) as client:
        wish = _wish_of_file(client, given) if given is not None else wish_of(client)
        wish.training_type = training_type or wish.training_type
        wish.set_all(assignments or [])
        wish.display_name = name
        _save(client, wish, task or "", update, as_json, is_whole=given is not None)


@app.command()
def delete(
    ctx: typer.Context,
    name: TemplateArgument,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Delete a template. Tasks made from it stay as they are."""
    with settings(ctx).client(start=True) as client:
        template = client.get_template(name)
        command = template_command("delete", name, "--yes")
        if not yes and not confirm(f"Delete template {template.display_name}?", command):
            say("nothing was deleted")
            raise typer.Exit(Exit.FAILED)
        client.delete_template(template.name, etag=template.etag)
    print("{}" if as_json else f"{template.display_name} deleted")


@app.command("export")
def export_template(
    ctx: typer.Context,
    name: TemplateArgument,
    file: Annotated[
        Path | None, typer.Argument(metavar="[FILE]", help="File to write. [-, which is stdout]")
    ] = None,
    every: AllOption = False,
    force: Annotated[
        bool, typer.Option("--force", help="Overwrite the file, and do not ask.")
    ] = False,
) -> None:
    """Write a template as a YAML file, which `import` and `train --file` read."""
    with settings(ctx).client(start=True) as client:
        text = _text(client, client.get_template(name), every)
    if file is None or str(file) == "-":
        print(text, end="")
        return
    options = ["--force", *(["--all"] if every else [])]
    command = template_command("export", name, str(file), *options)
    # A device or a pipe loses nothing.
    if file.is_file() and not force and not confirm(f"Overwrite {file}?", command):
        say("nothing was written")
        raise typer.Exit(Exit.FAILED)
    file.write_text(text, encoding="utf-8")
    say(f"{file} written")


@app.command("import")
def import_template(
    ctx: typer.Context,
    file: Annotated[
        Path, typer.Argument(metavar="FILE", help="YAML or JSON, as of `export`; - is stdin.")
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", metavar="NAME", help="Display name. [that in the file]"),
    ] = None,
    update: UpdateOption = False,
    as_json: JsonOption = False,
) -> None:
    """Make a template of a file. With --update, the file replaces all that the template has."""
    given = input_file(file) or file
    with settings(ctx).client(start=True) as client:
        wish = _wish_of_file(client, given)
        wish.display_name = name or wish.display_name
        if not wish.display_name and given is not file:
            raise typer.BadParameter("is needed: what was read has no name", param_hint="--name")
        # A file without a name lends its own.
        wish.display_name = wish.display_name or file.stem
        _save(client, wish, "", update, as_json, is_whole=True)


def _wish_of_file(client: Client, file: Path) -> Wish:
    """What the file asks for.

    Raises:
        InvalidArgument: It can't be read, or has nothing in it.
    """
    from finetuned._errors import FieldViolation
    from finetuned.cli.params import Wish, refused

    wish = wish_of(client, file=file)
    if wish == Wish():
        why = "is empty: it must hold sections such as `training:`, or a training_type at least"
        raise refused([FieldViolation(str(file), why, "BAD_FILE")])
    return wish


def _save(
    client: Client, wish: Wish, task: str, update: bool, as_json: bool, *, is_whole: bool
) -> None:
    """Create the template, or change it.

    Args:
        client: The client.
        wish: What the template is to have.
        task: Whose parameters lie under the wish's; or empty.
        update: Change the template of the name, if there is one.
        as_json: Write JSON.
        is_whole: The wish stands for the whole template: a change keeps nothing else.
    """
    from finetuned.cli.output import print_json
    from finetuned.cli.params import draft, refused

    was_typed = wish.training_type is not None
    plan = draft(wish, output_default=False)
    if plan.violations:
        raise refused(plan.violations)
    present = _present(client, plan.display_name) if update else None
    if present is not None:
        template = _update(client, present, plan, task, is_typed=was_typed, is_whole=is_whole)
    else:
        _check_no_id(client, plan.display_name)
        template = client.create_template(
            plan.display_name,
            plan.training_type if was_typed or not task else None,
            plan.parameters,
            task=task,
        )
    if as_json:
        print_json(template)
        return
    print(template.display_name)
    say(f"look at it: {template_command('show', template.display_name)}")


def _check_no_id(client: Client, display_name: str) -> None:
    """Raise where the name is another template's id, under which this one would not be found."""
    from finetuned._errors import FieldViolation, NotFound
    from finetuned.cli.params import refused

    try:
        other = client.get_template(f"templates/{display_name}")
    except NotFound:
        return
    why = f"is the id of template {other.display_name}: a template of that name can't be reached"
    raise refused([FieldViolation("display_name", why, "NAME_IS_AN_ID")])


def _update(
    client: Client, present: Template, plan: Draft, task: str, *, is_typed: bool, is_whole: bool
) -> Template:
    from finetuned._calls import ALL_PARAMETERS
    from finetuned._documents import sections
    from finetuned._errors import FieldViolation
    from finetuned._parameters import flatten
    from finetuned.cli.output import type_word
    from finetuned.cli.params import refused

    source = client.get_task(task) if task else None
    values = flatten(source.parameters) if source else {}
    values |= flatten(plan.parameters)
    old = type_word(present.training_type)
    new = plan.training_type if is_typed else type_word(source.training_type) if source else old
    if new != old:
        why = f"is {old} in template {present.display_name}, and can't become {new}"
        raise refused([FieldViolation("training_type", why, "IMMUTABLE")])
    # Like a new template: nothing of the old parameters stays.
    reset = (ALL_PARAMETERS,) if source or is_whole else ()
    return client.update_template(present.name, sections(values), reset=reset, etag=present.etag)


def _present(client: Client, display_name: str) -> Template | None:
    """The template of that name, or else of that id."""
    from finetuned._errors import NotFound

    for template in client.list_templates():
        if template.display_name == display_name:
            return template
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

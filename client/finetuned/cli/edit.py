"""`finetunectl task edit`: change a task, by options or in an editor."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuned.cli.settings import (
    Exit,
    JsonOption,
    TaskArgument,
    input_file,
    no_terminal,
    say,
    settings,
    task_command,
    task_word,
)
from finetuned.cli.train import DeviceOption, NameOption, SetOption

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned._errors import FieldViolation
    from finetuned.v1.task_pb2 import Task

_HEAD = """\
# Task {name}. Save and close to change it; a line that is taken out goes back to its default.
# Close without a change, or empty the file, to leave the task as it is.
"""


def edit(
    ctx: typer.Context,
    name: TaskArgument,
    assignments: SetOption = None,
    unset: Annotated[
        list[str] | None,
        typer.Option(
            "--unset",
            metavar="SECTION.FIELD",
            help="A parameter that goes back to its default; again for more.",
        ),
    ] = None,
    new_name: NameOption = None,
    device: DeviceOption = None,
    file: Annotated[
        Path | None,
        typer.Option(
            "-f",
            "--file",
            metavar="FILE",
            help="The parameters as in the editor: what is not in it goes back to its default.",
        ),
    ] = None,
    update_template: Annotated[
        bool, typer.Option("--update-template", help="Change the task's own template alike.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Change a task. Earlier runs keep what they ran with; the next start has what is new.

    Without options, the task opens as YAML in $VISUAL or $EDITOR; what is wrong comes back as
    comments.
    """
    from finetuned.cli.output import print_json

    by_options = assignments or unset or new_name is not None or device is not None
    if file is not None and by_options:
        raise typer.BadParameter(
            "stands for all parameters, so --set, --unset, --name and --device say nothing beside",
            param_hint="--file",
        )
    with settings(ctx).client() as client:
        task = client.get_task(name)
        if file is not None:
            changed: Task | None = _apply(client, task, input_file(file) or file, update_template)
        elif by_options:
            changed = _by_options(
                client, task, assignments or [], unset or [], new_name, device, update_template
            )
        else:
            changed = _in_editor(client, task, update_template)
    if changed is None:
        say(f"{task.display_name} is as it was")
        return
    if as_json:
        print_json(changed)
        return
    print(changed.display_name)
    say(f"start it: {task_command('start', changed)}")


def _by_options(
    client: Client,
    task: Task,
    assignments: list[str],
    unset: list[str],
    new_name: str | None,
    device: str | None,
    update_template: bool,
) -> Task:
    from finetuned.cli.params import Wish, draft, refused

    wish = Wish(display_name=new_name, device=device)
    wish.set_all(assignments)
    plan = draft(wish, output_default=False)
    if plan.violations:
        raise refused(plan.violations)
    return client.update_task(
        task.name,
        plan.parameters,
        display_name=new_name,
        device=device,
        reset=unset,
        update_template=update_template,
        etag=task.etag,
    )


def _in_editor(client: Client, task: Task, update_template: bool) -> Task | None:
    """The changed task; None where nothing was changed.

    What was typed is never lost: where it can't be used in the end, its file stays.
    """
    import tempfile

    from finetuned._errors import FinetunedError, InvalidArgument

    if not sys.stdin.isatty():
        raise no_terminal(
            "there is no terminal for an editor",
            task_command("edit", task, "--set", "section.field=value"),
        )
    head = _HEAD.format(name=task.display_name)
    before = _task_text(task)
    handle, where = tempfile.mkstemp(prefix="finetunectl-", suffix=".yaml")
    os.close(handle)
    path = Path(where)
    text, wrong = before, None
    while True:
        shown = (_remarks(wrong.violations, wrong.message) if wrong else "") + head + text
        path.write_text(shown, encoding="utf-8")
        _open_editor(path, task, shown)
        typed = _typed(path)
        text = _without_remarks(typed)
        if not text.strip() or text == before:
            path.unlink(missing_ok=True)
            return None
        if wrong and (typed == shown or not sys.stdin.isatty()):
            _say_kept(task, path)
            raise wrong
        try:
            changed = _apply(client, task, path, update_template)
        except InvalidArgument as error:
            wrong = error
        except FinetunedError:
            _say_kept(task, path)
            raise
        else:
            path.unlink()
            return changed


def _say_kept(task: Task, path: Path) -> None:
    say(f"what you typed is kept in {path}; when it is mended:")
    say(task_command("edit", task, "--file", str(path)))


def _typed(path: Path) -> str:
    """What the editor left; nothing where it took the file away."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


def _apply(client: Client, task: Task, path: Path, update_template: bool) -> Task:
    """Send what differs between the task and the file."""
    from finetuned._errors import FieldViolation
    from finetuned._parameters import flatten
    from finetuned.cli.output import type_word
    from finetuned.cli.params import draft, read_file, refused

    wish = read_file(path)
    wish.for_task()
    plan = draft(wish, output_default=False)
    violations = list(plan.violations)
    old_type = type_word(task.training_type)
    if wish.training_type is not None and plan.training_type != old_type:
        why = f"is {old_type} in task {task_word(task)}, and can't become {plan.training_type}"
        violations.append(FieldViolation("training_type", why, "IMMUTABLE"))
    if violations:
        raise refused(violations)
    old = _values(task)
    new = flatten(plan.parameters)
    changed: dict[str, dict[str, Any]] = {}
    for field_path, value in new.items():
        if field_path not in old or old[field_path] != value:
            section, _, field = field_path.partition(".")
            changed.setdefault(section, {})[field] = value
    return client.update_task(
        task.name,
        changed,
        # A file that was not made here need not have the name.
        display_name=plan.display_name
        if plan.display_name not in ("", task.display_name)
        else None,
        device=plan.device if plan.device != task.device else None,
        reset=[field_path for field_path in old if field_path not in new],
        update_template=update_template,
        etag=task.etag,
    )


def _values(task: Task) -> dict[str, Any]:
    """The task's parameters; an empty text is as good as none."""
    from finetuned._documents import differing

    return differing(task.parameters, None)


def _task_text(task: Task) -> str:
    from finetuned._documents import sections
    from finetuned.cli.yaml_text import yaml_text

    head = {"display_name": task.display_name, "device": task.device}
    return yaml_text({**head, **sections(_values(task))})


def _without_remarks(text: str) -> str:
    """The text without the comments at its top, ours among them."""
    lines = text.splitlines(keepends=True)
    while lines and lines[0].startswith("#"):
        del lines[0]
    return "".join(lines)


def _remarks(violations: list[FieldViolation], message: str) -> str:
    lines = [
        f"{v.field.removeprefix('task.').removeprefix('parameters.')}: {v.description}"
        for v in violations
    ] or [message]
    text = "\n".join(lines)
    return "# Wrong, and nothing is changed yet:\n" + "".join(
        f"#   {line}\n" for line in text.splitlines()
    )


def _open_editor(path: Path, task: Task, shown: str) -> None:
    import subprocess

    from finetuned.cli.errors import show_trouble

    editor = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        status = subprocess.run([*shlex.split(editor), str(path)], check=False).returncode
    except (OSError, ValueError) as error:
        path.unlink()
        show_trouble(
            f"the editor {editor!r} can't be run: {error}",
            reason="NO_EDITOR",
            command=f"EDITOR=nano {task_command('edit', task)}",
            as_json=False,
        )
        raise typer.Exit(Exit.FAILED) from error
    if not status:
        return
    say(f"error: the editor ended with status {status}; the task is as it was")
    if _typed(path) in ("", shown):
        path.unlink(missing_ok=True)
    else:
        _say_kept(task, path)
    raise typer.Exit(Exit.FAILED)

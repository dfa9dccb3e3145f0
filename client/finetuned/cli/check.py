"""`finetunectl check` and `finetunectl estimate`: what would come of parameters, without a task."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from finetuned.cli.settings import Exit, JsonOption, one_file, say, settings
from finetuned.cli.train import (
    DataOption,
    DeviceOption,
    FileOption,
    ModelOption,
    OutputOption,
    SetOption,
    TemplateOption,
    TypeOption,
    draft_with_template,
    wish_of,
)

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned._violations import ParameterViolation
    from finetuned.cli.params import Draft, Wish
    from finetuned.v1.parameter_service_pb2 import EstimateTaskResponse
    from finetuned.v1.task_pb2 import Task
    from finetuned.v1.template_service_pb2 import Template

FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="The same as --file FILE; - is stdin."),
]
OfTaskOption = Annotated[
    str | None,
    typer.Option(
        "--task", metavar="TASK", help="A task whose parameters hold where none is given."
    ),
]

_BAR_WIDTH = 30


@dataclass(frozen=True)
class _Question:
    """What is asked about."""

    wish: Wish
    draft: Draft
    training_type: str | None
    """None: that of the task or template."""
    task: str
    base: Task | Template | None
    """Where parameters come from that are not given."""

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Client.validate` and `Client.estimate`."""
        return {
            "training_type": self.training_type,
            "parameters": self.draft.parameters,
            "device": self.draft.device,
            "template": self.draft.template,
            "task": self.task,
        }

    def type_word(self) -> str:
        """`sft` or `pretrain`."""
        from finetuned.cli.output import type_word

        if self.training_type is None and self.base is not None:
            return type_word(self.base.training_type)
        return self.draft.training_type


def check(
    ctx: typer.Context,
    file_argument: FileArgument = None,
    file: FileOption = None,
    training_type: TypeOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output: OutputOption = None,
    device: DeviceOption = None,
    template: TemplateOption = None,
    task: OfTaskOption = None,
    assignments: SetOption = None,
    strict: Annotated[bool, typer.Option("--strict", help="Warnings count as errors.")] = False,
    fix: Annotated[
        bool,
        typer.Option("--fix", help="Write the parameters with all suggestions to stdout, as YAML."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Check parameters: everything that is wrong, doubtful or good to know, at once.

    Exit status 2 if a run can't be started like this. Nothing is written anywhere; with --fix, the
    findings are on stderr.
    """
    from finetuned.cli.output import print_json_value
    from finetuned.cli.recorded import warn_of_other_files
    from finetuned.cli.violations import as_json as violation_as_json
    from finetuned.cli.violations import print_violations, with_suggestions

    file = one_file(file_argument, file)
    with settings(ctx).client(start=True) as client:
        question = _ask(
            client, file, training_type, model, data, output, device, template, task, assignments
        )
        violations = _findings(client, question)
    warn_of_other_files(question.wish, question.draft)
    grave = ("error", "warning") if strict else ("error",)
    is_bad = any(violation.severity in grave for violation in violations)
    fixed = _fixed(question, violations) if fix else None
    if as_json:
        answer: dict[str, Any] = {
            "valid": not is_bad,
            "violations": [violation_as_json(v) for v in violations],
        }
        print_json_value({**answer, **(fixed or {"parameters": None})} if fix else answer)
    elif fix:
        _print_fixed(fixed)
        print_violations(violations, to_stderr=True)
    else:
        print_violations(violations)
        command = with_suggestions(sys.argv[1:], violations)
        if command:
            say(f"try: {command}")
        elif not violations:
            say("nothing is wrong")
    if is_bad:
        raise typer.Exit(Exit.USAGE)


def estimate(
    ctx: typer.Context,
    file_argument: FileArgument = None,
    file: FileOption = None,
    training_type: TypeOption = None,
    model: ModelOption = None,
    data: DataOption = None,
    output: OutputOption = None,
    device: DeviceOption = None,
    template: TemplateOption = None,
    task: OfTaskOption = None,
    assignments: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate a run beforehand: samples, steps, checkpoints, disk, memory, time.

    Takes seconds where the data have not been read before. Options as for `finetunectl check`. Exit
    status 2 if a run can't be started like this.
    """
    from finetuned._errors import FieldViolation
    from finetuned._violations import from_messages
    from finetuned.cli.checkpoint import show_plan
    from finetuned.cli.output import print_json
    from finetuned.cli.params import refused
    from finetuned.cli.violations import print_violations

    file = one_file(file_argument, file)
    with settings(ctx).client(start=True) as client:
        question = _ask(
            client, file, training_type, model, data, output, device, template, task, assignments
        )
        if question.draft.violations:
            raise refused(
                [
                    FieldViolation(found.field, found.message, found.reason)
                    for found in _findings(client, question)
                    if found.severity == "error"
                ]
            )
        answer = client.estimate(**question.arguments())
    violations = from_messages(answer.violations)
    if as_json:
        print_json(answer)
    else:
        _show_estimate(answer)
        if answer.HasField("resume_plan"):
            print()
            show_plan(answer.resume_plan)
        print_violations(violations, to_stderr=True)
    if any(violation.severity == "error" for violation in violations):
        raise typer.Exit(Exit.USAGE)


def _ask(
    client: Client,
    file: Path | None,
    training_type: str | None,
    model: str | None,
    data: str | None,
    output: str | None,
    device: str | None,
    template: str | None,
    task: str | None,
    assignments: list[str] | None,
) -> _Question:
    from finetuned._errors import FieldViolation
    from finetuned.cli.params import refused

    wish = wish_of(
        client,
        training_type=training_type,
        model=model,
        data=data,
        output=output,
        device=device,
        file=file,
        template=template,
        assignments=assignments,
    )
    wish.for_task()
    if task and wish.template:
        why = "can't be asked about together with a template: what the task has holds already"
        raise refused([FieldViolation("--task", why, "TASK_WITH_TEMPLATE")])
    was_typed = wish.training_type is not None
    base: Task | Template | None = None
    if task:
        base = client.get_task(task)
    elif wish.template:
        base = client.get_template(wish.template)
    # As `train` would have it: an output folder is chosen where none is given.
    draft = draft_with_template(client, wish, output_default=task is None)
    is_type = all(violation.field != "training_type" for violation in draft.violations)
    is_own = base is None or (was_typed and is_type)
    return _Question(wish, draft, draft.training_type if is_own else None, task or "", base)


def _findings(client: Client, question: _Question) -> list[ParameterViolation]:
    """Everything there is to say, the gravest first."""
    from finetuned._errors import InvalidArgument
    from finetuned._violations import from_shape

    shape = from_shape(question.draft.violations)
    arguments: dict[str, Any] = question.arguments()
    clash: list[ParameterViolation] = []
    try:
        found = client.validate(**arguments)
    except InvalidArgument as error:
        if question.base is None or question.training_type is None or not error.violations:
            raise
        # Of another type than the task or template; the rest is judged as that has it.
        clash = from_shape(error.violations)
        arguments["training_type"] = None
        found = client.validate(**arguments)
    wrong = {violation.field for violation in shape}
    found = [violation for violation in found if violation.field not in wrong]
    severities = ("error", "warning", "notice")
    return sorted(
        [*shape, *clash, *_without_effect(client, question), *found],
        key=lambda violation: severities.index(violation.severity),
    )


def _without_effect(client: Client, question: _Question) -> list[ParameterViolation]:
    """Warnings of what the training type does not have, which nobody would read."""
    from finetuned._parameters import flatten
    from finetuned._violations import ParameterViolation

    word = question.type_word()
    schema = client.parameter_schema(word)
    known = {section.name for section in schema.sections}
    known |= {field.path for section in schema.sections for field in section.fields}
    given = list(flatten(question.draft.parameters))
    sections = {path: path.partition(".")[0] for path in given}
    unread = [sections[path] if sections[path] not in known else path for path in given]
    return [
        ParameterViolation(name, "NO_EFFECT", f"has no effect: {word} does not have it", "warning")
        for name in dict.fromkeys(unread)
        if name not in known
    ]


def _fixed(question: _Question, violations: list[ParameterViolation]) -> dict[str, Any] | None:
    """The whole document with the suggestions, usable alone; what can't be read stays as given.

    None where it can't hold what is wrong, so that nobody would see it again.
    """
    from finetuned._documents import sections
    from finetuned._parameters import NOT_UTF8, SECTIONS, flatten

    wish, draft, base = question.wish, question.draft, question.base
    unusable = {violation.field for violation in draft.violations}
    values = (flatten(base.parameters) if base is not None else {}) | flatten(draft.parameters)
    is_typed = "training_type" in unusable
    head: dict[str, Any] = {
        "training_type": wish.training_type if is_typed else question.type_word(),
        "display_name": draft.display_name,
        "device": draft.device or getattr(base, "device", ""),
    }
    for violation in reversed(violations):  # the gravest has the last word
        if violation.suggested_value is not None:
            path = violation.suggested_field or violation.field
            (values if "." in path else head)[path] = violation.suggested_value
    parameters: dict[str, Any] = sections({k: v for k, v in values.items() if v != ""})
    for section, content in wish.sections.items():
        if section not in SECTIONS or not isinstance(content, dict):
            parameters[section] = content
            continue
        for name, given in cast("dict[str, Any]", content).items():
            if not name or f"{section}.{name}" in unusable:
                parameters.setdefault(section, {})[name] = given
    held = {f"{section}.{name}" for section, fields in parameters.items() for name in fields}
    held |= {*head, *parameters}
    for wrong in draft.violations:
        is_lost = wrong in wish.violations or wrong.reason == NOT_UTF8
        if is_lost or wrong.field not in held:
            return None
    return {**{key: text for key, text in head.items() if text}, "parameters": parameters}


def _print_fixed(fixed: dict[str, Any] | None) -> None:
    from finetuned.cli.yaml_text import yaml_text

    if fixed is None:
        say("error: nothing is written: a file can't hold all that is wrong")
        return
    parameters = fixed.pop("parameters")
    print(yaml_text({**fixed, **parameters}), end="")


def _show_estimate(answer: EstimateTaskResponse) -> None:
    from finetuned.cli.output import bytes_text, duration_text, print_pairs

    about = "" if answer.exact else "about "
    samples = f"{about}{answer.train_samples:,} to train on"
    for count, what in (
        (answer.cut_samples, "cut"),
        (answer.dropped_samples, "left out"),
        (answer.eval_samples, "to evaluate on"),
    ):
        samples += f", {count:,} {what}" if count else ""
    steps = f"{about}{answer.total_steps:,} ({answer.steps_per_epoch:,} an epoch)"
    if answer.run_steps != answer.total_steps:
        steps += f", {answer.run_steps:,} of them left for this run"
    checkpoints = f"{answer.checkpoints:,} saved, {answer.kept_checkpoints:,} kept"
    if answer.HasField("quota_left"):
        checkpoints += f"; {answer.quota_left:,} left of the quota"
    disk = f"{bytes_text(answer.disk_bytes)} of {bytes_text(answer.disk_free_bytes)} free"
    if answer.checkpoints:
        disk += f"; a checkpoint has {bytes_text(answer.checkpoint_bytes)}"
    share = answer.trainable_parameters / max(answer.total_parameters, 1)
    trained = (
        f"{answer.trainable_parameters:,} of {answer.total_parameters:,} ({share:.2%}) trained"
    )
    unknown = "not known: no run or probe of this model has been measured on this machine"
    has_duration = answer.HasField("duration")
    seconds = answer.duration.ToTimedelta().total_seconds()
    print_pairs(
        [
            ("samples", samples),
            ("tokens", f"{about}{answer.train_tokens:,} an epoch"),
            ("steps", steps),
            ("checkpoints", checkpoints),
            ("disk", disk),
            ("parameters", trained),
            ("duration", f"about {duration_text(seconds)}" if has_duration else unknown),
            ("device", answer.device),
            ("measured", _measured(answer)),
            (
                "memory",
                f"{bytes_text(answer.peak_memory_bytes)} at the peak"
                f" of {bytes_text(answer.memory_total_bytes)},"
                f" {bytes_text(answer.memory_free_bytes)} free now",
            ),
        ]
    )
    _show_memory(answer)


def _measured(answer: EstimateTaskResponse) -> str:
    from finetuned.cli.output import time_text

    if not answer.HasField("calibration"):
        return ""
    when = time_text(answer.calibration.probe_time)
    if answer.calibration.measured:
        return f"memory and speed, by the probe of {when}"
    return f"no; corrected by a probe with other settings, of {when}"


def _show_memory(answer: EstimateTaskResponse) -> None:
    """A bar for each part of the peak, as long as its share of the device's memory."""
    from finetuned.cli.bars import bar
    from finetuned.cli.output import bytes_text, console

    whole = max(answer.memory_total_bytes, answer.peak_memory_bytes, 1)
    rows = [("all", answer.peak_memory_bytes), *((p.name, p.bytes) for p in answer.memory_parts)]
    width = max(len(name) for name, _ in rows)
    out = console()
    for name, size in rows:
        share = size / whole
        is_much = name == "all" and answer.peak_memory_bytes > answer.memory_free_bytes
        out.print(
            f"  {name:<{width}}  ",
            bar(share, _BAR_WIDTH, "red" if is_much else "green", track=True),
            f"  {bytes_text(size):>10}  {share:.0%}",
            sep="",
            soft_wrap=True,
            markup=False,
        )

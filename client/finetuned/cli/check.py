"""`finetunectl check` and `finetunectl estimate`: what would come of parameters, without a task."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from finetuned.cli.settings import Exit, JsonOption, say, settings
from finetuned.cli.train import (
    DataOption,
    DeviceOption,
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
    from finetuned.cli.params import Draft
    from finetuned.v1.parameter_service_pb2 import EstimateTaskResponse

FileArgument = Annotated[
    Path | None,
    typer.Argument(metavar="[FILE]", help="Parameters in YAML or JSON, as for train --file."),
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

    draft: Draft
    training_type: str | None
    task: str

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Client.validate` and `Client.estimate`."""
        return {
            "training_type": self.training_type,
            "parameters": self.draft.parameters,
            "device": self.draft.device,
            "template": self.draft.template,
            "task": self.task,
        }


def check(
    ctx: typer.Context,
    file: FileArgument = None,
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
    from finetuned._violations import from_shape
    from finetuned.cli.output import print_json_value
    from finetuned.cli.violations import as_json as violation_as_json
    from finetuned.cli.violations import print_violations, with_suggestions

    with settings(ctx).client(start=True) as client:
        question = _ask(
            client, file, training_type, model, data, output, device, template, task, assignments
        )
        shape = from_shape(question.draft.violations)
        wrong = {violation.field for violation in shape}
        found = [v for v in client.validate(**question.arguments()) if v.field not in wrong]
    violations = shape + found
    grave = ("error", "warning") if strict else ("error",)
    is_bad = any(violation.severity in grave for violation in violations)
    if as_json:
        print_json_value(
            {"valid": not is_bad, "violations": [violation_as_json(v) for v in violations]}
        )
    else:
        if fix:
            _print_fixed(question, violations)
        print_violations(violations, to_stderr=fix)
        command = "" if fix else with_suggestions(sys.argv[1:], violations)
        if command:
            say(f"try: {command}")
        elif not violations:
            say("nothing is wrong")
    if is_bad:
        raise typer.Exit(Exit.USAGE)


def estimate(
    ctx: typer.Context,
    file: FileArgument = None,
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

    Takes seconds where the data have not been read before. Options as for `finetunectl check`.
    """
    from finetuned._violations import from_messages
    from finetuned.cli.output import print_json
    from finetuned.cli.params import refused
    from finetuned.cli.violations import print_violations

    with settings(ctx).client(start=True) as client:
        question = _ask(
            client, file, training_type, model, data, output, device, template, task, assignments
        )
        if question.draft.violations:
            raise refused(question.draft.violations)
        answer = client.estimate(**question.arguments())
    if as_json:
        print_json(answer)
        return
    _show_estimate(answer)
    print_violations(from_messages(answer.violations), to_stderr=True)


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
    was_typed = wish.training_type is not None
    # As `train` would have it: an output folder is chosen where none is given.
    draft = draft_with_template(client, wish, output_default=task is None)
    is_tasks = task is not None and not was_typed
    return _Question(draft, None if is_tasks else draft.training_type, task or "")


def _print_fixed(question: _Question, violations: list[ParameterViolation]) -> None:
    from finetuned._documents import sections
    from finetuned._parameters import flatten
    from finetuned.cli.yaml_text import yaml_text

    values = flatten(question.draft.parameters)
    for violation in reversed(violations):  # the gravest has the last word
        if violation.suggested_value is not None and violation.severity != "notice":
            values[violation.suggested_field or violation.field] = violation.suggested_value
    head = {
        name: text
        for name, text in (
            ("training_type", question.training_type),
            ("template", question.draft.template),
            ("device", question.draft.device),
        )
        if text
    }
    print(yaml_text({**head, **sections(values)}), end="")


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
    unknown = "not known: no run of this model has been measured on this machine"
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
            (
                "memory",
                f"{bytes_text(answer.peak_memory_bytes)} at the peak"
                f" of {bytes_text(answer.memory_total_bytes)},"
                f" {bytes_text(answer.memory_free_bytes)} free now",
            ),
        ]
    )
    _show_memory(answer)


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

"""`finetunectl dataset`: training data, looked at before it is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.group import Commands
from finetuned.cli.settings import Exit, JsonOption, command_line, say, settings, visible

if TYPE_CHECKING:
    from rich.console import Console

    from finetuned.v1.dataset_service_pb2 import (
        DatasetReport,
        InspectionProgress,
        RenderedSample,
    )

app = typer.Typer(cls=Commands, help="Training data.")

_BAR_WIDTH = 40
_BAD_LINES_SHOWN = 10
_DEFAULT_TYPE = "sft"
_DEFAULT_LENGTH = 512
_DEFAULT_SAMPLES = 3


@app.callback()
def _group() -> None:  # pyright: ignore[reportUnusedFunction]
    """Keeps `inspect` a verb: typer would drop it where it is the only one."""


@app.command()
def inspect(
    ctx: typer.Context,
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Training data: JSONL, or text.")],
    training_type: Annotated[
        str, typer.Option("--type", metavar="TYPE", help="sft (on chats) or pretrain (on text).")
    ] = _DEFAULT_TYPE,
    model: Annotated[
        Path | None,
        typer.Option("--model", metavar="DIR", help="Model whose tokenizer counts tokens."),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option("--tokenizer", metavar="DIR", help="Tokenizer, if not a model's.")
    ] = None,
    max_seq_length: Annotated[
        int,
        typer.Option("--max-seq-length", metavar="TOKENS", help="Where samples are cut."),
    ] = _DEFAULT_LENGTH,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave bad lines out, rather than refuse the file.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", metavar="N", help="Samples to show in full, 0 to 20.")
    ] = _DEFAULT_SAMPLES,
    as_json: JsonOption = False,
) -> None:
    """Read a whole data file as a run would, and show what is in it and what is learned of it.

    Exit status 2 if a run can't use it. Ctrl-C ends the reading. With --model or --tokenizer,
    tokens are counted and what the model learns is marked.
    """
    from finetuned.cli.errors import show_trouble
    from finetuned.cli.output import print_json

    folder = tokenizer or model
    with settings(ctx).client(start=True) as client:
        items = client.inspect_dataset(
            str(file.expanduser().absolute()),
            training_type,
            tokenizer_path=str(folder.expanduser().absolute()) if folder else "",
            max_seq_length=max_seq_length,
            bad_line_policy="skip" if skip_bad else "fail",
            max_rendered_samples=samples,
        )
        report = _follow(items, is_quiet=as_json)
    if report is None:
        show_trouble(
            "the daemon has sent no report; its log says more",
            reason="NO_REPORT",
            command=command_line("daemon", "logs", "--level", "error"),
            as_json=as_json,
        )
        raise typer.Exit(Exit.FAILED)
    if as_json:
        print_json(report)
    else:
        _show(report, max_seq_length)
        given = {
            "--type": training_type if training_type != _DEFAULT_TYPE else "",
            "--model": str(model or ""),
            "--tokenizer": str(tokenizer or ""),
            "--max-seq-length": "" if max_seq_length == _DEFAULT_LENGTH else str(max_seq_length),
            "--samples": "" if samples == _DEFAULT_SAMPLES else str(samples),
        }
        _say_next(report, file, given, training_type, skip_bad)
    if not report.usable:
        raise typer.Exit(Exit.USAGE)


def _follow(
    items: Iterator[InspectionProgress | DatasetReport], *, is_quiet: bool
) -> DatasetReport | None:
    """The report; until it is there, a bar on the terminal where stderr is one."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from finetuned.cli.live import is_interactive
    from finetuned.v1.dataset_service_pb2 import DatasetReport

    console = Console(stderr=True, markup=False)
    is_shown = is_interactive(console) and not is_quiet
    with Progress(
        BarColumn(),
        DownloadColumn(binary_units=True),
        TextColumn("{task.description}"),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not is_shown,
    ) as progress:
        bar = progress.add_task("reading", total=None)
        for item in items:
            if isinstance(item, DatasetReport):
                return item
            words = f"{item.samples:,} samples"
            words += f", {item.bad_lines:,} bad lines" if item.bad_lines else ""
            progress.update(
                bar, total=item.bytes_total, completed=item.bytes_read, description=words
            )
    return None


def _show(report: DatasetReport, max_seq_length: int) -> None:
    from rich.text import Text

    from finetuned.cli.output import bytes_text, enum_name, print_pairs
    from finetuned.v1.dataset_service_pb2 import DataFormat

    def word(number: DataFormat.ValueType) -> str:
        name = enum_name(DataFormat, number).removeprefix("DATA_FORMAT_").lower()
        return "none" if name == "unspecified" else name.replace("_", " ")

    formats = ", ".join(f"{word(f.format)} {f.samples:,}" for f in report.formats)
    tokens = ""
    if report.tokens:
        share = report.learned_tokens / report.tokens
        tokens = f"{report.tokens:,}, {report.learned_tokens:,} of them learned ({share:.0%})"
    verdict = Text("yes", "green") if report.usable else Text(f"no: {report.problem}", "red")
    print_pairs(
        [
            ("usable", verdict),
            ("format", word(report.format)),
            ("formats", formats if len(report.formats) > 1 else ""),
            ("size", bytes_text(report.size_bytes)),
            ("samples", f"{report.samples:,}"),
            ("bad lines", f"{report.bad_line_count:,}" if report.bad_line_count else ""),
            ("duplicates", f"{report.duplicates:,}" if report.duplicates else ""),
            ("roles", ", ".join(f"{role.role} {role.turns:,}" for role in report.roles)),
            (
                "turns",
                ", ".join(
                    f"{turn.samples:,} with {turn.turns}{' or more' if turn.or_more else ''}"
                    for turn in report.turns
                ),
            ),
            ("tokens", tokens),
            ("cut", f"{report.cut_samples:,} samples" if report.cut_samples else ""),
            (
                "left out",
                f"{report.empty_samples:,} samples, as nothing in them would be learned"
                if report.empty_samples
                else "",
            ),
            ("trained on", f"{report.train_samples:,} samples" if report.train_samples else ""),
            ("tokenizer", Text(report.tokenizer_problem, "yellow")),
        ]
    )
    _show_bad_lines(report)
    if report.HasField("token_lengths"):
        _show_lengths(report, max_seq_length)
    for sample in report.rendered_samples:
        _show_sample(sample)


def _show_bad_lines(report: DatasetReport) -> None:
    from finetuned.cli.output import print_table

    if not report.bad_lines:
        return
    print("\nbad lines")
    shown = report.bad_lines[:_BAD_LINES_SHOWN]
    print_table(
        ("line", "byte", "why", "begins"),
        (
            (f"{bad.line}", f"{bad.byte_offset}", bad.message, _one_line(bad.excerpt))
            for bad in shown
        ),
    )
    if report.bad_line_count > len(shown):
        print(f"... {report.bad_line_count - len(shown):,} more")


def _show_lengths(report: DatasetReport, max_seq_length: int) -> None:
    from rich.text import Text

    from finetuned.cli.bars import bar, is_encodable
    from finetuned.cli.output import console, print_table

    lengths = report.token_lengths
    print("\nlengths in tokens")
    print_table(
        ("shortest", "mean", "p50", "p90", "p95", "p99", "longest"),
        [
            (
                f"{lengths.minimum:,}",
                f"{lengths.mean:,.1f}",
                *(f"{n:,}" for n in (lengths.p50, lengths.p90, lengths.p95, lengths.p99)),
                f"{lengths.maximum:,}",
            )
        ],
    )
    filled = [number for number, entry in enumerate(lengths.histogram) if entry.samples]
    histogram = lengths.histogram[filled[0] : filled[-1] + 1] if filled else []
    most = max((entry.samples for entry in histogram), default=0)
    labels = [f"{entry.start:,}-{max(entry.end - 1, entry.start):,}" for entry in histogram]
    width = max(map(len, labels), default=0)
    dash = "╌" if is_encodable("╌") else "-"
    out = console()
    for label, entry in zip(labels, histogram, strict=True):
        is_cut = report.cut_samples > 0 and entry.end > max_seq_length
        if is_cut and entry.start <= max_seq_length:
            line = f" cut at {max_seq_length:,} ".center(_BAR_WIDTH, dash)
            out.print(Text(f"{'':<{width}}  {line}", style="yellow"), soft_wrap=True)
        style = "yellow" if is_cut else "green"
        shown = bar(entry.samples / max(most, 1), _BAR_WIDTH, style)
        row = Text(f"{label:>{width}}  ").append_text(shown).append(f"  {entry.samples:,}")
        out.print(row, soft_wrap=True)


def _show_sample(sample: RenderedSample) -> None:
    """The sample's text; what is learned in colour, or in «» where there is none."""
    from rich.text import Text

    from finetuned.cli.bars import is_encodable
    from finetuned.cli.output import console

    out = console()
    begin, end = ("«", "»") if is_encodable("«»") else ("<<", ">>")
    head = f"\nline {sample.line}: {sample.tokens:,} tokens, {sample.learned_tokens:,} learned"
    out.print(Text(head + (", cut" if sample.cut else ""), style="bold"), soft_wrap=True)
    text = Text()
    for piece in sample.pieces:
        words = visible(piece.text)
        if piece.learned and not _has_colour(out):
            words = f"{begin}{words}{end}"
        text.append(words, style="green" if piece.learned else "")
    out.print(text, soft_wrap=True)


def _has_colour(console: Console) -> bool:
    """Whether it shows colours: no pipe, no `NO_COLOR`, no dumb terminal."""
    return console.color_system is not None and not console.no_color


def _say_next(
    report: DatasetReport, file: Path, given: dict[str, str], training_type: str, skip_bad: bool
) -> None:
    """Say what to type next.

    Args:
        report: Of the file.
        file: The file, as it was typed.
        given: Options that were given, by name; empty values are left out.
        training_type: What the file was read for.
        skip_bad: Whether bad lines were skipped.
    """
    import shlex

    def command(*more: str, **changed: str) -> str:
        options = given | {f"--{name}": value for name, value in changed.items()}
        words = [word for name, value in options.items() if value for word in (name, value)]
        words += ["--skip-bad"] if skip_bad else []
        name = ["--", str(file)] if str(file).startswith("-") else [str(file)]
        words = [*words, *more, *name] if len(name) > 1 else [*name, *words, *more]
        return shlex.join(["finetunectl", "dataset", "inspect", *words])

    other = _other_type(report, file, training_type)
    if other == "pretrain":
        say(f"these are texts, not chats; read them as such: {command(type=other)}")
    elif other:
        say(f"these are chats, not texts; read them as such: {command(type='')}")
    elif not report.usable and report.bad_line_count and report.samples and not skip_bad:
        say(f"look at the rest: {command('--skip-bad')}")
    elif report.usable and not given["--model"] and not given["--tokenizer"]:
        say(f"count tokens: {command('--model', 'DIR')}")


def _other_type(report: DatasetReport, file: Path, training_type: str) -> str:
    """The training type that the file is made for, where it is another; empty where it is not."""
    if report.usable or report.samples:
        return ""
    reasons = {bad.reason for bad in report.bad_lines}
    is_sft = training_type.lower().removeprefix("training_type_") == "sft"
    if is_sft and (file.suffix.lower() == ".txt" or "TEXT_FOR_SFT" in reasons):
        return "pretrain"
    return "sft" if not is_sft and "CHAT_FOR_PRETRAINING" in reasons else ""


def _one_line(text: str) -> str:
    short = " ".join(visible(text).split())
    return short if len(short) <= 60 else short[:57] + "..."

"""`finetunectl probe`: three real steps on the longest samples, to see what a run takes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned.cli.settings import Exit, JsonOption, say, settings, task_command

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned._probe import ProbeWatch
    from finetuned.cli.settings import Settings
    from finetuned.v1.event_pb2 import ProbeReport
    from finetuned.v1.task_pb2 import Task

_BAR_WIDTH = 30
_FILES = (".yaml", ".yml", ".json")

ProbeArgument = Annotated[
    str,
    typer.Argument(
        metavar="TASK|FILE", help="A task, or a file of parameters as for `finetunectl train`."
    ),
]


def probe(ctx: typer.Context, name: ProbeArgument, as_json: JsonOption = False) -> None:
    """Try what a run takes: three real steps on the longest samples; nothing of it is left.

    Tells peak memory, speed, time for the whole run and bytes, and corrects `estimate` on this
    machine. Of a file it makes a task, which goes again unless the probe fails. Ctrl-C stops it.
    """
    options = settings(ctx)
    is_file = Path(name).suffix in _FILES and Path(name).is_file()
    with options.client() as client:
        task = _task_of_file(client, options, Path(name)) if is_file else client.get_task(name)
        try:
            task = client.start_probe(task.name)
            probe, was_interrupted = _follow(client, task, as_json=as_json)
        except BaseException:
            if is_file:
                _forget(client, task)
            raise
        failed = probe.report is None and not was_interrupted
        if is_file and not failed:
            _forget(client, task)
    if as_json:
        _print_json(probe)
    elif probe.report is not None:
        _show(probe.report)
    elif failed:
        _show_failure(task, probe)
    if was_interrupted:
        say("the probe was stopped")
        raise typer.Exit(Exit.INTERRUPTED)
    if failed:
        raise typer.Exit(_failure(probe))


def _task_of_file(client: Client, options: Settings, file: Path) -> Task:
    from finetuned.cli.train import create, wish_of

    return create(client, options, wish_of(client, file=file), start=False)


def _follow(client: Client, task: Task, *, as_json: bool) -> tuple[ProbeWatch, bool]:
    """Watches a probe to its end; and whether Ctrl-C has stopped it."""
    from finetuned._errors import FailedPrecondition
    from finetuned._probe import ProbeWatch
    from finetuned.cli.tracker import Tracker
    from finetuned.cli.view import View, choose

    probe, tracker = ProbeWatch(task), Tracker(task)
    was_interrupted = has_ended = False
    after = task.last_seq
    with View() if as_json else choose(as_json=False) as view:
        while not has_ended:
            try:
                for item in client.watch(task.name, after):
                    after = getattr(item, "seq", after)
                    has_ended = probe.take(item)
                    if has_ended:
                        break
                    if tracker.apply(item) and not as_json and probe.report is None:
                        view.show(item, tracker)
            except KeyboardInterrupt:
                was_interrupted = True
                try:
                    client.stop_task(task.name, discard=True)
                except FailedPrecondition:  # it has ended meanwhile
                    break
    return probe, was_interrupted


def _forget(client: Client, task: Task) -> None:
    from finetuned._errors import FinetunedError

    try:
        client.delete_task(task.name)
    except FinetunedError as error:
        say(f"task {task.display_name} is left: {error.message}")


def _show(report: ProbeReport) -> None:
    from finetuned.cli.bars import bar
    from finetuned.cli.output import bytes_text, console, duration_text, print_pairs

    share = report.peak_memory_bytes / max(1, report.memory_total_bytes)
    evaluation = f"{duration_text(report.seconds_per_evaluation)} each"
    print_pairs(
        [
            (
                "memory",
                f"{bytes_text(report.peak_memory_bytes)} at the peak"
                f" of {bytes_text(report.memory_total_bytes)},"
                f" {bytes_text(report.memory_available_bytes)} to be had: it fits",
            ),
            (
                "speed",
                f"{report.tokens_per_second:,.0f} tokens/s,"
                f" {report.seconds_per_step:.3g} s a step of the longest samples",
            ),
            (
                "duration",
                f"about {duration_text(report.duration_seconds)} for {report.run_steps:,} steps",
            ),
            ("evaluation", evaluation if report.seconds_per_evaluation else ""),
            (
                "disk",
                f"{bytes_text(report.disk_bytes)} in the end; a checkpoint has"
                f" {bytes_text(report.checkpoint_bytes)} and takes"
                f" {report.seconds_per_checkpoint:.3g} s",
            ),
            (
                "samples",
                f"{report.train_samples:,} with {report.train_tokens:,} tokens,"
                f" the longest {report.longest_tokens:,}",
            ),
        ]
    )
    console().print("memory ", bar(share, _BAR_WIDTH, "green", track=True), f" {share:.0%}")


def _show_failure(task: Task, probe: ProbeWatch) -> None:
    from finetuned.cli.failure import advice_text, evidence_rows, print_last_words
    from finetuned.cli.output import print_pairs, reason_word

    result = probe.result
    if result is None:
        return
    was_stopped = _failure(probe) is Exit.STOPPED
    print_pairs(
        [
            ("stopped" if was_stopped else "failed", reason_word(result.end_reason)),
            ("why", result.message),
            *evidence_rows(result),
        ]
    )
    if was_stopped:
        return
    print_last_words(result)
    if result.HasField("fix"):
        say(f"what would likely mend it: {task_command('fix', task)}")
        say(f"then again: finetunectl probe {task.name.removeprefix('tasks/')}")
    elif result.HasField("advice"):
        say(advice_text(result.advice))


def _failure(probe: ProbeWatch) -> Exit:
    from finetuned.v1.task_pb2 import EndReason

    stopped = EndReason.END_REASON_STOPPED_BY_USER
    is_stop = probe.result is not None and probe.result.end_reason == stopped
    return Exit.STOPPED if is_stop else Exit.FAILED


def _print_json(probe: ProbeWatch) -> None:
    from finetuned.cli.output import print_json_value, to_dict

    print_json_value(
        {
            "report": to_dict(probe.report) if probe.report is not None else None,
            "result": to_dict(probe.result) if probe.result is not None else None,
        }
    )

"""Watch a run to its end, and say how it ended."""

from __future__ import annotations

import sys
from collections.abc import Iterator

from rich.text import Text

from finetuned._client import Client
from finetuned.cli.curve import curve
from finetuned.cli.failure import advice_text, evidence_rows, print_last_words
from finetuned.cli.output import STATE_STYLES, print_pairs, reason_word, state_word
from finetuned.cli.settings import Exit, say, task_command
from finetuned.cli.tracker import Tracker
from finetuned.cli.view import choose
from finetuned.v1.task_pb2 import EndReason, Task, TaskState, TrainingType

_EXITS = {
    TaskState.TASK_STATE_COMPLETED: Exit.OK,
    TaskState.TASK_STATE_STOPPED: Exit.STOPPED,
    TaskState.TASK_STATE_FAILED: Exit.FAILED,
    TaskState.TASK_STATE_PENDING: Exit.STOPPED,  # a probe, of a task that was never started
}
_CURVE_WIDTH = 72


def follow(client: Client, task: Task, *, as_json: bool, after_seq: int = 0) -> Exit:
    """Watch a task until its run has ended; Ctrl-C leaves the run going."""
    tracker = Tracker(task)
    view = choose(as_json)
    try:
        with view:
            for item in client.watch(task.name, after_seq, until_end=True):
                if tracker.apply(item) or as_json:
                    view.show(item, tracker)
    except KeyboardInterrupt:
        if tracker.state == TaskState.TASK_STATE_PENDING:
            say(f"not started; start it: {task_command('start', tracker.task)}")
        elif tracker.state == TaskState.TASK_STATE_PAUSED:
            say("the run is paused")
            say(f"  let it go on: {task_command('resume', tracker.task, '--watch')}")
            say(f"  stop it:      {task_command('stop', tracker.task)}")
        elif not tracker.has_ended:
            say("the run goes on")
            say(f"  watch it again: {task_command('watch', tracker.task)}")
            say(f"  stop it:        {task_command('stop', tracker.task)}")
        return Exit.INTERRUPTED
    if tracker.result and tracker.result.end_reason == EndReason.END_REASON_PROBED:
        if not as_json:
            say(f"it was a probe; start the task: {task_command('start', tracker.task, '--watch')}")
        return Exit.OK
    if not as_json:
        _summarize(client.get_task(task.name), tracker)
    return _EXITS.get(tracker.state, Exit.FAILED)


def _summarize(task: Task, tracker: Tracker) -> None:
    drawing = curve(tracker.losses, width=_CURVE_WIDTH, ascii_only=not _has_braille())
    if drawing:
        print(f"\n{drawing}\n", flush=True)
    result = tracker.result
    word = state_word(tracker.state)
    why = reason_word(result.end_reason if result else task.end_reason)
    output = result.output_path if result else ""
    print_pairs(
        [
            (word, Text(why or word, style=STATE_STYLES.get(word, ""))),
            ("why", result.message if result else task.end_message),
            ("output", output),
            ("checkpoint", tracker.checkpoint if tracker.checkpoint != output else ""),
            *(evidence_rows(result) if result else ()),
        ]
    )
    if result is not None and tracker.state == TaskState.TASK_STATE_FAILED:
        print_last_words(result)
    for line in _next_steps(task, tracker):
        say(line)


def _next_steps(task: Task, tracker: Tracker) -> Iterator[str]:
    result = tracker.result
    if tracker.state == TaskState.TASK_STATE_COMPLETED:
        if result is not None and result.output_path:
            yield "use it, in Python:"
            yield from (f"  {line}" for line in _load_lines(task, result.output_path))
        return
    if result is not None and result.HasField("fix"):
        yield f"what would likely mend it: {task_command('fix', task, '--start')}"
    elif result is not None and result.HasField("advice"):
        yield advice_text(result.advice)
    if tracker.checkpoint:
        command = task_command("start", task, "--resume", "newest")
        yield f"go on from the newest checkpoint: {command}"
    if tracker.state == TaskState.TASK_STATE_FAILED:
        yield f"its log: {task_command('logs', task)}"
    yield f"start it anew: {task_command('start', task, '--watch')}"


def _load_lines(task: Task, path: str) -> tuple[str, str]:
    lora = task.parameters.lora
    is_adapter = (
        task.training_type == TrainingType.TRAINING_TYPE_SFT
        and lora.use_lora
        and not lora.merge_lora
    )
    if is_adapter:
        kind, module = "AutoPeftModelForCausalLM", "peft"
    else:
        kind, module = "AutoModelForCausalLM", "transformers"
    return f"from {module} import {kind}", f"model = {kind}.from_pretrained({path!r})"


def _has_braille() -> bool:
    try:
        "\u28ff┤".encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True

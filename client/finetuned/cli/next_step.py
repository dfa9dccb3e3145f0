"""What to type after an error: one table by reason, and one by code for what has no row there."""

from __future__ import annotations

import contextlib
import difflib
import os
import shlex
import sys
from collections.abc import Sequence

from finetuned._connect import ADDRESS_VARIABLE
from finetuned._errors import (
    DaemonNotStarted,
    DaemonUnavailable,
    FailedPrecondition,
    FinetunedError,
    InvalidArgument,
    NotFound,
)
from finetuned.cli.settings import Settings, command_line, resource_command

_SHOW_TOKEN = '! export FINETUNED_TOKEN="$(finetuned token show)"'  # noqa: S105 (no token)
_NAME_CA = "! export FINETUNED_TLS_CA=/path/to/ca.pem"

# NOUN and NAME are the task or template that the error is about. What begins with `!` is no command
# of this program. A row with NAME holds where the name is known.
BY_REASON = {
    # The state of a task
    "TASK_ACTIVE": "NOUN stop NAME --wait",
    "TASK_STOPPING": "NOUN watch NAME",
    "TASK_ENDING": "NOUN watch NAME",
    "TASK_PROBING": "NOUN stop NAME --wait",
    "TASK_PAUSED": "NOUN resume NAME",
    "TASK_NOT_ACTIVE": "NOUN show NAME",
    "TASK_NOT_PAUSED": "NOUN show NAME",
    "TASK_NOT_QUEUED": "queue",
    "TASK_BEING_DELETED": "task list",
    # Names
    "TASK_NOT_FOUND": "task list",
    "NO_TASKS": "train --help",
    "TEMPLATE_NOT_FOUND": "template list",
    "CHECKPOINT_NOT_FOUND": "task checkpoints NAME",
    "TASK_ID_TAKEN": "task list",
    "TEMPLATE_ID_TAKEN": "template list",
    "NAME_IS_AN_ID": "template list",
    "TEMPLATE_IMMUTABLE": "template export NAME own.yaml",
    "TEMPLATE_OF_OTHER_TYPE": "NOUN show NAME",
    "STALE_ETAG": "NOUN show NAME",
    # Checkpoints
    "CHECKPOINT_IN_USE": "NOUN stop NAME --wait",
    "CHECKPOINT_BEING_DELETED": "task checkpoints NAME",
    "NO_CHECKPOINT": "task checkpoints NAME",
    "NO_BEST_CHECKPOINT": "task checkpoints NAME",
    "CHECKPOINT_GONE": "task checkpoints NAME",
    "NOT_A_CHECKPOINT": "task checkpoints NAME",
    # The log of events
    "SEQ_BEYOND_LAST": "task logs NAME",
    "SEQ_COMPACTED": "task logs NAME",
    "LOG_EPOCH_CHANGED": "task logs NAME",
    # What has run out
    "QUOTA_EXCEEDED": "daemon status",
    "LIMIT_QUEUED_TASKS": "queue",
    "LIMIT_TASKS": "task list",
    "LIMIT_TEMPLATES": "template list",
    "DISK_FULL": "doctor --refresh",
    "ENVIRONMENT_NOT_READY": "doctor",
    # The daemon, and the way to it
    "DAEMON_STOPPING": "daemon start",
    "NO_LOG": "daemon start",
    "NOT_YOURS": '! export FINETUNED_RUNTIME_DIR="$HOME/.finetuned-run"',
    "TOKEN_MISSING": _SHOW_TOKEN,
    "TOKEN_WRONG": _SHOW_TOKEN,
    "TOKEN_CHANGED": _SHOW_TOKEN,
    "BAD_TOKEN": _SHOW_TOKEN,
    "TLS": _NAME_CA,
    "TLS_NEEDED": _NAME_CA,
    "BAD_TLS": _NAME_CA,
    "BAD_ADDRESS": "! finetunectl --address unix:/path/of.sock daemon status",
}
BY_CODE = {
    "UNAVAILABLE": "daemon start",
    "UNAUTHENTICATED": _SHOW_TOKEN,
    "PERMISSION_DENIED": "daemon status",
    "FAILED_PRECONDITION": "NOUN show NAME",
    "NOT_FOUND": "task list",
    "ALREADY_EXISTS": "task list",
    "ABORTED": "NOUN show NAME",
    "OUT_OF_RANGE": "task logs NAME",
    "RESOURCE_EXHAUSTED": "daemon status",
    "DEADLINE_EXCEEDED": "daemon status",
    # It is older than this program; its runs go on meanwhile.
    "UNIMPLEMENTED": "! finetunectl daemon stop && finetunectl daemon start",
    "INTERNAL": "support-bundle",
}
# Fields that are no parameters, with the command that lists what they can be.
_BY_FIELD = {
    "device": "device list",
    "template": "template list",
    "like": "task list",
    "name": "task list",
}
_OF_DATA = ("data.train_file", "data.eval_file")


def next_command(error: FinetunedError, options: Settings) -> str:
    """The command to type after the error, to be copied into a shell; empty where there is none."""
    noun, _ = _subject(error, options)
    for command in (_next(error, options), command_line(noun, "list")):
        if not command or not _is_typed(command):
            return command
    return ""


def _is_typed(command: str) -> bool:
    """Whether it is the very command that has failed."""
    words = shlex.split(command)[1:]
    return [w for w in words if w != "--"] == [w for w in sys.argv[1:] if w != "--"]


def _next(error: FinetunedError, options: Settings) -> str:
    own = str(getattr(error, "next_command", ""))
    if own:
        return own
    if isinstance(error, DaemonNotStarted):
        return command_line("daemon", "logs")
    if isinstance(error, DaemonUnavailable) and not error.reason:
        return _for_address(options) or command_line("daemon", "start")
    if isinstance(error, InvalidArgument) and error.reason not in BY_REASON:
        return _for_fields(error, options)
    if error.reason == "DISPLAY_NAME_TAKEN":
        return _with_update() or command_line("task", "list")
    if isinstance(error, NotFound):
        close = _closest(error, options)
        if close:
            return close
    row = BY_REASON.get(error.reason) or BY_CODE.get(error.code, "")
    noun, name = _subject(error, options)
    if "NAME" in row.split() and not name:
        row = f"{noun} list"
    return _filled(row, noun, name)


def explanation(error: FinetunedError, options: Settings) -> str:
    """A sentence before the command, where the command alone would not be understood."""
    if isinstance(error, DaemonUnavailable) and not error.reason and _for_address(options):
        variable = os.environ.get(ADDRESS_VARIABLE)
        own = ADDRESS_VARIABLE if options.address in (None, variable) else "--address"
        # `daemon start` would look there too, and start nothing.
        return f"the address is that of {own}; without it, your own daemon is asked"
    return ""


def with_word(wrong: str, right: str) -> str:
    """This command with one word replaced, to be copied into a shell; empty if it is not there."""
    words = sys.argv[1:]
    for place, word in enumerate(words):
        name, equals, value = word.partition("=")
        if word == wrong or (equals and name == wrong):
            words[place] = right + (equals + value if word != wrong else "")
            return shlex.join(["finetunectl", *words])
    return ""


def _with_update() -> str:
    """This command, as it would change the template that has the name; empty where it can't."""
    words = sys.argv[1:]
    if "template" not in words:
        return ""
    verb = words.index("template") + 2  # before what may follow a `--`
    return shlex.join(["finetunectl", *words[:verb], "--update", *words[verb:]])


def _filled(row: str, noun: str, name: str) -> str:
    if not row or row.startswith("! "):
        return row.removeprefix("! ")
    words = [noun if word == "NOUN" else word for word in row.split()]
    if "NAME" not in words:
        return command_line(*words)
    place = words.index("NAME")
    return resource_command(words[0], words[1], name, *words[place + 1 :])


def _for_address(options: Settings) -> str:
    """For a daemon at an address that was given, by which no daemon can be started."""
    variable = os.environ.get(ADDRESS_VARIABLE)
    if variable and options.address in (None, variable):
        return f"env -u {ADDRESS_VARIABLE} finetunectl daemon status"
    return "finetunectl daemon status" if options.address else ""


def _for_fields(error: InvalidArgument, options: Settings) -> str:
    """For wrong fields: the first of them explained, or what it can be."""
    from finetuned._parameters import SECTIONS, fields

    for violation in error.violations:
        path = violation.field.removeprefix("task.").removeprefix("parameters.")
        if path in fields():
            return command_line("params", path)
        if path.partition(".")[0] in SECTIONS:
            return command_line("params", path.partition(".")[0])
        if path in _BY_FIELD and violation.reason != "NOT_UTF8":
            return command_line(*_BY_FIELD[path].split())
    return command_line(*command_words(), "--help")


def command_words() -> Sequence[str]:
    """The command that was typed, without its options and arguments."""
    from finetuned.cli.quick import child, load

    node, found = load(), list[str]()
    for word in sys.argv[1:]:
        below = child(node, word)
        if below is not None:
            node, found = below, [*found, word]
    return found


def _subject(error: FinetunedError, options: Settings) -> tuple[str, str]:
    """Noun and name of what the error is about, as the user typed it."""
    subject = ""
    if isinstance(error, FailedPrecondition) and error.violations:
        subject = error.violations[0].subject
    if not subject:
        noun = "template" if options.template and not options.task else "task"
    else:
        noun = "template" if subject.startswith("templates/") else "task"
    typed = options.template if noun == "template" else options.task
    if error.reason == "CHECKPOINT_IN_USE":
        typed = ""  # the one that uses it need not be the one that was named
    name = typed or subject
    return noun, name if name != "machine" else ""


def _closest(error: NotFound, options: Settings) -> str:
    """This command with the name that was probably meant; empty where none is close."""
    from finetuned._client import Client

    is_template = "TEMPLATE" in error.reason
    typed = options.template if is_template else options.task
    if not typed or error.reason not in ("TASK_NOT_FOUND", "TEMPLATE_NOT_FOUND"):
        return ""
    folded: dict[str, str] = {}
    with contextlib.suppress(FinetunedError), Client(options.address, timeout=1) as client:
        found = client.list_templates() if is_template else client.list_tasks()
        # A display name that looks like an id is taken for one, so there the id stands for it.
        prefix = "templates/" if is_template else "tasks/"
        for one in found:
            looks_like_id = one.display_name.startswith(prefix)
            folded[one.display_name.casefold()] = one.name if looks_like_id else one.display_name
    close = difflib.get_close_matches(typed.casefold(), folded, n=1, cutoff=0.75)
    return with_word(typed, folded[close[0]]) if close else ""

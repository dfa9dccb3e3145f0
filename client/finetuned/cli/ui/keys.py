"""Every key, once: bindings, help, command palette and documentation are made of this table."""

from __future__ import annotations

from dataclasses import dataclass

from textual.binding import Binding


@dataclass(frozen=True)
class Key:
    """One key."""

    key: str
    """As Textual names it."""
    action: str
    label: str
    """For footer and palette."""
    help: str
    """A sentence."""
    in_footer: bool = False

    @property
    def binding(self) -> Binding:
        """For Textual."""
        # Typed into a line, too, but for letters.
        return Binding(
            self.key,
            self.action,
            self.label,
            show=self.in_footer,
            priority=self.key == "ctrl+c",
        )

    @property
    def shown(self) -> str:
        """The keys as people name them."""
        return _NAMES.get(self.key, self.key)


_NAMES = {
    "slash": "/",
    "question_mark": "?",
    "enter": "Enter",
    "escape": "Esc",
    "tab": "Tab",
    "ctrl+c": "Ctrl-C",
    "ctrl+p": "Ctrl-P",
}

TABS = (
    ("curves", "Curves"),
    ("log", "Log"),
    ("events", "Events"),
    ("checkpoints", "Checkpoints"),
    ("runs", "Runs"),
    ("parameters", "Parameters"),
)

TASK_KEYS = (
    Key("s", "start", "Start", "Start it: anew, or on from a checkpoint where there is one.", True),
    Key("p", "pause", "Pause", "Pause it: save, and free the device. Again: let it go on.", True),
    Key("x", "stop", "Stop", "Stop it; it saves a checkpoint first.", True),
    Key("X", "discard", "Stop, save nothing", "Stop it at once, without a checkpoint."),
    Key("f", "fix", "Fix", "Show what would mend a run that failed, and change it.", True),
    Key("b", "probe", "Probe", "Measure in three steps what the run would take."),
    Key("K", "move_in_queue(-1)", "Sooner", "Move it up in the queue of its device."),
    Key("J", "move_in_queue(1)", "Later", "Move it down in the queue."),
    Key("d", "delete", "Delete", "Delete it; asks what becomes of its outputs."),
    Key("n", "create", "New", "Create a task from a YAML or JSON file of parameters."),
    Key("c", "copy", "Copy path", "Copy the path of its checkpoint, or of its output folder."),
)

VIEW_KEYS = (
    *(
        Key(str(at), f"show_tab('{name}')", label, f"Show: {label.lower()}.")
        for at, (name, label) in enumerate(TABS, 1)
    ),
    Key("enter", "enter", "Open", "Go to what is shown of the task; on a run or a checkpoint: it."),
    Key("escape", "leave", "Back", "Back to the tasks; first, end a filter."),
    Key("slash", "filter", "Filter", "Filter the tasks by words; in the log, its lines.", True),
    Key("o", "sort", "Sort", "Sort by the next column."),
    Key("O", "reverse", "Reverse", "Sort the other way round."),
    Key("m", "metric", "Next curve", "The next curve."),
    Key("w", "smooth", "Smoothing", "Smooth the curve: weakly, strongly, not at all."),
    Key("g", "log_scale", "Log scale", "Draw the curve by its logarithm."),
    Key("l", "level", "Log level", "The least level of log lines: all, info, warning, error."),
    Key("z", "zoom", "Zoom", "Give the whole screen to what has the focus, and back."),
    Key("T", "theme", "Light or dark", "The other theme."),
)

PROGRAM_KEYS = (
    Key("S", "start_daemon", "Start daemon", "Start the daemon, where none answers.", True),
    Key("question_mark", "help", "Help", "All keys.", True),
    Key("ctrl+p", "command_palette", "Commands", "Find a command by its name."),
    Key("q", "quit", "Quit", "Quit. Runs go on.", True),
    Key("ctrl+c", "interrupt", "Quit", "The same, also while a question is open."),
)

GROUPS = (("Task", TASK_KEYS), ("View", VIEW_KEYS), ("Program", PROGRAM_KEYS))

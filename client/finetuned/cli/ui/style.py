"""How the view is laid out: below each other where there is little room, side by side elsewhere."""

CSS = """
Screen { layout: vertical; }
#status { height: 1; padding: 0 1; background: $primary 30%; }
#banner { height: 1; padding: 0 1; background: $warning; color: auto; display: none; }
#banner.-shown { display: block; }

#upper { layout: vertical; height: 8; }
TaskTable { height: 1fr; }
#devices { height: auto; max-height: 2; padding: 0 1; background: $boost; }
#status, #banner, #devices, #head { text-wrap: nowrap; text-overflow: ellipsis; }
.-many-devices #upper { height: 11; }
.-many-devices #devices { max-height: 5; }
.-tall #upper { height: 14; }
.-very-tall #upper { height: 22; }
.-wide #upper { layout: horizontal; }
.-wide #devices { width: 38; height: 1fr; max-height: 100%; }

TaskTable > .task-table--head { text-style: bold; color: $text-muted; background: $panel; }
TaskTable > .task-table--cursor { background: $block-cursor-background 45%; text-style: bold; }
TaskTable > .task-table--blurred { background: $surface-lighten-1; }
TaskTable { scrollbar-size: 1 1; background: $surface; overflow-x: hidden; }

#details { height: 1fr; }
#head { height: auto; max-height: 4; padding: 0 1; background: $panel; }
TabBar { height: 1; background: $panel; padding: 0 1; }
TabBar Tab { width: auto; padding: 0 1; color: $text-muted; }
TabBar Tab:hover { background: $boost; }
TabBar Tab.-shown { background: $primary; color: auto; text-style: bold; }
ContentSwitcher { height: 1fr; }
CurvesPane { padding: 0 1; }
LinesPane { padding: 0 1; scrollbar-size: 1 1; background: $background; overflow-x: hidden; }
CurvesPane:focus, LinesPane:focus, DataTable:focus { background-tint: $foreground 4%; }
DataTable { height: 1fr; scrollbar-size: 1 1; background: $background; }

#filter { display: none; height: 1; border: none; padding: 0 1; background: $boost; }
#filter.-shown { display: block; }

.-zoom-tasks #details { display: none; }
.-zoom-tasks #upper { height: 1fr; }
.-zoom-details #upper { display: none; }

ModalScreen { align: center middle; }
.dialog {
    width: 72; max-width: 95%; height: auto; max-height: 95%;
    padding: 1 2; border: round $primary; background: $surface;
}
.dialog .question { text-style: bold; margin-bottom: 1; }
.dialog .details { height: auto; max-height: 10; margin-bottom: 1; }
.dialog OptionList { height: auto; max-height: 8; border: none; background: $surface; }
.help { width: 92; height: 95%; }
.help Static { height: auto; }
.help .keys { margin-bottom: 1; }
"""

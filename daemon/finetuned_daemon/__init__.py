"""The daemon: owns tasks, their events and their runs. Never imports torch."""

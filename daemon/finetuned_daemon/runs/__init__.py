"""Runs: the run folder, its contract with the runner, the supervisor and the queue."""

"""The training runner, one process per run. The only package with torch."""

"""The training runner, one process per run. The only package with torch."""

import time

BEGAN = time.monotonic()
"""When the process began, but for Python's own start: before torch is imported."""

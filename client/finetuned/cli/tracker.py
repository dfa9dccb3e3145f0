"""What a watcher knows of a run; the package's own displays use it too."""

from __future__ import annotations

from finetuned._tracker import Tracker

__all__ = ["Tracker"]

"""Keeps pydantic from looking for plug-ins of other packages.

It looks with its first model: imports `importlib.metadata`, reads the metadata of every package
that is installed, and imports what calls itself a plug-in of it. None has any business in the
daemon, and to look takes 1.2 MB and a tenth of its start. `PYDANTIC_DISABLE_PLUGINS` saves the
second half alone, and runs would inherit it.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_NAME = "pydantic.plugin._loader"


class _NoPlugins(ModuleType):
    """Stands for pydantic's module that looks; what else that may have comes from itself."""

    @staticmethod
    def get_plugins() -> tuple[()]:
        return ()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        sys.modules.pop(_NAME, None)
        return getattr(importlib.import_module(_NAME), name)


def refuse_plugins() -> None:
    """To be called before the first model is used."""
    sys.modules.setdefault(_NAME, _NoPlugins(_NAME))

"""Documents as YAML, in the order given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml


def yaml_text(document: Mapping[str, Any]) -> str:
    """The document as a file that `finetunectl` reads; other languages stay readable."""
    text: str = yaml.safe_dump(
        dict(document), sort_keys=False, allow_unicode=True, default_flow_style=False, width=100
    )
    return text

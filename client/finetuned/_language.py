"""The language of the daemon's sentences."""

from __future__ import annotations

import os
from typing import Literal

from finetuned._errors import FieldViolation, InvalidArgument

Language = Literal["en", "zh"]

METADATA_KEY = "accept-language"

_LANGUAGES: dict[str, Language] = {"en": "en", "zh": "zh"}
_VARIABLES = ("LC_ALL", "LC_MESSAGES", "LANG")


def language_of(wish: str | None) -> Language:
    """`en` or `zh`; where nothing is wished for, what the locale's variables say, else `en`.

    Raises:
        InvalidArgument: Another language.
    """
    if wish is None:
        locale = next((value for name in _VARIABLES if (value := os.environ.get(name))), "")
        return "zh" if locale.lower().startswith("zh") else "en"
    language = _LANGUAGES.get(wish)
    if language is not None:
        return language
    wrong = FieldViolation("language", f"must be en or zh, not {wish!r}", "NOT_A_CHOICE")
    raise InvalidArgument(
        f"{wrong.field}: {wrong.description}", reason="INVALID_FIELDS", violations=[wrong]
    )

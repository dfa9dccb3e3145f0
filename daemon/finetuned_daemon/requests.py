"""What requests have in common: ids that make a repeat safe, names, field masks."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from finetuned_daemon.errors import InvalidRequest, Violation
from finetuned_daemon.limits import BY_NAME
from finetuned_daemon.parameters.models import SECTIONS, Parameters
from finetuned_daemon.store.database import Database
from finetuned_daemon.store.records import Answers
from finetuned_daemon.tasks import LONGEST_DISPLAY_NAME, TASK_ID, now_us
from finetuned_daemon.texts import Text

T = TypeVar("T")

_REQUEST_IDS_KEPT_US = 7 * 24 * 3600 * 1_000_000
_LONGEST_REQUEST_ID = BY_NAME["request_id_characters"].default

Given = Mapping[str, Mapping[str, Any]]
"""Parameters as given: values by section and name; what is absent is not given."""


@dataclass(frozen=True)
class RequestId(Generic[T]):
    """A repeat of the same request gets the first answer again."""

    id: str
    body: bytes
    """What the request says, without its id."""
    serialize: Callable[[T], bytes]
    """Makes the answer that is kept."""

    @property
    def digest(self) -> bytes:
        """Tells a repeat from another request under the same id."""
        return hashlib.sha256(self.body).digest()


class Repeats:
    """Remembers answers by request id, in the transaction of what they answer."""

    def __init__(self, database: Database) -> None:
        self._answers = Answers(database, BY_NAME["request_ids"].default)
        # A wall clock that jumps would make all that is kept look old, or new answers the oldest.
        self._began_us, self._began = now_us(), time.monotonic()

    def answered(self, request: RequestId[Any] | None) -> bytes | None:
        """The first answer to a repeated request.

        Raises:
            InvalidRequest: The id was used for another request.
        """
        if request is None:
            return None
        kept = self._answers.answer(request.id)
        if kept is None:
            return None
        digest, answer = kept
        if digest != request.digest:
            text = Text(
                "was used for another request; choose a new one for each",
                "已用于另一个请求；每个请求请使用新的 id",
            )
            raise InvalidRequest([Violation("request_id", text, "REQUEST_ID_REUSED")])
        return answer

    def first(self, request: RequestId[T] | None, answered: T) -> T | bytes:
        """The answer as it was kept, so that a repeat gets the very same.

        What is derived, such as the place in the queue, may have changed since.
        """
        kept = self.answered(request)
        return answered if kept is None else kept

    def keep(self, connection: Any, request: RequestId[T] | None, answered: T) -> None:
        """Keeps an answer; `connection` is that of the transaction."""
        if request is None:
            return
        now = self._began_us + int((time.monotonic() - self._began) * 1e6)
        self._answers.save(
            connection,
            request.id,
            request.digest,
            request.serialize(answered),
            now=now,
            forget_before=now - _REQUEST_IDS_KEPT_US,
        )


def check_request_id(request_id: str) -> list[Violation]:
    """A request id is printable and short."""
    if len(request_id) <= _LONGEST_REQUEST_ID and request_id.isprintable():
        return []
    text = Text(
        f"must be at most {_LONGEST_REQUEST_ID} printable characters, such as a UUID",
        f"最多 {_LONGEST_REQUEST_ID} 个可打印字符，例如 UUID",
    )
    return [Violation("request_id", text, "BAD_REQUEST_ID")]


def check_id(field: str, resource_id: str) -> list[Violation]:
    """The id that a client chooses for a resource; empty: the daemon chooses."""
    if not resource_id or TASK_ID.fullmatch(resource_id):
        return []
    text = Text(
        "must be 4 to 63 of a-z, 0-9 and -, a letter first and no - last",
        "须为 4 到 63 个字符，只含 a-z、0-9 和 -，以字母开头，且不以 - 结尾",
    )
    return [Violation(field, text, f"BAD_{field.upper()}")]


def check_training_type(found: object, violations: Sequence[Violation]) -> list[Violation]:
    """Somebody says what is trained: the request, its task or its template.

    Nothing more is said where `violations` say already that what the request says is wrong.
    """
    if found is not None or any(v.field == "training_type" for v in violations):
        return []
    text = Text("is required: SFT or PRETRAIN", "必填：SFT 或 PRETRAIN")
    return [Violation("training_type", text, "REQUIRED")]


def check_display_name(name: str) -> list[Violation]:
    """A name that users see."""
    if len(name) <= LONGEST_DISPLAY_NAME and name.isprintable() and name == name.strip():
        return []
    text = Text(
        f"must be at most {LONGEST_DISPLAY_NAME} printable characters, no space at either end",
        f"最多 {LONGEST_DISPLAY_NAME} 个可打印字符，首尾不能有空格",
    )
    return [Violation("display_name", text, "BAD_DISPLAY_NAME")]


# --- parameters that are given in part


def merged(base: Parameters, given: Given) -> dict[str, dict[str, Any]]:
    """The values of `base`, with those that are given in their place."""
    values = base.model_dump(exclude_none=True)
    for section, fields in given.items():
        values.setdefault(section, {}).update(fields)
    return values


def masked(base: Parameters, given: Given, paths: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The values of `base`, with the fields of `paths` as given, or absent where they are not.

    A path is `parameters`, `parameters.training` or `parameters.training.batch_size`.
    """
    values = base.model_dump(exclude_none=True)
    for path in paths:
        first, *rest = path.split(".")
        if first != "parameters":
            continue
        for section, model in SECTIONS.items():
            for name in model.model_fields:
                if rest == [section, name][: len(rest)]:
                    values[section].pop(name, None)
                    if name in given.get(section, {}):
                        values[section][name] = given[section][name]
    return values


def check_mask(paths: Iterable[str], known: Iterable[str]) -> list[Violation]:
    """A mask names fields that there are: `known` ones, and `parameters` with what lies in it."""
    allowed = set(known)
    for section, model in SECTIONS.items():
        allowed |= {f"parameters.{section}.{name}" for name in model.model_fields}
        allowed.add(f"parameters.{section}")
    result = list[Violation]()
    paths = list(paths)
    most = BY_NAME["mask_paths"].default
    if len(paths) > most:
        text = Text(f"has more than {most} paths", f"超过 {most} 个路径")
        return [Violation("update_mask", text, "TOO_MANY_PATHS")]
    for path in paths:
        if path not in allowed:
            text = Text(
                f"{path!r} is no field that can be changed; those are {', '.join(sorted(known))}, "
                "parameters.training.batch_size and the like",
                f"{path!r} 不是可修改的字段；可用 {'、'.join(sorted(known))}，"
                "或 parameters.training.batch_size 这样的路径",
            )
            result.append(Violation("update_mask", text, "UNKNOWN_FIELD"))
    return result

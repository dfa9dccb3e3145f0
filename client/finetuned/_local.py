"""Paths as a caller on the daemon's own machine means them: relative, or with `~`."""

from __future__ import annotations

from pathlib import Path

from google.protobuf.message import Message

from finetuned._parameters import is_utf8
from finetuned.v1.parameters_pb2 import Parameters

PATHS = (
    "data.train_file",
    "data.eval_file",
    "data.output_dir",
    "data.model_path",
    "data.tokenizer_path",
    "data.resume_from_checkpoint",
    "lora.peft_config_path",
)
"""The parameters that name a file or folder, which the contract's types don't say."""

_REQUEST_PATHS = frozenset(
    {
        "finetuned.v1.StartTaskRequest.resume_path",
        "finetuned.v1.InspectDatasetRequest.path",
        "finetuned.v1.InspectDatasetRequest.tokenizer_path",
    }
)


def make_absolute(request: Message) -> None:
    """Make every path of a request absolute, as seen from the current folder.

    One that can't be, such as `~` of somebody without a home, stays as it is: the daemon says then
    that it takes absolute paths.
    """
    if isinstance(request, Parameters):
        for path in PATHS:
            section, _, name = path.partition(".")
            if request.HasField(section):  # type: ignore[arg-type]
                _make_absolute(getattr(request, section), name)
        return
    for field, value in request.ListFields():
        if field.full_name in _REQUEST_PATHS:
            _make_absolute(request, field.name)
        elif isinstance(value, Message):
            make_absolute(value)


def _make_absolute(message: Message, field: str) -> None:
    text = getattr(message, field)
    if not text:
        return
    try:
        whole = str(Path(text).expanduser().absolute())
    except (RuntimeError, FileNotFoundError):  # no home, or the current folder is gone
        return
    if is_utf8(whole):
        setattr(message, field, whole)

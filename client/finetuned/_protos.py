"""Where the `.proto` files of the API lie, for generating clients of other languages."""

from __future__ import annotations

from pathlib import Path


def proto_dir() -> Path:
    """The folder to generate from: it holds `finetuned/v1/*.proto`, as imports name them.

    Where this is installed from a checkout in editable mode, it is the checkout's own.

    Raises:
        FileNotFoundError: This package was put together without them.
    """
    package = Path(__file__).parent
    for folder in (package / "proto", package.parents[1] / "proto"):
        if (folder / "finetuned/v1/task_service.proto").is_file():
            return folder
    raise FileNotFoundError(f"there are no .proto files beside {package}")

"""Every stable reason in the code, found by reading it: what `docs/troubleshooting.md` must have.

A reason is a string in capitals. One with an underscore is taken for a reason unless it is known to
be something else; one word alone is where it stands as an argument of what carries reasons.
"""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import grpc

import finetuned.v1
from conftest import REPOSITORY
from finetuned_daemon.limits import LIMITS
from finetuned_daemon.runs.contract import EndReason
from finetuned_daemon.tasks import PauseReason

_CAPITALS = re.compile(r"[A-Z][A-Z0-9]*(_[A-Z0-9]+)*")

CARRIERS = frozenset(
    {"Violation", "FieldViolation", "ParameterViolation", "PreconditionViolation", "BadRecord"}
    | {"WrongState", "AlreadyExists", "CursorOutOfRange", "Forbidden", "Unauthenticated"}
    | {"Notice", "notice", "Item", "Failure", "ErrorInfo", "_without_effect"}
)
"""What is given a reason."""

_FIELD_FIRST = ("FieldViolation", "Violation", "ParameterViolation", "WrongState")

# Variables of the environment, constants of systems and libraries, number formats.
_OTHER_PREFIXES = (
    *("FINETUNED_", "HF_", "SQLITE_", "OMP_", "CUDA_", "TOKENIZERS_", "TRANSFORMERS_", "GRPC_"),
    *(
        "WANDB_",
        "SWANLAB_",
        "MLFLOW_",
        "TRACKIO_",
        "TENSORBOARD_",
        "TQDM_",
        "LC_",
        "PYTHON_",
        "PYTORCH_",
        "F6_",
    ),
    *("F8_", "F4_", "XDG_", "NVIDIA_", "NCCL_", "O_", "AF_", "SIG", "DBUS_", "LISTEN_"),
    *(
        "NO_COLOR",
        "FORCE_COLOR",
        "NOTIFY_",
        "INVOCATION_",
        "JOURNAL_",
        "SYSTEMD_",
        "FILE_ATTRIBUTE_",
    ),
)
_OTHER = frozenset(
    {"ALLOC_FAILED", "CAUSAL_LM", "PCI_BUS_ID", "TRAINING_RUN_DIR"}
    # Of TLS libraries
    | {"CERTIFICATE_VERIFY_FAILED", "KEY_VALUES_MISMATCH", "WRONG_VERSION_NUMBER"}
    # States of a notification
    | {"GIVEN_UP"}
    # Names in exported scripts
    | {"MODEL_PATH", "RESUME_FROM_CHECKPOINT"}
)


def reasons() -> set[str]:
    """All of them."""
    found = {limit.reason for limit in LIMITS if limit.error}
    found |= {f"{kind.upper()}_NOT_FOUND" for kind in _kinds()}
    found |= set(EndReason) | set(PauseReason) - {PauseReason.REQUESTED}
    other = _names_of_protos() | {code.name for code in grpc.StatusCode}
    for tree in _trees():
        docstrings = _docstrings(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node not in docstrings:
                word = _word(node)
                if "_" in word and not (
                    word in other or word in _OTHER or word.startswith(_OTHER_PREFIXES)
                ):
                    found.add(word)
            else:
                found |= set(filter(None, map(_word, _given(node)))) - {"ERROR"}
    return found


def _given(node: ast.AST) -> Iterator[ast.expr]:
    """What stands in the place of a reason."""
    if isinstance(node, ast.Call):
        name = getattr(node.func, "id", getattr(node.func, "attr", ""))
        if name in CARRIERS:  # first comes a field, a task, or the reason itself
            yield from (a for n, a in enumerate(node.args) if n or name not in _FIELD_FIRST)
        yield from (keyword.value for keyword in node.keywords if keyword.arg == "reason")
    elif isinstance(node, ast.Assign) and any(
        getattr(target, "id", getattr(target, "attr", "")) == "reason" for target in node.targets
    ):
        yield node.value


def _word(node: ast.expr) -> str:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value if _CAPITALS.fullmatch(node.value) else ""
    return ""


def _kinds() -> set[str]:
    """What the daemon says is not found."""
    return {
        str(node.args[0].value)
        for tree in _trees()
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "NotFound"
        if node.args and isinstance(node.args[0], ast.Constant)
        if re.fullmatch("[a-z]+", str(node.args[0].value))
    }


def _docstrings(tree: ast.AST) -> set[ast.AST]:
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }


def _trees() -> Iterator[ast.Module]:
    for root in ("client/finetuned", "daemon"):
        for file in sorted((REPOSITORY / root).rglob("*.py")):
            if Path(finetuned.v1.__path__[0]) not in file.parents:
                yield ast.parse(file.read_text())


def _names_of_protos() -> set[str]:
    """Values of enums, with and without the prefix of the enum."""
    found = set[str]()
    for module in pkgutil.iter_modules(finetuned.v1.__path__):
        if not module.name.endswith("_pb2"):
            continue
        file = importlib.import_module(f"finetuned.v1.{module.name}").DESCRIPTOR
        enums = [*file.enum_types_by_name.values()]
        for message in file.message_types_by_name.values():
            enums += message.enum_types
        for enum in enums:
            prefix = re.sub(r"(?<!^)(?=[A-Z])", "_", enum.name).upper() + "_"
            for value in enum.values:
                found |= {value.name, value.name.removeprefix(prefix), prefix}
    return found

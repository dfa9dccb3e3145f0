"""Generates the Python stubs in client/finetuned/v1 from the protos here.

Run as `python proto/generate.py` (or `make proto`) after a change of a proto, and commit the
result; a test compares. The generator is pinned low (grpcio-tools 1.76.0 in constraints.txt):
generated code refuses runtimes older than itself.
"""

from __future__ import annotations

import sys
from pathlib import Path

from grpc_tools import _proto, protoc  # type: ignore[attr-defined]

PROTO_DIR = Path(__file__).resolve().parent
DEFAULT_OUT = PROTO_DIR.parent / "client"


def generate(out: Path) -> None:
    """Writes `finetuned/v1/*_pb2*.py[i]` below `out`; SystemExit where protoc finds an error."""
    out.mkdir(parents=True, exist_ok=True)
    protos = sorted(
        str(path.relative_to(PROTO_DIR)) for path in PROTO_DIR.glob("finetuned/v1/*.proto")
    )
    status = protoc.main(
        [
            "protoc",
            f"-I{PROTO_DIR}",
            f"-I{next(iter(_proto.__path__))}",  # google/protobuf/*.proto
            f"--plugin=protoc-gen-mypy={Path(sys.executable).parent / 'protoc-gen-mypy'}",
            f"--plugin=protoc-gen-mypy_grpc={Path(sys.executable).parent / 'protoc-gen-mypy_grpc'}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *protos,
        ]
    )
    if status:
        raise SystemExit(status)


if __name__ == "__main__":
    generate(Path(sys.argv[1]) if len(sys.argv) > 1 else DEFAULT_OUT)

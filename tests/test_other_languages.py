"""What `proto/README.md` promises to other languages: compatibility, and stubs by buf."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from conftest import REPOSITORY
from documents import blocks

PROTO = REPOSITORY / "proto"
BUF = Path(sys.executable).parent / "buf"


def breaking(protos: Path) -> subprocess.CompletedProcess[str]:
    """Holds protos against those of the last release."""
    return subprocess.run(
        [BUF, "breaking", protos, "--against", PROTO / "released.txtpb"],
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    folder = tmp_path / "proto"
    shutil.copytree(PROTO / "finetuned", folder / "finetuned")
    shutil.copy(PROTO / "buf.yaml", folder)
    return folder


def change(file: Path, old: str, new: str) -> None:
    text = file.read_text()
    assert re.search(old, text)
    file.write_text(re.sub(old, new, text, count=1))


def test_the_api_is_compatible_with_the_last_release() -> None:
    found = breaking(PROTO)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (r"  // .*\n  int32 run = 10;\n", "", 'field "10" with name "run"'),
        (r"int32 run = 10;", "int64 run = 10;", 'changed type from "int32" to "int64"'),
        (r"int32 run = 10;", "int32 run = 100;", 'field "10" with name "run"'),
        (r"int32 run = 10;", "int32 latest = 10;", 'from "run" to "latest"'),
        (r"TASK_STATE_PAUSED = 7", "TASK_STATE_PAUSED = 8", 'enum value "7"'),
    ],
    ids=["removed", "retyped", "renumbered", "renamed", "enum value"],
)
def test_what_breaks_clients_is_refused(copy: Path, old: str, new: str, said: str) -> None:
    change(copy / "finetuned/v1/task.proto", old, new)
    found = breaking(copy)
    assert found.returncode != 0
    assert said in found.stdout


def test_a_removed_rpc_is_refused(copy: Path) -> None:
    change(copy / "finetuned/v1/task_service.proto", r"  rpc GetTask\(.*\n", "")
    found = breaking(copy)
    assert found.returncode != 0
    assert 'RPC "GetTask"' in found.stdout


def test_what_is_new_passes(copy: Path) -> None:
    file = copy / "finetuned/v1/task.proto"
    change(file, r"(TASK_STATE_PAUSED = 7;)", r"\1\n  TASK_STATE_NEW = 8;")
    change(file, r"(  int32 run = 10;)", r"  string new = 1000;\n\1")
    change(
        copy / "finetuned/v1/system_service.proto",
        r"(  rpc GetQuota)",
        r"  rpc New(GetQuotaRequest) returns (GetQuotaResponse);\n\1",
    )
    assert breaking(copy).returncode == 0


def test_a_release_moves_what_later_ones_are_held_against(tmp_path: Path) -> None:
    """Once the changelog's newest version is no longer "(unreleased)", they are the same."""
    newest = re.search(r"^## .*$", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    if "(unreleased)" in newest[0]:
        return
    fresh = tmp_path / "fresh.txtpb"
    subprocess.run([BUF, "build", PROTO, "--exclude-source-info", "-o", fresh], check=True)
    assert fresh.read_text() == (PROTO / "released.txtpb").read_text()


# Answers a request for code with a file for each proto, of the options that it came with.
_PLUGIN = """\
#!{python}
import sys
from google.protobuf.compiler import plugin_pb2
request = plugin_pb2.CodeGeneratorRequest.FromString(sys.stdin.buffer.read())
answer = plugin_pb2.CodeGeneratorResponse(supported_features=1)
for file in request.proto_file:
    if file.name in request.file_to_generate:
        made = answer.file.add(name=file.name + ".{name}")
        made.content = request.parameter + "\\n" + str(file.options)
sys.stdout.buffer.write(answer.SerializeToString())
"""

LANGUAGES = {
    "go": ("protoc-gen-go", 'go_package: "example.com/you/gen/finetuned/v1;finetunedv1"'),
    "rust": ("protoc-gen-tonic", "no_server"),
    "csharp": ("grpc_csharp_plugin", 'csharp_namespace: "Finetuned.V1"'),
    "java": ("protoc-gen-grpc-java", 'java_package: "com.example.finetuned.v1"'),
}


def templates() -> dict[str, str]:
    """The examples of `buf.gen.yaml` in the document, by language."""
    found = [block.text for block in blocks(PROTO / "README.md") if block.kind == "yaml"]
    return dict(zip(LANGUAGES, found, strict=True))


@pytest.mark.parametrize("language", LANGUAGES)
def test_buf_generates_by_the_examples(language: str, tmp_path: Path) -> None:
    """With a stand-in for each plugin: buf takes the example, and what it sets arrives there."""
    # protoc brings the generators of messages for C# and Java; here a plugin stands for it, too.
    text = re.sub(r"protoc_builtin: (\w+)", r"local: protoc-gen-\1", templates()[language])
    names = [plugin["local"] for plugin in yaml.safe_load(text)["plugins"]]
    for name in names:
        plugin = tmp_path / name
        plugin.write_text(_PLUGIN.format(python=sys.executable, name=name))
        plugin.chmod(plugin.stat().st_mode | stat.S_IXUSR)
    (tmp_path / "buf.gen.yaml").write_text(text)
    done = subprocess.run(
        [BUF, "generate", PROTO],
        cwd=tmp_path,
        env={**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    protos = len(list(PROTO.glob("finetuned/v1/*.proto")))
    plugin_name, setting = LANGUAGES[language]
    made = {name: [*tmp_path.rglob(f"*.proto.{name}")] for name in names}
    assert {name: len(files) for name, files in made.items()} == dict.fromkeys(names, protos)
    assert setting in made[plugin_name][0].read_text()

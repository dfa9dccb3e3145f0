"""Model folders, data and paths of bad intent, as the daemon itself looks at them.

Each is answered within seconds by a sentence; nothing of it runs, waits or grows in the daemon.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from conftest import LLAMA_TENSORS, Scene, write_safetensors
from daemon_process import Daemon
from finetuned.v1 import (
    dataset_service_pb2,
    parameter_service_pb2,
    parameters_pb2,
    system_service_pb2,
    task_pb2,
    task_service_pb2,
)
from tiny import chats, make_model, write_jsonl

SFT = task_pb2.TRAINING_TYPE_SFT
_SECONDS = 60.0
_MOST_GROWTH = 700 << 20
"""Bytes that the daemon may grow by over all of these folders."""


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """A daemon that looks at all of them."""
    daemon = Daemon(tmp_path_factory.mktemp("daemon")).start()
    # It knows then which types of models the training environment knows.
    daemon.system.CheckEnvironment(system_service_pb2.CheckEnvironmentRequest(), timeout=60)
    yield daemon
    daemon.close()


def judged(daemon: Daemon, parameters: parameters_pb2.Parameters) -> dict[str, set[str]]:
    """Reasons of all violations by field; each sentence can be printed as it is."""
    request = parameter_service_pb2.ValidateParametersRequest(
        training_type=SFT, parameters=parameters, device="cpu"
    )
    answer = daemon.parameters.ValidateParameters(request, timeout=_SECONDS)
    found = defaultdict[str, set[str]](set)
    for violation in answer.violations:
        assert violation.message.replace("\n", "").isprintable()
        found[violation.field].add(violation.reason)
    return found


def refused(call: Callable[[], Any]) -> dict[str, str]:
    """Reasons by field of a call that is refused for its fields."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, caught.value
    status = rpc_status.from_call(caught.value)  # type: ignore[arg-type]
    assert status is not None
    found = error_details_pb2.BadRequest()
    for detail in status.details:
        if detail.Is(found.DESCRIPTOR):
            detail.Unpack(found)
    return {v.field: v.reason for v in found.field_violations}


def settings(folder: Path, name: str = "config.json", **more: Any) -> None:
    """Puts more into a JSON file."""
    file = folder / name
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | more))


def spoil(name: str, content: bytes) -> Callable[[Path], None]:
    """Puts other bytes in a file's place."""
    return lambda folder: (folder / name).write_bytes(content) and None


def header(text: bytes, more: bytes = b"") -> bytes:
    """A safetensors file with this header."""
    return len(text).to_bytes(8, "little") + text + more


def entry(shape: list[int], start: int, end: int) -> dict[str, Any]:
    """One tensor of a header."""
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


def index(name: str) -> Callable[[Path], None]:
    """Weights in parts, one of which has this name."""

    def make(folder: Path) -> None:
        shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
        os.replace(folder / "model.safetensors", folder / "model-1-of-2.safetensors")
        (folder / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"model.norm.weight": name}})
        )

    return make


def link(name: str, target: str) -> Callable[[Path], None]:
    """A link in a file's place."""

    def make(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target)

    return make


def fifo(name: str) -> Callable[[Path], None]:
    """A pipe in a file's place: who opens it waits."""

    def make(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return make


def sparse(folder: Path) -> None:
    """A file of a terabyte that takes no room; its header says a byte."""
    with open(folder / "model.safetensors", "r+b") as file:
        file.truncate(1 << 40)


def adapter(base: object) -> Callable[[Path], None]:
    """A folder with LoRA weights alone, whose base model lies there."""

    def make(folder: Path) -> None:
        (folder / "config.json").unlink()
        settings(folder, "adapter_config.json", base_model_name_or_path=base)

    return make


UNREADABLE, NO_CONFIG = "MODEL_UNREADABLE", "MODEL_WITHOUT_CONFIG"

FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "code for a type of its own": (
        lambda folder: settings(folder, model_type="evil", auto_map={"AutoConfig": "evil.Evil"}),
        "MODEL_NEEDS_ITS_CODE",
    ),
    "code beside a known type": (
        lambda folder: settings(folder, auto_map={"AutoConfig": "evil.Evil"}),
        "MODEL_CODE_NOT_RUN",
    ),
    "JSON of 100 MB": (spoil("config.json", b'{"a": "' + b"x" * (100 << 20) + b'"}'), NO_CONFIG),
    "JSON of millions of arrays": (
        spoil("config.json", b'{"a": [' + b"[]," * 15_000_000 + b"[]]}"), NO_CONFIG,
    ),
    "JSON nested deeply": (spoil("config.json", b'{"a":' * 500_000), NO_CONFIG),
    "JSON that is no text": (spoil("config.json", b"\xff\xfe\xfd"), NO_CONFIG),
    "half a character": (spoil("config.json", b'{"model_type": "\\ud800"}'), NO_CONFIG),
    "a number of a million digits": (
        spoil("config.json", b'{"hidden_size": ' + b"9" * 1_000_000 + b"}"), NO_CONFIG,
    ),
    "a type with control characters": (
        lambda folder: settings(folder, model_type="\x1b[31mllama\n"), "MODEL_TYPE_UNKNOWN",
    ),
    "a header beyond the file": (
        spoil("model.safetensors", (1 << 60).to_bytes(8, "little") + b"{}"), UNREADABLE,
    ),
    "a header of millions of objects": (
        spoil("model.safetensors", header(b'{"a":[' + b"{}," * 5_000_000 + b"{}]}")), UNREADABLE,
    ),
    "values that overlap": (
        spoil(
            "model.safetensors",
            header(json.dumps({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}).encode(), bytes(12)),
        ),
        UNREADABLE,
    ),
    "a hole between values": (
        spoil(
            "model.safetensors",
            header(json.dumps({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}).encode(), bytes(12)),
        ),
        UNREADABLE,
    ),
    "a shape beyond all memory": (
        spoil(
            "model.safetensors",
            header(json.dumps({"a": entry([1 << 40, 1 << 40], 0, 8)}).encode(), bytes(8)),
        ),
        UNREADABLE,
    ),
    "values before the beginning": (
        spoil(
            "model.safetensors", header(json.dumps({"a": entry([1], -4, 0)}).encode(), bytes(8))
        ),
        UNREADABLE,
    ),
    "a size that lies": (sparse, UNREADABLE),
    "weights above the folder": (index("../outside.safetensors"), UNREADABLE),
    "weights by a full path": (index("/etc/hostname"), UNREADABLE),
    "weights with a NUL": (index("a\0b"), UNREADABLE),
    "weights with control characters": (index("\x1b[31m\n.safetensors"), UNREADABLE),
    "a device for weights": (link("model.safetensors", "/dev/zero"), UNREADABLE),
    "a loop of links": (link("model.safetensors", "model.safetensors"), UNREADABLE),
    "a pipe for weights": (fifo("model.safetensors"), UNREADABLE),
    "a pipe for the config": (fifo("config.json"), NO_CONFIG),
    "a device for the config": (link("config.json", "/dev/zero"), NO_CONFIG),
    "an adapter of a name on the hub": (adapter("org/name"), "MODEL_IS_ADAPTER"),
    "an adapter of a number": (adapter(7), "MODEL_IS_ADAPTER"),
    "an adapter with control characters": (adapter("\x1b]0;x\x07"), "MODEL_IS_ADAPTER"),
    "a tokenizer of 100 MB": (
        spoil("tokenizer.json", b'{"model": "' + b"x" * (100 << 20) + b'"}'), "TOKENIZER_UNUSABLE",
    ),
    "a tokenizer nested deeply": (
        spoil("tokenizer.json", b'{"model":' * 500_000), "TOKENIZER_UNUSABLE",
    ),
    "a pipe for the tokenizer": (fifo("tokenizer.json"), "TOKENIZER_NOT_FOUND"),
}  # fmt: skip


@pytest.mark.parametrize("name", FOLDERS)
def test_a_hostile_model_folder_is_judged_by_a_sentence(
    shared: Daemon, scene: Scene, name: str
) -> None:
    """Within the deadline, with the field and a stable reason; a start is refused likewise."""
    make, reason = FOLDERS[name]
    make(scene.model)
    assert reason in judged(shared, scene.parameters())["data.model_path"]
    if reason != "MODEL_CODE_NOT_RUN":
        assert refused(lambda: shared.create(scene.parameters(), start=True)) == {
            "data.model_path": reason
        }


def test_all_of_that_has_not_blown_up_the_daemon(shared: Daemon) -> None:
    """It holds none of it, and its log tells of no exception. (Runs behind the tests above.)"""
    assert shared.process is not None
    assert psutil.Process(shared.process.pid).memory_info().rss < _MOST_GROWTH
    assert "Traceback" not in shared.log.read_text()


def test_a_folder_of_links_to_files_is_a_model(shared: Daemon, scene: Scene) -> None:
    """As the caches of the Hugging Face Hub are."""
    blobs = scene.root / "blobs"
    scene.model.rename(blobs)
    scene.model.mkdir()
    for file in blobs.iterdir():
        (scene.model / file.name).symlink_to(file)
    assert judged(shared, scene.parameters())["data.model_path"] == set()


def test_names_with_control_characters_are_never_said_as_they_are(
    shared: Daemon, scene: Scene
) -> None:
    """A terminal would do what they say."""
    named = scene.root / "m\x1b[31m\nfake: error\x07"
    scene.model.rename(named)
    (named / "config.json").unlink()
    parameters = scene.parameters()
    parameters.data.model_path = str(named)
    assert judged(shared, parameters)["data.model_path"] == {NO_CONFIG}


# --- data

DATA: dict[str, tuple[Callable[[Path], None], str]] = {
    "a line of a gigabyte": (
        lambda path: os.truncate(path, 1 << 30), "BAD_DATA_LINE",
    ),
    "nested deeply": (lambda path: path.write_text("[" * 1_000_000) and None, "BAD_DATA_LINE"),
    "millions of arrays": (
        lambda path: path.write_bytes(b'{"messages": [' + b"[]," * 15_000_000 + b"[]]}") and None,
        "BAD_DATA_LINE",
    ),
    "half a character": (
        lambda path: path.write_text(
            '{"messages": [{"role": "user", "content": "\\ud800"},'
            '{"role": "assistant", "content": "b"}]}'
        )
        and None,
        "BAD_DATA_LINE",
    ),
    "a pipe": (lambda path: (path.unlink(), os.mkfifo(path))[1], "NOT_A_FILE"),
    "a device": (lambda path: (path.unlink(), path.symlink_to("/dev/zero"))[1], "NOT_A_FILE"),
    "secrets of a process": (
        lambda path: (path.unlink(), path.symlink_to("/proc/self/environ"))[1], "NOT_A_FILE",
    ),
    "a folder": (lambda path: (path.unlink(), path.mkdir())[1], "NOT_A_FILE"),
    "a loop of links": (lambda path: (path.unlink(), path.symlink_to(path))[1], "FILE_NOT_FOUND"),
}  # fmt: skip


@pytest.mark.parametrize("name", DATA)
def test_hostile_data_is_judged_by_a_sentence(shared: Daemon, scene: Scene, name: str) -> None:
    """By a check, and by an inspection, which reports it where the check names its lines."""
    make, reason = DATA[name]
    make(scene.data)
    assert judged(shared, scene.parameters())["data.train_file"] == {reason}
    request = dataset_service_pb2.InspectDatasetRequest(path=str(scene.data), training_type=SFT)

    def inspect() -> list[dataset_service_pb2.InspectDatasetResponse]:
        return list(shared.datasets.InspectDataset(request, timeout=_SECONDS))

    if reason == "BAD_DATA_LINE":
        assert not inspect()[-1].report.usable
    else:
        assert refused(inspect) == {"path": reason}


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ cycler.__init__.__globals__.os.popen('touch CANARY').read() }}", "unsafe"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "5 s"),
        ("{{ 'a' * 10**11 }}", "too much memory"),
    ],
    ids=["leaves its sandbox", "never ends", "eats memory"],
)
def test_a_hostile_template_ends_an_inspection_with_the_reason(
    shared: Daemon, tmp_path: Path, template: str, why: str
) -> None:
    """In a process of its own: the daemon answers others all the while."""
    model = make_model(tmp_path / "model")
    canary = tmp_path / "canary"
    (model / "chat_template.jinja").write_text(template.replace("CANARY", str(canary)))
    data = write_jsonl(tmp_path / "chats.jsonl", chats(3))
    request = dataset_service_pb2.InspectDatasetRequest(
        path=str(data), training_type=SFT, tokenizer_path=str(model)
    )
    *_, last = shared.datasets.InspectDataset(request, timeout=150)
    assert why in last.report.tokenizer_problem
    assert not canary.exists()


# --- paths

FIELDS = ("train_file", "eval_file", "model_path", "tokenizer_path", "output_dir")


@pytest.mark.parametrize("field", [*FIELDS, "resume_from_checkpoint"])
@pytest.mark.parametrize("way", ["straight", "by a link", "by dots"])
def test_no_path_leads_into_the_daemons_own_folders(
    shared: Daemon, scene: Scene, field: str, way: str
) -> None:
    """Its database, token and run folders are neither data nor a place for results."""
    state = shared.paths.state_dir
    inside = {"output_dir": "runs/x", "train_file": "finetuned.db", "eval_file": "finetuned.db"}
    name = inside.get(field, "runs")
    (state / "runs").mkdir(exist_ok=True)
    (scene.root / "link").symlink_to(state)
    path = {
        "straight": f"{state}/{name}",
        "by a link": f"{scene.root}/link/{name}",
        "by dots": f"{scene.root}/../{scene.root.name}/link/../{state.name}/{name}",
    }[way]
    parameters = scene.parameters()
    setattr(parameters.data, field, path)
    before = sorted(state.iterdir())
    assert "IN_DAEMON_FOLDER" in judged(shared, parameters)[f"data.{field}"]
    assert refused(lambda: shared.create(parameters)) == {f"data.{field}": "IN_DAEMON_FOLDER"}
    assert sorted(state.iterdir()) == before


@pytest.mark.parametrize("field", ["path", "tokenizer_path"])
def test_no_inspection_reads_the_daemons_own_files(
    shared: Daemon, scene: Scene, field: str
) -> None:
    folder = shared.paths.runtime_dir
    names = {"path": str(scene.data), "tokenizer_path": ""}
    names[field] = str(folder if field == "tokenizer_path" else shared.paths.endpoint)
    request = dataset_service_pb2.InspectDatasetRequest(training_type=SFT, **names)
    found = refused(lambda: list(shared.datasets.InspectDataset(request, timeout=_SECONDS)))
    assert found == {field: "IN_DAEMON_FOLDER"}


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize(
    ("path", "reasons"),
    [
        ("relative/x", {"NOT_ABSOLUTE"}),
        ("~/x", {"NOT_ABSOLUTE"}),
        ("~root", {"NOT_ABSOLUTE"}),
        ("..", {"NOT_ABSOLUTE"}),
        ("/a\0b", {"NOT_A_PATH"}),
        ("/" + "a" * 5000, {"NOT_A_PATH", "FILE_NOT_FOUND", "FOLDER_NOT_FOUND"}),
        ("/proc/self/environ", {"NOT_A_FILE", "NOT_A_FOLDER"}),
        ("/dev/zero", {"NOT_A_FILE", "NOT_A_FOLDER"}),
    ],
)
def test_a_path_that_is_none_is_named(
    shared: Daemon, scene: Scene, field: str, path: str, reasons: set[str]
) -> None:
    parameters = scene.parameters()
    setattr(parameters.data, field, path)
    assert judged(shared, parameters)[f"data.{field}"] & reasons


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", " a ", "a;b", "$(a)", "a%20b", "-rf", "中"])
def test_strange_but_honest_names_are_taken_as_they_are(
    shared: Daemon, scene: Scene, name: str
) -> None:
    """They name files; nothing interprets them."""
    data = scene.root / name
    shutil.copy(scene.data, data)
    parameters = scene.parameters()
    parameters.data.train_file = str(data)
    assert judged(shared, parameters)["data.train_file"] == set()


# --- every wrong field


def test_a_start_names_all_that_is_wrong_with_the_request(shared: Daemon) -> None:
    """Also where none of it is about parameters."""
    request = task_service_pb2.StartTaskRequest(
        name="tasks/none", request_id="\n", resume=77, resume_path="/x"
    )
    assert refused(lambda: shared.tasks.StartTask(request)) == {
        "request_id": "BAD_REQUEST_ID",
        "resume": "NOT_A_CHOICE",
        "resume_path": "CHECKPOINT_GIVEN_TWICE",
    }


def test_a_creation_names_all_that_is_wrong_with_the_request(shared: Daemon) -> None:
    parameters = parameters_pb2.Parameters(training=parameters_pb2.TrainingParameters(batch_size=0))
    request = task_service_pb2.CreateTaskRequest(
        task=task_pb2.Task(training_type=77, parameters=parameters, display_name="\n"),  # type: ignore[arg-type]
        task_id="A",
        request_id="\n",
    )
    assert refused(lambda: shared.tasks.CreateTask(request)) == {
        "task_id": "BAD_TASK_ID",
        "request_id": "BAD_REQUEST_ID",
        "display_name": "BAD_DISPLAY_NAME",
        "training_type": "NOT_A_CHOICE",
        "training.batch_size": "OUT_OF_RANGE",
    }


def test_a_check_of_a_task_looks_at_template_and_type_as_well(shared: Daemon) -> None:
    """With a task, what else the request names is not passed over."""
    task = shared.create(parameters_pb2.Parameters()).name
    pretrain: Any = task_pb2.TRAINING_TYPE_PRETRAIN
    wrong: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"template": "templates/pretrain"}, {"template": "TEMPLATE_OF_OTHER_TYPE"}),
        ({"training_type": pretrain}, {"task": "TASK_OF_OTHER_TYPE"}),
        ({"training_type": 77}, {"training_type": "NOT_A_CHOICE"}),
    ]
    calls: list[tuple[Any, Any]] = [
        (shared.parameters.ValidateParameters, parameter_service_pb2.ValidateParametersRequest),
        (shared.parameters.EstimateTask, parameter_service_pb2.EstimateTaskRequest),
    ]
    for call, request in calls:
        for fields, reasons in wrong:
            asked = functools.partial(call, request(task=task, **fields))
            assert refused(asked) == reasons
        with pytest.raises(grpc.RpcError) as caught:
            call(request(task=task, template="templates/none"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    estimate = parameter_service_pb2.EstimateTaskRequest(
        resume=task_pb2.RESUME_CHOICE_NEWEST_CHECKPOINT,
        training_type=77,  # type: ignore[arg-type]
    )
    assert refused(lambda: shared.parameters.EstimateTask(estimate)) == {
        "task": "REQUIRED",
        "training_type": "NOT_A_CHOICE",
    }


def test_weights_that_are_in_order_are_taken(shared: Daemon, scene: Scene) -> None:
    """The scene itself is a model, or nothing above says anything."""
    write_safetensors(scene.model / "model.safetensors", LLAMA_TENSORS)
    assert judged(shared, scene.parameters())["data.model_path"] == set()

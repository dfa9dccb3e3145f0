"""The rules of the section `extensions`: what is refused before a start, and with what way out."""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import grpc
import pytest

from conftest import PROJECTIONS, Scene, write_safetensors
from daemon_process import Daemon, paths
from finetuned.v1 import task_pb2, task_service_pb2
from finetuned_daemon.config import Config
from finetuned_daemon.environment.environment import Environment
from finetuned_daemon.environment.items import judge_extra_packages
from finetuned_daemon.environment.model import Capability, CheckStatus
from finetuned_daemon.environment.python import Inventory, TrainingPython
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.parameters.extensions import ExtensionParameters
from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import EXTRA_PACKAGES, extra_packages
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import STATE_FILES, FileEntry, Manifest
from finetuned_daemon.validation.check import check
from finetuned_daemon.validation.surroundings import Surroundings

HAN = re.compile("[\u4e00-\u9fff]")
SFT, PRETRAIN = TrainingType.SFT, TrainingType.PRETRAIN
E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTICE
ALL_PACKAGES = frozenset(name for package in EXTRA_PACKAGES for name in package.distributions)


def gpu(**changes: Any) -> Surroundings:
    """A GPU that can do everything, and every package."""
    can = {"bf16": True, "fp16": True, "tf32": True, "four_bit": True, "eight_bit_optimizer": True}
    return Surroundings(
        device="cuda:0",
        capability=Capability(**{name: changes.get(name, able) for name, able in can.items()}),
        packages=changes.get("packages", ALL_PACKAGES),
    )


ON_GPU = gpu()
ON_CPU = Surroundings(packages=ALL_PACKAGES)


def judge(
    values: dict[str, Any],
    training_type: TrainingType = SFT,
    surroundings: Surroundings = ON_GPU,
    *,
    complete: bool = False,
) -> list[Violation]:
    """The violations of values by path, those of the default fp16 on the CPU aside."""
    given = dict[str, dict[str, Any]]()
    for path, value in values.items():
        section, name = path.split(".")
        given.setdefault(section, {})[name] = value
    found = check(given, training_type, surroundings, complete=complete)[1]
    return [v for v in found if v.reason != "FP16_UNAVAILABLE_ON_CPU"]


ALONE: list[tuple[dict[str, Any], TrainingType, Surroundings, str, Severity]] = [
    ({"loraplus_lr_ratio": 0.5}, SFT, ON_GPU, "OUT_OF_RANGE", E),
    ({"lora_init": "pissa", "optimization.use_qlora": True}, SFT, ON_GPU, "PISSA_WITH_QLORA", E),
    ({"lora_init": "pissa", "extensions.use_dora": True}, SFT, ON_GPU, "PISSA_WITH_DORA", E),
    (
        {"lora_init": "pissa", "lora.lora_target_modules": ["q_proj", "lm_head"]},
        SFT,
        ON_GPU,
        "PISSA_ON_EMBEDDINGS",
        E,
    ),
    ({"attn_implementation": "flash_attention_2"}, SFT, ON_CPU, "DEVICE_LACKS_IT", E),
    ({"attn_implementation": "flash_attention_2"}, SFT, gpu(bf16=False), "DEVICE_LACKS_IT", E),
    (
        {"attn_implementation": "flash_attention_2", "optimization.fp16": False},
        PRETRAIN,
        ON_GPU,
        "FLASH_ATTENTION_IN_FLOAT32",
        E,
    ),
    ({"use_liger_kernel": True}, PRETRAIN, ON_CPU, "DEVICE_LACKS_IT", E),
    ({"use_liger_kernel": True}, SFT, gpu(packages=frozenset()), "PACKAGE_MISSING", E),
    (
        {"attn_implementation": "flash_attention_2"},
        SFT,
        gpu(packages=frozenset({"liger-kernel"})),
        "PACKAGE_MISSING",
        E,
    ),
    ({"report_to": "wandb"}, SFT, gpu(packages=frozenset({"tensorboard"})), "PACKAGE_MISSING", E),
    ({"report_to": "mlflow"}, PRETRAIN, gpu(packages=frozenset()), "PACKAGE_MISSING", E),
    ({"packing": True}, PRETRAIN, ON_GPU, "NOT_FOR_PRETRAINING", N),
    ({"use_dora": True}, PRETRAIN, ON_GPU, "NOT_FOR_PRETRAINING", N),
    ({"loraplus_lr_ratio": 16.0}, PRETRAIN, ON_GPU, "NOT_FOR_PRETRAINING", N),
    ({"lora_init": "pissa", "lora.use_lora": False}, SFT, ON_GPU, "LORA_OFF", N),
    ({"loraplus_lr_ratio": 16.0, "lora.use_lora": False}, SFT, ON_GPU, "LORA_OFF", N),
    ({"use_rslora": True, "data.attach_lora": True}, SFT, ON_GPU, "ATTACHED_LORA_WINS", N),
]


@pytest.mark.parametrize(
    ("values", "training_type", "surroundings", "reason", "severity"),
    ALONE,
    ids=[f"{row[3]}-{next(iter(row[0]))}" for row in ALONE],
)
def test_a_rule_fires_alone_and_its_suggestion_silences_it(
    values: dict[str, Any],
    training_type: TrainingType,
    surroundings: Surroundings,
    reason: str,
    severity: Severity,
) -> None:
    """In both languages, at the extension that is meant."""
    values = {name if "." in name else f"extensions.{name}": v for name, v in values.items()}
    (violation,) = judge(values, training_type, surroundings)
    path = next(iter(values))
    assert (violation.field, violation.reason, violation.severity) == (path, reason, severity)
    assert HAN.search(violation.message.zh)
    assert not HAN.search(violation.message.en)
    mended = values | {violation.suggested_field or violation.field: violation.suggested}
    if mended.get("optimization.bf16"):
        mended["optimization.fp16"] = False
    assert judge(mended, training_type, surroundings) == []


def test_a_peft_file_decides_instead_of_the_shape_extensions(tmp_path: Path) -> None:
    """Each of them says so, beside the file; the ratio of the rates stays in effect."""
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({"peft_type": "LORA", "target_modules": ["q_proj"]}))
    values = {
        "lora.peft_config_path": str(file),
        "extensions.use_dora": True,
        "extensions.lora_init": "pissa",
        "extensions.loraplus_lr_ratio": 16.0,
    }
    found = [(v.field, v.reason) for v in judge(values)]
    assert sorted(found) == [
        ("extensions.lora_init", "PEFT_CONFIG_WINS"),
        ("extensions.use_dora", "PEFT_CONFIG_WINS"),
        ("lora.peft_config_path", "PEFT_CONFIG_WINS"),
    ]


def test_what_goes_together_is_not_remarked_on() -> None:
    """Every extension that can be combined with the others, in one task."""
    values: dict[str, Any] = {
        "extensions.packing": True,
        "extensions.neftune_noise_alpha": 5.0,
        "extensions.use_rslora": True,
        "extensions.lora_init": "pissa",
        "extensions.loraplus_lr_ratio": 16.0,
        "extensions.attn_implementation": "flash_attention_2",
        "extensions.use_liger_kernel": True,
        "extensions.report_to": "swanlab",
        "extensions.retry_out_of_memory": True,
    }
    assert judge(values) == []
    assert judge({"extensions.use_dora": True, "optimization.use_qlora": True}) == []


def test_what_is_not_known_of_the_environment_is_not_refused() -> None:
    """Another Python that was not asked yet may have the package: the start asks it."""
    values = {"extensions.use_liger_kernel": True, "extensions.report_to": "wandb"}
    assert judge(values, surroundings=gpu(packages=None)) == []


def test_tensorboard_may_be_either_of_its_packages() -> None:
    """The second one writes the same files."""
    for name in ("tensorboard", "tensorboardX"):
        here = Surroundings(packages=frozenset({name}))
        assert judge({"extensions.report_to": "tensorboard"}, surroundings=here) == []


@pytest.mark.parametrize(
    ("surroundings", "compiler"), [(ON_CPU, "g++"), (ON_GPU, "gcc")], ids=["cpu", "gpu"]
)
def test_compiling_needs_a_compiler_and_is_a_warning_on_the_cpu(
    surroundings: Surroundings, compiler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch would find out in the middle of the first step."""
    values = {"extensions.torch_compile": True}
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv("CC", raising=False)
    (violation,) = judge(values, surroundings=surroundings)
    assert (violation.reason, violation.severity) == ("COMPILER_MISSING", E)
    (tmp_path / compiler).touch(0o755)
    found = [(v.reason, v.severity) for v in judge(values, surroundings=surroundings)]
    assert found == ([("COMPILED_ON_CPU", W)] if surroundings is ON_CPU else [])


# --- packages


@pytest.mark.parametrize(
    ("extensions", "package"),
    [
        ({"attn_implementation": "flash_attention_2"}, "flash-attn"),
        ({"use_liger_kernel": True}, "liger-kernel"),
        *(({"report_to": tool}, tool) for tool in ("tensorboard", "wandb", "mlflow", "swanlab")),
    ],
)
def test_a_start_is_refused_with_the_command_that_brings_the_package(
    extensions: dict[str, Any], package: str
) -> None:
    """Where only the start has asked the training environment."""
    parameters = Parameters(extensions=ExtensionParameters(**extensions))
    bare = Inventory(python="3.11.0", path=(), packages={})
    (item,) = judge_extra_packages("/p", bare, parameters)
    assert (item.status, item.reason, item.name) == (CheckStatus.ERROR, "PACKAGE_MISSING", package)
    assert item.remedy.en == f"/p -m pip install {package}"
    there = Inventory(python="3.11.0", path=(), packages={package: "1"})
    assert list(judge_extra_packages("/p", there, parameters)) == []
    assert extra_packages(Parameters()) == {}


async def test_the_training_environment_is_asked_for_these_packages(tmp_path: Path) -> None:
    """By the names that they are installed by."""
    site = tmp_path / "site"
    for name in ("flash_attn", "liger_kernel", "tensorboardX"):
        folder = site / f"{name}-1.5.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.5\n")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={site} exec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    found = await TrainingPython(str(python), tmp_path).ask()
    assert {"flash-attn", "liger-kernel", "tensorboardX"} <= found.packages.keys()


async def test_a_start_asks_another_python_that_nobody_has_asked(tmp_path: Path) -> None:
    """Until then nothing is known of its packages; afterwards every check knows."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} "$@"\n')
    python.chmod(0o755)
    found = paths(tmp_path / "state", tmp_path / "run")
    found.state_dir.mkdir()
    environment = Environment(Config(paths=found, runner_python=str(python)))
    try:
        assert environment.packages() is None
        parameters = Parameters(extensions=ExtensionParameters(report_to="swanlab"))
        (item,) = await environment.before_start(parameters, "cpu")
        assert (item.name, item.reason) == ("swanlab", "PACKAGE_MISSING")
        known = environment.packages()
        assert known is not None
        assert "torch" in known
        assert "swanlab" not in known
    finally:
        await environment.close()


def test_a_daemon_names_the_package_that_its_python_lacks(daemon: Daemon, scene: Scene) -> None:
    """At the field, when a task is created, and nothing is written."""
    parameters = scene.parameters()
    parameters.extensions.report_to = "swanlab"
    parameters.extensions.packing = True
    task = task_pb2.Task(training_type=task_pb2.TRAINING_TYPE_SFT, parameters=parameters)
    with pytest.raises(grpc.RpcError) as caught:
        daemon.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "extensions.report_to" in str(caught.value.details())
    parameters.extensions.report_to = "none"
    task = task_pb2.Task(training_type=task_pb2.TRAINING_TYPE_SFT, parameters=parameters)
    created = daemon.tasks.CreateTask(task_service_pb2.CreateTaskRequest(task=task)).task
    assert created.parameters.extensions.packing
    assert created.parameters.extensions.lora_init == "default"


# --- a checkpoint to resume


def checkpoint(scene: Scene, made: dict[str, Any], extensions: dict[str, Any]) -> Path:
    """A whole LoRA checkpoint of a run with these extensions."""
    folder = scene.root / "checkpoint-1"
    folder.mkdir()
    config = {
        "r": 16,
        "lora_alpha": 16,
        "target_modules": [module.rpartition(".")[2] for module in PROJECTIONS],
        "base_model_name_or_path": str(scene.model),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config | made))
    names = [f"base_model.model.{module}.lora_A.weight" for module in PROJECTIONS]
    write_safetensors(folder / "adapter_model.safetensors", names, 8)
    for name in STATE_FILES:
        (folder / name).write_text("state")
    files = {p.name: FileEntry(size=p.stat().st_size, sha256="") for p in folder.iterdir()}
    manifest = Manifest(
        step=1, files=files, optimizer="adamw_torch", parameters={"extensions": extensions}
    )
    (folder / "manifest.json").write_text(manifest.model_dump_json())
    return folder


@pytest.mark.parametrize(
    ("made", "then", "now"),
    [
        ({"use_dora": True}, {}, {"use_dora": True}),
        ({"use_rslora": True}, {}, {"use_rslora": True}),
        ({"r": 32, "lora_alpha": 32}, {"lora_init": "pissa"}, {"lora_init": "pissa"}),
        ({}, {"loraplus_lr_ratio": 16.0}, {"loraplus_lr_ratio": 16.0}),
    ],
    ids=["dora", "rslora", "pissa", "loraplus"],
)
def test_a_checkpoint_goes_on_with_the_extensions_it_was_made_with(
    scene: Scene, made: dict[str, Any], then: dict[str, Any], now: dict[str, Any]
) -> None:
    """Without them it is refused with the value that it needs."""
    values: dict[str, Any] = {
        "data.train_file": str(scene.data),
        "data.model_path": str(scene.model),
        "data.output_dir": str(scene.output),
        "data.resume_from_checkpoint": str(checkpoint(scene, made, then)),
    }
    with_them = values | {f"extensions.{name}": value for name, value in now.items()}
    assert [v for v in judge(with_them, complete=True) if v.severity is E] == []
    (violation,) = [v for v in judge(values, complete=True) if v.severity is E]
    assert violation.field == "data.resume_from_checkpoint"
    ((name, value),) = now.items()
    assert violation.suggested_field == f"extensions.{name}"
    assert violation.suggested == value


def test_another_ratio_than_before_is_taken_over(scene: Scene) -> None:
    """The runner sets the rates of the resumed optimizer anew."""
    folder = checkpoint(scene, {}, {"loraplus_lr_ratio": 16.0})
    values = {
        "data.train_file": str(scene.data),
        "data.model_path": str(scene.model),
        "data.output_dir": str(scene.output),
        "data.resume_from_checkpoint": str(folder),
        "extensions.loraplus_lr_ratio": 8.0,
    }
    assert [v for v in judge(values, complete=True) if v.severity is E] == []

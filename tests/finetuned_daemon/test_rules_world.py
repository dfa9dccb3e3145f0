"""Every rule about files and folders fires alone, and is silent where nothing is wrong."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import PROJECTIONS, Scene, write_safetensors
from finetuned_daemon.errors import Severity, Violation
from finetuned_daemon.runs.contract import TrainingType
from finetuned_daemon.runs.manifest import STATE_FILES, FileEntry, Manifest
from finetuned_daemon.validation.surroundings import Surroundings
from rules import (
    AMPERE,
    HAN,
    ON_AMPERE,
    SFT,
    Values,
    alone,
    judge,
)

E, W, N = Severity.ERROR, Severity.WARNING, Severity.NOTICE

# --- files and folders


class World:
    """A sound model, data and output folder, and hands to spoil them."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        self.values: Values = {
            "data.model_path": str(scene.model),
            "data.train_file": str(scene.data),
            "data.output_dir": str(scene.output),
        }
        self.surroundings = ON_AMPERE

    def set(self, **values: Any) -> None:
        self.values |= {name.replace("__", "."): value for name, value in values.items()}

    def config(self, **changes: Any) -> None:
        path = self.scene.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def checkpoint(self, base: str | None = None, width: int = 8, r: int = 16) -> Path:
        """A whole LoRA checkpoint of the default shape."""
        folder = self.scene.root / "checkpoint-1"
        folder.mkdir(exist_ok=True)
        config = {
            "r": r,
            "lora_alpha": 16,
            "target_modules": [module.rpartition(".")[2] for module in PROJECTIONS],
            "base_model_name_or_path": str(self.scene.model) if base is None else base,
        }
        (folder / "adapter_config.json").write_text(json.dumps(config))
        names = [f"base_model.model.{module}.lora_A.weight" for module in PROJECTIONS]
        write_safetensors(folder / "adapter_model.safetensors", names, width)
        for name in STATE_FILES:
            (folder / name).write_text("state")
        files = {
            path.name: FileEntry(size=path.stat().st_size, sha256="")
            for path in folder.iterdir()
            if path.name != "manifest.json"
        }
        manifest = Manifest(step=1, files=files, optimizer="adamw_torch")
        (folder / "manifest.json").write_text(manifest.model_dump_json())
        self.set(data__resume_from_checkpoint=str(folder))
        return folder

    def judge(self, training_type: TrainingType = SFT) -> list[Violation]:
        return judge(self.values, training_type, self.surroundings, complete=True)


@pytest.fixture
def world(scene: Scene) -> World:
    world = World(scene)
    assert world.judge() == []
    return world


def spoil_gguf(world: World) -> None:
    path = world.scene.root / "model.gguf"
    path.write_bytes(b"GGUF\3")
    world.set(data__model_path=str(path))


def spoil_shards(world: World) -> None:
    (world.scene.model / "model.safetensors").rename(world.scene.model / "a.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (world.scene.model / "model.safetensors.index.json").write_text(json.dumps(index))


def spoil_weights(world: World) -> None:
    path = world.scene.model / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def spoil_to_bin(world: World) -> None:
    (world.scene.model / "model.safetensors").unlink()
    (world.scene.model / "pytorch_model.bin").write_bytes(bytes(100))


def spoil_to_adapter(world: World) -> None:
    base = world.scene.root / "base"
    shutil.copytree(world.scene.model, base)
    (world.scene.model / "config.json").unlink()
    config = {"base_model_name_or_path": str(base)}
    (world.scene.model / "adapter_config.json").write_text(json.dumps(config))


def spoil_targets(world: World) -> None:
    write_safetensors(
        world.scene.model / "model.safetensors", ("h.0.c_attn.weight", "h.0.q_proj.weight")
    )


def spoil_data(world: World) -> None:
    world.scene.data.write_text(world.scene.data.read_text() + "{broken\n")


def spoil_peft(world: World) -> None:
    path = world.scene.root / "peft.json"
    path.write_text('{"peft_type": "PREFIX_TUNING"}')
    world.set(lora__peft_config_path=str(path))


def spoil_state(world: World) -> None:
    (world.checkpoint() / "optimizer.pt").unlink()


def spoil_size(world: World) -> None:
    (world.checkpoint() / "scheduler.pt").write_text("more than it was")


def known_types(*names: str) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        world.surroundings = Surroundings(
            device="cuda:0", capability=AMPERE, model_types=frozenset(names)
        )

    return spoil


def both(*parts: Callable[[World], object]) -> Callable[[World], None]:
    def spoil(world: World) -> None:
        for part in parts:
            part(world)

    return spoil


def copy_of(path: Path) -> Path:
    return Path(shutil.copy(path, path.with_name(f"copy-{path.name}")))


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 0},
        {"r": "x"},
        {"lora_alpha": math.nan},
        {"lora_dropout": 2},
        {"bias": "zz"},
        {"target_modules": "("},
        {"target_modules": [1]},
        {"rank_pattern": {"q_proj": 0}},
    ],
)
def test_a_peft_file_with_what_no_lora_has_is_refused(
    world: World, settings: dict[str, Any]
) -> None:
    path = world.scene.root / "peft.json"
    path.write_text(json.dumps(settings))
    world.set(lora__peft_config_path=str(path))
    found = [v for v in world.judge() if v.severity is E]
    assert alone(found) == ("lora.peft_config_path", "BAD_PEFT_CONFIG", E)
    assert next(iter(settings)) in found[0].message.en


def test_a_peft_file_for_another_model_is_refused(world: World) -> None:
    path = world.scene.root / "peft.json"
    path.write_text('{"r": 4, "target_modules": ["c_attn"]}')
    world.set(lora__peft_config_path=str(path))
    found = [v for v in world.judge() if v.severity is E]
    assert alone(found) == ("lora.peft_config_path", "TARGET_MODULE_MISSING", E)


def unlink(name: str) -> Callable[[World], None]:
    return lambda world: (world.scene.model / name).unlink()


def setting(**values: Any) -> Callable[[World], None]:
    return lambda world: world.set(**values)


RESUME = "data.resume_from_checkpoint"
WORLD: dict[str, tuple[Callable[[World], object], tuple[str, str, Severity]]] = {
    "gguf file": (spoil_gguf, ("data.model_path", "MODEL_IS_GGUF", E)),
    "no config": (unlink("config.json"), ("data.model_path", "MODEL_WITHOUT_CONFIG", E)),
    "no weights": (unlink("model.safetensors"), ("data.model_path", "MODEL_WITHOUT_WEIGHTS", E)),
    "a shard missing": (spoil_shards, ("data.model_path", "MODEL_UNREADABLE", E)),
    "weights cut off": (spoil_weights, ("data.model_path", "MODEL_UNREADABLE", E)),
    "only .bin": (spoil_to_bin, ("data.model_path", "MODEL_WITHOUT_SAFETENSORS", W)),
    "adapter alone": (spoil_to_adapter, ("data.model_path", "MODEL_IS_ADAPTER", E)),
    "unknown type": (known_types("gpt2"), ("data.model_path", "MODEL_TYPE_UNKNOWN", E)),
    "code, unknown type": (
        both(known_types("gpt2"), lambda w: w.config(auto_map={"AutoModel": "x.X"})),
        ("data.model_path", "MODEL_NEEDS_ITS_CODE", E),
    ),
    "code, known type": (
        both(known_types("llama"), lambda w: w.config(auto_map={"AutoModel": "x.X"})),
        ("data.model_path", "MODEL_CODE_NOT_RUN", W),
    ),
    "too long": (
        lambda w: w.config(max_position_embeddings=256),
        ("training.max_seq_length", "MAX_SEQ_LENGTH_ABOVE_MODEL", W),
    ),
    "targets": (spoil_targets, ("lora.lora_target_modules", "TARGET_MODULE_MISSING", E)),
    "type is no name": (
        lambda w: w.config(model_type=["llama"]),
        ("data.model_path", "MODEL_TYPE_UNKNOWN", E),
    ),
    "another width than its weights": (
        lambda w: w.config(hidden_size=10**9, num_hidden_layers=10**9),
        ("data.model_path", "MODEL_CONTRADICTS_ITSELF", E),
    ),
    "quantized": (
        lambda w: w.config(quantization_config={"quant_method": "gptq"}),
        ("data.model_path", "MODEL_IS_QUANTIZED", E),
    ),
    "quantized in 4 bits": (
        lambda w: w.config(quantization_config={"quant_method": "bitsandbytes"}),
        ("data.model_path", "MODEL_IS_QUANTIZED", E),
    ),
    "broken tokenizer": (
        lambda w: (w.scene.model / "tokenizer.json").write_text("{}"),
        ("data.model_path", "TOKENIZER_UNUSABLE", E),
    ),
    "empty chat template": (
        lambda w: (w.scene.model / "chat_template.jinja").write_text(""),
        ("data.model_path", "CHAT_TEMPLATE_MISSING", E),
    ),
    "evaluation on the training data": (
        lambda w: w.set(data__eval_file=str(w.scene.data), training__eval_strategy="epoch"),
        ("data.eval_file", "EVALUATION_ON_TRAINING_DATA", W),
    ),
    "evaluation beyond the end": (
        lambda w: w.set(
            data__eval_file=str(copy_of(w.scene.data)),
            training__eval_strategy="steps",
            training__eval_steps=5000,
        ),
        ("training.eval_steps", "EVALUATION_AT_END_ONLY", W),
    ),
    "output in results": (
        lambda w: setattr(
            w,
            "surroundings",
            Surroundings(device="cuda:0", capability=AMPERE, output_within="tasks/other"),
        ),
        ("data.output_dir", "OUTPUT_IN_RESULTS", E),
    ),
    "output in /proc": (
        setting(data__output_dir="/proc/x"),
        ("data.output_dir", "NOT_WRITABLE", E),
    ),
    "another optimizer": (
        both(lambda w: w.checkpoint(), setting(training__optimizer="sgd")),
        (RESUME, "CHECKPOINT_OF_OTHER_OPTIMIZER", E),
    ),
    "nothing left": (
        both(lambda w: w.checkpoint(), setting(training__max_steps=1)),
        (RESUME, "NOTHING_LEFT_TO_TRAIN", W),
    ),
    "attached from another model": (
        both(lambda w: w.checkpoint(width=4), setting(data__attach_lora=True)),
        (RESUME, "CHECKPOINT_OF_OTHER_MODEL", E),
    ),
    "no tokenizer": (unlink("tokenizer.json"), ("data.model_path", "TOKENIZER_NOT_FOUND", E)),
    "no chat template": (
        unlink("chat_template.jinja"),
        ("data.model_path", "CHAT_TEMPLATE_MISSING", E),
    ),
    "bad line": (spoil_data, ("data.train_file", "BAD_DATA_LINE", E)),
    "no sample": (
        lambda w: w.scene.data.write_text("\n"),
        ("data.train_file", "DATA_EMPTY", E),
    ),
    "eval file and ratio": (
        lambda w: w.set(
            data__eval_file=str(copy_of(w.scene.data)),
            data__eval_ratio=0.5,
            training__eval_strategy="epoch",
        ),
        ("data.eval_ratio", "EVALUATION_FILE_WITH_RATIO", E),
    ),
    "split of one": (
        setting(data__eval_ratio=0.5, training__eval_strategy="epoch"),
        ("data.eval_ratio", "SPLIT_LEAVES_NONE", E),
    ),
    "warm-up": (
        setting(training__warmup_steps=2),
        ("training.warmup_steps", "WARMUP_LONGER_THAN_RUN", W),
    ),
    "output in model": (
        lambda w: w.set(data__output_dir=str(w.scene.model / "out")),
        ("data.output_dir", "OUTPUT_IN_MODEL_FOLDER", E),
    ),
    "output of another task": (
        lambda w: setattr(
            w,
            "surroundings",
            Surroundings(device="cuda:0", capability=AMPERE, output_owner="tasks/other"),
        ),
        ("data.output_dir", "OUTPUT_OF_ANOTHER_TASK", W),
    ),
    "no manifest": (
        lambda w: (w.checkpoint() / "manifest.json").unlink(),
        (RESUME, "NOT_A_CHECKPOINT", E),
    ),
    "state missing": (spoil_state, (RESUME, "NOT_A_CHECKPOINT", E)),
    "state of another size": (spoil_size, (RESUME, "NOT_A_CHECKPOINT", E)),
    "another rank": (lambda w: w.checkpoint(r=8), (RESUME, "CHECKPOINT_OF_OTHER_LORA", E)),
    "LoRA for all weights": (
        both(lambda w: w.checkpoint(), setting(lora__use_lora=False)),
        (RESUME, "CHECKPOINT_OF_OTHER_LORA", E),
    ),
    "another width": (lambda w: w.checkpoint(width=4), (RESUME, "CHECKPOINT_OF_OTHER_MODEL", E)),
    "another path": (
        lambda w: w.checkpoint(base="/elsewhere"),
        (RESUME, "CHECKPOINT_OF_OTHER_PATH", W),
    ),
    "nothing to attach": (
        setting(data__attach_lora=True),
        ("data.attach_lora", "ADAPTER_NOT_FOUND", E),
    ),
    "peft file": (spoil_peft, ("lora.peft_config_path", "BAD_PEFT_CONFIG", E)),
}


@pytest.mark.parametrize("name", WORLD)
def test_a_rule_about_the_world_fires_alone(world: World, name: str) -> None:
    spoil, expected = WORLD[name]
    spoil(world)
    # That a PEFT file decides is said beside what is wrong with it.
    found = [v for v in world.judge() if v.reason != "PEFT_CONFIG_WINS"]
    assert alone(found) == expected


def test_a_whole_checkpoint_of_this_task_is_in_order(world: World) -> None:
    world.checkpoint()
    assert world.judge() == []


def test_what_a_rule_suggests_is_what_there_is(world: World) -> None:
    spoil_targets(world)
    (violation,) = world.judge()
    assert violation.suggested == ("q_proj",)
    assert "c_attn, q_proj" in violation.message.en
    spoil_to_adapter(world)
    (violation,) = world.judge()
    assert violation.suggested == str(world.scene.root / "base")


def test_five_at_once_come_in_one_answer(world: World) -> None:
    spoil_gguf(world)
    spoil_data(world)
    world.set(
        data__output_dir="/dev/null",
        training__batch_size=0,
        training__optimizer="nope",
        optimization__bf16=True,
        training__eval_strategy="steps",
    )
    found = world.judge()
    assert {(v.field, v.reason) for v in found} == {
        ("data.model_path", "MODEL_IS_GGUF"),
        ("data.train_file", "BAD_DATA_LINE"),
        ("data.output_dir", "NOT_A_FOLDER"),
        ("training.batch_size", "OUT_OF_RANGE"),
        ("training.optimizer", "NOT_A_CHOICE"),
        ("optimization.bf16", "FP16_WITH_BF16"),
        ("training.eval_strategy", "EVALUATION_DATA_MISSING"),
    }
    for violation in found:
        assert HAN.search(violation.message.zh)


def test_errors_come_first_then_warnings_then_notices(world: World) -> None:
    world.config(max_position_embeddings=256)
    world.set(data__eval_ratio=0.5, training__batch_size=0)
    assert [v.severity for v in world.judge()] == [E, W, N]


@pytest.fixture
def mount(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a small file system with options, where this machine lets us."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mount(options: str) -> Path:
        command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
        if shutil.which("mount") is None or subprocess.run(command, check=False).returncode:
            pytest.skip("no right to mount a file system here")
        return folder

    yield mount
    if os.path.ismount(folder):
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_named(world: World, mount: Callable[[str], Path]) -> None:
    world.set(data__output_dir=str(mount("size=1m") / "out"))
    assert alone(world.judge()) == ("data.output_dir", "DISK_FULL", E)


def test_a_folder_that_cant_be_written_is_named(world: World, mount: Callable[[str], Path]) -> None:
    if os.geteuid():
        folder = world.scene.root / "locked"
        folder.mkdir(mode=0o500)
    else:  # root may write anywhere but where nobody can
        folder = mount("ro")
    world.set(data__output_dir=str(folder / "out"))
    assert alone(world.judge()) == ("data.output_dir", "NOT_WRITABLE", E)

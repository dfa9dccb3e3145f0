"""Fixtures for all tests.

A daemon of one's own, and what the fake runner takes for a model and data.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from daemon_process import Daemon
from finetuned.v1 import parameters_pb2

REPOSITORY = Path(__file__).parent.parent

PROJECTIONS = tuple(
    f"model.layers.0.{module}_proj" for module in ("q", "k", "v", "o", "gate", "up", "down")
)
LLAMA_TENSORS = tuple(f"{m}.weight" for m in ("model.embed_tokens", "lm_head", *PROJECTIONS))


def write_safetensors(path: Path, names: Iterable[str], width: int = 8) -> Path:
    """Writes square matrices of zeros with these names as a safetensors file."""
    size = width * width * 4
    header = {
        name: {
            "dtype": "F32",
            "shape": [width, width],
            "data_offsets": [number * size, (number + 1) * size],
        }
        for number, name in enumerate(names)
    }
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(size * len(header)))
    return path


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    """A daemon with folders of its own; runs go to the fake runner."""
    daemon = Daemon(tmp_path).start()
    yield daemon
    daemon.close()


@dataclass
class Scene:
    """What a run of the fake runner needs, and a hand on its steps."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def data(self) -> Path:
        return self.root / "chats.jsonl"

    @property
    def output(self) -> Path:
        return self.root / "out"

    def parameters(self, **training: Any) -> parameters_pb2.Parameters:
        """Parameters of a task that can be started."""
        return parameters_pb2.Parameters(
            data=parameters_pb2.DataParameters(
                train_file=str(self.data), model_path=str(self.model), output_dir=str(self.output)
            ),
            training=parameters_pb2.TrainingParameters(**training),
        )

    def play(self, **scenario: Any) -> parameters_pb2.Parameters:
        """Says what the next run does; the parameters for it."""
        (self.model / "scenario.json").write_text(json.dumps(scenario))
        if scenario.get("gated") and not (self.model / "gate").exists():
            os.mkfifo(self.model / "gate")
        return self.parameters()

    def let_pass(self, steps: int) -> None:
        """Lets a gated run take so many steps more."""
        descriptor = os.open(self.model / "gate", os.O_RDWR)
        os.write(descriptor, b"." * steps)
        # The reader may not have come yet; a FIFO keeps its bytes only while somebody has it open.
        self._held.append(descriptor)

    def __post_init__(self) -> None:
        self._held: list[int] = []
        self.model.mkdir(parents=True)
        config = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 1, "vocab_size": 8}
        (self.model / "config.json").write_text(json.dumps(config))
        (self.model / "tokenizer.json").write_text('{"model": {}}')
        write_safetensors(self.model / "model.safetensors", LLAMA_TENSORS)
        (self.model / "chat_template.jinja").write_text("{{ messages }}")
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
        self.data.write_text(json.dumps({"messages": chat}) + "\n")
        self.play()

    def close(self) -> None:
        for descriptor in self._held:
            os.close(descriptor)


@pytest.fixture
def scene(tmp_path: Path) -> Iterator[Scene]:
    """What a run of the fake runner needs."""
    scene = Scene(tmp_path / "scene")
    yield scene
    scene.close()

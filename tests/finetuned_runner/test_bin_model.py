"""Models whose weights are in `.bin` files: pickles, of which nothing but numbers is taken."""

from __future__ import annotations

import os
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from finetuned_daemon.runs.contract import EndReason
from tiny import weights


class Evil:
    """Leaves a file behind where its pickle is loaded without care."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.trace), os.O_CREAT)


@pytest.fixture
def folder(shop: Any, tmp_path: Path) -> Path:
    """A model without safetensors; its `.bin` is still to be written."""
    folder = tmp_path / "bin-model"
    shutil.copytree(shop.model(), folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    return folder


def test_a_model_of_bin_files_trains_as_one_of_safetensors_does_and_says_so(
    shop: Any, folder: Path
) -> None:
    settings = {"max_steps": 2}
    plain = shop.here(shop.make("plain", training=settings))
    old = shop.here(shop.make("old", training=settings, data={"model_path": str(folder)}))
    assert old.result.end_reason is EndReason.STEP_LIMIT, old.result.message
    assert old.losses() == plain.losses()
    assert old.notices()["MODEL_WITHOUT_SAFETENSORS"].field == "data.model_path"
    assert "MODEL_WITHOUT_SAFETENSORS" not in plain.notices()
    assert weights(old.output / "final").keys() == weights(plain.output / "final").keys()


def test_safetensors_win_over_bin_files_beside_them(shop: Any, folder: Path) -> None:
    shutil.copy(shop.model() / "model.safetensors", folder)
    (folder / "pytorch_model.bin").write_bytes(b"never read")
    run = shop.here(shop.make(training={"max_steps": 1}, data={"model_path": str(folder)}))
    assert run.result.end_reason is EndReason.STEP_LIMIT, run.result.message
    assert "MODEL_WITHOUT_SAFETENSORS" not in run.notices()


@pytest.mark.parametrize("as_zip", [True, False], ids=["zip", "plain pickle"])
def test_code_in_a_bin_file_does_not_run(
    shop: Any, folder: Path, tmp_path: Path, *, as_zip: bool
) -> None:
    trace = tmp_path / "trace"
    evil = {"model.norm.weight": Evil(trace)}
    if as_zip:
        torch.save(evil, folder / "pytorch_model.bin")
    else:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(evil, protocol=2))
    run = shop.here(shop.make(data={"model_path": str(folder)}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "holds more than numbers" in run.result.message
    assert not trace.exists()
    pickle.loads(pickle.dumps(Evil(trace)))
    assert trace.exists()  # so it would have been there

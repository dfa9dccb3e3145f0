"""What is noted while a run goes on, and left at its end: its record and its model card.

Hashed are, whole: data files, a PEFT configuration, and the files of model and tokenizer that a run
can read, weights included. That takes about half a second a gigabyte, in a thread beside the
loading that reads the same files. A checkpoint that is resumed from goes by its manifest, which has
the hashes of its files.

A run that is stopped leaves no record: its parameters are in its `spec.json`, its checkpoints have
manifests, and the run that goes on from them leaves one at its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import threading
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.parameters.needs import effective_optimizer, needs_bitsandbytes
from finetuned_daemon.runs.contract import Result, Spec, write_record
from finetuned_daemon.runs.manifest import MANIFEST, DataFile, Manifest, model_files
from finetuned_runner.data import Prepared
from finetuned_runner.model_card import model_card
from finetuned_runner.record import RECORD, Machine, RecordedFile, ResumedFrom, TrainingRecord
from finetuned_runner.trainer import RunTrainer

CARD = "README.md"

_PACKAGES = ("finetuned", "torch", "transformers", "peft", "accelerate", "tokenizers")


class Notes:
    """What is noted while a run goes on, for its record."""

    def __init__(self, spec: Spec) -> None:
        """Begins to hash what the run reads, in a thread."""
        self._spec = spec
        self._start = datetime.now(UTC)
        self._files: dict[str, list[RecordedFile]] = {}
        self._hashing = threading.Thread(target=self._hash, name="hashes", daemon=True)
        self._hashing.start()

    def leave(
        self,
        trainer: RunTrainer,
        tokenizer: PreTrainedTokenizerBase,
        result: Result,
        prepared: Prepared,
    ) -> Callable[[Path], None]:
        """What writes record and card into the folder of a model or adapter.

        Waits for the hashes.
        """
        self._hashing.join()
        for parameter, read in (
            ("data.train_file", prepared.train),
            ("data.eval_file", prepared.evaluation),
        ):
            # The file may have been written to since; the run has read it as it was.
            if read is not None and read.sha256:
                self._files[parameter] = [
                    file.model_copy(update={"sha256": read.sha256})
                    for file in self._files.get(parameter, [])
                ]
        record = self._record(trainer, tokenizer, result)

        def write(folder: Path) -> None:
            write_record(folder / RECORD, record)
            is_adapter = (folder / "adapter_config.json").is_file()
            # peft leaves a card of its own, with gaps to fill and the base model's path.
            (folder / CARD).write_text(
                model_card(record, is_adapter=is_adapter, name=folder.name.removeprefix(".tmp-")),
                encoding="utf-8",
            )

        return write

    def _hash(self) -> None:
        for parameter, paths in _inputs(_asked(self._spec)).items():
            files = self._files[parameter] = list[RecordedFile]()
            for path in paths:
                # What can't be read ends the run, or is not needed.
                with contextlib.suppress(OSError):
                    files.append(_hashed(path))

    def _record(
        self, trainer: RunTrainer, tokenizer: PreTrainedTokenizerBase, result: Result
    ) -> TrainingRecord:
        spec, arguments = self._spec, trainer.args
        model: Any = trainer.model
        history: list[dict[str, float]] = trainer.state.log_history
        template: object = getattr(tokenizer, "chat_template", None)
        is_gpu = spec.device != "cpu"
        trained, total = _count(model)
        manifest = trainer.resumed_from
        return TrainingRecord(
            task=spec.task,
            run=spec.run,
            training_type=spec.training_type.value.lower(),
            device=spec.device,
            parameters=_asked(spec),
            precision="bf16" if arguments.bf16 else "fp16" if arguments.fp16 else "float32",
            optimizer=effective_optimizer(spec.parameters),
            trained_parameters=trained,
            total_parameters=total,
            num_samples=_size(trainer.train_dataset),
            num_eval_samples=_size(trainer.eval_dataset),
            num_tokens=trainer.num_tokens,
            files=self._files,
            resumed_from=_resumed_from(spec, manifest) if manifest else None,
            chat_template_sha256=_sha256(template) if isinstance(template, str) else "",
            versions=_versions(spec.parameters),
            machine=Machine(
                system=f"{platform.system()} {platform.machine()}",
                cpu=_cpu_name(),
                gpu=torch.cuda.get_device_name(0) if is_gpu else "",
                num_threads=torch.get_num_threads(),
            ),
            start_time=self._start,
            end_time=datetime.now(UTC),
            end_reason=result.end_reason,
            step=result.step,
            # Where nothing was left to train, the state knows of no epoch.
            epoch=trainer.state.epoch or (manifest.epoch if manifest else 0.0),
            train_losses=_by_step(history, "loss"),
            eval_losses=_by_step(history, "eval_loss"),
        )


def _inputs(parameters: Parameters) -> dict[str, list[Path]]:
    """The files that a run with these parameters reads, by parameter."""
    data = parameters.data
    found: dict[str, list[Path]] = {}
    for name, path in (
        ("data.train_file", data.train_file),
        ("data.eval_file", data.eval_file),
        ("lora.peft_config_path", parameters.lora.peft_config_path),
    ):
        if path:
            found[name] = [Path(path)]
    if data.model_path:
        found["data.model_path"] = model_files(Path(data.model_path))
    if data.tokenizer_path:
        found["data.tokenizer_path"] = model_files(Path(data.tokenizer_path), weights=False)
    if data.resume_from_checkpoint:
        found["data.resume_from_checkpoint"] = [Path(data.resume_from_checkpoint, MANIFEST)]
    return found


def _asked(spec: Spec) -> Parameters:
    """The run's own parameters: that it went on after a pause is nothing that was asked for."""
    return spec.run_parameters or spec.parameters


def _resumed_from(spec: Spec, manifest: Manifest) -> ResumedFrom | None:
    """The checkpoint of another run that this one went on from, `manifest` being the last one's."""
    data = _asked(spec).data
    if spec.run_parameters is not None:
        folder = data.resume_from_checkpoint
        if not folder or data.attach_lora:
            return None
        try:
            manifest = Manifest.model_validate_json(Path(folder, MANIFEST).read_bytes())
        except (OSError, ValidationError):  # deleted since: what is left of it is its name
            manifest = Manifest(step=0)
    now = {"data.train_file": data.train_file, "data.eval_file": data.eval_file}
    return ResumedFrom(
        checkpoint=Path(data.resume_from_checkpoint or "").name,
        step=manifest.step,
        data_files={
            name: Path(manifest.data_files[name].path).name
            for name, path in now.items()
            if name in manifest.data_files and DataFile.of(path or "") != manifest.data_files[name]
        },
    )


def _hashed(path: Path) -> RecordedFile:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return RecordedFile(name=path.name, size=file.tell(), sha256=digest)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _versions(parameters: Parameters) -> dict[str, str]:
    packages = (*_PACKAGES, "bitsandbytes") if needs_bitsandbytes(parameters) else _PACKAGES
    versions = {"python": platform.python_version()}
    for package in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):  # run from its source
            versions[package] = importlib.metadata.version(package)
    return versions


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:  # not Linux
        pass
    return platform.processor()


def _count(model: Any) -> tuple[int, int]:
    """Values that are trained, and all of them."""
    if isinstance(model, PeftModel):  # counts packed 4-bit weights as what they stand for
        return model.get_nb_trainable_parameters()
    sizes = [parameter.numel() for parameter in model.parameters()]
    return sum(sizes), sum(sizes)


def _size(dataset: Any) -> int:
    return 0 if dataset is None else len(dataset)


def _by_step(history: list[dict[str, float]], key: str) -> dict[int, float]:
    return {int(entry["step"]): entry[key] for entry in history if key in entry}

"""What the probe process answers: the record that daemon and runner share."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", defer_build=True)


class ProbedDevice(_Record):
    """A GPU as torch sees it."""

    id: str
    """`cuda:N`, numbered as NVML does."""
    name: str
    compute_capability: str
    """Such as `8.0`."""
    supported: bool
    """Whether this torch holds code for it."""
    bf16: bool
    fp16: bool
    tf32: bool
    four_bit: bool
    eight_bit_optimizer: bool


class Probe(_Record):
    """What the training environment says of itself once everything is imported."""

    python: str
    versions: dict[str, str]
    """Of each package that could be imported."""
    failures: dict[str, str]
    """Package that is installed and can't be imported -> the error in one line."""
    cuda_build: str
    """CUDA that torch was built for, such as `12.8`; empty: torch is built for the CPU alone."""
    cuda_problem: str
    """Why torch can use no GPU, in its own words; empty: it can, or is built without CUDA."""
    devices: tuple[ProbedDevice, ...]
    """GPUs that torch can use."""
    model_types: tuple[str, ...]
    """`model_type`s of causal language models that transformers knows."""
    runtime_bytes: int = 0
    """Resident memory once all is imported that a run imports; 0: not known. Without bitsandbytes.

    A torch that is built for CUDA takes twice that of one for the CPU alone.
    """

    def device(self, device_id: str) -> ProbedDevice | None:
        """A GPU by its id."""
        return next((device for device in self.devices if device.id == device_id), None)

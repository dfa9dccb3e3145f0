"""What a judgement takes from outside of the parameters: the machine, and the other tasks."""

from __future__ import annotations

from dataclasses import dataclass

from finetuned_daemon.devices import CPU
from finetuned_daemon.environment.capability import CPU_CAPABILITY
from finetuned_daemon.environment.model import Capability


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """The machine and the other tasks, as they are when parameters are judged."""

    device: str = CPU
    """Id of the device that the run would use."""
    capability: Capability = CPU_CAPABILITY
    """What that device can do."""
    has_bitsandbytes: bool = True
    """Whether the training environment has it, which 4 and 8 bits need; not known: yes."""
    packages: frozenset[str] | None = None
    """Packages of the training environment, of those that are asked for; None: not asked yet."""
    model_types: frozenset[str] | None = None
    """`model_type`s that the training environment knows; None: it was not asked yet."""
    own_folders: tuple[str, ...] = ()
    """Folders of the daemon's own, with no link in them: no path of a run may lie there."""
    output_within: str = ""
    """A task in one of whose runs' folders the output folder lies, by its name; empty: none."""
    output_owner: str = ""
    """Another task whose results are in the output folder, by its name; empty: there is none."""

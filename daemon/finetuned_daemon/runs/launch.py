"""How the process of a run comes to be: from the standby where there is one, else from nothing."""

from __future__ import annotations

import os

from finetuned_daemon.config import Config
from finetuned_daemon.parameters.needs import needs_bitsandbytes
from finetuned_daemon.runs.bundle import Bundle
from finetuned_daemon.runs.contract import Spec
from finetuned_daemon.runs.orphans import Orphans
from finetuned_daemon.runs.process import RunnerProcess
from finetuned_daemon.runs.standby import Standby

_LOG = "standby.log"


class Launcher:
    """Starts the processes of runs."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._orphans = Orphans()
        self.standby = Standby(config, config.paths.state_dir / _LOG, self._orphans)

    def begin(self) -> None:
        """Sees to orphans from now on, where there are any."""
        self._orphans.start(asks=not self.standby.is_off)

    def start(self, spec: Spec, bundle: Bundle) -> RunnerProcess:
        """Starts a runner in a session and process group of its own, its output in a file.

        Raises:
            OSError: It can't be started.
        """
        environment = _environment(spec.num_threads)
        # It counts as not installed in a standby: its import takes longer than all of one's.
        if not needs_bitsandbytes(spec.parameters):
            with open(bundle.console, "ab") as console:
                child = self.standby.start(
                    bundle.path, console, environment, self._config.runner_umask
                )
            if child is not None:
                return RunnerProcess.of_child(child, bundle.path)
        return RunnerProcess.start(
            [
                self._config.runner_python,
                "-P",
                "-m",
                self._config.runner_module,
                str(bundle.path),
            ],
            cwd=bundle.path,
            console=bundle.console,
            env=environment,
            umask=self._config.runner_umask,
        )

    def warm(self, model: str) -> None:
        """Makes a standby for the next run, where there is none; for a model such as this."""
        self.standby.warm(_environment(num_threads()), model)

    async def close(self) -> None:
        """Ends the standby; runs go on."""
        await self.standby.close()
        self._orphans.close()


def num_threads() -> int:
    """OpenMP threads of a run.

    As many as `OMP_NUM_THREADS` says where the daemon was started with it; else the cores that this
    process may use, hyperthreads not counted twice.
    """
    import psutil  # at the first start of a run: a daemon starts sooner without it

    asked = os.environ.get("OMP_NUM_THREADS", "")
    if asked.isdecimal() and int(asked) > 0:
        return int(asked)
    usable = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return min(usable, psutil.cpu_count(logical=False) or usable)


def _environment(threads: int) -> dict[str, str]:
    """The runner's environment.

    The daemon's, without its secrets, and what torch must find before it is imported.
    """
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("FINETUNED_")},
        # Spinning barriers collapse twelvefold as soon as anything else wants a core.
        "OMP_WAIT_POLICY": "PASSIVE",
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "PYTHONUNBUFFERED": "1",
    }

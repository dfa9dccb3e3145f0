"""`python -m finetuned_runner RUN_DIR`: claims the run folder, trains, says how it ended.

With `--inspect` instead of a folder it looks at training data: see `inspection`. With `--probe` it
says what this Python can train with: see `probe`. With `--standby` it imports everything and waits
for a folder: see `standby`.

Exit status: 0 where the run completed or stopped as wished, 1 where it failed, 2 for wrong usage,
75 where the folder is another process's.
"""

from __future__ import annotations

import importlib.metadata
import logging
import multiprocessing
import os
import platform
import sys
import traceback
from pathlib import Path
from typing import NoReturn

from finetuned_daemon.parameters.models import Parameters
from finetuned_daemon.runs.contract import (
    FORMAT_VERSION,
    PROCESS,
    SPEC,
    EndReason,
    Process,
    ProcessIdentity,
    Result,
    RunPhase,
    Spec,
    TrainingType,
    sync_dir,
)
from finetuned_runner.control import Watch, mask_signals
from finetuned_runner.environment import prepare
from finetuned_runner.failures import RunFailed, judge
from finetuned_runner.report import Report, send_logs, send_transformers_logs

_EXIT_USAGE = 2
_EXIT_CLAIMED = 75  # EX_TEMPFAIL
_SUCCESSES = frozenset(
    {
        EndReason.FINISHED,
        EndReason.EARLY_STOPPED,
        EndReason.STEP_LIMIT,
        EndReason.STOPPED_BY_USER,
        EndReason.QUOTA_USED_UP,
        EndReason.PROBED,
    }
)


def main(arguments: list[str]) -> int:
    """Runs what a run folder asks for, inspects or probes; returns the exit status."""
    if arguments == ["--probe"]:
        from finetuned_runner import probe

        return probe.main()
    if arguments == ["--inspect"]:
        from finetuned_runner import inspection

        return inspection.main()
    is_from_standby = arguments[:1] == ["--standby"]
    if is_from_standby:
        from finetuned_runner import standby

        mode, model, _ = arguments[1:]
        waited_for = standby.wait("fork" if mode == "fork" else "spare", model)
        if waited_for is None:
            return 0
        arguments = [str(waited_for)]
    if len(arguments) != 1 or not Path(arguments[0]).is_dir():
        print("usage: python -m finetuned_runner RUN_DIR", file=sys.stderr)
        return _EXIT_USAGE
    run_dir = Path(arguments[0]).absolute()
    mask_signals()
    if not _claim(run_dir, is_from_standby=is_from_standby):
        print(f"{run_dir} belongs to another process", file=sys.stderr)
        return _EXIT_CLAIMED
    report = Report(run_dir)
    report.phase(RunPhase.STARTING)
    watch = Watch(run_dir, report)
    watch.start()
    result = _run(run_dir, report, watch)
    try:
        watch.end(result)
    except OSError:
        traceback.print_exc()
        return 1
    return 0 if result.end_reason in _SUCCESSES else 1


def _claim(run_dir: Path, *, is_from_standby: bool = False) -> bool:
    """Makes the folder this process's own; False if it is another's already."""
    identity = ProcessIdentity.of(os.getpid())
    if identity is None:  # the kernel knows every process that asks
        raise RuntimeError("this process can't be identified")
    process = Process(identity=identity, versions=_versions(), is_from_standby=is_from_standby)
    temporary = run_dir / f".{PROCESS}.{os.getpid()}.tmp"
    with open(temporary, "xb") as file:
        file.write(process.model_dump_json(indent=1).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())
    try:
        os.link(temporary, run_dir / PROCESS)  # unlike a rename, fails where the name is taken
    except FileExistsError:
        return False
    finally:
        temporary.unlink()
    sync_dir(run_dir)
    return True


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in ("torch", "transformers", "peft"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # said when it is imported
            continue
    return versions


def _run(run_dir: Path, report: Report, watch: Watch) -> Result:
    parameters = Parameters()
    try:
        spec = Spec.model_validate_json((run_dir / SPEC).read_bytes())
        if spec.format_version > FORMAT_VERSION:
            raise RunFailed(
                EndReason.RUNNER_CRASHED,
                f"The run folder has format {spec.format_version}, "
                f"this runner knows {FORMAT_VERSION}: update it.",
            )
        parameters = spec.parameters
        watch.disk_wait_seconds = 0.0 if spec.probe else spec.disk_wait_seconds
        if spec.request_id:  # the console is where a failure is looked into
            print(f"{spec.task}, run {spec.run}, started by request {spec.request_id}", flush=True)
        prepare(spec)
        level = parameters.logging.log_level
        send_logs(report, level)
        send_transformers_logs(level)
        return _train(spec, report, watch)
    except BaseException as error:
        logging.getLogger(__name__).debug("the run broke off", exc_info=True)
        traceback.print_exc()
        return judge(error, parameters, report.step)


def _train(spec: Spec, report: Report, watch: Watch) -> Result:
    from finetuned_runner import data

    prepared = data.begin(spec, report)
    try:
        # Imported here: both bring torch, which reads the environment once.
        if spec.training_type is TrainingType.SFT:
            from finetuned_runner import sft

            return sft.run(spec, report, watch, prepared)
        from finetuned_runner import pretrain

        return pretrain.run(spec, report, watch, prepared)
    finally:
        prepared.close()


def _leave(status: int) -> NoReturn:
    """Ends the process without the second that tearing down torch's modules takes."""
    for worker in multiprocessing.active_children():  # of a data loader whose loop broke off
        worker.kill()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


if __name__ == "__main__":
    _leave(main(sys.argv[1:]))

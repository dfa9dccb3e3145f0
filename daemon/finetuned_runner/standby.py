"""A process that has imported what runs need, and waits to become one.

Imports are most of the time to a run's first step, and the same for every run. `--standby fork`
forks a process for each run that is asked for, until its pipe ends; `--standby spare` becomes the
run itself, once. The daemon decides which: a fork is safe on Linux alone, and only while there is
one thread and CUDA was never touched, so a `fork` that finds itself otherwise says that it is a
spare one.

On stdin is a socket. From the daemon comes a line of JSON with a descriptor, the console of the
run:

    {"run_dir": "/...", "umask": 18, "env": {...}}

and to it go lines:

    {"ready": "fork"}           or "spare"
    {"pid": 123}                the run, a child of the standby's own parent
    {"refused": "why"}          it is to be started the usual way, and the standby ends

A run that comes from here differs in nothing from one that was started: it is a child of the
daemon, leads its session, has the descriptors, environment, folder and umask of any runner, and
`ps` shows it as one.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import json
import multiprocessing
import os
import random
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from finetuned_runner.control import mask_signals
from finetuned_runner.encode_process import fork_ahead
from finetuned_runner.environment import hide_bitsandbytes, prepare_imports

Mode = Literal["fork", "spare"]

OPTION = "--standby"
_RUN_DIR = "TRAINING_RUN_DIR"
"""`RUN_DIR_VARIABLE` of the daemon's, which this package can't import."""
_MOST_BYTES = 1 << 20
"""Of a request."""
_NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"


class _Request(NamedTuple):
    run_dir: str
    umask: int
    env: dict[str, str]
    console: int
    """Descriptor of its `console.log`."""


def wait(mode: Mode, model: str = "") -> Path | None:
    """Imports everything, then waits to be a run.

    Args:
        mode: How runs come from it.
        model: Folder of a model like theirs, for the module that is of its kind.

    Returns:
        In the process of a run: its folder. None: nothing more is asked for, or something can't be
        done here.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    control = socket.socket(fileno=os.dup(0))
    _close_stdin()  # what imports start must not have the socket
    loaded = _Loaded()
    _import(model)
    loaded.remember_files()
    gc.collect()
    gc.freeze()  # a collection in a run would write to every page that it shares
    if mode == "fork" and not _may_fork():
        mode = "spare"
    _say(control, ready=mode)
    while (request := _ask(control)) is not None:
        why = loaded.change()
        if why or not _fits(request.run_dir):
            _say(control, refused=why or "the run folder's name is too long")
            return None
        if mode == "spare":
            _become(request)
            _say(control, pid=os.getpid())
            _leave_standby(request, control)
            return Path(request.run_dir)
        try:
            pid = _fork(request)
        except OSError as error:
            _say(control, refused=f"no process can be made: {error}")
            return None
        if pid is None:
            _leave_standby(request, control)
            # What these processes inherit: they are forked before the run sets it for itself.
            prepare_imports()
            mask_signals()
            fork_ahead()
            return Path(request.run_dir)
        os.close(request.console)
        _say(control, pid=pid)
    return None


def _import(model: str) -> tuple[ModuleType, ...]:
    """Imports what a run does, and computes nothing: OpenMP's threads don't survive a fork.

    Args:
        model: Folder of a model, as the next run's will be of the same kind; empty: none is known.
    """
    prepare_imports()
    hide_bitsandbytes()
    # The driver itself, which else is asked whether there is a GPU, can't be used after a fork.
    os.environ[_NVML_CHECK] = "1"
    from finetuned_runner import data, pretrain, sft

    if model:
        _import_model(model)
    return data, pretrain, sft


def _import_model(folder: str) -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    except Exception as error:  # noqa: BLE001 - it is imported later, and what is wrong is said then
        print(f"the model in {folder} is not known before a run: {error}", flush=True)


def _may_fork() -> bool:
    if sys.platform != "linux" or threading.active_count() != 1:
        return False
    import torch

    is_initialized = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return not is_initialized and not _has_driver()


def _has_driver() -> bool:
    """Whether a driver of a GPU is open in this process."""
    for opened in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            if str(opened.readlink()).startswith(("/dev/nvidia", "/dev/kfd")):
                return True
    return False


# --- the daemon's side of the socket


def _say(control: socket.socket, **message: Any) -> None:
    with contextlib.suppress(OSError):  # it is gone, and the next read says so
        control.sendall(json.dumps(message).encode() + b"\n")


def _ask(control: socket.socket) -> _Request | None:
    """The next run that is asked for; None: there will be none."""
    data, descriptors = b"", list[int]()
    while not data.endswith(b"\n"):
        try:
            part, received, _, _ = socket.recv_fds(control, 1 << 16, 1)
        except ConnectionError:
            return None
        descriptors += received
        if not part or len(data) > _MOST_BYTES:
            return None
        data += part
    # A daemon that is gone by now may have a successor that starts the run itself.
    looked = select.poll()
    looked.register(control, 0)
    if looked.poll(0):
        return None
    content = json.loads(data)
    return _Request(content["run_dir"], content["umask"], content["env"], descriptors[0])


# --- becoming a run


def _fork(request: _Request) -> int | None:
    """Forks a run; returns its pid, and None in the run.

    Its parent ends at once, so that it becomes the child of the daemon, which has asked for orphans
    below it: the exit status of a run is the daemon's to have, and this process can end any time.

    Raises:
        OSError: There is no process to be had.
    """
    reader, writer = os.pipe()
    try:
        between = os.fork()
    except OSError:
        os.close(reader)
        os.close(writer)
        raise
    if not between:
        try:
            if os.fork():
                os._exit(0)
        except OSError:
            os._exit(1)
        os.close(reader)
        os.setsid()
        _become(request)
        # By now it is known by its command line and its environment.
        os.write(writer, str(os.getpid()).encode())
        os.close(writer)
        return None
    os.close(writer)
    answer = os.read(reader, 32)
    os.close(reader)
    os.waitpid(between, 0)
    if not answer:
        raise OSError("a process that was forked ended at once")
    return int(answer)


def _become(request: _Request) -> None:
    """Makes this process known as a run, and its output that of the run."""
    os.dup2(request.console, 1)
    os.dup2(request.console, 2)
    if sys.platform == "linux":
        _rename(request.run_dir)
    os.environ.clear()
    os.environ.update(request.env)
    os.environ[_RUN_DIR] = request.run_dir
    sys.argv[1:] = [request.run_dir]


def _leave_standby(request: _Request, control: socket.socket) -> None:
    """Makes of this process what a runner is when it starts."""
    control.close()
    os.closerange(3, max(int(opened.name) for opened in Path("/dev/fd").iterdir()) + 1)
    os.chdir(request.run_dir)
    os.umask(request.umask)
    _reseed()
    # A secret of its own, as each process that is started has.
    multiprocessing.current_process().authkey = os.urandom(32)


def _close_stdin() -> None:
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)


def _reseed() -> None:
    """Nothing random is the same in two runs, unless their seeds are."""
    import numpy as np
    import torch

    random.seed()
    np.random.seed()
    torch.default_generator.seed()


# --- its name


def _arguments() -> list[bytes]:
    """Its command line, as the kernel shows it."""
    return Path("/proc/self/cmdline").read_bytes().split(b"\0")


def _bounds() -> tuple[int, int, int, int]:
    """Addresses of the command line and the environment, as the kernel has them."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # The first of them is the third of proc(5); arg_start is the 48th.
    return int(fields[45]), int(fields[46]), int(fields[47]), int(fields[48])


def _command_line(run_dir: str) -> bytes:
    arguments = _arguments()
    own = arguments[: arguments.index(OPTION.encode())]
    return b"\0".join([*own, os.fsencode(run_dir)]) + b"\0"


def _room_in_environment() -> tuple[int, int]:
    """Where the room for the run folder begins in the environment, and how many bytes it has."""
    _, _, start, end = _bounds()
    environment = ctypes.string_at(start, end - start)
    mark = f"{_RUN_DIR}=".encode()
    offset = 0 if environment.startswith(mark) else environment.find(b"\0" + mark) + 1
    if not environment.startswith(mark, offset):
        return start, 0
    value = environment.index(b"\0", offset)
    return start + offset + len(mark), value - offset - len(mark)


def _fits(run_dir: str) -> bool:
    """Whether this process was started with room enough for the name of the run folder."""
    if sys.platform != "linux":
        return True
    start, end, _, _ = _bounds()
    has_room = len(_command_line(run_dir)) <= end - start
    return has_room and len(os.fsencode(run_dir)) <= _room_in_environment()[1]


def _rename(run_dir: str) -> None:
    """Makes the kernel show this process as the runner of a folder.

    A daemon knows runners by their command line, and what they have left behind by the environment.
    Neither can be set but by writing over it; of a process that was started they are right anyhow.
    """
    start, end, _, _ = _bounds()
    ctypes.memmove(start, _command_line(run_dir).ljust(end - start, b"\0"), end - start)
    address, size = _room_in_environment()
    ctypes.memmove(address, os.fsencode(run_dir).ljust(size, b"\0"), size)


# --- what it was made of

_Stamp = tuple[int, int, int]
_UNKNOWN: _Stamp = (0, 0, 0)
"""No file's."""
_SLACK_SECONDS = 2.0
"""What the start of a process is known to, and the times of files."""


class _Loaded:
    """What was imported from where: no run may start with code that has been replaced."""

    def __init__(self) -> None:
        # Before the imports: a folder that changes meanwhile shows a change afterwards.
        self._stamps: dict[str, _Stamp | None] = {
            path: _stamp(path) for path in (*sys.path, sys.executable) if path
        }

    def remember_files(self) -> None:
        """Takes note of the modules' files, once they are imported.

        A file that has changed since this process began may have been read before it did: it counts
        as changed ever after.
        """
        import psutil

        begun = int((psutil.Process().create_time() - _SLACK_SECONDS) * 1e9)
        for module in list(sys.modules.values()):
            path: Any = getattr(module, "__file__", None)
            if isinstance(path, str) and path not in self._stamps:
                is_new = _changed_ns(path) >= begun
                self._stamps[path] = _UNKNOWN if is_new else _stamp(path)

    def change(self) -> str:
        """What is not as it was; empty: all is."""
        for path, stamp in self._stamps.items():
            if _stamp(path) != stamp:
                return f"{path} has changed"
        return ""


def _changed_ns(path: str) -> int:
    """When a file changed in any way; unlike the time of its content nobody can set it back."""
    try:
        return Path(path).stat().st_ctime_ns
    except OSError:
        return 0


def _stamp(path: str) -> _Stamp | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - twice as fast, of thousands of files
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino

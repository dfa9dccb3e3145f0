"""`finetunectl support-bundle`: what a maintainer needs, shown before it is written."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from finetuned._errors import AlreadyExists, DaemonUnavailable
from finetuned.cli.settings import Exit, JsonOption, confirm, say, settings

if TYPE_CHECKING:
    from finetuned._client import Client
    from finetuned.cli.support_content import Item


def support_bundle(
    ctx: typer.Context,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", metavar="FILE", help="The file, a .tar.gz; never replaced."),
    ] = None,
    yes: Annotated[
        bool, typer.Option("--yes", "-y", help="Show the list, and ask nothing.")
    ] = False,
    task: Annotated[
        str,
        typer.Option(
            "--task", metavar="TASK", help="The task that it is about; else those that have failed."
        ),
    ] = "",
    with_names: Annotated[
        bool, typer.Option("--with-names", help="With names of tasks, files and folders.")
    ] = False,
    with_console: Annotated[
        bool,
        typer.Option("--with-console", help="With what runs printed; data may be in it."),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Collect what a maintainer needs to look into a fault. Shows the list first, and asks.

    Never in it: tokens, values of variables, training data, parameters that are names or paths.
    """
    from finetuned._paths import Paths, paths
    from finetuned.cli.support_content import Collector
    from finetuned.cli.support_redact import Redactor

    path = output or Path(f"finetuned-support-{time.strftime('%Y%m%d-%H%M%S')}.tar.gz")
    if os.path.lexists(path):
        raise AlreadyExists(f"there is a {path} already; choose another name by -o")
    address = settings(ctx).address
    redactor = Redactor(with_names=with_names)
    with contextlib.ExitStack() as stack:
        client: Client | None = None
        folders = paths()
        try:
            asked = stack.enter_context(settings(ctx).client())
            info = asked.system_info()
        except DaemonUnavailable:
            say(f"no daemon answers{f' at {address}' if address else ''}: its files are read")
        else:
            client = asked
            # Not on this machine, perhaps: then what is read there is not there.
            folders = Paths(Path(info.state_dir), Path(info.runtime_dir))
        collector = Collector(folders, client, redactor, task=task, with_console=with_console)
        items = collector.items()
    _show(items)
    if not yes and not confirm(f"Write this to {path}?", "finetunectl support-bundle --yes"):
        say("nothing was written")
        raise typer.Exit(Exit.FAILED)
    _write(path, items)
    if as_json:
        from finetuned.cli.output import print_json_value

        files = [{"name": item.name, "bytes": len(item.content)} for item in items]
        print_json_value({"file": str(path.absolute()), "files": files})
    else:
        print(path)


def _show(items: Sequence[Item]) -> None:
    from finetuned.cli.output import bytes_text

    width = max(len(item.name) for item in items)
    say("These files would be in it:")
    for item in items:
        say(f"  {item.name:<{width}}  {bytes_text(len(item.content)):>10}  {item.purpose}")


def _write(path: Path, items: Sequence[Item]) -> None:
    """Writes the file as a whole, for this user alone; what is there is never replaced.

    Raises:
        AlreadyExists: Somebody has made a file of that name meanwhile.
        OSError: It can't be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)
    descriptor = os.open(temporary, flags, 0o600)
    try:
        with open(descriptor, "wb") as file:
            file.write(_packed(path, items))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, path)  # unlike a rename, fails where the name is taken
        except FileExistsError as error:
            raise AlreadyExists(f"there is a {path} already; choose another name by -o") from error
    finally:
        temporary.unlink(missing_ok=True)


def _packed(path: Path, items: Sequence[Item]) -> bytes:
    import gzip
    import tarfile

    name = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    now = int(time.time())
    packed = io.BytesIO()
    # gzip's header would have the name of the file.
    with (
        gzip.GzipFile(filename="", mode="wb", fileobj=packed, mtime=now) as zipped,
        tarfile.open(fileobj=zipped, mode="w") as archive,
    ):
        for item in items:
            entry = tarfile.TarInfo(f"{name}/{item.name}")
            entry.size, entry.mode, entry.mtime = len(item.content), 0o600, now
            archive.addfile(entry, io.BytesIO(item.content))
    return packed.getvalue()

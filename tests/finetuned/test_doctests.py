"""The examples in the client's docstrings are run, against a real daemon."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

import finetuned
from daemon_process import Daemon

if TYPE_CHECKING:
    from conftest import Scene

MODULES = [
    "finetuned",
    *(f"finetuned.{m.name}" for m in pkgutil.iter_modules(finetuned.__path__) if m.name[0] == "_"),
]
EXAMPLES = [
    example
    for module in MODULES
    for example in doctest.DocTestFinder().find(importlib.import_module(module))
    # Methods of the async client have the docstrings of the other's.
    if example.examples and (".Async" not in example.name or example.name.endswith("AsyncClient"))
]


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    daemon = Daemon(tmp_path_factory.mktemp("doctests")).start()
    yield daemon
    daemon.close()


def test_there_are_examples() -> None:
    shown = {example.name.rpartition(".")[2] for example in EXAMPLES}
    assert {"finetuned", "Client", "AsyncClient", "TaskHandle", "train", "watch_tasks"} <= shown


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.name)
def test_an_example_does_what_it_shows(
    example: doctest.DocTest,
    daemon: Daemon,
    scene: Scene,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the folder of model and data, as the user's own daemon, with one task that waits."""
    monkeypatch.setenv("FINETUNED_STATE_DIR", str(daemon.paths.state_dir))
    monkeypatch.setenv("FINETUNED_RUNTIME_DIR", str(daemon.paths.runtime_dir))
    monkeypatch.delenv("FINETUNED_ADDRESS", raising=False)
    monkeypatch.chdir(scene.root)
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    said: list[str] = []
    with finetuned.Client() as client:
        for task in client.list_tasks():
            client.delete_task(task.name)
        client.create_task(
            "sft", scene.play(), display_name="Greetings", task_id="greetings", device="cpu"
        )
        example.globs.update(finetuned=finetuned, client=client)
        doctest.DocTestRunner(optionflags=flags).run(example, out=said.append)
        # What the package's own example opens.
        opened = example.globs.get("client")
        if opened is not client and isinstance(opened, finetuned.Client):
            opened.close()
    assert not said, "".join(said)

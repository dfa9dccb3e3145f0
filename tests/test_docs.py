"""The pages that are made from code are fresh, and those written by hand miss nothing of it."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from conftest import REPOSITORY
from documents import all_documents, inline_commands_faults, parameter_paths
from finetuned_daemon.parameters.models import SECTIONS
from finetuned_daemon.tasks import TaskState
from reasons import reasons

DOCS = REPOSITORY / "docs"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", ["parameters.md", "parameters.zh.md", "api.md"])
def test_the_pages_that_are_made_are_fresh(generator: ModuleType, name: str) -> None:
    fresh = generator.pages()[name]
    assert (DOCS / name).read_text() == fresh, "run `make docs` and commit the result"


@pytest.mark.parametrize("name", ["parameters.md", "parameters.zh.md"])
def test_every_parameter_has_its_heading(name: str) -> None:
    headings = re.findall(r"^### `(.+)`$", (DOCS / name).read_text(), re.MULTILINE)
    assert headings == [
        f"{section}.{field}" for section, model in SECTIONS.items() for field in model.model_fields
    ]


def test_every_rpc_message_and_enum_has_its_heading() -> None:
    page = (DOCS / "api.md").read_text()
    headings = re.findall(r"^### (\S+)$", page, re.MULTILINE)
    assert len(headings) == len(set(headings))
    protos = "".join(p.read_text() for p in (REPOSITORY / "proto/finetuned/v1").glob("*.proto"))
    names = re.findall(r"^ *(?:message|enum|rpc) (\w+)", protos, re.MULTILINE)
    assert sorted(names) == sorted(heading.rpartition(".")[2] for heading in headings)


def test_every_reason_in_the_code_is_on_the_page_of_troubles_and_no_other() -> None:
    """With its cause and what to do; a new reason fails here until it is written down."""
    page = (DOCS / "troubleshooting.md").read_text()
    rows = re.findall(r"^\| `([A-Z0-9_]+)` \|(.+)\|$", page, re.MULTILINE)
    told = [reason for reason, _ in rows]
    assert len(told) == len(set(told)), "a reason has one row"
    in_code = reasons()
    assert sorted(in_code - set(told)) == [], "these have no row in docs/troubleshooting.md"
    assert sorted(set(told) - in_code) == [], "these are not in the code any more"
    assert all(len(row.split("|")[0].strip()) > 10 for _, row in rows), "each says what happened"


def test_the_concepts_name_every_state() -> None:
    page = (DOCS / "concepts.md").read_text()
    assert [state for state in TaskState if f"`{state}`" not in page] == []


@pytest.mark.parametrize("file", all_documents(), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_parameters_in_sentences_are_parameters_that_there_are(file: Path) -> None:
    sections = "|".join(SECTIONS)
    named = set(re.findall(rf"`((?:{sections})\.\w+)\b[^`]*`", file.read_text()))
    # What the documents name besides that looks like a parameter: files, and fields of requests.
    assert sorted(named - parameter_paths() - {"training.jsonl"}) == []


@pytest.mark.parametrize("file", all_documents(), ids=lambda f: str(f.relative_to(REPOSITORY)))
def test_commands_in_sentences_are_commands_that_there_are(file: Path) -> None:
    assert inline_commands_faults(file) == []

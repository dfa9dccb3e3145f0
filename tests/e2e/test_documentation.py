"""The documents are true: each block runs from top to bottom, and each link leads somewhere.

`documents.py` says how a block is marked, `documents_bench.py` what surrounds it.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from conftest import REPOSITORY
from documents import Block, all_documents, blocks, broken_links, command_faults, documents, faults
from documents_bench import bench


def name_of(file: Path) -> str:
    return str(file.relative_to(REPOSITORY))


@pytest.mark.timeout(600)
@pytest.mark.parametrize("file", documents(), ids=name_of)
def test_what_a_document_tells_to_do_can_be_done(file: Path, tmp_path: Path) -> None:
    """Each block of commands or Python ends well, one after the other in one place."""
    to_run = [block for block in blocks(file) if block.is_run]
    if not to_run:
        return
    with bench(tmp_path) as place:
        place.prepare(file, "\n".join(block.text for block in to_run))
        for block in to_run:
            place.run(block)


def test_a_block_that_fails_is_noticed_and_what_is_set_stays(tmp_path: Path) -> None:
    """A command in the middle too; variables and names last to the end of a file."""

    def block(kind: str, text: str) -> Block:
        return Block(REPOSITORY / "README.md", 1, kind, text, is_marked=False, why="")

    with bench(tmp_path) as place:
        place.run(block("sh", "word=kept\nmkdir -p below && cd below\n"))
        assert place.run(block("sh", 'echo "$word in $(basename "$PWD")"\n')) == "kept in below\n"
        with pytest.raises(AssertionError, match="exit status 3"):
            place.run(block("sh", "true\n(exit 3)\ntrue\n"))
        with pytest.raises(AssertionError, match="exit status 1"):
            place.run(block("sh", "false | cat\n"))
        place.run(block("python", "async def answer():\n    return 42\n"))
        assert place.run(block("python", "print(await answer())\n")) == "42\n"
        with pytest.raises(AssertionError, match="ZeroDivisionError"):
            place.run(block("python", "1 / 0\n"))


@pytest.mark.parametrize("file", all_documents(), ids=name_of)
def test_what_is_not_run_is_well_formed_and_names_commands_that_there_are(file: Path) -> None:
    wrong = {block.place: found for block in blocks(file) if (found := faults(block))}
    assert not wrong


@pytest.mark.parametrize("file", all_documents(), ids=name_of)
def test_every_link_within_the_documents_leads_somewhere(file: Path) -> None:
    assert broken_links(file) == []


def test_every_document_is_in_the_table_of_contents() -> None:
    contents = (REPOSITORY / "docs/README.md").read_text()
    missing = [
        page.name
        for page in (REPOSITORY / "docs").glob("*.md")
        if page.name != "README.md" and f"]({page.name})" not in contents
    ]
    assert missing == []


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("finetunectl trian", "no command 'trian'"),
        ("finetunectl task list --jsonl", "no option --jsonl"),
        ("echo a | finetunectl task watch x --every=2", "no option --every"),
        ("X=$(finetuned db mend)", "no command 'mend'"),
        ("make everything", "no target 'everything'"),
        ("finetunectl train --model a \\\n   --nets b", "no option --nets"),
    ],
)
def test_a_command_that_there_is_not_is_noticed(text: str, fault: str) -> None:
    (said,) = command_faults(text)
    assert fault in said

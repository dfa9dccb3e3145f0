"""The table of the 49 parameters and what proves each."""

from __future__ import annotations

import json

import promises


def test_each_of_the_49_parameters_is_proven_by_a_test_that_runs_here() -> None:
    """A proof that needs a GPU comes on top; one for a parameter that there is not is a slip."""
    paths = promises.parameters()
    assert len(paths) == len(set(paths)) == 49
    proofs = promises.proofs()
    unproven = [p for p in paths if all(proof.needs_gpu for proof in proofs.get(p, []))]
    assert unproven == []
    extensions = json.loads((promises.TESTS / "data" / "extensions.json").read_text())
    known = {*paths, *(f"{fact['section']}.{fact['name']}" for fact in extensions)}
    assert proofs.keys() - known == set()


def test_the_table_says_what_the_tests_say() -> None:
    """`tests/data/promises.txt` is for reading; `python tests/promises.py` makes it anew."""
    assert promises.TABLE.read_text() == promises.table()

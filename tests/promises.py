"""What proves that each parameter does what it says: read from the tests that bear `proves`.

python tests/promises.py    writes tests/data/promises.txt anew
"""

from __future__ import annotations

import ast
import json
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
TABLE = TESTS / "data" / "promises.txt"


@dataclass(frozen=True)
class Proof:
    """A test that shows what a parameter does."""

    test: str
    """`path::name`, the path below `tests/`."""
    sentence: str
    """Its docstring's first paragraph; its name where it has none."""

    @property
    def needs_gpu(self) -> bool:
        """Whether it is skipped on a machine without a GPU."""
        return self.test.startswith("gpu/")


def parameters() -> list[str]:
    """The paths of the 49 parameters, in the order of the form."""
    facts = json.loads((TESTS / "data" / "parameters.json").read_text())
    return [f"{fact['section']}.{fact['name']}" for fact in facts]


def proofs() -> dict[str, list[Proof]]:
    """The proofs by the path that their marker names, also where it is no parameter's."""
    found = dict[str, list[Proof]]()
    for file in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                proof = Proof(f"{file.relative_to(TESTS).as_posix()}::{node.name}", _says(node))
                for path in _marked(node):
                    found.setdefault(path, []).append(proof)
    return found


def _says(test: ast.FunctionDef) -> str:
    text = ast.get_docstring(test)
    if text is None:
        return test.name.removeprefix("test_").replace("_", " ").capitalize() + "."
    return " ".join(text.split("\n\n")[0].split())


def _marked(test: ast.FunctionDef) -> list[str]:
    return [
        argument.value
        for decorator in test.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.proves"
        for argument in decorator.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
    ]


def table() -> str:
    """The parameters, under each the tests that prove it and what each of them says."""
    by_path = proofs()
    lines = list[str]()
    for path in parameters():
        lines.append(path)
        for proof in by_path.get(path, []):
            lines += [f"    {proof.sentence}", f"        {proof.test}"]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    TABLE.write_text(table())

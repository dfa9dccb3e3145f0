"""No code of ours runs, or lets a library run, what came from somebody else.

Each call that could is listed here with the reason why it can't; a new one fails until it is.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

from conftest import REPOSITORY

ROOTS = (
    REPOSITORY / "client/finetuned",
    REPOSITORY / "daemon/finetuned_daemon",
    REPOSITORY / "daemon/finetuned_runner",
)

NEVER = {
    "eval", "exec", "compile", "__import__", "execfile", "input",
    "pickle.load", "pickle.loads", "pickle.Unpickler", "cPickle.load", "dill.load", "joblib.load",
    "cloudpickle.load", "cloudpickle.loads", "marshal.load", "marshal.loads", "shelve.open",
    "torch.load", "torch.hub.load", "torch.jit.load", "pandas.read_pickle",
    "yaml.load", "yaml.full_load", "yaml.unsafe_load", "yaml.load_all",
    "tarfile.open", "zipfile.ZipFile", "shutil.unpack_archive",
    "os.system", "os.popen", "os.execv", "os.execve", "os.spawnv", "subprocess.getoutput",
    "runpy.run_path", "runpy.run_module", "importlib.machinery.SourceFileLoader",
    "tempfile.mktemp", "snapshot_download", "hf_hub_download", "urllib.request.urlopen",
}  # fmt: skip
"""Calls, by the end of their dotted names."""

WITH_REASON = {
    ("cli/params.py", "yaml.load"): "with a BaseLoader of ours: texts, lists and mappings alone",
    ("cli/support.py", "tarfile.open"): "writes an archive and reads none",
    ("finetuned_runner/chat_mask_tracking.py", "compile"): "of jinja2, in transformers' sandbox",
    ("finetuned_runner/token_store.py", "np.load"): "allow_pickle is off, as numpy has it",
    ("finetuned/__init__.py", "import_module"): "of a table of our own modules",
    ("finetuned_daemon/plugins.py", "import_module"): "of the one module that it stands for",
    ("finetuned_runner/probe.py", "import_module"): "of a table of packages",
    ("finetuned_runner/trackers.py", "import_module"): "of a table of reporting packages",
}
"""Calls that are safe where they stand, by the end of the file's path and the name."""


def calls() -> Iterator[tuple[str, str, ast.Call]]:
    """Every call in our packages: file, dotted name, node."""
    for root in ROOTS:
        for file in sorted(root.rglob("*.py")):
            if "v1" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call):
                    yield str(file.relative_to(root.parent)), dotted(node.func), node


def dotted(node: ast.expr) -> str:
    """Such as `torch.load`; what a method is called on is cut where it is no name."""
    parts = list[str]()
    while isinstance(node, ast.Attribute):
        parts.append(node.attr)
        node = node.value
    parts.append(node.id if isinstance(node, ast.Name) else "")
    return ".".join(reversed(parts))


def has_reason(file: str, name: str) -> bool:
    """Whether the call is listed for this file."""
    return any(file.endswith(end) and name.endswith(call) for end, call in WITH_REASON if call)


def is_unsafe(name: str) -> bool:
    """Whether a dotted name is that of a call that may run code or unpack what it likes."""
    if "." not in name:
        return name in NEVER
    return any(name == call or name.endswith(f".{call}") for call in NEVER if "." in call)


def is_constant(node: ast.expr | None, value: object) -> bool:
    """Whether an argument stands there as this very value."""
    return isinstance(node, ast.Constant) and node.value is value


def test_nothing_unpickles_evaluates_or_unpacks() -> None:
    """Neither ourselves nor by a library's loader; each exception has its reason."""
    found = [f"{file}: {name}" for file, name, _ in calls() if is_unsafe(name)]
    assert [line for line in found if not has_reason(*line.split(": "))] == []


def test_what_imports_or_loads_by_name_does_so_from_a_table_of_ours() -> None:
    """No string of a client or model becomes a module."""
    names = ("import_module", "np.load", "numpy.load", "load_module", "exec_module")
    found = {
        (file, name)
        for file, name, node in calls()
        if name.rpartition(".")[2] in names or name in names
        if not (name.endswith("import_module") and isinstance(node.args[0], ast.Constant))
    }
    assert [call for call in sorted(found) if not has_reason(*call)] == []


def test_every_reason_is_needed() -> None:
    """A list of exceptions that nobody needs any more hides the next one."""
    found = [(file, name) for file, name, _ in calls()]
    for end, call in WITH_REASON:
        assert any(f.endswith(end) and n.endswith(call) for f, n in found), (end, call)


def test_no_numpy_file_is_read_with_pickles_and_no_yaml_with_an_unsafe_loader() -> None:
    """What the reasons above say is so."""
    for file, name, node in calls():
        keywords = {k.arg: k.value for k in node.keywords}
        if name.endswith("np.load"):
            assert "allow_pickle" not in keywords, file
        if name == "tarfile.open":
            assert isinstance(keywords["mode"], ast.Constant), file
            assert str(keywords["mode"].value).startswith(("w", "x")), file
        if name == "yaml.load":
            loader = keywords["Loader"]
            assert isinstance(loader, ast.Name), file
            source = (REPOSITORY / "client" / file).read_text()
            classes = {
                c.name: c for c in ast.walk(ast.parse(source)) if isinstance(c, ast.ClassDef)
            }
            assert [dotted(b) for b in classes[loader.id].bases] == ["yaml.BaseLoader"]


def test_every_loader_of_models_is_kept_from_the_hub_and_from_code_in_folders() -> None:
    """from_pretrained runs the code of a folder, or asks the hub, unless it is told not to."""
    seen = 0
    for file, name, node in calls():
        if name.rpartition(".")[2] != "from_pretrained" or "export" in file:
            continue
        seen += 1
        keywords = {k.arg: k.value for k in node.keywords}
        only_local = keywords.get("local_files_only")
        assert is_constant(only_local, True), file
        trusts = keywords.get("trust_remote_code")
        if name.startswith("Auto"):  # PEFT's has no such switch, and loads no code
            assert is_constant(trusts, False), file
    assert seen >= 4


def test_nothing_ever_trusts_code_of_a_model() -> None:
    """Not even where it is written in a way that the other tests don't see."""
    for root in ROOTS:
        for file in root.rglob("*.py"):
            text = file.read_text()
            assert "trust_remote_code=True" not in text.replace(" ", ""), file
            assert "weights_only=False" not in text.replace(" ", ""), file
            assert "allow_all_kernels" not in text, file


def test_no_process_is_started_by_a_shell() -> None:
    """Arguments are lists: a file name with a semicolon is a file name."""
    for file, name, node in calls():
        assert not name.endswith("create_subprocess_shell"), file
        for keyword in node.keywords:
            if keyword.arg == "shell":
                assert is_constant(keyword.value, False), file


def test_the_walk_sees_what_it_looks_for() -> None:
    """The rules themselves: each would be caught."""
    for text in ("torch.load(x)", "a.b.pickle.loads(x)", "eval(x)", "yaml.load(x)", "os.system(x)"):
        [node] = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Call)]
        assert is_unsafe(dotted(node.func)), text
    [node] = [n for n in ast.walk(ast.parse("model.eval()")) if isinstance(n, ast.Call)]
    assert not is_unsafe(dotted(node.func))
    assert Path(ROOTS[0]).is_dir()

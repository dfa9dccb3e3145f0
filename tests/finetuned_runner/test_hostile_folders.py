"""Real runs on model folders, data and checkpoints that somebody made with bad intent.

What can be trained without their code is trained; all else ends with a sentence. A canary, a file
that their code would make, is never there.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from finetuned_daemon.runs.contract import EndReason
from finetuned_daemon.runs.manifest import MANIFEST, Manifest
from finetuned_runner import chat_mask, encoding
from finetuned_runner.checkpoint import seal

DONE = (EndReason.FINISHED, EndReason.STEP_LIMIT)


class Canary:
    """Leaves a file behind where its pickle is loaded without care."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.open, (str(self.trace), os.O_CREAT)


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A file that hostile code would make."""
    return tmp_path / "canary"


@pytest.fixture
def folder(shop: Any, tmp_path: Path) -> Path:
    """A model of one's own to spoil."""
    shutil.copytree(shop.model(), tmp_path / "hostile")
    return tmp_path / "hostile"


def settings(folder: Path, name: str = "config.json", **more: Any) -> None:
    """Puts more into a JSON file of the folder."""
    file = folder / name
    values = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(values | more))


def begin(shop: Any, folder: Path, **data: Any) -> Any:
    """A real runner process on the folder, to its end."""
    return shop.start(
        shop.make(data={"model_path": str(folder), **data}, training={"max_steps": 1})
    )


def test_code_in_a_model_folder_is_passed_over_and_the_model_trained(
    shop: Any, folder: Path, trace: Path
) -> None:
    """`auto_map` in each file that has one names modules of the folder; none is imported."""
    code = f"import os\nos.open({str(trace)!r}, os.O_CREAT)\n"
    for name in ("configuration_evil", "modeling_evil", "tokenization_evil", "processing_evil"):
        (folder / f"{name}.py").write_text(code)
    settings(
        folder,
        auto_map={
            "AutoConfig": "configuration_evil.Evil",
            "AutoModelForCausalLM": "modeling_evil.Evil",
        },
    )
    own = {"AutoTokenizer": ["tokenization_evil.Evil", "tokenization_evil.Evil"]}
    settings(folder, "tokenizer_config.json", auto_map=own)
    settings(folder, "processor_config.json", auto_map={"AutoProcessor": "processing_evil.Evil"})
    settings(folder, "generation_config.json", custom_generate="modeling_evil.py")
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate/generate.py").write_text(code)
    run = begin(shop, folder)
    assert run.wait() == 0
    assert run.result.end_reason in DONE, run.result.message
    assert not trace.exists()


@pytest.mark.parametrize(
    "name", ["_attn_implementation_internal", "_attn_implementation", "attn_implementation"]
)
def test_kernels_that_a_config_names_are_not_fetched_or_imported(
    shop: Any, folder: Path, trace: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """As in CVE-2026-4372, with a package `kernels` that would tell of its import."""
    package = trace.parent / "site" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"import os\nos.open({str(trace)!r}, os.O_CREAT)\n")
    monkeypatch.setenv("PYTHONPATH", str(package.parent))
    settings(folder, **{name: "evil/kernel:function"})
    run = begin(shop, folder)
    assert run.wait() in (0, 1)
    assert run.result.end_reason in (*DONE, EndReason.MODEL_UNLOADABLE), run.result.message
    assert not trace.exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", b"[" * 200_000),
        ("config.json", b"\xff\xfe\x00{"),
        ("config.json", b'{"model_type": "llama", "hidden_size": NaN}'),
        ("tokenizer.json", b'{"model": ' + b"[" * 200_000),
        ("tokenizer_config.json", b"[1]"),
        ("generation_config.json", b'{"temperature": "x"}'),
        ("model.safetensors", (1 << 40).to_bytes(8, "little") + b"{}"),
        ("model.safetensors", (100_000_000).to_bytes(8, "little") + b"{" * 1000),
    ],
    ids=[
        "deep config",
        "config not UTF-8",
        "NaN in config",
        "deep tokenizer",
        "tokenizer_config a list",
        "generation_config of words",
        "header beyond the file",
        "header of 100 MB",
    ],
)
def test_a_file_that_is_not_what_it_should_be_ends_the_run_with_a_sentence(
    shop: Any, folder: Path, name: str, content: bytes
) -> None:
    (folder / name).write_bytes(content)
    run = shop.here(shop.make(data={"model_path": str(folder)}, training={"max_steps": 1}))
    assert run.result.end_reason in (*DONE, EndReason.MODEL_UNLOADABLE), run.result.message
    if run.result.end_reason is EndReason.MODEL_UNLOADABLE:
        assert str(folder) in run.result.message
    assert run.result.message.isprintable()


def test_half_a_character_in_a_config_is_told_without_it(shop: Any, folder: Path) -> None:
    """No result could be written with it. In a process: the libraries log it as it stands."""
    (folder / "config.json").write_bytes(b'{"model_type": "\\ud800"}')
    run = shop.start(shop.make(data={"model_path": str(folder)}, training={"max_steps": 1}))
    run.wait()
    assert run.result.end_reason in (*DONE, EndReason.MODEL_UNLOADABLE), run.result.message
    assert run.result.message.isprintable()


@pytest.mark.parametrize("part", ["../outside.safetensors", "/etc/hostname", "link.safetensors"])
def test_an_index_reads_no_file_outside_of_its_folder(shop: Any, folder: Path, part: str) -> None:
    """Weights elsewhere are not taken for the model's: what they hold would end up in results."""
    os.replace(folder / "model.safetensors", folder.parent / "outside.safetensors")
    if part.startswith("link"):
        (folder / part).symlink_to("/dev/zero")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    run = shop.here(shop.make(data={"model_path": str(folder)}))
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE, run.result.message


@pytest.mark.parametrize("base", ["org/name", "../..", "https://evil.example/x", "\0", 7])
def test_an_adapter_leads_to_no_other_place_than_a_folder(
    shop: Any, folder: Path, base: object
) -> None:
    """`base_model_name_or_path` is a full path to a folder of this machine, or nothing."""
    (folder / "config.json").unlink()
    settings(folder, "adapter_config.json", base_model_name_or_path=base)
    made = shop.make(data={"model_path": str(folder), "attach_lora": True})
    run = shop.here(made)
    assert run.result.end_reason is EndReason.MODEL_UNLOADABLE
    assert "base model" in run.result.message


# --- templates

NEVER_ENDS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "more than 1 s",
)
DOUBLES = (
    "{% set n = namespace(x='aaaaaaaa') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "too much memory",
)
TEMPLATES = {
    "loops for ever": NEVER_ENDS,
    "doubles": DOUBLES,
    "multiplies": ("{{ 'a' * 10**11 }}", "too much memory"),
    "fills up": ("{{ 'a'|center(10**10) }}", "too much memory"),
    "writes a book": ("{{ 'a' * 2 * 10**7 }}", "characters of one chat"),
    "counts far": ("{% for i in range(10**12) %}x{% endfor %}", "Range too big"),
    "looks at classes": ("{{ ''.__class__.__mro__ }}", "unsafe"),
    "uses a global": ("{{ cycler.__init__.__globals__.os.popen('id').read() }}", "unsafe"),
    "uses another": ("{{ lipsum.__globals__['os'].popen('id').read() }}", "unsafe"),
    "uses a filter": ("{{ (''|attr('__class__')).__mro__ }}", "unsafe"),
    "divides by zero": ("{{ 1 / 0 }}", "division by zero"),
    "calls itself": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
    "shouts": ("{{ raise_exception('\x1b[31m' ~ 'A' * 100000) }}", "AAAA"),
    "imports": ("{% import 'os' as os %}{{ os }}", "no loader"),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_that_leaves_its_bounds_is_refused_with_the_reason(
    shop: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Within a second or two of processor time, and a gigabyte."""
    monkeypatch.setattr(chat_mask, "_SECONDS", 1.0)
    monkeypatch.setattr(encoding, "MEMORY_BYTES", 256 << 20)
    template, why = TEMPLATES[name]
    (folder / "chat_template.jinja").write_text(template)
    run = shop.here(shop.make(data={"model_path": str(folder)}))
    assert run.result.end_reason is EndReason.DATASET_INVALID, run.result.message
    assert why in run.result.message
    assert run.result.message.isprintable()
    assert len(run.result.message) < 1000


def test_a_template_that_never_ends_holds_no_process_that_makes_tokens(
    shop: Any, folder: Path
) -> None:
    """In a runner as it is, with so much data that a process of its own makes the tokens."""
    (folder / "chat_template.jinja").write_text(NEVER_ENDS[0])
    run = begin(shop, folder, train_file=str(shop.chats(2000)))
    assert run.process.wait(150) == 1
    assert run.result.end_reason is EndReason.DATASET_INVALID, run.result.message
    assert "more than 5 s" in run.result.message


def test_a_step_that_can_not_be_interrupted_ends_with_its_process(tmp_path: Path) -> None:
    """A loop of the interpreter's own hears no signal; the one that ends it says what it was."""
    code = (
        "from finetuned_runner import bounds\n"
        "bounds._GRACE_SECONDS = 0.5\n"
        "with bounds.bounded_time(0.2):\n"
        "    sum(range(10 ** 12))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert done.returncode == -signal.SIGPROF


# --- checkpoints


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "scaler.pt"]
)
def test_nothing_that_a_checkpoint_holds_is_run_when_it_is_resumed(
    shop: Any, trace: Path, name: str
) -> None:
    """Not even where its maker wrote the right hashes into its manifest."""
    data = {"model_path": str(shop.model())}
    done = shop.here(shop.make("first", data=data, training={"max_steps": 2, "save_steps": 1}))
    checkpoint = done.output / "checkpoint-1"
    (checkpoint / name).write_bytes(pickle.dumps(Canary(trace)))
    manifest = Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes())
    seal(checkpoint, manifest)
    resumed = data | {"resume_from_checkpoint": str(checkpoint)}
    run = shop.start(shop.make("second", data=resumed, training={"max_steps": 2}))
    assert run.wait() in (0, 1)
    assert not trace.exists()
    if name not in ("training_args.bin", "scaler.pt"):
        assert run.result.end_reason not in DONE
    pickle.loads(pickle.dumps(Canary(trace)))
    assert trace.exists()  # so it would have been there


@pytest.mark.parametrize(
    "state",
    [
        b"[" * 200_000,
        b"\xff",
        b"[1]",
        b'{"global_step": 1e400}',
        b'{"global_step": "x", "epoch": []}',
    ],
    ids=["deep", "no text", "an array", "huge", "of other kinds"],
)
def test_a_state_of_the_trainer_that_is_none_ends_the_run(shop: Any, state: bytes) -> None:
    data = {"model_path": str(shop.model())}
    done = shop.here(shop.make("first", data=data, training={"max_steps": 2, "save_steps": 1}))
    checkpoint = done.output / "checkpoint-1"
    (checkpoint / "trainer_state.json").write_bytes(state)
    manifest = Manifest.model_validate_json((checkpoint / MANIFEST).read_bytes())
    seal(checkpoint, manifest)
    resumed = data | {"resume_from_checkpoint": str(checkpoint)}
    run = shop.here(shop.make("second", data=resumed, training={"max_steps": 2}))
    assert run.result.end_reason not in DONE
    assert str(checkpoint) in run.result.message, run.result.message


@pytest.mark.parametrize("name", ["../first/secret", "/etc/hostname", "a/../../x", "link"])
def test_a_manifest_speaks_of_no_file_outside_of_its_checkpoint(shop: Any, name: str) -> None:
    """Else a checkpoint tells which files there are, and what hashes they have."""
    data = {"model_path": str(shop.model())}
    done = shop.here(shop.make("first", data=data, training={"max_steps": 2, "save_steps": 1}))
    checkpoint = done.output / "checkpoint-1"
    (checkpoint.parent / "secret").write_text("x")
    if name == "link":
        (checkpoint / "link").symlink_to("/etc/hostname")
    manifest = json.loads((checkpoint / MANIFEST).read_text())
    manifest["files"][name] = {"size": 1, "sha256": "0"}
    (checkpoint / MANIFEST).write_text(json.dumps(manifest))
    resumed = data | {"resume_from_checkpoint": str(checkpoint)}
    run = shop.here(shop.make("second", data=resumed, training={"max_steps": 2}))
    assert run.result.end_reason not in DONE
    assert "is no file of a checkpoint" in run.result.message

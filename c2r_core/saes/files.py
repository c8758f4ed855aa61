"""SAEs by name and on disk: the registry of architectures, saving, loading, folding.

A saved SAE is two files. `config.json` holds the SHA-256 of the other, and one of its own entries, so that
nothing is loaded that is not what was saved.
"""

from __future__ import annotations

import copy
import filecmp
import inspect
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from c2r_core.artefacts.checksums import compare, of_file, of_values
from c2r_core.artefacts.fields import read_object
from c2r_core.artefacts.files import whole_folder
from c2r_core.artefacts.names import unknown_name
from c2r_core.saes.base import SAE

FORMAT_VERSION = 2
"""Version 1 had no checksums."""
CONFIG, WEIGHTS = "config.json", "sae.safetensors"
OF_CONFIG, OF_WEIGHTS = "config_sha256", "weights_sha256"
"""Entries of the config: its own checksum (of its other values), and that of the file of weights."""
RESTORE = "Restore it from a copy, or save the SAE again (overwrite=True)."

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
    TypeError
        If it needs another argument, such as `k`, or has one too many; the message lists what it takes.
    """
    if architecture not in ARCHITECTURES:
        raise ValueError(unknown_name("architecture", architecture, sorted(ARCHITECTURES)))
    takes = inspect.signature(ARCHITECTURES[architecture])
    try:
        takes.bind(**arguments)
    except TypeError as error:
        raise TypeError(
            f"create_sae({architecture!r}, …): {error}. It takes {', '.join(takes.parameters)}."
        ) from error
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
            config[OF_WEIGHTS] = of_file(part / WEIGHTS)
            config[OF_CONFIG] = of_values(config)
            (part / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
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
    """Read an SAE that `save_sae` wrote; both files are compared with their checksums.

    Folders of format version 1 have none, and are read as they are.

    Raises
    ------
    FileNotFoundError
        If there is no such folder, or it lacks `config.json` or `sae.safetensors`.
    ValueError
        If a file is not what was saved; the message names it. Also if the config is of another format version
        or architecture, or does not fit the tensors.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"There is no folder {folder}; expected one that save_sae has written."
        )
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; expected a folder written by save_sae."
            )
    config = _read_config(folder)
    norm_factor, trained_on = config.pop("norm_factor", None), config.pop("trained_on", {})
    _check_what_is_said(folder / CONFIG, norm_factor, trained_on)
    try:
        _check_size(folder, config)
        sae = _created(folder / CONFIG, config)
        sae.load_state_dict(load_file(folder / WEIGHTS))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}/sae.safetensors does not fit config.json: {error}") from error
    sae.norm_factor, sae.trained_on = norm_factor, trained_on
    return sae.to(device)


def _check_what_is_said(file: Path, norm_factor: object, trained_on: object) -> None:
    is_number = isinstance(norm_factor, int | float) and not isinstance(norm_factor, bool)
    if not (is_number and 0 < norm_factor <= sys.float_info.max):
        raise ValueError(f"{file} has the norm_factor {norm_factor!r}; expected a positive number.")
    said = trained_on.values() if isinstance(trained_on, dict) else [None]
    if not all(isinstance(value, str | int | float) for value in said):
        raise ValueError(f"{file} has another trained_on than text and numbers by name.")


def _check_size(folder: Path, config: Mapping[str, Any]) -> None:
    """Before an SAE of the config's size takes memory: its weights must be in the file."""
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        shape = file.get_slice("W_dec").get_shape()
    stated = [config.get("d_sae"), config.get("d_in")]
    if stated != shape:
        raise ValueError(
            f"{folder}/{WEIGHTS} does not fit {CONFIG}: W_dec has shape {shape}, and (d_sae, d_in) are "
            f"{stated}."
        )


def _created(file: Path, config: Mapping[str, Any]) -> SAE:
    architecture = ARCHITECTURES.get(str(config.get("architecture")))
    if architecture is not None:
        known = {"architecture", "d_in", "d_sae", *architecture.hyper_parameters}
        if unknown := sorted(config.keys() - known):
            raise ValueError(f"{file} has an entry that is one too many: {', '.join(unknown)}.")
    try:
        return create_sae(**config)
    except (KeyError, TypeError, ArithmeticError) as error:
        raise ValueError(
            f"{file} lacks an entry, has one too many, or one of another type: {error}"
        ) from error


def _read_config(folder: Path) -> dict[str, Any]:
    """What `create_sae` takes, with norm_factor and trained_on; both files are those that were saved."""
    file = folder / CONFIG
    config = read_object(file, RESTORE)
    version = config.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise ValueError(
            f"{file} has format version {version!r}; this code reads 1 and {FORMAT_VERSION}."
        )
    if version == FORMAT_VERSION:
        compare(file, config.pop(OF_CONFIG, None), of_values(config), RESTORE)
        weights = folder / WEIGHTS
        compare(weights, config.pop(OF_WEIGHTS, None), of_file(weights), RESTORE)
    del config["format_version"]
    return config


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

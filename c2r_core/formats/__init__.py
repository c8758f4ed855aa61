"""SAEs on disk, of this package and of other libraries: one function opens them all, one writes them.

    opened = open_sae("my_sae")
    feature_acts = opened.sae.encode(x)  # raw activations (batch, d_in) -> (batch, d_sae)
    export_sae(opened.sae, "for_sae_lens", "sae_lens", stated=opened.stated)

A further format is a module with CONFIG, WEIGHTS, `read` and `stated`, and a line in FORMATS. One that is
also written has `write`, and a line in WRITTEN of `export.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

import torch

from c2r_core.artefacts.fields import read_object
from c2r_core.formats import c2r, dictionary_learning, sae_lens
from c2r_core.formats.export import export_sae
from c2r_core.formats.inference import InferenceSAE
from c2r_core.saes.interface import AnySAE

__all__ = ["FORMATS", "InferenceSAE", "OpenedSAE", "export_sae", "open_sae"]

FORMATS: dict[str, ModuleType] = {
    "c2r": c2r,
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
}


@dataclass(frozen=True)
class OpenedSAE:
    """An SAE that takes raw activations, and what its folder says about it.

    Attributes
    ----------
    sae : AnySAE
    format : str
        A key of FORMATS.
    architecture : str
        The format's own name for it.
    weights_sha256 : str or None
        Of the file that holds the weights, in hex; None for an SAE that is in memory.
    stated : dict of str
        What the config says of its training, as far as it does: model, hook_name, layer, data; for an own
        SAE its `trained_on`.
    """

    sae: AnySAE
    format: str
    architecture: str
    weights_sha256: str | None
    stated: dict[str, str] = field(default_factory=dict)


def open_sae(folder: str | Path, device: str | torch.device = "cpu") -> OpenedSAE:
    """Open an SAE folder of any known format.

    The format is recognised by the names of its files. Every SAE comes back ready for raw
    activations: an own SAE with its normalising factor folded in.

    Raises FileNotFoundError if the folder does not exist or holds no SAE of a known format; the message
    lists which files were looked for, and which were there. Raises ValueError if the folder fits several
    formats, or holds an SAE that is damaged or cannot be represented exactly.
    """
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}; expected one that holds an SAE.")
    fitting = [name for name, form in FORMATS.items() if not _missing(folder, form)]
    if len(fitting) != 1:
        looked_for = "; ".join(_looked_for(folder, name) for name in FORMATS)
        if fitting:
            raise ValueError(f"{folder} fits several formats: {looked_for}. Keep one SAE a folder.")
        raise FileNotFoundError(f"{folder} holds no SAE of a known format: {looked_for}.")
    form = FORMATS[fitting[0]]
    config = read_object(folder / form.CONFIG, "Restore it from a copy.")
    sae, architecture = form.read(folder, config)
    with (folder / form.WEIGHTS).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return OpenedSAE(sae.to(device), fitting[0], architecture, digest, form.stated(config))


def _missing(folder: Path, form: ModuleType) -> list[str]:
    return [name for name in (form.CONFIG, form.WEIGHTS) if not (folder / name).is_file()]


def _looked_for(folder: Path, name: str) -> str:
    form = FORMATS[name]
    missing = _missing(folder, form)
    state = f"lacks {' and '.join(missing)}" if missing else "complete"
    return f"{name} ({form.CONFIG}, {form.WEIGHTS}): {state}"

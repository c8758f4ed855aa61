"""An SAE written in the format of another library, with the same activations and reconstructions there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from c2r_core.artefacts.files import whole_folder
from c2r_core.formats import dictionary_learning, sae_lens
from c2r_core.formats.inference import Gated, InferenceSAE, JumpReLU, ReLU, TopK
from c2r_core.saes import SAE, fold_norm_factor

WRITTEN: dict[str, ModuleType] = {
    "sae_lens": sae_lens,
    "dictionary_learning": dictionary_learning,
}


def export_sae(
    sae: SAE | InferenceSAE,
    folder: str | Path,
    format: str,
    *,
    stated: Mapping[str, Any] | None = None,
    overwrite: bool = False,
) -> Path:
    """Write an SAE for another library; returns the folder, which appears whole or not at all.

    What is written takes raw activations: the normalising factor is folded in. BatchTopK and Matryoshka
    become JumpReLU SAEs with their threshold, as they are at inference. In dictionary_learning's format
    biases are moved between encoder and decoder, which changes activations by rounding alone.

    Parameters
    ----------
    sae : SAE or InferenceSAE
        A single one of this package, or what `open_sae` gives of another library's.
    folder : path
        New or empty.
    format : str
        "sae_lens" or "dictionary_learning".
    stated : mapping, optional
        Of the training: model, hook_name, layer. None takes the SAE's own `trained_on`.
    overwrite : bool
        Replace a folder that is there already.

    Raises
    ------
    ValueError
        If the format is unknown, the SAE is a stack, or its architecture cannot be represented.
    FileExistsError
        If the folder holds anything and overwrite is False.
    """
    if format not in WRITTEN:
        raise ValueError(f"The format is {format!r}; expected one of {', '.join(WRITTEN)}.")
    folder = Path(folder)
    if not overwrite and folder.exists() and any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty; take another folder, or overwrite=True.")
    reduced = sae if isinstance(sae, InferenceSAE) else _reduced(sae)
    if stated is None:
        stated = getattr(sae, "trained_on", {})
    with whole_folder(folder, replace=overwrite) as part:
        WRITTEN[format].write(reduced, part, stated)
    return folder


def _reduced(sae: SAE) -> InferenceSAE:
    """An SAE of this package as encode, decode and W_dec of raw activations."""
    if sae.n_stacked is not None:
        raise ValueError(f"This is a stack of {sae.n_stacked} SAEs; export what unstack() returns.")
    if sae.architecture not in ACTIVATIONS:
        raise ValueError(
            f"The architecture is {sae.architecture!r}, of which other libraries know nothing; what can be "
            f"exported is {', '.join(ACTIVATIONS)}."
        )
    kind, *names = ACTIVATIONS[sae.architecture]
    state = {name: tensor.cpu() for name, tensor in fold_norm_factor(sae).state_dict().items()}
    given = [state[name] for name in names] + ([sae.k] if kind is TopK else [])
    return InferenceSAE(state["W_enc"], state["W_dec"], state["b_dec"], kind(*given), centred=True)


ACTIVATIONS: dict[str, tuple[Any, ...]] = {
    "relu": (ReLU, "b_enc"),
    "relu_april": (ReLU, "b_enc"),
    "p_anneal": (ReLU, "b_enc"),
    "topk": (TopK, "b_enc"),
    "batch_topk": (JumpReLU, "b_enc", "threshold"),
    "matryoshka_batch_topk": (JumpReLU, "b_enc", "threshold"),
    "jump_relu": (JumpReLU, "b_enc", "threshold"),
    "gated": (Gated, "b_enc", "r_mag", "b_mag"),
}
"""What each architecture does at inference, and with which tensors; one registered elsewhere is not known."""

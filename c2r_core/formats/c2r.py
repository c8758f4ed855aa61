"""SAEs of this package: a folder that `save_sae` wrote."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from c2r_core.saes import SAE, fold_norm_factor, load_sae

CONFIG, WEIGHTS = "config.json", "sae.safetensors"


def read(folder: Path, config: Mapping[str, Any]) -> tuple[SAE, str]:
    """The SAE, its normalising factor folded in, and the name of its architecture."""
    sae = fold_norm_factor(load_sae(folder))
    return sae, sae.architecture


def stated(config: Mapping[str, Any]) -> dict[str, str]:
    """What `save_sae` recorded of the training; nothing where an older version wrote the folder."""
    return {name: str(value) for name, value in config.get("trained_on", {}).items()}

"""Study `architectures`, of notebook 06: C²R and OrtSAE on every architecture that the profile has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, ToyProfile, training_seeds
from c2r_core.experiments.study import Study
from c2r_core.experiments.toy import arm_table, standard_arms, toy_arm, toy_cell

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "relu": "ReLU",
    "relu_april": "ReLU (April)",
    "p_anneal": "p-annealing",
    "gated": "Gated",
    "jump_relu": "JumpReLU",
    "topk": "TopK",
    "batch_topk": "BatchTopK",
    "matryoshka_batch_topk": "Matryoshka",
}
"""In the order in which they are shown; an architecture without toy settings is left out."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, C²R and OrtSAE on each architecture."""
    toy = profile.toy
    study = Study("architectures", profile, training_seeds(toy.comparison_seeds, seed), device)
    return [
        toy_cell(study, name, toy_arm(toy, architecture, regulariser))
        for name, (architecture, regulariser) in _arms(toy).items()
    ]


def _arms(toy: ToyProfile) -> dict[str, tuple]:
    return {
        f"{architecture}, {arm}": (architecture, regulariser)
        for architecture in [*TITLES, *(toy.architectures.keys() - TITLES.keys())]
        if architecture in toy.architectures
        for arm, regulariser in standard_arms(toy, architecture).items()
    }


def architecture_table(values: Mapping[str, Any], toy: ToyProfile) -> pd.DataFrame:
    """Architecture (its title), arm, seed and the fields of `ToyReport`."""
    about = {}
    for name, (architecture, _) in _arms(toy).items():
        arm = name.split(", ")[1]
        about[slug(name)] = {"architecture": TITLES.get(architecture, architecture), "arm": arm}
    return arm_table(values, about)

"""Study `architectures`, of notebook 06: C²R and OrtSAE on every architecture that the profile has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile, ToyProfile
from c2r_core.experiments.study import NamedArm, arm_table
from c2r_core.experiments.toy import standard_arms, toy_arm, toy_cells

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
    n_seeds = profile.toy.comparison_seeds
    return toy_cells("architectures", _arms(profile.toy), profile, n_seeds, seed, device)


def _arms(toy: ToyProfile) -> Iterator[NamedArm]:
    for name in [*TITLES, *(toy.architectures.keys() - TITLES.keys())]:
        if name in toy.architectures:
            for arm, penalty in standard_arms(toy, name).items():
                about = {"architecture": TITLES.get(name, name), "arm": arm}
                yield NamedArm(f"{name}, {arm}", toy_arm(toy, name, penalty), about)


def architecture_table(values: Mapping[str, Any], toy: ToyProfile) -> pd.DataFrame:
    """Architecture (its title), arm, seed and the fields of `ToyReport`."""
    return arm_table(values, _arms(toy))

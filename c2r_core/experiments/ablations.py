"""Study `ablations`, of notebook 07: C²R with one part changed at a time, each at its best weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile, ToyProfile
from c2r_core.experiments.study import NamedArm, arm_table
from c2r_core.experiments.toy import ARCHITECTURES, standard_arms, toy_arm, toy_cells
from c2r_core.training import create_regulariser

TITLES = {
    "unweighted_sum": "unweighted sum",
    "group_lasso": "group lasso",
    "product": "product",
    "minimum": "minimum",
    "co_activation": "co-activation",
}


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, C²R, OrtSAE and the ablations, on the two architectures of notebook 03."""
    n_seeds = profile.toy.comparison_seeds
    return toy_cells("ablations", _arms(profile.toy), profile, n_seeds, seed, device)


def _arms(toy: ToyProfile) -> Iterator[NamedArm]:
    for name, title in ARCHITECTURES.items():
        ablated = {
            TITLES[ablation]: create_regulariser(ablation, weight=weights[name])
            for ablation, weights in toy.ablation_weight.items()
        }
        for arm, penalty in (standard_arms(toy, name) | ablated).items():
            about = {"architecture": title, "arm": arm}
            yield NamedArm(f"{title}, {arm}", toy_arm(toy, name, penalty), about)


def ablation_table(values: Mapping[str, Any], toy: ToyProfile) -> pd.DataFrame:
    """Architecture, arm, seed and the fields of `ToyReport`."""
    return arm_table(values, _arms(toy))

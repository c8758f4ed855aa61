"""Study `ablations`, of notebook 07: C²R with one part changed at a time, each at its best weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, ToyProfile, training_seeds
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm
from c2r_core.experiments.toy import ARCHITECTURES, arm_table, standard_arms, toy_arm, toy_cell
from c2r_core.training import create_regulariser

if TYPE_CHECKING:
    import pandas as pd

TITLES = {
    "unweighted_sum": "unweighted sum",
    "group_lasso": "group lasso",
    "product": "product",
    "minimum": "minimum",
    "co_activation": "co-activation",
}


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, C²R, OrtSAE and the ablations, on the two architectures of notebook 03."""
    study = Study("ablations", profile, training_seeds(profile.toy.comparison_seeds, seed), device)
    return [
        toy_cell(study, f"{architecture}, {arm}", how)
        for (architecture, arm), how in _arms(profile.toy).items()
    ]


def _arms(toy: ToyProfile) -> dict[tuple[str, str], Arm]:
    arms = {}
    for name, title in ARCHITECTURES.items():
        ablated = {
            TITLES[ablation]: create_regulariser(ablation, weight=weights[name])
            for ablation, weights in toy.ablation_weight.items()
        }
        for arm, regulariser in (standard_arms(toy, name) | ablated).items():
            arms[title, arm] = toy_arm(toy, name, regulariser)
    return arms


def ablation_table(values: Mapping[str, Any], toy: ToyProfile) -> pd.DataFrame:
    """Architecture, arm, seed and the fields of `ToyReport`."""
    about = {
        slug(f"{architecture}, {arm}"): {"architecture": architecture, "arm": arm}
        for architecture, arm in _arms(toy)
    }
    return arm_table(values, about)

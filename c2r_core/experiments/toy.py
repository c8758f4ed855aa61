"""What the toy runs are worth: tables, paired differences, and a look into a dictionary."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2r_core.artefacts.profiles import ToyProfile
from c2r_core.artefacts.results import read_json, tuning_dir
from c2r_core.data.toy import FeatureTree, ToySample
from c2r_core.experiments.synthetic import ToyRuns, feature_tree
from c2r_core.metrics.toy import evaluate_toy
from c2r_core.saes import SAE
from c2r_core.statistics import Interval, paired_interval

if TYPE_CHECKING:
    import pandas as pd

EVALUATION_SEED = 10**6  # no training seed comes near, so evaluation samples are new


def evaluation_sample(toy: ToyProfile) -> ToySample:
    """The samples on which all toy SAEs are measured; no run has seen them."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    return feature_tree(toy).sample(toy.evaluation_samples, generator)


def toy_table(toy: ToyProfile, runs: ToyRuns) -> pd.DataFrame:
    """One row per run: arm, seed and the fields of `ToyReport`, on samples no run has seen."""
    import pandas as pd

    tree, sample = feature_tree(toy), evaluation_sample(toy)
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed} | asdict(evaluate_toy(sae, tree, sample))
            for (arm, seed), sae in runs.items()
        ]
    )


def architecture_table(toy: ToyProfile, runs: Mapping[str, ToyRuns]) -> pd.DataFrame:
    """`toy_table` of several architectures, with the column `architecture` in front."""
    import pandas as pd

    tables = []
    for architecture, of_one in runs.items():
        table = toy_table(toy, of_one)
        table.insert(0, "architecture", architecture)
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def tuning_table(name: str, sweep: str | None = None) -> pd.DataFrame:
    """What was tried when the toys' weights were chosen, from results/tuning (`tune_toys`).

    Parameters
    ----------
    name : "toy" or "ablations"
    sweep : "c2r" or "orthogonality", for "toy"

    Returns
    -------
    DataFrame with the columns penalty, architecture, weight, chosen (bool) and the metrics that
    were kept, means over the tuning seeds.
    """
    import pandas as pd

    outcome = read_json(tuning_dir() / f"{name}.json")["outcome"]
    if name == "toy":
        chosen_by = {"c2r": "c2r_strength", "orthogonality": "orthogonality_weight"}[sweep]
        found = {
            (sweep, architecture): (one["tried"][sweep], one[chosen_by])
            for architecture, one in outcome.items()
        }
    else:
        found = {
            (ablation, architecture): (one["tried"], one["weight"])
            for ablation, by in outcome.items()
            for architecture, one in by.items()
        }
    return pd.DataFrame(
        {"penalty": penalty, "architecture": architecture, "chosen": row["weight"] == chosen} | row
        for (penalty, architecture), (rows, chosen) in found.items()
        for row in rows
    )


def values_by_seed(table: pd.DataFrame, arm: str, metric: str) -> list[float]:
    """One arm's values of a metric, ordered by seed."""
    return table[table["arm"] == arm].sort_values("seed")[metric].tolist()


def paired_difference(
    table: pd.DataFrame,
    metric: str,
    *,
    arm: str = "C²R",
    baseline: str = "baseline",
    scale: float = 1.0,
    level: float = 0.95,
) -> Interval:
    """Interval of arm − scale · baseline in one metric of a `toy_table`, paired by seed."""
    values = (values_by_seed(table, name, metric) for name in (arm, baseline))
    return paired_interval(*values, scale=scale, level=level)


@torch.no_grad()
def family_cosines(
    sae: SAE, tree: FeatureTree, parent: int = 0, n: int = 8
) -> tuple[list[str], Tensor]:
    """The n latents nearest to a parent or one of its children, as names and a matrix.

    The matrix (n, 1 + children) holds their cosines with the true directions, parent first; rows
    are ordered by the direction they are nearest to.
    """
    family = tree.directions[[parent, *tree.children[parent].tolist()]]
    cosines = torch.nn.functional.normalize(sae.W_dec.cpu(), dim=-1) @ family.T
    nearest = cosines.max(1)
    chosen = nearest.values.topk(n).indices
    chosen = chosen[torch.argsort(nearest.indices[chosen] * 10 - nearest.values[chosen])]
    return [f"latent {i}" for i in chosen.tolist()], cosines[chosen]

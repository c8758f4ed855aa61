"""Study `blocks`, of notebook 16: where can first-letter absorption be measured? Blocks of the model, and k.

Two things are needed: the model must tell letters there (SAEBench wants 20 letters whose probe has a test F1
above 0.6), and a baseline must absorb, or there is nothing to mend. The SAEs are baselines of half the
profile's tokens and steps: their absorption is for comparing blocks and k, not for quoting.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.experiments.language_model import Sources, arm_of, metric_cell, metric_table
from c2r_core.experiments.study import Study

BLOCKS = {"smollm2-135m": (2, 4, 8, 12, 16, 20, 24), "random-2-layer": (0, 1)}
"""By language model; another one's is the block of the profile's hook alone."""
FACTORS = (1.0, 3.2)
"""Of the profile's k."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """A baseline for each block and k: reconstruction and absorption."""
    lm, study = profile.language_model, Study("blocks", profile, training_seeds(1, seed), device)
    made = []
    for block, k in _points(profile):
        sources = Sources(profile).with_lm(
            hook_name=_hook(lm.hook_name, block), train_tokens=lm.train_tokens // 2
        )
        arm = arm_of(lm, device, steps=lm.steps // 2, k=k)
        metrics = ["reconstruction", "absorption"]
        made.append(metric_cell(study, arm, title(block, k), metrics, sources))
    return made


def _points(profile: Profile) -> list[tuple[int, int]]:
    lm = profile.language_model
    own = int(lm.hook_name.split(".")[1])
    return [
        (block, round(factor * lm.k))
        for block in BLOCKS.get(lm.model, (own,))
        for factor in FACTORS
    ]


def _hook(hook_name: str, block: int) -> str:
    _, _, rest = hook_name.split(".", 2)
    return f"blocks.{block}.{rest}"


def title(block: int, k: int) -> str:
    """Name of a row: a block and k."""
    return f"block {block:02d}, k = {k}"


COLUMNS = {
    "fvu": "reconstruction.fvu",
    "l0": "reconstruction.l0",
    "letters": "absorption.num_good_probes",
    "absorption": "absorption.mean_absorption_fraction_score",
    "full_absorption": "absorption.mean_full_absorption_score",
}


def blocks_table(values: Mapping[str, Any], profile: Profile) -> pd.DataFrame:
    """One row per block and k; NaN where no letter can be measured."""
    points = _points(profile)
    titles = [title(block, k) for block, k in points]
    measured = metric_table(values, COLUMNS, titles).set_index("arm").reindex(titles)
    table = pd.DataFrame(points, columns=["block", "k"])
    return table.join(measured[list(COLUMNS)].reset_index(drop=True))

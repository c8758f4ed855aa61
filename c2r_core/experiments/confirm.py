"""Study `confirm`: the form of C²R that study `forms` chose, on seeds that chose nothing.

docs/design.md says how it was chosen, which outcomes count, and as what. A cell is a penalty in one world on
one architecture, at its chosen strength, over SEEDS.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile
from c2r_core.experiments.forms import (
    ALIKE,
    ARCHITECTURES,
    TREE,
    form_cells,
    form_names,
    form_rows,
)
from c2r_core.experiments.study import Study
from c2r_core.statistics import Interval, paired_interval

SEEDS = (10, 11, 12, 13, 14)
RIVALS = ("C²R", "OrtSAE")
CHOSEN = "directed"
STRENGTHS: dict[str, dict[str, float]] = {
    "relu": {"C²R": 0.3, "OrtSAE": 0.3, CHOSEN: 0.3},
    "batch_topk": {"C²R": 0.3, "OrtSAE": 1.0, CHOSEN: 3.0},
}
"""By architecture and form: what `choice` gives for the committed cells of `forms`; a test holds them so."""
NEARLY_EQUAL = 0.02
"""Recovery within which forms count as equally good on the tree; of those, likeness decides."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """No penalty, C²R, OrtSAE and the chosen form, in each world on each architecture."""
    del seed
    strengths = {
        architecture: {title: [strength] for title, strength in of_forms.items()}
        for architecture, of_forms in STRENGTHS.items()
    }
    return form_cells(Study("confirm", profile, SEEDS, device), strengths)


def confirm_table(values: Mapping[str, Any], profile: Profile) -> pd.DataFrame:
    """World, architecture, form ("none" without), strength, seed and what `forms` shows."""
    return form_rows(form_names(profile, STRENGTHS), values)


class Choice(NamedTuple):
    """A form, and by architecture the strength of each penalty that is confirmed."""

    form: str
    strengths: dict[str, dict[str, float]]


def choice(explored: pd.DataFrame) -> Choice:
    """What the rule of docs/design.md chooses from `forms_table` of the exploring seeds.

    A penalty's strength has the highest mean recovery on the tree, the lowest of equals. The form has the
    highest mean of those over the architectures; of all within NEARLY_EQUAL of it, the one that recovers most
    where features are alike, at the same strengths.
    """
    penalties = explored[explored["form"] != "none"]
    means = penalties.groupby(["world", "architecture", "form", "strength"])["recovery"].mean()
    on_tree = means[TREE].fillna(-1.0)
    best = on_tree.groupby(level=["architecture", "form"]).idxmax()
    strengths = {(architecture, title): point[2] for (architecture, title), point in best.items()}

    def recovered(title: str, world: str) -> float:
        points = [(world, a, title, strengths[a, title]) for a in ARCHITECTURES]
        return sum(means[point] for point in points) / len(points)

    titles = [title for title in penalties["form"].unique() if title not in RIVALS]
    most = max(recovered(title, TREE) for title in titles)
    equals = [title for title in titles if recovered(title, TREE) >= most - NEARLY_EQUAL]
    chosen = max(equals, key=lambda title: recovered(title, ALIKE))
    return Choice(
        chosen, {a: {t: strengths[a, t] for t in (*RIVALS, chosen)} for a in ARCHITECTURES}
    )


def differences(table: pd.DataFrame, outcome: str) -> dict[tuple[str, str, str], Interval]:
    """Chosen form minus each other arm, paired by seed: {(world, architecture, other): 95 % interval}."""
    return {key: paired_interval(*pair) for key, pair in _pairs(table, outcome).items()}


def holm_differences(table: pd.DataFrame, outcome: str) -> dict[tuple[str, str, str], Interval]:
    """On the tree, against RIVALS: intervals as of `differences`, corrected by `holm`."""
    pairs = _pairs(table, outcome)
    return holm({key: pairs[key] for key in pairs if key[0] == TREE and key[2] in RIVALS})


def holm(
    pairs: Mapping[Any, tuple[Sequence[float], Sequence[float]]], level: float = 0.95
) -> dict[Any, Interval]:
    """Paired intervals of first − second whose levels are corrected by Holm, `level` for all together.

    The difference of smallest p value has the level that Bonferroni gives for all, the next that for one
    fewer, and so on; from the first on whose interval holds 0 all have that one's level (Holm, 1979).
    """
    from scipy.stats import ttest_rel

    p_values = {key: np.nan_to_num(ttest_rel(*pair).pvalue, nan=1.0) for key, pair in pairs.items()}
    found, fails = {}, False
    for rank, key in enumerate(sorted(pairs, key=p_values.__getitem__)):
        if not fails:
            own_level = 1 - (1 - level) / (len(pairs) - rank)
        found[key] = paired_interval(*pairs[key], level=own_level)
        fails = fails or found[key].low <= 0 <= found[key].high
    return {key: found[key] for key in pairs}


def _pairs(
    table: pd.DataFrame, outcome: str
) -> dict[tuple[str, str, str], tuple[Sequence[float], Sequence[float]]]:
    """(values of the chosen form, values of the other), by seed, for every world and architecture."""
    by = table.set_index(["world", "architecture", "form", "seed"])[outcome].sort_index()
    return {
        (world, architecture, other): (
            by[world, architecture, CHOSEN].tolist(),
            by[world, architecture, other].tolist(),
        )
        for world, architecture in dict.fromkeys(
            zip(table["world"], table["architecture"], strict=True)
        )
        for other in ("none", *RIVALS)
    }

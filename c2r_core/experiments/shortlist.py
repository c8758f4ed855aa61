"""Study `shortlist`: what is kept of study `front`, on two more seeds; and the rules that keep and choose.

docs/design.md has the rules. A cell is one SAE, as in `front`, on the exploring seeds that `front` left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile
from c2r_core.experiments.confirm import RIVALS
from c2r_core.experiments.front import (
    EXPLORING,
    FORMS,
    Spec,
    front_table,
    of_size,
    plain_specs,
    spec_cells,
    spec_table,
)

KEPT: dict[str, tuple[float, ...]] = {
    "C²R": (0.3, 0.8839),
    "OrtSAE": (0.3, 0.8839),
    "silent partner, directed": (0.3, 0.8839),
    "directed": (0.3, 0.8839),
    "directed OrtSAE, margin": (0.8839, 2.6),
}
"""By penalty the strengths that `kept` gives for the committed cells of `front`; a test holds them so."""
N_FORMS, N_STRENGTHS = 3, 2
"""So many forms beside RIVALS are kept, and so many strengths of each penalty."""
MOST_FVU, LEAST_LIVE = 1.2, 0.7
"""A strength is allowed up to so many times the FVU of no penalty, and from such a share of live latents."""
PRIMARY = "absorption"


def specs(lm: LanguageModelProfile) -> list[Spec]:
    """No penalty at three widths, and each penalty that is kept, at the strengths kept."""
    penalties = [Spec(form, s, lm.d_sae) for form, strengths in KEPT.items() for s in strengths]
    return plain_specs(lm) + penalties


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE, seed by seed; the seeds are always those of EXPLORING that `front` has not."""
    del seed
    which = specs(profile.language_model)
    return [
        cell
        for one in EXPLORING[1:]
        for cell in spec_cells("shortlist", profile, one, which, device)
    ]


def explored_table(
    first: Mapping[str, Any], more: Mapping[str, Any], lm: LanguageModelProfile
) -> pd.DataFrame:
    """`front_table` of the values of `front`, with the rows of this study's values below."""
    return pd.concat([front_table(first, lm), spec_table(more, specs(lm))], ignore_index=True)


# -- the rules ----------------------------------------------------------------------------------


def strength_table(explored: pd.DataFrame) -> pd.DataFrame:
    """What the rules read of `explored_table`: one row a form and strength, in the order of FORMS.

    Means over `seeds`, the number of seeds on which absorption could be measured; `fvu ratio` is to no
    penalty at the largest width on the same seeds, and `excess` is absorption less `of_size`. A strength is
    `allowed` by MOST_FVU and LEAST_LIVE, and if no strength of its form has more seeds. `rank` counts from 1:
    first those allowed, from the lowest excess, of equals the weakest; then the others, from the weakest.
    """
    explored = explored.assign(excess=explored[PRIMARY] - of_size(explored, PRIMARY))
    plain = explored[(explored["form"] == "none") & (explored["d_sae"] == explored["d_sae"].max())]
    there = explored[explored["form"] != "none"].dropna(subset=["fvu", "live share", "excess"])
    there = there.assign(plain=there["seed"].map(plain.set_index("seed")["fvu"]))
    by_strength = there.groupby(["form", "strength"])
    table = by_strength[["fvu", "plain", "live share", PRIMARY, "excess"]].mean()
    table.insert(0, "seeds", by_strength.size())
    table.insert(2, "fvu ratio", table["fvu"] / table.pop("plain"))
    all_seeds = table["seeds"] == table.groupby(level="form")["seeds"].transform("max")
    good = (table["fvu ratio"] <= MOST_FVU) & (table["live share"] >= LEAST_LIVE)
    table["allowed"] = good & all_seeds
    ranked = table.reset_index().assign(fewer=~all_seeds.to_numpy())
    ranked["by"] = ranked["excess"].where(ranked["allowed"], 0.0)
    ranked = ranked.sort_values(["fewer", "allowed", "by", "strength"], ascending=[1, 0, 1, 1])
    ranked["rank"] = ranked.groupby("form").cumcount() + 1
    ranked = ranked.drop(columns=["fewer", "by"])
    return ranked.sort_values(["form", "strength"], key=_in_order, ignore_index=True)


def _in_order(column: pd.Series) -> pd.Series:
    return column.map(FORMS.index) if column.name == "form" else column


def _ranked_forms(points: pd.DataFrame) -> list[str]:
    """Forms but RIVALS, best first: those with an allowed strength, then the others, by excess."""
    forms = points.assign(barred=~points["allowed"]).drop(list(RIVALS))
    return forms.sort_values(["barred", "excess"], kind="stable").index.tolist()


def kept(first: pd.DataFrame) -> dict[str, tuple[float, ...]]:
    """By penalty the strengths that go on, from `front_table`: RIVALS and the N_FORMS best forms."""
    table = strength_table(first)
    forms = _ranked_forms(table[table["rank"] == 1].set_index("form"))
    going_on = table[table["rank"] <= N_STRENGTHS].groupby("form")["strength"].agg(tuple)
    return going_on.loc[[*RIVALS, *forms[:N_FORMS]]].to_dict()


class Choice(NamedTuple):
    """A form, and the strength of each penalty that is confirmed."""

    form: str
    strengths: dict[str, float]


def choice(explored: pd.DataFrame) -> Choice:
    """What is confirmed, from `explored_table`: each penalty at the strength ranked first, and one form.

    The form is there on all of EXPLORING and has the lowest excess; of equals the first in FORMS.
    """
    table = strength_table(explored)
    points = table[table["rank"] == 1].set_index("form")
    is_there = points["seeds"] == len(EXPLORING)
    form = _ranked_forms(points[is_there | points.index.isin(RIVALS)])[0]
    return Choice(form, points.loc[[*RIVALS, form], "strength"].to_dict())

"""Study `widths`, of notebook 21: does what C²R changes on a language model depend on the number of latents?

C²R at the paper's strength in narrower dictionaries, on seeds on which it was trained at the full width only.
What no penalty gives at each width, and C²R at the full one, is in studies `front`, `confirm_lm` and
`promises`. docs/design.md says what is claimed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile
from c2r_core.experiments import confirm_lm, front, promises
from c2r_core.experiments.front import Spec
from c2r_core.statistics import paired_interval

FRESH = (0, 11, 12, 13, 14)
"""Seeds on which C²R was trained at no narrower width before."""
STRENGTH = front.STRENGTHS[1]
"""The paper's."""
OUTCOMES = ("fvu", "live share", *confirm_lm.OUTCOMES, "splitting")


def specs(lm: LanguageModelProfile) -> list[Spec]:
    """C²R at a half and a quarter of the latents."""
    return [Spec("C²R", STRENGTH, lm.d_sae // narrower) for narrower in (2, 4)]


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE, seed by seed; the seeds are always FRESH."""
    del seed
    which = specs(profile.language_model)
    return [
        cell for one in FRESH for cell in front.spec_cells("widths", profile, one, which, device)
    ]


def width_table(values: Mapping[str, Mapping[str, Any]], profile: Profile) -> pd.DataFrame:
    """One row an SAE of FRESH: form ("none" or "C²R"), d_sae, seed, and OUTCOMES.

    Parameters
    ----------
    values : Mapping
        By study, "widths", "front", "confirm_lm" and "promises", the values of its committed cells.
    """
    lm = profile.language_model
    confirmed, _ = promises.language_model_tables(values["promises"], values["confirm_lm"], profile)
    full = confirmed["form"].isin(["none", promises.PAPERS])
    first = front.spec_table(
        values["front"], [*front.plain_specs(lm), Spec("C²R", STRENGTH, lm.d_sae)]
    )
    own = front.spec_table(values["widths"], specs(lm))
    table = pd.concat([own, first, confirmed[full].replace({"form": {promises.PAPERS: "C²R"}})])
    table = table.loc[table["seed"].isin(FRESH), ["form", "d_sae", "seed", *OUTCOMES]]
    return table.sort_values(["form", "d_sae", "seed"], ignore_index=True)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """C²R minus no penalty in each of OUTCOMES at each width of `width_table`, paired by seed.

    Columns: outcome, d_sae, seeds, mean, low, high (95 %, Student's t).
    """
    rows = []
    for (outcome, d_sae), both in _pairs(table).groupby(["outcome", "d_sae"], sort=False):
        about = {"outcome": outcome, "d_sae": d_sae, "seeds": len(both)}
        rows.append(about | paired_interval(both["C²R"], both["none"])._asdict())
    return pd.DataFrame(rows)


def slopes(table: pd.DataFrame) -> pd.DataFrame:
    """By how much each of OUTCOMES changes when the width doubles: a straight line over log2(d_sae).

    Of `width_table`, at the widths that C²R and no penalty have. One row an outcome, "of" "none", "C²R" or
    "C²R − none", the difference by seed: `seeds`, mean, low, high (95 %, Student's t).
    """
    pairs, rows = _pairs(table), []
    for outcome, of_outcome in pairs.groupby("outcome", sort=False):
        by_seed = [
            np.polyfit(np.log2(of_seed["d_sae"]), of_seed[["none", "C²R"]], 1)[0]
            for _, of_seed in of_outcome.groupby("seed")
        ]
        none, c2r = np.transpose(by_seed)
        for of, pair in {
            "none": (none, 0 * none),
            "C²R": (c2r, 0 * c2r),
            "C²R − none": (c2r, none),
        }.items():
            about = {"outcome": outcome, "of": of, "seeds": len(none)}
            rows.append(about | paired_interval(*pair)._asdict())
    return pd.DataFrame(rows)


def _pairs(table: pd.DataFrame) -> pd.DataFrame:
    """Outcome, d_sae, seed, and its value with C²R and without a penalty, where both are there."""
    long = table.melt(["form", "d_sae", "seed"], OUTCOMES, var_name="outcome")
    wide = long.pivot(index=["outcome", "d_sae", "seed"], columns="form", values="value")
    wide = wide.dropna().reset_index()
    wide["outcome"] = pd.Categorical(wide["outcome"], OUTCOMES, ordered=True)
    return wide.sort_values(["outcome", "d_sae", "seed"]).astype({"d_sae": float, "outcome": str})

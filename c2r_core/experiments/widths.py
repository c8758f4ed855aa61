"""Study `widths`, of notebook 21: does what C²R changes on a language model depend on the number of latents?

C²R at the paper's strength, and no penalty, at narrower widths. At the full width they are in studies
`front`, `shortlist`, `confirm_lm` and `promises`. docs/design.md says what is claimed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile
from c2r_core.experiments import confirm_lm, front
from c2r_core.experiments.front import Spec
from c2r_core.statistics import paired_interval

SEEDS = (0, 1, 2, 11, 12, 13, 14)
"""All on which C²R was trained at the full width and at no narrower one."""
STRENGTH = front.STRENGTHS[1]
"""The paper's. λ follows from it and from the width."""
SOURCES = ("widths", "front", "shortlist", "confirm_lm", "promises")
OUTCOMES = ("fvu", "live share", *confirm_lm.OUTCOMES, "f1", "splitting")


def specs(lm: LanguageModelProfile) -> list[Spec]:
    """No penalty at a half, a quarter and an eighth of the latents, and C²R at the first two."""
    half, quarter, eighth = (lm.d_sae // narrower for narrower in (2, 4, 8))
    plain = [Spec("none", 0.0, d_sae) for d_sae in (half, quarter, eighth)]
    return plain + [Spec("C²R", STRENGTH, d_sae) for d_sae in (half, quarter)]


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE, seed by seed; the seeds are always SEEDS."""
    del seed
    which = specs(profile.language_model)
    return [
        cell for one in SEEDS for cell in front.spec_cells("widths", profile, one, which, device)
    ]


def width_table(values: Mapping[str, Mapping[str, Any]], profile: Profile) -> pd.DataFrame:
    """One row an SAE of SEEDS: form ("none" or "C²R"), d_sae, seed, "live latents" and OUTCOMES.

    Narrower SAEs are the study's own, those of the full width are of the others.

    Parameters
    ----------
    values : Mapping
        By study of SOURCES, the values of its committed cells.
    """
    lm = profile.language_model
    full = [Spec("none", 0.0, lm.d_sae), Spec("C²R", STRENGTH, lm.d_sae)]
    parts = [front.spec_table(values["widths"], specs(lm))]
    parts += [front.spec_table(values[study], full) for study in SOURCES[1:]]
    table = pd.concat([part for part in parts if len(part)] or parts[:1], ignore_index=True)
    columns = ["form", "d_sae", "seed", "live latents", *OUTCOMES]
    kinds = {"d_sae": int, "seed": int} | dict.fromkeys(("live latents", *OUTCOMES), float)
    table = table.loc[table["seed"].isin(SEEDS), columns].astype(kinds)
    return table.sort_values(["form", "d_sae", "seed"], ignore_index=True)


def changes(table: pd.DataFrame) -> pd.DataFrame:
    """C²R minus no penalty at each width of `width_table`, paired by seed.

    One row an outcome of OUTCOMES and a width: `seeds`, `mean`, `low`, `high` (95 %, Student's t). A width
    at which fewer than two seeds have both is left out.
    """
    by = ["form", "seed", "d_sae"]
    rows = []
    for outcome in OUTCOMES:
        wide = table.set_index(by)[outcome].unstack("form").reindex(columns=["C²R", "none"])
        for d_sae, both in wide.dropna().groupby("d_sae"):
            rows += _row({"outcome": outcome, "d_sae": d_sae}, both["C²R"], both["none"])
    return pd.DataFrame(rows, columns=["outcome", "d_sae", *_COUNTED])


def excesses(table: pd.DataFrame, by: str = "fvu") -> pd.DataFrame:
    """C²R at each width, less what no penalty gives on its seed at equal `by`: "fvu" or "live latents".

    As `changes`; what no penalty gives is interpolated between its widths, and `outside` counts the seeds on
    which C²R's SAE lies outside of theirs, where the nearest is taken.
    """
    plain = table[table["form"] == "none"].groupby("seed")[by]
    ends = table["seed"].map(plain.min()), table["seed"].map(plain.max())
    outside = ~table[by].between(*ends)
    rows = []
    for outcome in OUTCOMES:
        of_size = front.of_size(table, outcome, by)
        own = table.assign(own=table[outcome], of_size=of_size, outside=outside)
        own = own[own["form"] == "C²R"].dropna(subset=["own", "of_size"])
        for d_sae, both in own.groupby("d_sae"):
            about = {"outcome": outcome, "d_sae": d_sae, "outside": int(both["outside"].sum())}
            rows += _row(about, both["own"], both["of_size"])
    return pd.DataFrame(rows, columns=["outcome", "d_sae", "outside", *_COUNTED])


def growth(table: pd.DataFrame) -> pd.DataFrame:
    """C²R's change at the full width minus its change at a quarter of it, seed by seed.

    One row an outcome of OUTCOMES; the columns are those of `changes`, without the width.
    """
    wide = table.set_index(["seed", "form", "d_sae"])[list(OUTCOMES)].unstack(["form", "d_sae"])
    full = table["d_sae"].max()
    rows = []
    for outcome in OUTCOMES:
        four = [(outcome, form, d) for d in (full, full // 4) for form in ("C²R", "none")]
        if not set(four) <= set(wide.columns):
            continue
        of = wide[four].dropna()
        first, last = of[four[0]] - of[four[1]], of[four[2]] - of[four[3]]
        rows += _row({"outcome": outcome}, first, last)
    return pd.DataFrame(rows, columns=["outcome", *_COUNTED])


_COUNTED = ("seeds", "mean", "low", "high")


def _row(about: Mapping[str, Any], first: Iterable, second: Iterable) -> list[dict[str, Any]]:
    """One row of a paired difference, or none if there are fewer than two pairs."""
    first, second = list(first), list(second)
    if len(first) < 2:
        return []
    return [dict(about) | {"seeds": len(first)} | paired_interval(first, second)._asdict()]

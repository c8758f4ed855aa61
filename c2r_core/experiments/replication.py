"""Does what study `validation` found hold on SAEs that it had not seen?

Those are the language model's SAEs of the studies `front`, `shortlist`, `confirm_lm` and `promises`:
BatchTopK of one k, without a penalty at three widths and with C²R and its rivals, trained to compare
penalties. Those with the seed of `validation` are left out: three of them are its own SAEs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.experiments import front, promises, shortlist
from c2r_core.experiments.validation import CANDIDATE, FAILURES, PREDICTORS
from c2r_core.statistics import mean_interval, rank_correlation

STUDIES = ("front", "shortlist", "confirm_lm", "promises")
FEWEST = 5
"""SAEs of a seed; a seed with fewer has no rank correlation of its own."""


def later_saes(values: Mapping[str, Mapping[str, Any]], profile: Profile) -> pd.DataFrame:
    """One row an SAE of another seed: form, seed, and the measured columns of `validation_table`.

    SAEs of which a predictor or a failure could not be measured are left out.

    Parameters
    ----------
    values : Mapping
        By study of STUDIES, the values of its committed cells.
    """
    explored = shortlist.explored_table(
        values["front"], values["shortlist"], profile.language_model
    )
    confirmed, _ = promises.language_model_tables(values["promises"], values["confirm_lm"], profile)
    saes = pd.concat([explored, confirmed], ignore_index=True)
    saes = saes[~saes["seed"].isin(training_seeds(1))]
    failures = {column: 1 - saes[front.SUCCESSES[column]] for column in FAILURES.values()}
    return saes.assign(**failures).dropna(subset=[*PREDICTORS, *failures])


def replication_table(saes: pd.DataFrame) -> pd.DataFrame:
    """Rank correlations of PREDICTORS with FAILURES over all SAEs, and within one seed.

    One row a failure and predictor: `mean`, `low`, `high` over all SAEs (bootstrap), as if they were
    independent; `in_seed`, `in_seed_low`, `in_seed_high`, the mean over `seeds` seeds of the correlation
    among one seed's SAEs (Student's t); and `lead`, `lead_low`, `lead_high`, the same for how much larger the
    |correlation| of assignment consistency is. Every seed counts alike, however many SAEs it has. What is
    over seeds is over independent trainings of nearly the same designs: it says nothing of other designs.
    """
    inside = {seed: rows for seed, rows in saes.groupby("seed") if len(rows) >= FEWEST}
    found = []
    for failure, column in FAILURES.items():
        ranks = {seed: rows[[*PREDICTORS, column]].rank() for seed, rows in inside.items()}
        by_seed = pd.DataFrame(
            {name: [of[name].corr(of[column]) for of in ranks.values()] for name in PREDICTORS}
        )
        for name, title in PREDICTORS.items():
            row = {"failure": failure, "predictor": title, "n": len(saes), "seeds": len(inside)}
            row |= rank_correlation(saes[name], saes[column])._asdict()
            row |= over_seeds("in_seed", by_seed[name])
            if name != CANDIDATE:
                row |= over_seeds("lead", by_seed[CANDIDATE].abs() - by_seed[name].abs())
            found.append(row)
    return pd.DataFrame(found)


def over_seeds(name: str, values: pd.Series) -> dict[str, float]:
    """The mean of one value a seed, `name`, with `name`_low and `name`_high: 95 %, Student's t.

    NaN if fewer than two seeds have a value.
    """
    # Where all SAEs of a seed have the same value, there is no correlation.
    values = values.dropna()
    ends = mean_interval(values) if len(values) > 1 else [np.nan] * 3
    return dict(zip((name, f"{name}_low", f"{name}_high"), ends, strict=True))


def side_by_side(first: pd.DataFrame, again: pd.DataFrame) -> pd.DataFrame:
    """A `correlation_table` of the first SAEs beside a `replication_table`: text, with intervals.

    One row a failure and predictor; the columns say of which SAEs a correlation is, and "AC's lead" is within
    a seed.
    """
    key = ["failure", "predictor"]
    whole = first[first["saes"] == "all"]
    columns = {
        f"the first {whole['n'].max()}": interval_text(whole.set_index(key), "mean", "low", "high"),
        f"the other {again['n'].max()}": interval_text(again.set_index(key), "mean", "low", "high"),
        "within a seed": interval_text(
            again.set_index(key), "in_seed", "in_seed_low", "in_seed_high"
        ),
        "AC's lead": interval_text(again.set_index(key), "lead", "lead_low", "lead_high"),
    }
    return pd.DataFrame(columns).reindex(again.set_index(key).index).reset_index()


def interval_text(table: pd.DataFrame, *ends: str) -> pd.Series:
    """Three columns, a mean and its ends, as text; empty where there is no mean."""
    rows = table[list(ends)].itertuples(index=False)
    text = [
        "" if np.isnan(mean) else f"{mean:.2f} [{low:.2f}, {high:.2f}]" for mean, low, high in rows
    ]
    return pd.Series(text, table.index)

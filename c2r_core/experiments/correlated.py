"""C²R and OrtSAE where true features are themselves correlated: sweeps over worlds and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import CorrelatedProfile, ToyProfile
from c2r_core.experiments.synthetic import c2r_of, train_toy_arms
from c2r_core.experiments.toy import toy_table
from c2r_core.statistics import paired_interval
from c2r_core.training import Orthogonality

if TYPE_CHECKING:
    import pandas as pd


def worlds(toy: ToyProfile, correlated: CorrelatedProfile) -> dict[str, ToyProfile]:
    """The profile's worlds by name: groups of like directions, then groups that fire together.

    None has a tree, so that nothing is there to be absorbed.
    """
    flat = {
        "n_parents": 0,
        "n_singles": correlated.n_features,
        "single_probability": correlated.probability,
        "group_size": correlated.group_size,
    }
    named = {f"cosine {cosine:g}": {"group_cosine": cosine} for cosine in correlated.cosines}
    named |= {
        f"fire together, {correlation:g}": {"group_correlation": correlation}
        for correlation in correlated.correlations
    }
    return {name: toy.model_copy(update=flat | own) for name, own in named.items()}


def weight_sweep(
    toy: ToyProfile,
    architecture: str,
    shares: Sequence[float],
    seeds: Sequence[int],
    device: str = "cpu",
) -> pd.DataFrame:
    """C²R and OrtSAE at shares of the profile's weights, which were tuned in the same way.

    Returns
    -------
    DataFrame with `penalty`, `share`, seed and the fields of `ToyReport`
        The baseline is there for both penalties, at share 0.
    """
    import pandas as pd

    strength, weight = toy.c2r_strength[architecture], toy.orthogonality_weight[architecture]
    sweeps = {
        "C²R": {share: c2r_of(toy, share * strength) for share in shares},
        "OrtSAE": {share: Orthogonality(share * weight) for share in shares},
    }
    tables = []
    for penalty, arms in sweeps.items():
        runs = train_toy_arms(toy, architecture, {0.0: None} | arms, seeds, device)
        table = toy_table(toy, runs).rename(columns={"arm": "share"})
        tables.append(table.assign(penalty=penalty))
    return pd.concat(tables, ignore_index=True)


def differences_from_baseline(
    table: pd.DataFrame, metric: str, control: str | None = None
) -> pd.DataFrame:
    """95 % intervals of a metric minus the baseline's, paired by seed.

    Parameters
    ----------
    table : DataFrame
        `weight_sweep`s with a column `world`.
    metric : str
    control : str, optional
        A world whose difference, at the same penalty, share and seed, is taken off: what is left is
        due to what the other worlds have and this one has not. Its own rows are 0.

    Returns
    -------
    DataFrame with `world`, `penalty`, `share`, `mean`, `low` and `high`

    Raises
    ------
    ValueError
        If the table has no such control.
    """
    import pandas as pd

    if control is not None and control not in set(table["world"]):
        raise ValueError(unknown_name("world", control, table["world"].unique()))
    columns = ["world", "penalty", "seed", "share"]
    values = table.set_index(columns)[metric].unstack("share")
    baseline = values.pop(0.0)
    change = values.sub(baseline, axis=0)
    found = []
    for world in table["world"].unique():
        for penalty in table["penalty"].unique():
            for share in change.columns:
                own = change.loc[(world, penalty), share]
                other = own * 0 if control is None else change.loc[(control, penalty), share]
                interval = paired_interval(own, other)
                names = {"world": world, "penalty": penalty, "share": share}
                found.append(names | interval._asdict())
    return pd.DataFrame(found)

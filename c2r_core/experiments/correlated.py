"""Study `correlated`, of notebook 09: C²R and OrtSAE where true features are themselves correlated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug, unknown_name
from c2r_core.artefacts.profiles import CorrelatedProfile, Profile, ToyProfile, training_seeds
from c2r_core.experiments.study import Study
from c2r_core.experiments.toy import arm_table, c2r_of, toy_arm, toy_cell
from c2r_core.statistics import paired_interval
from c2r_core.training import Orthogonality, Regulariser

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


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, and both penalties at shares of their weights, in every world."""
    study = Study("correlated", profile, training_seeds(profile.correlated.seeds, seed), device)
    return [
        toy_cell(study, name, toy_arm(world, about["architecture"], penalty))
        for name, world, penalty, about in _arms(profile)
    ]


def _arms(
    profile: Profile,
) -> Iterator[tuple[str, ToyProfile, Regulariser | None, dict[str, Any]]]:
    """Name, world, penalty and what a table says about it."""
    toy, correlated = profile.toy, profile.correlated
    for architecture in correlated.architectures:
        strength, weight = toy.c2r_strength[architecture], toy.orthogonality_weight[architecture]
        for name, world in worlds(toy, correlated).items():
            about = {"architecture": architecture, "world": name}
            yield f"{architecture}, {name}, baseline", world, None, about
            for share in correlated.shares:
                for title, penalty in (
                    ("C²R", c2r_of(world, share * strength)),
                    ("OrtSAE", Orthogonality(share * weight)),
                ):
                    more = {"penalty": title, "share": share}
                    yield f"{architecture}, {name}, {title} {share:g}", world, penalty, about | more


def correlated_table(
    values: Mapping[str, Any], profile: Profile, architecture: str
) -> pd.DataFrame:
    """World, penalty, share, seed and the fields of `ToyReport`.

    Shares are of the weights that were tuned on the tree, in the same way for both penalties. The
    baseline is there for both, at share 0.
    """
    import pandas as pd

    pieces = []
    for name, _, penalty, about in _arms(profile):
        if about["architecture"] == architecture:
            own = [about] if penalty else [about | {"penalty": p, "share": 0.0} for p in PENALTIES]
            pieces += [arm_table(values, {slug(name): columns}) for columns in own]
    return pd.concat(pieces, ignore_index=True).drop(columns="architecture")


PENALTIES = ("C²R", "OrtSAE")


def differences_from_baseline(
    table: pd.DataFrame, metric: str, control: str | None = None
) -> pd.DataFrame:
    """95 % intervals of a metric minus the baseline's, paired by seed.

    Parameters
    ----------
    table : DataFrame
        From `correlated_table`.
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
        for penalty in PENALTIES:
            for share in change.columns:
                own = change.loc[(world, penalty), share]
                other = own * 0 if control is None else change.loc[(control, penalty), share]
                interval = paired_interval(own, other)
                names = {"world": world, "penalty": penalty, "share": share}
                found.append(names | interval._asdict())
    return pd.DataFrame(found)

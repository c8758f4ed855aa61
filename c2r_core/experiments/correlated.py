"""Study `correlated`, of notebook 09: C²R and OrtSAE where true features are themselves correlated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import CorrelatedProfile, Profile, ToyProfile
from c2r_core.experiments.study import NamedArm, arm_table
from c2r_core.experiments.toy import c2r_of, toy_arm, toy_cells
from c2r_core.statistics import paired_interval
from c2r_core.training import Orthogonality

PENALTIES = ("C²R", "OrtSAE")


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
    own = profile.correlated
    arms = (arm for name in own.architectures for arm in _arms(profile, name))
    return toy_cells("correlated", arms, profile, own.seeds, seed, device)


def _arms(profile: Profile, architecture: str) -> Iterator[NamedArm]:
    """Of one architecture; the baseline is there for both penalties, at share 0."""
    toy, correlated = profile.toy, profile.correlated
    strength, weight = toy.c2r_strength[architecture], toy.orthogonality_weight[architecture]
    for world, sizes in worlds(toy, correlated).items():
        baseline = toy_arm(sizes, architecture, None)
        for title in PENALTIES:
            about = {"world": world, "penalty": title, "share": 0.0}
            yield NamedArm(f"{architecture}, {world}, baseline", baseline, about)
        for share in correlated.shares:
            penalties = (c2r_of(sizes, share * strength), Orthogonality(share * weight))
            for title, penalty in zip(PENALTIES, penalties, strict=True):
                arm = toy_arm(sizes, architecture, penalty)
                about = {"world": world, "penalty": title, "share": share}
                yield NamedArm(f"{architecture}, {world}, {title} {share:g}", arm, about)


def correlated_table(
    values: Mapping[str, Any], profile: Profile, architecture: str
) -> pd.DataFrame:
    """World, penalty, share, seed and the fields of `ToyReport`.

    Shares are of the weights that were tuned on the tree, in the same way for both penalties. The
    baseline is there for both, at share 0.
    """
    return arm_table(values, _arms(profile, architecture))


def differences_from_baseline(
    table: pd.DataFrame, metric: str, control: str | None = None
) -> pd.DataFrame:
    """95 % intervals of a metric minus the baseline's, paired by seed.

    From a `correlated_table`; gives `world`, `penalty`, `share`, `mean`, `low` and `high`. Control is a world
    whose difference, at the same penalty, share and seed, is taken off: what is left is due to what the other
    worlds have and this one has not. Its own rows are 0. A ValueError says if there is no such world.
    """
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

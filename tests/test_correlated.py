"""Worlds are what they are named for; differences are paired by seed."""

from __future__ import annotations

import pandas as pd
import pytest
import torch

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments.correlated import (
    cells,
    correlated_table,
    differences_from_baseline,
    worlds,
)
from c2r_core.experiments.toy import feature_tree

SMOKE = load_profile("smoke")


def test_worlds_have_the_truth_they_are_named_for():
    settings = SMOKE.correlated.model_copy(update={"cosines": [0.0, 0.6], "correlations": [0.5]})
    named = worlds(SMOKE.toy, settings)
    assert list(named) == ["cosine 0", "cosine 0.6", "fire together, 0.5"]
    trees = {name: feature_tree(world) for name, world in named.items()}
    size = settings.group_size
    for name, tree in trees.items():
        cosines = tree.directions[:size] @ tree.directions[:size].T
        expected = 0.6 if name == "cosine 0.6" else 0.0
        off_diagonal = cosines[~torch.eye(size, dtype=torch.bool)]
        torch.testing.assert_close(
            off_diagonal, torch.full_like(off_diagonal, expected), atol=1e-5, rtol=0
        )
        assert tree.n_features == settings.n_features
    assert trees["fire together, 0.5"].group_correlation == 0.5


def test_both_penalties_have_the_baseline_and_as_many_points():
    profile = SMOKE.model_copy(
        update={"correlated": SMOKE.correlated.model_copy(update={"cosines": [0.6]})}
    )
    made = cells(profile)
    names = [cell.name for cell in made]
    assert len(names) == len(set(names)) == 2 * (1 + 2 * len(profile.correlated.shares))
    values = {
        name: [{"seed": seed, "mcc": number} for seed in (10, 11)]
        for number, name in enumerate(names)
    }
    table = correlated_table(values, profile, "relu")
    assert table.groupby(["world", "penalty", "share"])["seed"].count().eq(2).all()
    shares = table.groupby("penalty")["share"].unique()
    assert [list(one) for one in shares] == [[0.0, *profile.correlated.shares]] * 2
    baseline = table[table["share"] == 0].groupby(["world", "penalty"])["mcc"].mean()
    assert baseline.groupby("world").nunique().eq(1).all()


def planted_worlds() -> pd.DataFrame:
    """MCC is 1 − seed/10 without a penalty and falls by share · (1, or 3 in world "b")."""
    return pd.DataFrame(
        [
            {
                "world": world,
                "penalty": penalty,
                "share": share,
                "seed": seed,
                "mcc": 1 - seed / 10 - share * slope,
            }
            for seed in (1, 0)
            for share in (0.5, 0.0, 0.1)
            for world, slope in (("a", 1), ("b", 3))
            for penalty in ("C²R", "OrtSAE")
        ]
    )


def test_differences_from_the_baseline_are_paired():
    differences = differences_from_baseline(planted_worlds(), "mcc").set_index(
        ["world", "penalty", "share"]
    )
    assert len(differences) == 8
    for world, slope in (("a", 1), ("b", 3)):
        row = differences.loc[(world, "C²R", 0.5)]
        assert row.tolist() == pytest.approx([-0.5 * slope] * 3)


def test_a_controls_difference_is_taken_off():
    excess = differences_from_baseline(planted_worlds(), "mcc", control="a")
    assert excess["mean"].tolist() == pytest.approx([0, 0] * 2 + [-0.2, -1.0] * 2)
    with pytest.raises(ValueError, match="'c'"):
        differences_from_baseline(planted_worlds(), "mcc", control="c")

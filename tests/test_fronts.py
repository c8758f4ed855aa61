"""Fronts: a planted one is interpolated exactly; tables pair by seed; knobs are the ones they say."""

from __future__ import annotations

import math

import pandas as pd
import pytest
import torch

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import synthetic as toy_runs
from c2r_core.experiments.correlated import differences_from_baseline, weight_sweep, worlds
from c2r_core.experiments.knobs import (
    LABELS,
    front_differences,
    front_label,
    front_prices,
    front_table,
    knob_fronts,
)
from c2r_core.experiments.synthetic import feature_tree
from c2r_core.metrics.fronts import price_at

SMOKE = load_profile("smoke")


def test_a_planted_front_is_interpolated_exactly():
    failure, price = [0.8, 0.4, 0.1, 0.2], [1.0, 2.0, 5.0, 9.0]
    assert price_at(failure, price, 0.4) == 2.0
    assert price_at(failure, price, 0.2) == pytest.approx(2 + 3 * 2 / 3), (
        "the first crossing counts"
    )
    assert price_at(failure, price, 0.1) == 5.0
    assert price_at(failure, price, 0.9) == 1.0, "there already"
    assert math.isnan(price_at(failure, price, 0.05)), "it never gets there"


def test_points_on_a_line_give_that_line():
    failure = [1.0, 0.7, 0.2, 0.0]
    price = [3 - 2 * value for value in failure]
    for target in (0.95, 0.5, 0.1):
        assert price_at(failure, price, target) == pytest.approx(3 - 2 * target)


@pytest.mark.parametrize(
    "failure, price, message",
    [
        ([0.1], [0.1, 0.2], "equal length"),
        ([], [], "at least one point"),
        ([0.1, float("nan")], [0.1, 0.2], "finite"),
    ],
)
def test_what_is_no_front_is_refused(failure, price, message):
    with pytest.raises(ValueError, match=message):
        price_at(failure, price, 0.1)


def planted(front: str, shift: float, lowest: float = 0.0, knob: str = "every") -> pd.DataFrame:
    """Three seeds, FVU = strength + seed/10 + shift, absorption falls from 1 to `lowest`."""
    return pd.DataFrame(
        [
            {
                "knob": knob,
                "front": front,
                "seed": seed,
                "strength": strength,
                "fvu": strength + seed / 10 + shift + seed * shift,
                "absorption": 1 - strength * (1 - lowest),
            }
            for strength in (1.0, 0.0, 0.5)
            for seed in (2, 0, 1)
        ]
    )


def test_front_prices_pair_by_seed_with_the_first_front():
    table = pd.concat([planted("T = 1", 0), planted("T = 20", 0.5), planted("T = 5", 0, 0.6)])
    standard, dearer, never = front_prices(table, "absorption", 0.25)
    assert (standard.front, standard.reached) == ("T = 1", 3)
    assert standard.price == pytest.approx(0.75 + 0.1)
    assert standard.difference == (0, 0, 0)
    assert dearer.difference.mean == pytest.approx(1.0)
    assert dearer.difference.low < 1 < dearer.difference.high
    assert never.reached == 0 and math.isnan(never.difference.mean) and math.isnan(never.price)
    needed = front_prices(table, "absorption", 0.25, price="strength")
    assert [one.price for one in needed[:2]] == pytest.approx([0.75, 0.75])


def test_every_knob_compares_with_its_own_standard():
    table = pd.concat(
        [planted("T = 1", 0), planted("T = 5", 0.5), planted("α = 1", 1, knob="alpha")]
    )
    prices = {one.front: one for one in front_prices(table, "absorption", 0.5)}
    assert prices["α = 1"].difference.mean == 0 and prices["T = 5"].difference.mean > 0


def test_front_differences_are_taken_at_equal_strength():
    table = pd.concat([planted("T = 1", 0), planted("T = 20", 0.5)])
    differences = front_differences(table, "fvu", 0.5)
    assert list(differences) == [("every", "T = 20")]
    assert differences["every", "T = 20"].by_seed == pytest.approx([0.5, 1.0, 1.5])
    assert differences["every", "T = 20"].interval.mean == pytest.approx(1.0)
    assert front_differences(table, "absorption", 0.5)["every", "T = 20"].interval == (0, 0, 0)
    with pytest.raises(ValueError, match="0.7 is no point of the fronts; these are: 0, 0.5, 1"):
        front_differences(table, "fvu", 0.7)


@pytest.fixture(scope="module")
def toy():
    return SMOKE.toy.model_copy(update={"steps": 4, "evaluation_samples": 500})


@pytest.fixture
def trained(monkeypatch):
    """What was asked to be trained: (batch size, regulariser), instead of the training."""
    from c2r_core.experiments import knobs

    asked = []

    def remember(toy, architecture, arms, seeds, device):
        asked.extend((toy.batch_size, regulariser) for regulariser in arms.values())
        return {}

    monkeypatch.setattr(knobs, "train_toy_arms", remember)
    monkeypatch.setattr(knobs, "toy_table", lambda toy, runs: pd.DataFrame({"arm": [0.0]}))
    return asked


def test_knobs_reach_the_training(toy, trained):
    front_table(toy, "relu", [0.1], [0], every=5, chunk_size=30, start=0.5, warmup=0.25, alpha=2.0)
    (_, baseline), (_, penalty) = trained
    assert baseline is None
    assert (penalty.every, penalty.chunk_size, penalty.alpha) == (5, 30, 2.0)
    assert (penalty.start, penalty.warmup) == (2, 1)
    assert penalty.weight == toy_runs.c2r_of(toy, 0.1, alpha=2.0).weight


def test_lambda_follows_the_batch_size(toy, trained):
    front_table(toy, "relu", [0.1], [0])
    front_table(toy, "relu", [0.1], [0], batch_size=4 * toy.batch_size)
    (size, _), (_, standard), (larger, _), (_, penalty) = trained
    assert larger == 4 * size and penalty.weight == pytest.approx(standard.weight / 2)


def test_an_unknown_knob_is_named(toy):
    with pytest.raises(ValueError, match="'evry'; did you mean 'every'"):
        front_table(toy, "relu", [0.1], [0], evry=5)


def test_knob_fronts_begin_with_the_standard_one(toy):
    knobs = SMOKE.knobs.model_copy(
        update={"strengths": {"relu": [0.3]}, "values": {"relu": {"every": [2], "alpha": [0.5]}}}
    )
    table = knob_fronts(toy, "relu", knobs, [0, 1])
    fronts = table[["knob", "front"]].drop_duplicates().to_numpy().tolist()
    assert fronts == [
        ["every", "T = 1"],
        ["every", "T = 2"],
        ["alpha", "α = 1"],
        ["alpha", "α = 0.5"],
    ]
    assert len(table) == 4 * 2 * 2
    baseline = table[table["strength"] == 0].groupby("front")["fvu"].mean()
    assert baseline.nunique() == 1
    with_penalty = table[table["strength"] > 0].groupby("front")["fvu"].mean()
    assert with_penalty["T = 1"] == with_penalty["α = 1"] != with_penalty["T = 2"]


def test_every_knob_has_a_name_for_every_value(toy):
    names = {knob: (front_label(knob, None, toy), front_label(knob, 0.5, toy)) for knob in LABELS}
    assert names["alpha"] == ("α = 1", "α = 0.5") and names["start"] == (
        "starts at 0%",
        "starts at 50%",
    )
    assert names["chunk_size"][0] == "all latents" and names["warmup"][0] == "no warm-up"
    assert names["batch_size"][0] == f"B = {toy.batch_size}" and names["every"][0] == "T = 1"


def test_worlds_have_the_truth_they_are_named_for(toy):
    settings = SMOKE.correlated.model_copy(update={"cosines": [0.0, 0.6], "correlations": [0.5]})
    named = worlds(toy, settings)
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


def test_weight_sweep_gives_both_penalties_the_baseline_and_as_many_points(toy):
    world = worlds(toy, SMOKE.correlated)["cosine 0.6"]
    table = weight_sweep(world, "relu", [0.25, 1.0], [0, 1])
    assert table.groupby(["penalty", "share"])["seed"].count().eq(2).all()
    shares = table.groupby("penalty")["share"].unique()
    assert [list(one) for one in shares] == [[0.0, 0.25, 1.0]] * 2
    baseline = table[table["share"] == 0].groupby("penalty")["mcc"].mean()
    assert baseline.nunique() == 1


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

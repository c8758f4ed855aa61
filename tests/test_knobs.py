"""Trade-offs of C²R: tables pair by seed; knobs are the ones they say."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments.knobs import (
    LABELS,
    cells,
    costs_at_target,
    differences_from_standard,
    knob_table,
    setting_label,
)
from c2r_core.experiments.toy import c2r_of

SMOKE = load_profile("smoke")


def planted(setting: str, shift: float, lowest: float = 0.0, knob: str = "every") -> pd.DataFrame:
    """Three seeds, FVU = strength + seed/10 + shift, absorption falls from 1 to `lowest`."""
    return pd.DataFrame(
        [
            {
                "knob": knob,
                "setting": setting,
                "seed": seed,
                "strength": strength,
                "fvu": strength + seed / 10 + shift + seed * shift,
                "absorption": 1 - strength * (1 - lowest),
            }
            for strength in (1.0, 0.0, 0.5)
            for seed in (2, 0, 1)
        ]
    )


def test_costs_at_target_pair_by_seed_with_the_first_setting():
    table = pd.concat([planted("T = 1", 0), planted("T = 20", 0.5), planted("T = 5", 0, 0.6)])
    standard, costlier, never = costs_at_target(table, "absorption", 0.25)
    assert (standard.setting, standard.reached) == ("T = 1", 3)
    assert standard.cost == pytest.approx(0.75 + 0.1)
    assert standard.difference == (0, 0, 0)
    assert costlier.difference.mean == pytest.approx(1.0)
    assert costlier.difference.low < 1 < costlier.difference.high
    assert never.reached == 0 and math.isnan(never.difference.mean) and math.isnan(never.cost)
    needed = costs_at_target(table, "absorption", 0.25, cost="strength")
    assert [one.cost for one in needed[:2]] == pytest.approx([0.75, 0.75])


def test_every_knob_compares_with_its_own_standard():
    table = pd.concat(
        [planted("T = 1", 0), planted("T = 5", 0.5), planted("α = 1", 1, knob="alpha")]
    )
    costs = {one.setting: one for one in costs_at_target(table, "absorption", 0.5)}
    assert costs["α = 1"].difference.mean == 0 and costs["T = 5"].difference.mean > 0


def test_differences_from_standard_are_taken_at_equal_strength():
    table = pd.concat([planted("T = 1", 0), planted("T = 20", 0.5)])
    differences = differences_from_standard(table, "fvu", 0.5)
    assert list(differences) == [("every", "T = 20")]
    assert differences["every", "T = 20"].by_seed == pytest.approx([0.5, 1.0, 1.5])
    assert differences["every", "T = 20"].interval.mean == pytest.approx(1.0)
    assert differences_from_standard(table, "absorption", 0.5)["every", "T = 20"].interval == (
        0,
        0,
        0,
    )
    with pytest.raises(
        ValueError, match="no setting was run at strength 0.7; these were: 0, 0.5, 1"
    ):
        differences_from_standard(table, "fvu", 0.7)


def with_knobs(**values: list[float]):
    """The smoke profile with these values of knobs, on ReLU, at one strength."""
    knobs = {"strengths": {"relu": [0.3]}, "values": {"relu": values}}
    return SMOKE.model_copy(update={"knobs": SMOKE.knobs.model_copy(update=knobs)})


def settings(profile) -> dict[str, dict]:
    return {cell.name: cell.settings["arm"] for cell in cells(profile)}


def test_knobs_reach_the_training():
    profile = with_knobs(
        every=[5], chunk_size=[30], start=[0.5], warmup=[0.25], alpha=[2.0], batch_size=[512]
    )
    toy, of = profile.toy, settings(profile)
    assert len(of) == 2 * (1 + 6)
    assert of["relu-standard-0"]["regulariser"] is None
    standard = of["relu-standard-0.3"]["regulariser"]
    for name, value in {
        "every-5": {"every": 5},
        "chunk_size-30": {"chunk_size": 30},
        "start-0.5": {"start": toy.steps // 2},
        "warmup-0.25": {"warmup": toy.steps // 4},
        "alpha-2": {"alpha": 2.0, "weight": c2r_of(toy, 0.3, alpha=2.0).weight},
    }.items():
        assert of[f"relu-{name}-0.3"]["regulariser"] == standard | value
    larger = of["relu-batch_size-512-0.3"]
    assert larger["batch_size"] == 512 == 4 * toy.batch_size
    assert larger["regulariser"]["weight"] == pytest.approx(standard["weight"] / 2)


def test_an_unknown_knob_is_named():
    with pytest.raises(ValueError, match="'evry'; did you mean 'every'"):
        cells(with_knobs(evry=[5]))


def test_a_table_begins_each_knob_with_the_standard_setting():
    profile = with_knobs(every=[2], alpha=[0.5])
    values = {
        cell.name: [{"seed": seed, "fvu": number} for seed in (10, 11)]
        for number, cell in enumerate(cells(profile))
    }
    table = knob_table(values, profile, "relu")
    assert table[["knob", "setting"]].drop_duplicates().to_numpy().tolist() == [
        ["every", "T = 1"],
        ["every", "T = 2"],
        ["alpha", "α = 1"],
        ["alpha", "α = 0.5"],
    ]
    assert len(table) == 4 * 2 * 2
    at = table.groupby(["setting", "strength"])["fvu"].first()
    assert (at["T = 1"] == at["α = 1"]).all() and (at["T = 1"] != at["T = 2"]).all()


def test_every_knob_has_a_name_for_every_value():
    toy = SMOKE.toy
    names = {k: (setting_label(k, None, toy), setting_label(k, 0.5, toy)) for k in LABELS}
    assert names["alpha"] == ("α = 1", "α = 0.5")
    assert names["start"] == ("starts at 0%", "starts at 50%")
    assert names["chunk_size"][0] == "all latents" and names["warmup"][0] == "no warm-up"
    assert names["batch_size"][0] == f"B = {toy.batch_size}" and names["every"][0] == "T = 1"

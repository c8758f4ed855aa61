"""What C²R changes at each width: beside no penalty at equal width, at equal FVU, and with the width."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, front, widths
from c2r_core.training import weight_from_strength

PROFILE = load_profile("default")
LM = PROFILE.language_model
FVU = {4096: 0.10, 2048: 0.12, 1024: 0.15, 512: 0.18}


def known(seeds=(11, 12), gain=None) -> pd.DataFrame:
    """Absorption is 5 FVU plus the seed; with C²R FVU is 0.03 higher, and absorption changes by `gain`."""
    gain = gain or {4096: -0.2, 2048: -0.1, 1024: 0.0}
    rows = []
    for seed in seeds:
        rows += [("none", d_sae, seed, fvu, 5 * fvu + seed) for d_sae, fvu in FVU.items()]
        rows += [
            ("C²R", d_sae, seed, FVU[d_sae] + 0.03, 5 * FVU[d_sae] + seed + by)
            for d_sae, by in gain.items()
        ]
    table = pd.DataFrame(rows, columns=["form", "d_sae", "seed", "fvu", "absorption"])
    table["live latents"] = table["d_sae"].astype(float)
    return table.reindex(columns=["form", "d_sae", "seed", "live latents", *widths.OUTCOMES])


def of(table: pd.DataFrame, outcome: str = "absorption") -> pd.DataFrame:
    return table[table["outcome"] == outcome].set_index("d_sae")


def test_the_narrower_saes_are_trained_as_the_full_one_was():
    by_name = {cell.name: cell.settings for cell in cells("widths", PROFILE)}
    assert len(by_name) == 5 * len(widths.SEEDS)
    full = front.Spec("C²R", 0.8839, 4096).arm(LM).settings()
    half = by_name["c2r-0.8839-2048-latents-seed-11"]["arm"]
    assert {name for name in full if full[name] != half[name]} == {"d_sae", "form"}
    weights = [arm["form"]["weight"] for arm in (full, half)]
    assert weights[1] == weight_from_strength(0.8839, batch_size=LM.batch_size, d_sae=2048)
    assert weights[1] < weights[0]
    assert by_name["none-512-latents-seed-0"]["arm"]["form"] is None


def test_changes_are_paired_at_each_width():
    found = of(widths.changes(known()))
    assert found["mean"].to_dict() == pytest.approx({1024: 0, 2048: -0.1, 4096: -0.2})
    assert set(found["seeds"]) == {2}


def test_at_equal_fvu_a_narrower_sae_is_the_rival():
    found = of(widths.excesses(known()))  # size alone gives 5 · 0.03 more at the FVU of C²R
    assert found["mean"].to_dict() == pytest.approx({1024: -0.15, 2048: -0.25, 4096: -0.35})
    assert set(found["outside"]) == {0}
    by_live = of(widths.excesses(known(), "live latents"))
    assert by_live["mean"].to_dict() == pytest.approx({1024: 0, 2048: -0.1, 4096: -0.2})
    cost = of(widths.excesses(known(), "live latents"), "fvu")
    assert cost["mean"].tolist() == pytest.approx([0.03] * 3)


def test_an_fvu_beyond_the_narrowest_is_counted():
    table = known()
    table.loc[(table["form"] == "C²R") & (table["d_sae"] == 1024), "fvu"] = 0.2
    assert of(widths.excesses(table))["outside"].to_dict() == {1024: 2, 2048: 0, 4096: 0}


def test_growth_is_the_change_of_the_change():
    found = widths.growth(known()).set_index("outcome").loc["absorption"]
    assert found["mean"] == pytest.approx(-0.2) and found["seeds"] == 2


def test_a_seed_without_its_twin_is_left_out_of_what_needs_it():
    table = known(seeds=(11, 12, 13))
    lost = (table["seed"] == 13) & (table["form"] == "C²R") & (table["d_sae"] == 4096)
    table.loc[lost, "absorption"] = np.nan
    assert of(widths.changes(table))["seeds"].to_dict() == {1024: 3, 2048: 3, 4096: 2}
    assert widths.growth(table).set_index("outcome").loc["absorption", "seeds"] == 2


def record(fvu):
    values = {"fvu": fvu, "l0": 10, "num_alive": 9}
    return {"reconstruction": {"status": "evaluated", "values": values}}


def test_all_sources_give_one_table_and_nothing_else_gets_in():
    values = {
        "widths": {"c2r-0.8839-2048-latents-seed-11": record(0.1)},
        "front": {
            "c2r-0.8839-4096-latents-seed-0": record(0.2),
            "c2r-2.6-4096-latents-seed-0": record(0),
        },
        "shortlist": {
            "none-4096-latents-seed-1": record(0.25),
            "none-1024-latents-seed-1": record(0),
        },
        "confirm_lm": {
            "none-4096-latents-seed-12": record(0.3),
            "none-4096-latents-seed-10": record(0),
            "c2r-0.3-4096-latents-seed-12": record(0),
        },
        "promises": {
            "c2r-0.8839-4096-latents-seed-14": record(0.4),
            "directed-0.8839-4096-latents-seed-14": record(0),
        },
    }
    found = widths.width_table(values, PROFILE)
    assert list(zip(found["form"], found["d_sae"], found["seed"], found["fvu"], strict=True)) == [
        ("C²R", 2048, 11, 0.1),
        ("C²R", 4096, 0, 0.2),
        ("C²R", 4096, 14, 0.4),
        ("none", 4096, 1, 0.25),
        ("none", 4096, 12, 0.3),
    ]


@pytest.mark.parametrize("there", [(), ("front",)])
def test_tables_of_what_is_not_there_are_empty_and_have_their_columns(there):
    values = {study: {} for study in widths.SOURCES}
    values |= {study: {"none-4096-latents-seed-0": record(0.1)} for study in there}
    table = widths.width_table(values, PROFILE)
    assert len(table) == len(there)
    for found in (widths.changes(table), widths.excesses(table), widths.growth(table)):
        assert found.empty and {"outcome", "mean", "low", "high"} <= set(found)

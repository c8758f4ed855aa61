"""What C²R changes at each width, and how outcomes change with the width."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, front, widths
from c2r_core.training import weight_from_strength

PROFILE = load_profile("default")


def known(of_c2r: float = 0.05, seeds=(11, 12)) -> pd.DataFrame:
    """Absorption rises by 0.1 a doubling, with C²R by `of_c2r`; seeds differ by a constant."""
    rows = [
        (form, 1024 * 2**doublings, seed, 0.3 + rise * doublings + seed)
        for seed in seeds
        for form, rise in (("none", 0.1), ("C²R", of_c2r))
        for doublings in range(3)
    ]
    table = pd.DataFrame(rows, columns=["form", "d_sae", "seed", "absorption"])
    return table.reindex(columns=["form", "d_sae", "seed", *widths.OUTCOMES])


def test_the_narrower_saes_are_trained_as_the_full_one_was():
    by_name = {cell.name: cell.settings for cell in cells("widths", PROFILE)}
    assert len(by_name) == 2 * len(widths.FRESH)
    full = front.Spec("C²R", 0.8839, 4096).arm(PROFILE.language_model).settings()
    half = by_name["c2r-0.8839-2048-latents-seed-11"]["arm"]
    assert {name for name in full if full[name] != half[name]} == {"d_sae", "form"}
    weights = [arm["form"]["weight"] for arm in (full, half)]
    sizes = {"batch_size": PROFILE.language_model.batch_size, "d_sae": 2048}
    assert weights[1] == weight_from_strength(0.8839, **sizes)
    assert weights[1] < weights[0]


def test_changes_are_paired_at_each_width():
    found = widths.changes(known()).set_index("d_sae")
    assert set(found["outcome"]) == {"absorption"} and set(found["seeds"]) == {2}
    assert found["mean"].tolist() == pytest.approx([0, -0.05, -0.1])


def test_a_slope_is_the_change_per_doubling():
    found = widths.slopes(known()).set_index("of")
    assert found["mean"].to_dict() == pytest.approx({"none": 0.1, "C²R": 0.05, "C²R − none": -0.05})
    assert found["low"].to_numpy() == pytest.approx(found["high"].to_numpy())


def test_an_sae_without_its_twin_is_left_out():
    table = known(seeds=(11, 12, 13))
    lost = (table["seed"] == 13) & (table["form"] == "C²R") & (table["d_sae"] == 4096)
    table.loc[lost, "absorption"] = np.nan
    found = widths.changes(table).set_index("d_sae")
    assert found["seeds"].tolist() == [3, 3, 2]


def test_all_sources_give_one_table():
    def record(fvu):
        return {
            "reconstruction": {
                "status": "evaluated",
                "values": {"fvu": fvu, "l0": 10, "num_alive": 9},
            }
        }

    lm = PROFILE.language_model
    values = {
        "widths": {"c2r-0.8839-2048-latents-seed-11": record(0.1)},
        "front": {
            "c2r-0.8839-4096-latents-seed-0": record(0.2),
            "c2r-0.3-4096-latents-seed-0": record(0),
        },
        "confirm_lm": {
            "none-1024-latents-seed-12": record(0.3),
            "none-1024-latents-seed-10": record(0),
            "ortsae-0.3-4096-latents-seed-12": record(0),
        },
        "promises": {"c2r-0.8839-4096-latents-seed-14": record(0.4)},
    }
    found = widths.width_table(values, PROFILE)
    assert list(zip(found["form"], found["d_sae"], found["seed"], found["fvu"], strict=True)) == [
        ("C²R", lm.d_sae // 2, 11, 0.1),
        ("C²R", lm.d_sae, 0, 0.2),
        ("C²R", lm.d_sae, 14, 0.4),
        ("none", lm.d_sae // 4, 12, 0.3),
    ]

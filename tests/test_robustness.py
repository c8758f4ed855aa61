"""Assignment consistency under other constants and on other concepts: what is measured, and the tables."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from c2r_core.artefacts.cells import compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, robustness, widths
from c2r_core.metrics.assignment import N_SAMPLES
from c2r_core.metrics.carriers import STANDARD_RULE

PROFILE = load_profile("default")


def test_the_saes_are_those_of_study_widths():
    own, trained = (
        {cell.name: cell.settings["arm"] for cell in cells(study, PROFILE)}
        for study in ("robustness", "widths")
    )
    assert own == trained


def test_an_ending_needs_a_stem_and_words_may_have_several():
    words = (" Elections", "thing", "king", " walking", "agents", " ED")
    found = robustness.word_endings(words)
    names = np.array(robustness.ENDINGS)
    held = {word: set(names[of]) for word, of in zip(words, found, strict=True)}
    assert held == {
        " Elections": {"s"},
        "thing": set(),
        "king": set(),
        " walking": {"ing"},
        "agents": {"s"},
        " ED": set(),
    }


def ways(consistency):
    """One SAE: as it is by the standard rule, upside down by the strictest, and with few words."""
    rows = [
        rule._asdict()
        | {"n_samples": n, "consistency": value, "no_carrier_share": 0.2, "n_evaluated": 20}
        for rule, n, value in (
            (STANDARD_RULE, N_SAMPLES, consistency),
            (robustness.RULES[-1], N_SAMPLES, 1 - consistency),
            (STANDARD_RULE, 10, consistency / 2),
        )
    ]
    endings = {
        "mean_consistency": consistency + 0.1,
        "mean_no_carrier_share": 0.3,
        "n_evaluated": 9,
    }
    return {"rules": rows, "endings": endings}


@pytest.fixture
def table() -> pd.DataFrame:
    """Of two whole seeds and one with a single SAE: the harder to erase, the less consistent."""
    values, measured = {}, {}
    for number, cell in enumerate(cells("robustness", PROFILE)[:11]):
        consistency = 0.1 + 0.05 * (number % 5)
        values[cell.name] = ways(consistency)
        of = {
            "reconstruction": {"fvu": 0.1, "l0": 10, "num_alive": 9},
            "use": {"sae": {"mean_erased": consistency, "mean_steered": 0.5}},
        }
        measured[cell.name] = {
            name: {"status": "evaluated", "values": of_metric} for name, of_metric in of.items()
        }
    return robustness.robustness_table(values, measured, PROFILE)


def test_every_sae_has_a_row_for_every_way(table):
    assert len(table) == 11 * 4
    assert table["concepts"].value_counts().to_dict() == {"letters": 33, "endings": 11}
    assert set(table["seed"]) == set(widths.SEEDS[:3])


def test_ways_are_compared_within_seeds(table):
    found = robustness.ways_table(table, 2048)
    assert list(found["concepts"]) == ["letters"] * 3 + ["endings"]
    standard, few, strictest, endings = found.to_dict("records")
    assert (standard["min_cosine"], standard["min_share"]) == tuple(STANDARD_RULE)
    assert few["n_samples"] == 10 and strictest["min_share"] == 0.6
    for way in (standard, few, endings):
        assert (way["standard"], way["erasing"]) == pytest.approx((1, -1))
    assert (strictest["standard"], strictest["erasing"]) == pytest.approx((-1, 1))
    # Cells of a seed are no penalty at 2048, 1024, 512, then C²R at 2048, 1024: three steps of 0.05 apart.
    gains = [way["gain"] for way in (standard, few, strictest, endings)]
    assert gains == pytest.approx([0.15, 0.075, -0.15, 0.15])
    assert (standard["no_carrier"], endings["no_carrier"]) == pytest.approx((0.2, 0.3))
    names = [robustness.way_name(way) for way in found.to_dict("records")]
    assert names == ["cosine 0.1, share 0.4", "10 words", "cosine 0.2, share 0.6", "endings"]
    shown = robustness.ways_text(found)
    assert shown.loc[0, "erasing"].startswith("-1.00 [") and list(shown["n"]) == [20, 10, 20, 20]
    assert standard["n_evaluated"] == 20 and endings["n_evaluated"] == 9


def test_without_cells_there_are_no_rows():
    assert robustness.robustness_table({}, {}, PROFILE).empty


def test_a_cell_at_smoke_size_has_every_rule_and_ending():
    found = compute(cells("robustness", load_profile("smoke"))[0])
    settings = [tuple(row[name] for name in robustness.SETTING) for row in found["rules"]]
    assert len(set(settings)) == len(settings) == len(robustness.RULES) + 2
    names = [concept["concept"] for concept in found["endings"]["concepts"]]
    assert names == [f"-{ending}" for ending in robustness.ENDINGS]

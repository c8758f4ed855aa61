"""The links between measures and use are judged on SAEs that had no part in finding them."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import replication, validation
from c2r_core.experiments.validation import FAILURES, PREDICTORS


def planted(per_seed: int = 8, seeds: int = 4) -> pd.DataFrame:
    """Erasing fails by the exception rate and by an amount of each seed's own; the rest is noise."""
    generator = np.random.default_rng(0)
    n = per_seed * seeds
    saes = pd.DataFrame({name: generator.random(n) for name in PREDICTORS})
    saes["seed"] = np.repeat(np.arange(seeds), per_seed)
    own = 10 * (saes["seed"] % 2)
    return saes.assign(
        **{"erasing fails": saes["exception rate"] + own, "steering fails": generator.random(n)}
    )


def test_a_link_that_seeds_blur_is_found_within_them():
    table = replication.replication_table(planted()).set_index(["failure", "predictor"])
    found = table.loc[("erasing", "exception rate")]
    assert found[["in_seed", "in_seed_low"]].tolist() == pytest.approx([1, 1])
    assert found["mean"] < 0.8 and found["n"] == 32 and found["seeds"] == 4
    chance = table.loc[("steering", "exception rate")]
    assert chance["in_seed_low"] < 0 < chance["in_seed_high"]


def test_the_lead_is_consistencys_over_a_rival():
    table = replication.replication_table(planted()).set_index(["failure", "predictor"])
    assert np.isnan(table.loc[("erasing", PREDICTORS["consistency"]), "lead"])
    assert table.loc[("erasing", "exception rate"), "lead"] < 0


def test_a_seed_in_which_nothing_varies_is_left_out():
    saes = planted(seeds=3)
    saes.loc[saes["seed"] == 0, "l0"] = 10.0
    table = replication.replication_table(saes).set_index(["failure", "predictor"])
    assert table.loc[("erasing", "L0"), ["in_seed", "lead"]].notna().all()


def test_a_seed_with_few_saes_has_no_correlation_of_its_own():
    saes = planted(per_seed=replication.FEWEST - 1)
    table = replication.replication_table(saes)
    assert table["in_seed"].isna().all() and table["mean"].notna().all()


def test_the_tables_stand_side_by_side():
    saes = planted()
    first = validation.correlation_table(saes.assign(k=10), k=10)
    shown = replication.side_by_side(first, replication.replication_table(saes))
    assert list(shown)[2:4] == ["the first 32", "the other 32"]
    assert len(shown) == len(FAILURES) * len(PREDICTORS)
    assert (shown["the first 32"] == shown["the other 32"]).all(), "of the same SAEs"
    assert shown["AC's lead"].eq("").sum() == 2, "consistency has no lead over itself"


def test_the_later_saes_are_the_committed_ones_and_not_those_of_the_validation(committed_of):
    values = {study: committed_of(study) for study in replication.STUDIES}
    saes = replication.later_saes(values, load_profile("default"))
    assert len(saes) == 85 and saes["seed"].nunique() == 7
    first = committed_of("validation").values()
    known = {record["reconstruction"]["values"]["fvu"] for record in first}
    assert len(known) == 37 and not saes["fvu"].isin(known).any()
    assert not saes.duplicated(["form", "strength", "d_sae", "seed"]).any()
    for failure in FAILURES.values():
        assert saes[failure].between(0, 1).all()

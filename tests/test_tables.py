"""Paired differences of arms: what is paired, and what n is."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from c2r_core.notebook.tables import paired_items, paired_seeds
from c2r_core.statistics import mean_interval


def letters(n_seeds):
    return pd.DataFrame(
        {"arm": arm, "seed": seed, "letter": letter, "value": value + 0.1 * seed}
        for seed in range(n_seeds)
        for arm, values in {
            "C²R": {"A": 0.2, "B": 0.1},
            "baseline": {"A": 0.5, "B": 0.3, "C": 1},
        }.items()
        for letter, value in values.items()
    )


def test_few_seeds_are_averaged_and_the_interval_is_over_items_that_both_have():
    found = paired_items(letters(2), "letter", "value")
    assert found.n == "2 letters, 2 seeds"
    assert found.interval == pytest.approx(mean_interval([-0.3, -0.2]))


def test_with_enough_seeds_the_interval_is_over_them():
    found = paired_items(letters(3), "letter", "value")
    assert found.n == "3 seeds"
    assert found.interval == pytest.approx((-0.25, -0.25, -0.25))


def test_scale_and_single_pairs():
    one = paired_seeds(letters(1).query("letter == 'A'"), "value", scale=0.5)
    assert one.n == "1 seed"
    assert one.interval.mean == pytest.approx(-0.05) and math.isnan(one.interval.low)


def test_what_is_missing_or_none_is_not_paired():
    table = letters(1).astype({"value": object})
    table.loc[table["letter"] == "A", "value"] = None
    assert paired_items(table, "letter", "value").n == "1 letter, 1 seed"
    assert paired_items(table.iloc[:0], "letter", "value") == (None, "0 letters, 0 seeds")
    assert paired_seeds(pd.DataFrame(), "value").interval is None

"""Paired differences of arms: what is paired, and what n is. Means, and how many rows they rest on."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from c2r_core.notebook.tables import counted_means, paired_items, paired_seeds
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


def test_a_mean_says_how_many_rows_it_rests_on():
    table = pd.DataFrame({"width": [1, 1, 1, 2], "k": 5, "fvu": [0.1, 0.3, 0.5, 0.7], "l0": 4.0})
    found = counted_means(table, ["width", "k"], ["fvu", "l0"], of="pairs")
    assert list(found.columns) == ["pairs", "fvu", "l0"] and found.index.names == ["width", "k"]
    assert found["pairs"].tolist() == [3, 1]
    assert found["fvu"].tolist() == pytest.approx([0.3, 0.7])


def test_a_row_that_lacks_a_number_is_in_no_mean_and_not_counted():
    table = pd.DataFrame(
        {"width": [1, 1, 2], "fvu": [0.1, 0.3, 0.5], "l0": [4.0, math.nan, math.nan]}
    )
    found = counted_means(table, ["width"], ["fvu", "l0"], of="pairs")
    assert found["pairs"].tolist() == [1, 0]
    assert found.loc[1].tolist() == [1, 0.1, 4.0] and found.loc[2, ["fvu", "l0"]].isna().all()

"""Differences of arms in a table of cells, and what their interval is over; means, and what they rest on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd

from c2r_core.statistics import Interval, paired_interval

MIN_SEEDS = 3


class Paired(NamedTuple):
    """A paired difference; `n` says what its interval is over."""

    interval: Interval | None
    """None if nothing could be paired; without ends (NaN) for a single pair."""
    n: str


def paired_seeds(
    table: pd.DataFrame,
    value: str,
    *,
    arm: str = "C²R",
    baseline: str = "baseline",
    scale: float = 1.0,
) -> Paired:
    """Arm − scale · baseline over the seeds.

    The table has the columns `arm`, `seed` and the value; rows of equal arm and seed are averaged.
    """
    pair = _pairs(table, ["seed"], value, arm, baseline)
    return Paired(_interval(pair, arm, baseline, scale), _count(len(pair), "seed"))


def paired_items(
    table: pd.DataFrame,
    item: str,
    value: str,
    *,
    arm: str = "C²R",
    baseline: str = "baseline",
    scale: float = 1.0,
) -> Paired:
    """Arm − scale · baseline over the seeds if there are at least MIN_SEEDS, else over items.

    Only items that both arms have for a seed count. The table has the columns `arm`, `seed`, `item` (what a
    row is about, such as "letter", which names n) and the value.
    """
    pair = _pairs(table, ["seed", item], value, arm, baseline)
    n_seeds = len(pair.index.unique("seed"))
    means = pair.groupby(level="seed" if n_seeds >= MIN_SEEDS else item).mean()
    n = _count(n_seeds, "seed")
    if n_seeds < MIN_SEEDS:
        n = f"{_count(len(means), item)}, {n}"
    return Paired(_interval(means, arm, baseline, scale), n)


def counted_means(
    table: pd.DataFrame, by: Sequence[str], columns: Sequence[str], *, of: str
) -> pd.DataFrame:
    """Means over the rows of each group, and how many rows they rest on.

    Parameters
    ----------
    table : DataFrame
        With the columns `by`, whose values name a group, and `columns`, which are numbers.
    of : str
        What a row is, such as "pairs": the title of the count.

    Returns
    -------
    DataFrame
        One row a group, indexed by `by`: the count, then the means. A row of the table that lacks one of the
        numbers (NaN) is in no mean and not counted; a group without any has the count 0 and NaN.
    """
    complete = table[list(columns)].notna().all(axis=1)
    numbers = table[list(columns)].where(complete)
    groups = [table[name] for name in by]
    means = numbers.groupby(groups).mean()
    means.insert(0, of, complete.groupby(groups).sum())
    return means


def _pairs(
    table: pd.DataFrame, index: list[str], value: str, arm: str, baseline: str
) -> pd.DataFrame:
    columns = table.reindex(columns=["arm", *index, value])
    columns = columns.assign(**{value: pd.to_numeric(columns[value])}).dropna()
    wide = columns.groupby([*index, "arm"])[value].mean().unstack("arm")
    return wide.reindex(columns=[arm, baseline]).dropna()


def _interval(pair: pd.DataFrame, arm: str, baseline: str, scale: float) -> Interval | None:
    if len(pair) > 1:
        return paired_interval(pair[arm], pair[baseline], scale=scale)
    if len(pair) == 1:
        return Interval(float((pair[arm] - scale * pair[baseline]).iloc[0]), math.nan, math.nan)
    return None


def _count(n: int, what: str) -> str:
    return f"{n} {what}{'' if n == 1 else 's'}"

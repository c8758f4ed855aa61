"""Rank correlations, and costs read off a trade-off."""

from __future__ import annotations

import math

import pytest

from c2r_core.statistics import cost_at, rank_correlation, rank_correlation_lead


def test_a_planted_trade_off_is_interpolated_exactly():
    failure, cost = [0.8, 0.4, 0.1, 0.2], [1.0, 2.0, 5.0, 9.0]
    assert cost_at(failure, cost, 0.4) == 2.0
    assert cost_at(failure, cost, 0.2) == pytest.approx(2 + 3 * 2 / 3), "the first crossing counts"
    assert cost_at(failure, cost, 0.1) == 5.0
    assert cost_at(failure, cost, 0.9) == 1.0, "there already"
    assert math.isnan(cost_at(failure, cost, 0.05)), "it never gets there"


def test_points_on_a_line_give_that_line():
    failure = [1.0, 0.7, 0.2, 0.0]
    cost = [3 - 2 * value for value in failure]
    for target in (0.95, 0.5, 0.1):
        assert cost_at(failure, cost, target) == pytest.approx(3 - 2 * target)


@pytest.mark.parametrize(
    "failure, cost, message",
    [
        ([0.1], [0.1, 0.2], "equal length"),
        ([], [], "at least one point"),
        ([0.1, float("nan")], [0.1, 0.2], "finite"),
    ],
)
def test_what_is_no_trade_off_is_refused(failure, cost, message):
    with pytest.raises(ValueError, match=message):
        cost_at(failure, cost, 0.1)


def test_rank_correlations():
    x = list(range(20))
    assert rank_correlation(x, [v**3 for v in x]).mean == pytest.approx(1)
    assert rank_correlation(x, [-v for v in x]).mean == pytest.approx(-1)
    noise = [11, 3, 17, 8, 0, 14, 6, 19, 2, 10, 16, 5, 13, 1, 18, 7, 12, 4, 15, 9]
    weak = rank_correlation(x, noise)
    assert weak.low < 0 < weak.high
    lead = rank_correlation_lead(x, noise, [-v for v in x])
    assert lead.mean == pytest.approx(1 - abs(weak.mean)) and lead.low > 0
    tied = rank_correlation([0, 0, 1, 1, 2], [1, 1, 2, 2, 3])
    assert tied.mean == pytest.approx(1)
    with pytest.raises(ValueError, match="at least five pairs"):
        rank_correlation([1, 2], [1, 2])
    with pytest.raises(ValueError, match="NaN"):
        rank_correlation([1, 2, 3, 4, float("nan")], [1, 2, 3, 4, 5])

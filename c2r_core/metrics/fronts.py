"""Fronts: two metrics that trade against each other while a weight sweeps from nothing to too much."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def price_at(failure: Sequence[float], price: Sequence[float], target: float) -> float:
    """Price at which a front first brings a failure down to a target, linear between its points.

    Parameters
    ----------
    failure : sequence of float
        What should be low, such as absorption: one entry a point, in order of the weight.
    price : sequence of float of equal length
        What it costs, such as FVU; or the weight itself, for the weight that is needed.
    target : float

    Returns
    -------
    float
        The first point's price if that is at the target already; NaN, not evaluable, if no point is.

    Raises
    ------
    ValueError
        If the lengths differ, there is no point, or a value is not finite.

    Examples
    --------
    >>> price_at(failure=[0.4, 0.2, 0.0], price=[0.0, 0.1, 0.5], target=0.1)
    0.3
    """
    failure, price = np.asarray(failure, dtype=float), np.asarray(price, dtype=float)
    if failure.shape != price.shape or failure.ndim != 1 or not len(failure):
        raise ValueError(
            f"Got {failure.shape} failures and {price.shape} prices; expected two sequences of "
            "equal length with at least one point."
        )
    if not (np.isfinite(failure).all() and np.isfinite(price).all()):
        raise ValueError(
            f"Got failures {failure.tolist()} and prices {price.tolist()}; expected finite values."
        )
    reached = np.flatnonzero(failure <= target)
    if not len(reached):
        return float("nan")
    last = reached[0]
    if last == 0:
        return float(price[0])
    first = last - 1
    share = (failure[first] - target) / (failure[first] - failure[last])
    return float(price[first] + share * (price[last] - price[first]))

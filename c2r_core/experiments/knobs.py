"""Fronts of the toy experiments: one for every value of a knob, its points along the strength."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import KnobsProfile, ToyProfile
from c2r_core.experiments.synthetic import c2r_of, train_toy_arms
from c2r_core.experiments.toy import toy_table
from c2r_core.metrics.fronts import price_at
from c2r_core.statistics import Interval, paired_interval

if TYPE_CHECKING:
    import pandas as pd

LABELS = {
    "alpha": "α = {:g}",
    "every": "T = {:g}",
    "start": "starts at {:.0%}",
    "warmup": "warm-up {:.0%}",
    "chunk_size": "chunks of {:g}",
    "batch_size": "B = {:g}",
}
"""The knobs: fields of `C2R`, with start and warmup as shares of the steps, and the batch size."""


class FrontPrice(NamedTuple):
    """What a front pays at a target, and how much more that is than the standard front's price.

    `reached` counts the seeds in which both fronts get to the target; only these are compared, and
    the difference is NaN, not evaluable, where they are fewer than two.
    """

    knob: str
    front: str
    price: float
    difference: Interval
    reached: int


class FrontDifference(NamedTuple):
    """A front minus the standard one at one strength: mean with its 95 % interval, and each seed's."""

    interval: Interval
    by_seed: list[float]


def front_table(
    toy: ToyProfile,
    architecture: str,
    strengths: Sequence[float],
    seeds: Sequence[int],
    device: str = "cpu",
    **setting: float,
) -> pd.DataFrame:
    """A front of C²R: `strength`, seed and the fields of `ToyReport`; strength 0 is the baseline.

    Parameters
    ----------
    strengths : sequence of float
        As in `weight_from_strength`, so that λ follows the batch size and α.
    **setting
        Values of knobs other than their standard ones; see LABELS.

    Raises
    ------
    ValueError
        If there is no such knob.
    """
    for knob in setting:
        if knob not in LABELS:
            raise ValueError(unknown_name("knob", knob, LABELS))
    toy = toy.model_copy(update={"batch_size": setting.pop("batch_size", toy.batch_size)})
    for share in ("start", "warmup"):
        if share in setting:
            setting[share] = round(setting[share] * toy.steps)
    arms = {0.0: None} | {strength: c2r_of(toy, strength, **setting) for strength in strengths}
    runs = train_toy_arms(toy, architecture, arms, seeds, device)
    return toy_table(toy, runs).rename(columns={"arm": "strength"})


def knob_fronts(
    toy: ToyProfile,
    architecture: str,
    knobs: KnobsProfile,
    seeds: Sequence[int],
    device: str = "cpu",
) -> pd.DataFrame:
    """`front_table` for every value of every knob of the profile, with `knob` and `front`.

    The standard front, α = 1 on every step from the first on with a search over all latents, is
    the first front of each knob, under that knob's name for it.
    """
    import pandas as pd

    def front(**setting: float) -> pd.DataFrame:
        strengths = knobs.strengths[architecture]
        return front_table(toy, architecture, strengths, seeds, device, **setting)

    standard, pieces = front(), []
    for knob, values in knobs.values[architecture].items():
        pieces.append(standard.assign(knob=knob, front=front_label(knob, None, toy)))
        for value in values:
            label = front_label(knob, value, toy)
            pieces.append(front(**{knob: value}).assign(knob=knob, front=label))
    return pd.concat(pieces, ignore_index=True)


def front_label(knob: str, value: float | None, toy: ToyProfile) -> str:
    """Name of a front; a value of None is the standard one.

    Examples
    --------
    >>> from c2r_core.artefacts.profiles import load_profile
    >>> front_label("every", 5, load_profile("default").toy)
    'T = 5'
    """
    standard: dict[str, Any] = {
        "alpha": 1.0,
        "every": 1,
        "start": 0.0,
        "warmup": 0.0,
        "chunk_size": None,
        "batch_size": toy.batch_size,
    }
    value = standard[knob] if value is None else value
    if knob == "warmup" and not value:
        return "no warm-up"
    return "all latents" if value is None else LABELS[knob].format(value)


def front_prices(
    table: pd.DataFrame, failure: str, target: float, price: str = "fvu"
) -> list[FrontPrice]:
    """What each front of a `knob_fronts` pays at a target, paired by seed with the standard front.

    Parameters
    ----------
    failure : str
        Column that should be low.
    target : float
    price : str
        Column of the price; "strength" asks for the strength that is needed.
    """
    found = []
    for knob, of_knob in table.groupby("knob", sort=False):
        standard = None
        for front, rows in of_knob.groupby("front", sort=False):
            by_seed = rows.sort_values(["seed", "strength"]).groupby("seed")
            prices = np.array(
                [price_at(one[failure], one[price], target) for _, one in by_seed], dtype=float
            )
            standard = prices if standard is None else standard
            both = np.isfinite(prices) & np.isfinite(standard)
            difference = Interval(float("nan"), float("nan"), float("nan"))
            if both.sum() > 1:
                difference = paired_interval(prices[both], standard[both])
            mean = float(prices[both].mean()) if both.any() else float("nan")
            found.append(FrontPrice(str(knob), str(front), mean, difference, int(both.sum())))
    return found


def front_differences(
    table: pd.DataFrame, metric: str, strength: float
) -> dict[tuple[str, str], FrontDifference]:
    """A metric at one strength, each front minus the standard one, paired by seed.

    Parameters
    ----------
    table : DataFrame
        From `knob_fronts`.
    metric : str
    strength : float
        One of the fronts' points.

    Returns
    -------
    dict from (knob, front) to a FrontDifference, without the standard fronts

    Raises
    ------
    ValueError
        If the fronts have no such point.
    """
    points = table[table["strength"] == strength]
    if points.empty:
        known = ", ".join(f"{value:g}" for value in sorted(table["strength"].unique()))
        raise ValueError(f"strength {strength:g} is no point of the fronts; these are: {known}.")
    found = {}
    for knob, of_knob in points.groupby("knob", sort=False):
        values = {
            front: rows.sort_values("seed")[metric].tolist()
            for front, rows in of_knob.groupby("front", sort=False)
        }
        standard, *others = values
        for front in others:
            by_seed = [a - b for a, b in zip(values[front], values[standard], strict=True)]
            interval = paired_interval(values[front], values[standard])
            found[str(knob), str(front)] = FrontDifference(interval, by_seed)
    return found

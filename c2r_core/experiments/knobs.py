"""Study `knobs`, of notebook 08: trade-offs of C²R, its strength swept at each value of a knob."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug, unknown_name
from c2r_core.artefacts.profiles import Profile, ToyProfile, training_seeds
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm
from c2r_core.experiments.toy import arm_table, c2r_of, toy_arm, toy_cell
from c2r_core.statistics import Interval, cost_at, paired_interval

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


class CostAtTarget(NamedTuple):
    """What a setting costs at a target, and how much more that is than the standard setting's cost.

    `reached` counts the seeds in which both get to the target; only these are compared, and the
    difference is NaN, not evaluable, where they are fewer than two.
    """

    knob: str
    setting: str
    cost: float
    difference: Interval
    reached: int


class Difference(NamedTuple):
    """A setting minus the standard one at one strength: mean with its 95 % interval, each seed's."""

    interval: Interval
    by_seed: list[float]


class _Point(NamedTuple):
    architecture: str
    knob: str
    value: float | None
    strength: float

    @property
    def cell(self) -> str:
        setting = "standard" if self.value is None else f"{self.knob} {self.value:g}"
        return f"{self.architecture}, {setting}, {self.strength:g}"


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell a point: architecture, value of a knob, strength; the standard setting comes once."""
    study = Study("knobs", profile, training_seeds(profile.knobs.seeds, seed), device)
    points = {slug(point.cell): point for point in _points(profile)}
    return [toy_cell(study, name, _arm(profile.toy, point)) for name, point in points.items()]


def _points(profile: Profile) -> Iterator[_Point]:
    """Every point of every setting; the standard one is the first setting of each knob."""
    for architecture, knobs in profile.knobs.values.items():
        for knob, values in knobs.items():
            for value in [None, *values]:
                for strength in [0.0, *profile.knobs.strengths[architecture]]:
                    yield _Point(architecture, knob, value, strength)


def _arm(toy: ToyProfile, point: _Point) -> Arm:
    if point.knob not in LABELS:
        raise ValueError(unknown_name("knob", point.knob, LABELS))
    setting = {} if point.value is None else {point.knob: point.value}
    toy = toy.model_copy(update={"batch_size": setting.pop("batch_size", toy.batch_size)})
    for share in ("start", "warmup"):
        if share in setting:
            setting[share] = round(setting[share] * toy.steps)
    penalty = c2r_of(toy, point.strength, **setting) if point.strength else None
    return toy_arm(toy, point.architecture, penalty)


def knob_table(values: Mapping[str, Any], profile: Profile, architecture: str) -> pd.DataFrame:
    """Knob, setting, strength, seed and the fields of `ToyReport`; strength 0 is the baseline.

    The standard setting, α = 1 on every step from the first on with a search over all latents, is
    the first setting of each knob, under that knob's name for it.
    """
    import pandas as pd

    pieces = []
    for point in _points(profile):
        if point.architecture == architecture:
            label = setting_label(point.knob, point.value, profile.toy)
            about = {"knob": point.knob, "setting": label, "strength": point.strength}
            pieces.append(arm_table(values, {slug(point.cell): about}))
    return pd.concat(pieces, ignore_index=True)


def setting_label(knob: str, value: float | None, toy: ToyProfile) -> str:
    """Name of a setting; a value of None is the standard one.

    Examples
    --------
    >>> from c2r_core.artefacts.profiles import load_profile
    >>> setting_label("every", 5, load_profile("default").toy)
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


def costs_at_target(
    table: pd.DataFrame, failure: str, target: float, cost: str = "fvu"
) -> list[CostAtTarget]:
    """What each setting of a `knob_table` costs at a target, paired by seed with the standard one.

    Parameters
    ----------
    failure : str
        Column that should be low.
    target : float
    cost : str
        Column of the cost; "strength" asks for the strength that is needed.
    """
    found = []
    for knob, of_knob in table.groupby("knob", sort=False):
        standard = None
        for setting, rows in of_knob.groupby("setting", sort=False):
            by_seed = rows.sort_values(["seed", "strength"]).groupby("seed")
            costs = np.array(
                [cost_at(one[failure], one[cost], target) for _, one in by_seed], dtype=float
            )
            standard = costs if standard is None else standard
            both = np.isfinite(costs) & np.isfinite(standard)
            difference = Interval(float("nan"), float("nan"), float("nan"))
            if both.sum() > 1:
                difference = paired_interval(costs[both], standard[both])
            mean = float(costs[both].mean()) if both.any() else float("nan")
            found.append(CostAtTarget(str(knob), str(setting), mean, difference, int(both.sum())))
    return found


def differences_from_standard(
    table: pd.DataFrame, metric: str, strength: float
) -> dict[tuple[str, str], Difference]:
    """A metric at one strength, each setting minus the standard one, paired by seed.

    Returns
    -------
    dict from (knob, setting) to a Difference, without the standard settings

    Raises
    ------
    ValueError
        If the settings have no such point.
    """
    points = table[table["strength"] == strength]
    if points.empty:
        known = ", ".join(f"{value:g}" for value in sorted(table["strength"].unique()))
        raise ValueError(f"no setting was run at strength {strength:g}; these were: {known}.")
    found = {}
    for knob, of_knob in points.groupby("knob", sort=False):
        values = {
            setting: rows.sort_values("seed")[metric].tolist()
            for setting, rows in of_knob.groupby("setting", sort=False)
        }
        standard, *others = values
        for setting in others:
            by_seed = [a - b for a, b in zip(values[setting], values[standard], strict=True)]
            interval = paired_interval(values[setting], values[standard])
            found[str(knob), str(setting)] = Difference(interval, by_seed)
    return found

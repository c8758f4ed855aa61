"""Study `knobs`, of notebook 08: trade-offs of C²R, its strength swept at each value of a knob."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import Profile, ToyProfile
from c2r_core.experiments.study import NamedArm, arm_table
from c2r_core.experiments.synthetic import Arm
from c2r_core.experiments.toy import c2r_of, toy_arm, toy_cells
from c2r_core.statistics import Interval, cost_at, paired_interval

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


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell a point: architecture, value of a knob, strength; the standard setting comes once."""
    arms = (arm for architecture in profile.knobs.values for arm in _arms(profile, architecture))
    return toy_cells("knobs", arms, profile, profile.knobs.seeds, seed, device)


def _arms(profile: Profile, architecture: str) -> Iterator[NamedArm]:
    """Every point of every setting; the standard one is the first setting of each knob."""
    for knob, values in profile.knobs.values[architecture].items():
        if knob not in LABELS:
            raise ValueError(unknown_name("knob", knob, LABELS))
        for value in [None, *values]:
            name = "standard" if value is None else f"{knob} {value:g}"
            label = setting_label(knob, value, profile.toy)
            for strength in [0.0, *profile.knobs.strengths[architecture]]:
                arm = _arm(profile.toy, architecture, {knob: value}, strength)
                about = {"knob": knob, "setting": label, "strength": strength}
                yield NamedArm(f"{architecture}, {name}, {strength:g}", arm, about)


def _arm(toy: ToyProfile, architecture: str, knobs: dict[str, Any], strength: float) -> Arm:
    setting = {knob: value for knob, value in knobs.items() if value is not None}
    toy = toy.model_copy(update={"batch_size": setting.pop("batch_size", toy.batch_size)})
    for share in ("start", "warmup"):
        if share in setting:
            setting[share] = round(setting[share] * toy.steps)
    penalty = c2r_of(toy, strength, **setting) if strength else None
    return toy_arm(toy, architecture, penalty)


def knob_table(values: Mapping[str, Any], profile: Profile, architecture: str) -> pd.DataFrame:
    """Knob, setting, strength, seed and the fields of `ToyReport`; strength 0 is the baseline.

    The standard setting, α = 1 on every step from the first on with a search over all latents, is
    the first setting of each knob, under that knob's name for it.
    """
    return arm_table(values, _arms(profile, architecture))


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

    Failure is a column that should be low; cost is one too, "strength" asks for the strength that is needed.
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
    """By (knob, setting), a metric at one strength minus the standard setting's, paired by seed.

    A ValueError says if no setting was run at this strength.
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

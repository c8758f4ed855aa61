"""Study `front`: forms of C²R on a language model, beside OrtSAE and smaller dictionaries, against FVU.

What a penalty buys is read against what it costs: absorption, consistency and use against FVU at equal L0. A
cell is one SAE of the first of the tuning's seeds, EXPLORING: a form at a strength and a width. What is kept
is tried on the others (study `shortlist`), and what is chosen is confirmed on fresh seeds (`confirm_lm`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile
from c2r_core.experiments.forms import form, weight_of
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    arm_of,
    metric_cell,
    metric_table,
)
from c2r_core.experiments.study import Study
from c2r_core.experiments.tuning import SEEDS as EXPLORING
from c2r_core.experiments.validation import COLUMNS, METRICS
from c2r_core.training.forms import PairPenalty

STRENGTHS = (0.3, 0.8839, 2.6)
"""The middle one is the paper's. Where the charge is constant, the weight is SHARE of `forms.weight_of`."""
SHARE = 0.25 / (3.0 * 0.8839)
"""So that OrtSAE's own weight, 0.25, stands beside the paper's strength of C²R."""
MARGIN = 0.17
"""About the largest cosine of a random direction with 4096 others in 576 dimensions, √(2 ln 4096 / 576)."""
FORMS = (
    "C²R",
    "OrtSAE",
    "directed",
    "directed OrtSAE",
    "directed OrtSAE, margin",
    "silent partner, directed",
    "directed, margin",
    "held norms",
)
SUCCESSES = {"erasing fails": "erased", "steering fails": "steered"}
"""What COLUMNS read: shares of answers, from which `validation_table` makes those of failures."""


@dataclass(frozen=True)
class FormArm(LanguageModelArm):
    """A language model's SAE with a form of C²R as its penalty."""

    form: PairPenalty | None = None

    def code(self) -> list[str]:
        """The modules of its architecture and of its penalty."""
        return super().code() + [PairPenalty.__module__] * (self.form is not None)

    def penalties(self) -> list:
        """The form, if there is one."""
        return [self.form] if self.form else []


class Spec(NamedTuple):
    """One way to train: a form's title ("none" without), its strength, and the width."""

    form: str
    strength: float
    d_sae: int

    @property
    def title(self) -> str:
        """The title of the cell, but for what `metric_cell` adds."""
        strength = f" {self.strength:g}" if self.strength else ""
        return f"{self.form}{strength}, {self.d_sae} latents"

    def arm(self, lm: LanguageModelProfile, device: str = "cpu") -> FormArm:
        """How it is trained: the profile's recipe, with the form applied as often as its penalties are."""
        plain = arm_of(lm, device, d_sae=self.d_sae)
        arm = FormArm(**{name: getattr(plain, name) for name in plain.__dataclass_fields__})
        if self.form == "none":
            return arm
        penalty = form(self.form, 0.0, lm.steps)
        weight = weight_of(penalty, self.strength, batch_size=arm.batch_size, d_sae=self.d_sae)
        if penalty.charge == "constant":
            weight *= SHARE
        margin = MARGIN if penalty.margin else 0.0
        penalty = replace(penalty, weight=weight, every=arm.every, margin=margin)
        return replace(arm, form=penalty)


def plain_specs(lm: LanguageModelProfile) -> list[Spec]:
    """No penalty at three widths: what size alone gives."""
    return [Spec("none", 0.0, d_sae) for d_sae in (lm.d_sae, lm.d_sae // 2, lm.d_sae // 4)]


def specs(lm: LanguageModelProfile) -> list[Spec]:
    """No penalty at three widths, then every form at every strength at the largest."""
    in_turn = (STRENGTHS[1], STRENGTHS[0], STRENGTHS[2])
    forms = [Spec(title, strength, lm.d_sae) for strength in in_turn for title in FORMS]
    return plain_specs(lm) + forms


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE; the seed is always the first of EXPLORING. Study `shortlist` has the others."""
    del seed
    return spec_cells("front", profile, EXPLORING[0], specs(profile.language_model), device)


def spec_cells(
    study: str, profile: Profile, seed: int, which: Sequence[Spec], device: str = "cpu"
) -> list[Cell]:
    """The records of METRICS, a cell an SAE of one seed."""
    of_seed, sources = Study(study, profile, [seed], device), Sources(profile)
    return [
        metric_cell(of_seed, spec.arm(sources.lm, device), spec.title, METRICS, sources)
        for spec in which
    ]


def front_table(values: Mapping[str, Any], lm: LanguageModelProfile) -> pd.DataFrame:
    """`spec_table` of the study's own list."""
    return spec_table(values, specs(lm))


def spec_table(values: Mapping[str, Any], which: Sequence[Spec]) -> pd.DataFrame:
    """One row an SAE that is there: form, strength, d_sae, seed, and what was measured.

    The columns are those of study `validation`, but for "erased" and "steered", the shares of answers, and
    "live share".
    """
    by_title = {spec.title: spec for spec in which}
    table = metric_table(values, COLUMNS, by_title).rename(columns=SUCCESSES)
    about = pd.DataFrame([by_title[title] for title in table["arm"]], columns=Spec._fields)
    table = about.join(table.drop(columns="arm"))
    return table.assign(**{"live share": table["live latents"] / table["d_sae"]})


def of_size(table: pd.DataFrame, outcome: str, by: str = "fvu") -> pd.Series:
    """What fewer latents give of an outcome at the FVU, or another column, of each row, on its seed.

    `table` is of `spec_table`. What is found is interpolated linearly in `by` between the SAEs without a
    penalty; outside of theirs it is the nearest one's.
    """
    found = pd.Series(np.nan, table.index)
    for _, saes in table.groupby("seed"):
        sizes = saes[saes["form"] == "none"].sort_values(by)
        found[saes.index] = np.interp(saes[by], sizes[by], sizes[outcome])
    return found

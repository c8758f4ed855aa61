"""Study `forms`: other forms of C²R on toys, at the same number of strengths each, on exploring seeds.

A form is a `PairPenalty`. Each is trained at STRENGTHS of its unit, on two architectures, in a world whose
truth is orthogonal and has a hierarchy, and in one whose true features are alike (groups at a cosine of
0.6), where every penalty on likeness is wrong. A cell is a form in one world on one architecture: all
strengths and seeds. What is found here chooses; what is chosen is confirmed on other seeds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, ToyProfile
from c2r_core.errors import NotEvaluable
from c2r_core.experiments.correlated import worlds
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm, trained, trained_at
from c2r_core.experiments.toy import reports, toy_arm
from c2r_core.experiments.tuning import SEEDS
from c2r_core.training import weight_from_strength
from c2r_core.training.forms import PairPenalty

STRENGTHS = (0.03, 0.1, 0.3, 1.0, 3.0)
"""As in `weight_from_strength`; of a constant charge CONSTANT times as much is the weight."""
CONSTANT = 3.0
ARCHITECTURES = ("relu", "batch_topk")
ALIKE = "cosine 0.6"
"""The world of study `correlated` in which true features are alike."""
TREE = "tree"

_directed = {"moves": "rarer", "charge": "held norms"}
FORMS: dict[str, dict[str, Any]] = {
    "C²R": {},
    "OrtSAE": {"charge": "constant"},
    "held norms": {"charge": "held norms"},
    "directed, with gradient": {"moves": "rarer"},
    "directed": _directed,
    "directed, margin": _directed | {"margin": 0.1},
    "directed OrtSAE": {"moves": "rarer", "charge": "constant"},
    "directed OrtSAE, margin": {"moves": "rarer", "charge": "constant", "margin": 0.1},
    "silent partner": {"charge": "silent partner"},
    "silent partner, directed": {"moves": "rarer", "charge": "silent partner"},
    "directed, four neighbours": _directed | {"n_neighbours": 4},
    "directed, fading": _directed | {"fade_start": 0.6, "fade_steps": 0.2},
}
"""By title, the settings of `PairPenalty`; those of fading are shares of the training."""
SHOWN = ("recovery", "mcc", "absorption", "latents_per_parent", "detector_f1", "fvu", "l0")


def form(title: str, weight: float, steps: int) -> PairPenalty:
    """A form of the list, in a training of so many steps."""
    settings = dict(FORMS[title])
    for name in ("fade_start", "fade_steps"):
        if name in settings:
            settings[name] = max(1, round(settings[name] * steps))
    return PairPenalty(weight, **settings)


def weight_of(penalty: PairPenalty, strength: float, batch_size: int, d_sae: int) -> float:
    """The weight of a form at a strength: as C²R's, or where the charge is constant CONSTANT times it."""
    if penalty.charge == "constant":
        return CONSTANT * strength
    return weight_from_strength(strength, batch_size=batch_size, d_sae=d_sae)


def toy_worlds(profile: Profile) -> dict[str, ToyProfile]:
    """The two worlds by name."""
    alike = worlds(profile.toy, profile.correlated)
    return {TREE: profile.toy} | {name: alike[name] for name in [ALIKE] if name in alike}


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """No penalty, and each form, in each world on each architecture; the seeds are always SEEDS."""
    del seed
    strengths = {architecture: dict.fromkeys(FORMS, STRENGTHS) for architecture in ARCHITECTURES}
    return form_cells(Study("forms", profile, SEEDS, device), strengths)


def form_cells(study: Study, strengths: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Cell]:
    """In each world, without a penalty and for each form, its strengths by architecture and title."""
    made = []
    for name, (world, architecture, title) in form_names(study.profile, strengths).items():
        toy = toy_worlds(study.profile)[world]
        plain, how = toy_arm(toy, architecture, None), {"samples": toy.evaluation_samples}
        if title == "none":
            made.append(study.cell(name, measure, arm=plain, **how))
        else:
            arm = replace(plain, regulariser=form(title, 0.0, plain.config.steps))
            own = strengths[architecture][title]
            made.append(study.cell(name, measure_form, arm=arm, strengths=own, **how))
    return made


def form_names(
    profile: Profile, titles: Mapping[str, Iterable[str]]
) -> dict[str, tuple[str, str, str]]:
    """World, architecture and title ("none" first) of each cell, by its name; titles by architecture."""
    return {
        slug(f"{world}, {architecture}, {title}"): (world, architecture, title)
        for world in toy_worlds(profile)
        for architecture, own in titles.items()
        for title in ("none", *own)
    }


def measure(arm: Arm, samples: int, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """One row a seed: what is SHOWN, without a penalty."""
    return _rows(trained(arm, seeds, device), arm, samples, 0.0)


def measure_form(
    arm: Arm, strengths: Sequence[float], samples: int, seeds: Sequence[int], device: str
) -> list[dict[str, Any]]:
    """One row a strength and seed: what is SHOWN; where an SAE cannot be measured, its row says why."""
    sizes = {"batch_size": arm.batch_size, "d_sae": arm.d_sae}
    weights = {strength: weight_of(arm.regulariser, strength, **sizes) for strength in strengths}
    found = trained_at(arm, list(weights.values()), seeds, device)
    return [
        row
        for strength, weight in weights.items()
        for row in _rows(found[weight], arm, samples, strength)
    ]


def _rows(saes: Mapping[int, Any], arm: Arm, samples: int, strength: float) -> list[dict[str, Any]]:
    rows = []
    for seed, sae in saes.items():
        about = {"seed": seed, "strength": strength}
        try:
            (found,) = reports({seed: sae}, arm.features, samples)
        except NotEvaluable as error:
            rows.append(about | dict.fromkeys(SHOWN) | {"not_evaluable": str(error)})
        else:
            rows.append(about | {name: found[name] for name in SHOWN})
    return rows


def forms_table(values: Mapping[str, Any], profile: Profile) -> pd.DataFrame:
    """World, architecture, form ("none" without), strength, seed and what is SHOWN."""
    names = form_names(profile, dict.fromkeys(ARCHITECTURES, FORMS))
    return form_rows({name: own for name, own in names.items() if name in values}, values)


def form_rows(names: Mapping[str, tuple[str, str, str]], values: Mapping[str, Any]) -> pd.DataFrame:
    """The rows of cells by `form_names`, each with its world, architecture and form."""
    about = ("world", "architecture", "form")
    return pd.DataFrame(
        dict(zip(about, which, strict=True)) | row
        for name, which in names.items()
        for row in values[name]
    )

"""The studies: what each measures, cell by cell, and the tables that notebooks make of the cells.

A study is a module with `cells(profile, seed=0, device="cpu")`. `c2r run STUDY` computes its cells,
`c2r status` says which of the committed ones are still those of this code.
"""

from __future__ import annotations

from importlib import import_module

from c2r_core.errors import needs_extra

needs_extra("evaluate", "pandas", "pydantic", "scipy", "sklearn")

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import unknown_name
from c2r_core.artefacts.profiles import Profile

STUDIES = {
    "toy": "c2r_core.experiments.toy",
    "architectures": "c2r_core.experiments.architectures",
    "ablations": "c2r_core.experiments.ablations",
    "knobs": "c2r_core.experiments.knobs",
    "correlated": "c2r_core.experiments.correlated",
    "benchmark": "c2r_core.experiments.benchmark",
    "published": "c2r_core.experiments.published",
    "strength": "c2r_core.experiments.strength",
    "language_model": "c2r_core.experiments.language_model",
    "examples": "c2r_core.experiments.examples",
    "absorption": "c2r_core.experiments.absorption",
    "agreement": "c2r_core.experiments.agreement",
    "validation": "c2r_core.experiments.validation",
    "blocks": "c2r_core.experiments.blocks",
    "parity": "c2r_core.experiments.parity",
    "tuning": "c2r_core.experiments.tuning",
    "forms": "c2r_core.experiments.forms",
    "confirm": "c2r_core.experiments.confirm",
    "front": "c2r_core.experiments.front",
    "shortlist": "c2r_core.experiments.shortlist",
    "confirm_lm": "c2r_core.experiments.confirm_lm",
    "promises": "c2r_core.experiments.promises",
    "widths": "c2r_core.experiments.widths",
    "robustness": "c2r_core.experiments.robustness",
    "performance": "c2r_core.experiments.performance",
    "scale": "c2r_core.experiments.scale",
    "playground": "c2r_core.experiments.playground",
    "steering": "c2r_core.experiments.steering",
}
"""By name, the module that makes the study's cells."""
CHOSEN_BEFORE = ("tuning",)
"""Studies whose outcome is a setting of the others, so that `make reproduce` reads them and does not run them
again: the weights in profiles.yml were chosen by them once. `make evidence STUDY=tuning` runs them."""
MAIN = {
    "toy": ("",),
    "language_model": ("reconstruction", "decoder", "absorption", "assignment_consistency", "use"),
}
"""What `make reproduce` computes without ALL=1: the cells of a study whose names end so."""


def cells(study: str, profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """The study's cells, in an order in which what they share is made once.

    Raises
    ------
    ValueError
        If there is no such study.
    """
    if study not in STUDIES:
        raise ValueError(unknown_name("study", study, STUDIES))
    return import_module(STUDIES[study]).cells(profile, seed, device)


def how(study: str, cell: str, asked: str) -> str:
    """How a cell is come by, as `artefacts.cells` takes it, where "main" or another mode was asked for."""
    if asked == "main":
        return "anew" if cell.endswith(MAIN.get(study, ())) else "kept"
    return "kept" if asked == "anew" and study in CHOSEN_BEFORE else asked

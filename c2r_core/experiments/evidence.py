"""The report's data: tables of cells that are there, each row marked that is not of this code.

Nothing is computed here. A row's `state` is the worst of its cells': "current", "stale" (of other code,
settings or inputs) or "missing".

    evidence = gather(load_profile("default"))
    print(evidence.summary())
    saes = evidence.validation()  # a DataFrame with a column `state`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import State, look, read_or_compute, state
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.experiments import blocks, cells, parity, validation
from c2r_core.experiments.language_model import metric_table, standard_arms

STUDIES = ("language_model", "agreement", "validation", "blocks", "parity")
WORST = ("missing", "stale", "current")
MARK = {"current": "", "stale": " (STALE)", "missing": " (MISSING)"}

ROWS = {
    "FVU": "reconstruction.fvu",
    "L0": "reconstruction.l0",
    "live latents (share)": "reconstruction.frac_alive",
    "cross-entropy recovered": "model_preservation.ce_loss_score",
    "KL (nats)": "model_preservation.kl_div_with_sae",
    "absorption, mean fraction": "absorption.mean_absorption_fraction_score",
    "absorption, full": "absorption.mean_full_absorption_score",
    "split latents per letter": "absorption.mean_num_split_features",
    "assignment consistency": "assignment_consistency.mean_consistency",
    "exception rate": "assignment_consistency.mean_exception_rate",
    "no-carrier share": "assignment_consistency.mean_no_carrier_share",
    "modal latent, precision": "assignment_consistency.mean_precision",
    "modal latent, recall": "assignment_consistency.mean_recall",
    "sparse probing, one latent": "sparse_probing.sae_top_1_test_accuracy",
    "sparse probing, five latents": "sparse_probing.sae_top_5_test_accuracy",
    "detection score": "detection.mean_score",
    "meta-SAE, variance explained": "meta_sae.explained_variance",
    "right answers erased": "use.sae.mean_erased",
    "answers steered": "use.sae.mean_steered",
}
"""Rows of the table of arms: where each number is in the records."""


@dataclass(frozen=True)
class Evidence:
    """The cells of some studies: {study: {name: …}}. `values` holds those that are current or stale."""

    profile: Profile
    values: Mapping[str, Mapping[str, Any]]
    states: Mapping[str, Mapping[str, State]]

    def summary(self) -> str:
        """A line a study: how many cells are current, stale and missing, and what made them stale."""
        lines = []
        for study, states in self.states.items():
            counts = Counter(state.kind for state in states.values())
            line = f"{study}: " + ", ".join(f"{counts[k]} {k}" for k in reversed(WORST))
            reasons = {r for s in states.values() if s.kind == "stale" for r in s.why.split(", ")}
            lines.append(line + (f" (by {', '.join(sorted(reasons)[:3])})" if reasons else ""))
        return "\n".join(lines)

    def state(self, study: str, names: Iterable[str]) -> str:
        """The worst state among cells; a cell that the study does not have is missing."""
        missing = State("missing")
        return worst(self.states[study].get(name, missing).kind for name in names)

    def arms(self) -> pd.DataFrame:
        """One row a measurement: each arm's mean over seeds, and the row's state; index: measurement."""
        titles = list(standard_arms(self.profile.language_model))
        table = metric_table(self.values["language_model"], ROWS, titles)
        wide = table.groupby("arm", sort=False)[list(ROWS)].mean().T.reindex(columns=titles)
        seeds = training_seeds(self.profile.language_model.seeds)
        wide["state"] = [
            self.state(
                "language_model",
                [slug(f"{t}, seed {s}, {path.split('.')[0]}") for t in titles for s in seeds],
            )
            for path in ROWS.values()
        ]
        return wide

    def validation(self) -> pd.DataFrame:
        """`validation_table`, with the state of each SAE's cell.

        An SAE whose cell is stale has no numbers: with other code it is another SAE, and none to compare.
        """
        lm = self.profile.language_model
        table = validation.validation_table(self.values["validation"], lm)
        (seed,) = training_seeds(1)
        titles = [spec.title for spec in validation.specs(lm)]
        table = self._with_states(table, "validation", [[f"{t}, seed {seed}"] for t in titles])
        measured = [*validation.COLUMNS]
        table[measured] = table[measured].where(table["state"] == "current")
        return table

    def blocks(self) -> pd.DataFrame:
        """`blocks_table`, with the state of each row's cell."""
        table = blocks.blocks_table(self.values["blocks"], self.profile)
        (seed,) = training_seeds(1)
        points = zip(table["block"], table["k"], strict=True)
        names = [[f"{blocks.title(block, k)}, seed {seed}"] for block, k in points]
        return self._with_states(table, "blocks", names)

    def parity(self) -> pd.DataFrame:
        """`parity_table`, with the state of each row's cells."""
        table = parity.parity_table(self.values["parity"])
        names = [
            [f"{row.architecture}, seed {row.seed}, {library}" for library in parity.LIBRARIES]
            for row in table.itertuples()
        ]
        return self._with_states(table, "parity", names)

    def _with_states(
        self, table: pd.DataFrame, study: str, names: Sequence[Sequence[str]]
    ) -> pd.DataFrame:
        states = [self.state(study, [slug(name) for name in of_row]) for of_row in names]
        return table.assign(state=states)


def gather(profile: Profile, studies: Sequence[str] = STUDIES) -> Evidence:
    """What is there of the studies that the report rests on."""
    found = {s: {cell.name: look(cell) for cell in cells(s, profile)} for s in studies}
    values = {s: {n: v for n, (_, v) in by.items() if v is not None} for s, by in found.items()}
    return Evidence(
        profile, values, {s: {n: state for n, (state, _) in by.items()} for s, by in found.items()}
    )


def committed(study: str, profile: Profile) -> dict[str, Any]:
    """{name: values} of a study whose committed cells are all there and current; else empty.

    Whatever C2R_CELLS says: for a study that takes hours, which no notebook computes.
    """
    made = cells(study, profile)
    if any(state(cell).kind != "current" for cell in made):
        return {}
    return {cell.name: read_or_compute(cell, "kept") for cell in made}


def worst(states: Iterable[str]) -> str:
    """The worst of some rows' states: that of a number which was computed from all of them."""
    return min(states, key=WORST.index, default="missing")


def marked(table: pd.DataFrame, column: str | None = None) -> pd.DataFrame:
    """A table to be shown: without `state`, but with STALE or MISSING behind `column`, or the index."""
    marks = table["state"].map(MARK)
    shown = table.drop(columns="state")
    if column is None:
        return shown.set_axis(shown.index.astype(str) + marks.to_numpy())
    return shown.assign(**{column: shown[column].astype(str) + marks})

"""Study `validation`, of notebook 16: does assignment consistency predict what a latent is worth to its user?

Each SAE of a stated list (architectures, widths, k, penalties, trainings cut short) is measured by
`evaluate`: reconstruction, first-letter absorption, assignment consistency, and how often erasing and
steering fail, on words that the others do not score.

The SAEs share their training data and their seed, and they differ in k more than in anything else: so the
correlations are also given among those of k = 10 alone. The link to erasing is partly built in: a latent
that is silent on a word can erase nothing there.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile, training_seeds
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    arm_of,
    metric_cell,
    metric_table,
)
from c2r_core.experiments.study import Study
from c2r_core.statistics import paired_interval, rank_correlation, rank_correlation_lead

METRICS = ("reconstruction", "absorption", "assignment_consistency", "use")


class Spec(NamedTuple):
    """One SAE of the list, in terms of the profile."""

    architecture: str
    d_sae: int
    k: int
    c2r_strength: float = 0.0
    orthogonality_weight: float = 0.0
    steps: int | None = None
    """None: the profile's."""

    @property
    def title(self) -> str:
        """What it is, in words."""
        parts = [self.architecture, f"{self.d_sae} latents", f"k = {self.k}"]
        parts += [f"C²R {self.c2r_strength:g}"] * bool(self.c2r_strength)
        parts += [f"OrtSAE {self.orthogonality_weight:g}"] * bool(self.orthogonality_weight)
        parts += [f"{self.steps} steps"] * (self.steps is not None)
        return ", ".join(parts)

    def arm(self, lm: LanguageModelProfile, device: str = "cpu") -> LanguageModelArm:
        """How it is trained."""
        return arm_of(lm, device, **self._asdict())


def specs(lm: LanguageModelProfile) -> Iterator[Spec]:
    """The list."""
    small, large = lm.small_d_sae, lm.d_sae
    middle = 2 * small if large > 2 * small else (small + large) // 2
    c2r, ort = {"c2r_strength": lm.c2r_strength}, {"orthogonality_weight": lm.orthogonality_weight}
    half, more = max(1, lm.k // 2), round(3.2 * lm.k)
    for d_sae in (small, middle):
        for k in (half, lm.k, more):
            for penalty in ({}, c2r, ort):
                yield Spec("batch_topk", d_sae, k, **penalty)
        yield Spec("batch_topk", d_sae, lm.k, c2r_strength=0.3)
        for architecture in ("topk", "matryoshka_batch_topk"):
            for penalty in ({}, c2r, ort):
                yield Spec(architecture, d_sae, lm.k, **penalty)
        yield Spec("batch_topk", d_sae, lm.k, steps=lm.steps // 5)
    for penalty in ({}, c2r, ort):
        yield Spec("batch_topk", large, lm.k, **penalty)


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE."""
    sources = Sources(profile)
    study = Study("validation", profile, training_seeds(1, seed), device)
    return [
        metric_cell(study, spec.arm(sources.lm, device), spec.title, METRICS, sources)
        for spec in specs(sources.lm)
    ]


COLUMNS = {
    "consistency": "assignment_consistency.mean_consistency",
    "exception rate": "assignment_consistency.mean_exception_rate",
    "no carrier": "assignment_consistency.mean_no_carrier_share",
    "recall": "assignment_consistency.mean_recall",
    "f1": "assignment_consistency.mean_f1",
    "fvu": "reconstruction.fvu",
    "l0": "reconstruction.l0",
    "live latents": "reconstruction.num_alive",
    "absorption": "absorption.mean_absorption_fraction_score",
    "full absorption": "absorption.mean_full_absorption_score",
    "splitting": "absorption.mean_num_split_features",
    "erasing fails": "use.sae.mean_erased",
    "steering fails": "use.sae.mean_steered",
}


def validation_table(values: Mapping[str, Any], lm: LanguageModelProfile) -> pd.DataFrame:
    """One row an SAE: what it is, its measurements, and how use fails; NaN where not evaluable."""
    listed = list(specs(lm))
    titles = [spec.title for spec in listed]
    measured = metric_table(values, COLUMNS, titles).set_index("arm").reindex(titles)
    table = pd.DataFrame(listed).join(measured[list(COLUMNS)].reset_index(drop=True))
    for failure in FAILURES.values():
        table[failure] = 1 - table[failure]
    return table.fillna({"steps": lm.steps}).astype({"steps": float})


CANDIDATE = "consistency"
PREDICTORS = {
    CANDIDATE: "assignment consistency",
    "exception rate": "exception rate",
    "no carrier": "no-carrier share",
    "recall": "modal latent recall",
    "f1": "modal latent F1",
    "fvu": "FVU",
    "l0": "L0",
    "absorption": "absorption, mean fraction",
    "full absorption": "absorption, full",
    "live latents": "live latents",
}
"""Columns of `validation_table` and their titles; the first is on trial, the others are its rivals."""
FAILURES = {"erasing": "erasing fails", "steering": "steering fails"}


def correlation_table(saes: pd.DataFrame, k: int) -> pd.DataFrame:
    """Rank correlations with failure over SAEs, and by how much consistency leads each rival.

    From a `validation_table`; the SAEs of this k are also judged among themselves. Columns: `saes`, `n`,
    `failure`, `predictor`, `mean`, `low`, `high` and `lead`, `lead_low`, `lead_high` (of |rank correlation|,
    consistency's minus the rival's), all with 95 % intervals.
    """
    saes, rows = saes.dropna(subset=[*PREDICTORS, *FAILURES.values()]), []
    for group, members in (("all", saes), (f"k = {k}", saes[saes["k"] == k])):
        if len(members) < 5:
            continue
        own = members[CANDIDATE]
        for failure, column in FAILURES.items():
            failed = members[column]
            for name, title in PREDICTORS.items():
                row = {"saes": group, "n": len(members), "failure": failure, "predictor": title}
                row |= rank_correlation(members[name], failed)._asdict()
                if name != CANDIDATE:
                    lead = rank_correlation_lead(own, members[name], failed)
                    row |= {"lead": lead.mean, "lead_low": lead.low, "lead_high": lead.high}
                rows.append(row)
    return pd.DataFrame(rows)


EFFECTS = {
    "consistency": "assignment consistency",
    "exception rate": "exception rate",
    "no carrier": "no-carrier share",
    "erasing fails": "erasing fails (share)",
    "steering fails": "steering fails (share)",
    "absorption": "absorption, mean fraction",
    "fvu": "FVU",
}
ALIKE = ["architecture", "d_sae", "k", "steps"]


def pairs(saes: pd.DataFrame) -> pd.DataFrame:
    """What each penalty changes, SAE by SAE: one row per penalty and SAE that has a twin without.

    C²R at the highest strength of the list. The columns are ALIKE, `penalty`, `common` (whether the other
    penalty has this SAE too), and the differences of EFFECTS.
    """
    c2r, ort = saes["c2r_strength"], saes["orthogonality_weight"]
    plain = saes[(c2r == 0) & (ort == 0)].set_index(ALIKE)
    treated = {
        "C²R": saes[(c2r > 0) & (c2r == c2r.max())].set_index(ALIKE),
        "OrtSAE": saes[ort > 0].set_index(ALIKE),
    }
    common = treated["C²R"].index.intersection(treated["OrtSAE"].index)
    columns, pieces = list(EFFECTS), []
    for penalty, rows in treated.items():
        change = rows[columns] - plain.loc[rows.index, columns]
        pieces.append(change.assign(penalty=penalty, common=rows.index.isin(common)).reset_index())
    return pd.concat(pieces, ignore_index=True)


def paired_effects(changes: pd.DataFrame) -> pd.DataFrame:
    """Means over the pairs that both penalties have, of each penalty and of C²R − OrtSAE.

    One row per comparison and measurement: penalty, name, n_pairs, mean, low, high (95 %, Student's t over
    architectures, widths and k). `changes` is of `pairs`, or some of its rows, such as one width's.
    """
    common, rows = changes[changes["common"]], []
    by = {penalty: of.set_index(ALIKE).sort_index() for penalty, of in common.groupby("penalty")}
    for column, name in EFFECTS.items():
        wide = pd.DataFrame({penalty: of[column] for penalty, of in by.items()}).dropna()
        if len(wide) < 2:
            continue
        for title, first, second in (
            ("C²R − none", wide["C²R"], wide["C²R"] * 0),
            ("OrtSAE − none", wide["OrtSAE"], wide["OrtSAE"] * 0),
            ("C²R − OrtSAE", wide["C²R"], wide["OrtSAE"]),
        ):
            found = {"penalty": title, "name": name, "n_pairs": len(wide)}
            rows.append(found | paired_interval(first, second)._asdict())
    return pd.DataFrame(rows)

"""Study `published`, of notebook 10: SAEs on the features of SynthSAEBench-16k, beside its published rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile, PublishedProfile, training_seeds
from c2r_core.data.synth_sae_bench import SynthSAEBench
from c2r_core.experiments.benchmark import (
    TITLES,
    arms_with_each_penalty,
    benchmark_table,
    measure,
)
from c2r_core.experiments.study import NamedArm, Study

MATRYOSHKA = "Matryoshka"
ARMS = (*TITLES, MATRYOSHKA)

ROWS = {
    "BatchTopK": {"f1": 0.7316, "mcc": 0.7574, "uniqueness": 0.9837, "explained": 0.7923},
    "Matryoshka": {"f1": 0.8793, "mcc": 0.7927, "uniqueness": 0.9987, "explained": 0.7792},
}
"""The published rows at L0 25, after 200 M samples (SAELens's documentation, page SynthSAEBench): means over
seeds, whose standard deviations are at most 0.0021. "explained" is 1 − FVU."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """ARMS, then shorter runs of the baseline."""
    published = profile.published
    study = Study("published", profile, training_seeds(published.seeds, seed), device)
    return study.cells(_arms(published), measure, samples=published.evaluation_samples)


def _arms(published: PublishedProfile) -> list[NamedArm]:
    arms = arms_with_each_penalty(published, published_features(published))
    plain = arms[0].arm
    matryoshka = replace(plain, architecture="matryoshka_batch_topk")
    arms.append(NamedArm(MATRYOSHKA, matryoshka, {"arm": MATRYOSHKA}))
    for steps in published.shorter:
        arm = replace(plain, config=replace(plain.config, steps=steps))
        arms.append(NamedArm(shorter(steps), arm, {"arm": shorter(steps)}))
    return arms


def shorter(steps: int) -> str:
    """The title of a shorter run of the baseline."""
    return f"baseline, {steps} steps"


def published_features(published: PublishedProfile) -> SynthSAEBench:
    """The profile's features; one object a process, since to push them apart takes a while."""
    return _features(published.n_features, published.d_in, published.n_roots)


@cache
def _features(n_features: int, d_in: int, n_roots: int) -> SynthSAEBench:
    return SynthSAEBench(n_features=n_features, d_in=d_in, n_roots=n_roots)


def published_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row per run of ARMS: arm, seed, the fields of `ForestReport` and "explained", 1 − FVU."""
    return _explained(benchmark_table(values, ARMS))


def by_samples(published: PublishedProfile, values: Mapping[str, Any]) -> pd.DataFrame:
    """The baseline by how long it was trained: one row a run, as `published_table`, and "samples"."""
    titles = {shorter(steps): steps for steps in published.shorter} | {TITLES[0]: published.steps}
    table = _explained(benchmark_table(values, list(titles)))
    return table.assign(samples=table["arm"].map(titles) * published.batch_size)


def _explained(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(explained=1 - table["fvu"])

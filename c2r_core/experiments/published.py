"""Study `published`, of notebook 10: SAEs on the features of SynthSAEBench-16k, beside its published rows.

SAEs of this size are trained one by one, on the sparse path; stacks, as on the toys, take the dense one.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, PublishedProfile, training_seeds
from c2r_core.data.batches import ToyBatches
from c2r_core.data.synth_sae_bench import SynthSAEBench
from c2r_core.experiments.benchmark import TITLES, arms_with_each_penalty, reports
from c2r_core.experiments.study import NamedArm, Study
from c2r_core.experiments.synthetic import Arm
from c2r_core.saes import SAE, create_sae, load_sae, save_sae
from c2r_core.training import train

MATRYOSHKA = "Matryoshka"
ARMS = (*TITLES, MATRYOSHKA)

ROWS = {
    "BatchTopK": {"f1": 0.7316, "mcc": 0.7574, "uniqueness": 0.9837, "explained": 0.7923},
    "Matryoshka": {"f1": 0.8793, "mcc": 0.7927, "uniqueness": 0.9987, "explained": 0.7792},
}
"""The published rows at L0 25, after 200 M samples (SAELens's documentation, page SynthSAEBench): means over
seeds, whose standard deviations are at most 0.0021. "explained" is 1 − FVU."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Seed by seed, one cell an SAE: ARMS, then shorter runs of the baseline."""
    published = profile.published
    return [
        Study("published", profile, [one], device).cell(
            _of_seed(named.name, one), measure, arm=named.arm, samples=published.evaluation_samples
        )
        for one in training_seeds(published.seeds, seed)
        for named in _arms(published)
    ]


def _of_seed(title: str, seed: int) -> str:
    return f"{title}, seed {seed}"


def measure(arm: Arm, samples: int, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """`ForestReport` of each seed, on samples that no run has seen."""
    return reports({seed: trained(arm, seed, device) for seed in seeds}, arm.features, samples)


def trained(arm: Arm, seed: int, device: str = "cpu") -> SAE:
    """The arm's SAE of one seed, trained alone, or from the cache."""

    def build(folder: Path) -> None:
        sae = create_sae(
            arm.architecture, d_in=arm.features.d_in, d_sae=arm.d_sae, seed=seed, **arm.arguments
        ).to(device)
        batches = ToyBatches(arm.features, arm.batch_size, seed)
        penalties = [arm.regulariser] if arm.regulariser else []
        train(sae, batches, arm.config, penalties, progress=False)
        save_sae(sae, folder / "sae")

    key = arm.settings() | {"seed": seed, "device": device.partition(":")[0]}
    code = ["c2r_core.experiments.published:trained", *arm.code()]
    return load_sae(cached("sae", key, build, code=code) / "sae")


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
    """One row per run of ARMS: arm, seed, `ForestReport` without its bands, and "explained", 1 − FVU."""
    return _table(values, ARMS)


def by_samples(published: PublishedProfile, values: Mapping[str, Any]) -> pd.DataFrame:
    """The baseline by how long it was trained: one row a run, as `published_table`, and "samples"."""
    titles = {shorter(steps): steps for steps in published.shorter} | {TITLES[0]: published.steps}
    table = _table(values, titles)
    return table.assign(samples=table["arm"].map(titles) * published.batch_size)


def _table(values: Mapping[str, Any], titles: Iterable[str]) -> pd.DataFrame:
    rows = [
        {"arm": title} | row
        for title in titles
        for name, of_cell in values.items()
        for row in of_cell
        if name == slug(_of_seed(title, row["seed"]))
    ]
    table = pd.DataFrame(rows).drop(columns="bands")
    return table.assign(explained=1 - table["fvu"])

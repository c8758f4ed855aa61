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
from c2r_core.data.batches import Prefetched, ToyBatches
from c2r_core.data.synth_sae_bench import SynthSAEBench
from c2r_core.experiments.benchmark import TITLES, arms_with_each_penalty, band_table, reports
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
    """Seed by seed, one cell an SAE of ARMS, then shorter runs of the baseline.

    Of Matryoshka and the shorter runs, of which nothing is claimed, the first seed alone.
    """
    published = profile.published
    first, *others = training_seeds(published.seeds, seed)
    arms = _arms(published)
    compared = [named for named in arms if named.name != MATRYOSHKA]
    runs = [(named, first) for named in arms]
    runs += [(named, one) for one in others for named in compared]
    runs += [(named, first) for named in _shorter_arms(published, arms[0].arm)]
    return [
        Study("published", profile, [one], device).cell(
            _of_seed(named.name, one), measure, arm=named.arm, samples=published.evaluation_samples
        )
        for named, one in runs
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
        if device != "cpu":
            batches = Prefetched(batches)  # samples are drawn on the CPU
        penalties = [arm.regulariser] if arm.regulariser else []
        checkpoint = folder / "checkpoint.safetensors"
        train(sae, batches, arm.config, penalties, checkpoint=checkpoint, progress=False)
        save_sae(sae, folder / "sae")
        checkpoint.unlink(missing_ok=True)

    key = arm.settings() | {"seed": seed, "device": device.partition(":")[0]}
    code = ["c2r_core.experiments.published:trained", *arm.code()]
    return load_sae(cached("sae", key, build, code=code, resumable=True) / "sae", device)


def _arms(published: PublishedProfile) -> list[NamedArm]:
    arms = arms_with_each_penalty(published, published_features(published))
    plain = arms[0].arm
    matryoshka = replace(plain, architecture="matryoshka_batch_topk")
    return [*arms, NamedArm(MATRYOSHKA, matryoshka, {"arm": MATRYOSHKA})]


def _shorter_arms(published: PublishedProfile, plain: Arm) -> list[NamedArm]:
    return [
        NamedArm(shorter(steps), replace(plain, config=replace(plain.config, steps=steps)), {})
        for steps in published.shorter
    ]


def shorter(steps: int) -> str:
    """The title of a shorter run of the baseline."""
    return f"baseline, {steps} steps"


def published_features(published: PublishedProfile) -> SynthSAEBench:
    """The profile's features; one object a process, since to push them apart takes a while."""
    # By what decides them: a profile with a list in it cannot be looked up.
    return _features(published.n_features, published.d_in, published.n_roots)


@cache
def _features(n_features: int, d_in: int, n_roots: int) -> SynthSAEBench:
    return SynthSAEBench(n_features=n_features, d_in=d_in, n_roots=n_roots)


def published_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row per run of ARMS: arm, seed, `ForestReport` without its bands, and "explained", 1 − FVU."""
    runs = [(title, seed) for title in TITLES for seed in _seeds(values)]
    return _table(values, [*runs, (MATRYOSHKA, _seeds(values)[0])])


def published_bands(values: Mapping[str, Any]) -> pd.DataFrame:
    """`benchmark.band_table` of the arms that have every seed."""
    seeds = _seeds(values)
    return band_table(
        {slug(t): [row for one in seeds for row in values[slug(_of_seed(t, one))]] for t in TITLES}
    )


def by_samples(published: PublishedProfile, values: Mapping[str, Any]) -> pd.DataFrame:
    """The first seed's baseline by how long it was trained: as `published_table`, and "samples"."""
    titles = {shorter(steps): steps for steps in published.shorter} | {TITLES[0]: published.steps}
    table = _table(values, [(title, _seeds(values)[0]) for title in titles])
    return table.assign(samples=table["arm"].map(titles) * published.batch_size)


def _table(values: Mapping[str, Any], runs: Iterable[tuple[str, int]]) -> pd.DataFrame:
    rows = [
        {"arm": title} | row for title, seed in runs for row in values[slug(_of_seed(title, seed))]
    ]
    table = pd.DataFrame(rows).drop(columns="bands")
    return table.assign(explained=1 - table["fvu"])


def _seeds(values: Mapping[str, Any]) -> list[int]:
    return sorted({row["seed"] for of_cell in values.values() for row in of_cell})

"""Study `benchmark`, of notebook 10: BatchTopK SAEs on a `GatedForest`, many features of unlike frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from typing import TYPE_CHECKING, Any

import torch

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import BenchmarkProfile, Profile, training_seeds
from c2r_core.data.forest import GatedForest
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import EVALUATION_SEED, Arm, trained
from c2r_core.experiments.toy import arm_table
from c2r_core.metrics.forest import evaluate_forest
from c2r_core.training import C2R, Orthogonality, Regulariser, TrainConfig, weight_from_strength

if TYPE_CHECKING:
    import pandas as pd

TITLES = ("baseline", "C²R", "OrtSAE")


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, C²R and OrtSAE with the profile's weights."""
    benchmark = profile.benchmark
    study = Study("benchmark", profile, training_seeds(benchmark.seeds, seed), device)
    c2r, weight = benchmark.c2r_strength, benchmark.orthogonality_weight
    penalties = (None, c2r_of(benchmark, c2r), orthogonality_of(benchmark, weight))
    return [
        study.cell(
            title,
            measure,
            arm=benchmark_arm(benchmark, penalty),
            samples=benchmark.evaluation_samples,
        )
        for title, penalty in zip(TITLES, penalties, strict=True)
    ]


@cache
def benchmark_features(benchmark: BenchmarkProfile) -> GatedForest:
    """The profile's features; one object a process, since measuring their rates takes seconds."""
    return GatedForest(
        n_features=benchmark.n_features, d_in=benchmark.d_in, n_roots=benchmark.n_roots
    )


def benchmark_arm(benchmark: BenchmarkProfile, regulariser: Regulariser | None) -> Arm:
    """A BatchTopK SAE on the forest, None for the baseline."""
    config = TrainConfig(steps=benchmark.steps, lr=benchmark.lr, clip_norm=benchmark.clip_norm)
    return Arm(
        features=benchmark_features(benchmark),
        architecture="batch_topk",
        d_sae=benchmark.d_sae,
        batch_size=benchmark.batch_size,
        config=config,
        arguments={"k": benchmark.k},
        regulariser=regulariser,
    )


def c2r_of(benchmark: BenchmarkProfile, strength: float) -> C2R:
    """C²R of a dimensionless strength at the profile's batch size and width."""
    sizes = {"batch_size": benchmark.batch_size, "d_sae": benchmark.d_sae}
    return C2R(weight_from_strength(strength, **sizes), every=benchmark.penalty_every)


def orthogonality_of(benchmark: BenchmarkProfile, weight: float) -> Orthogonality:
    """OrtSAE's penalty on the steps on which C²R acts."""
    return Orthogonality(weight, every=benchmark.penalty_every)


def measure(arm: Arm, samples: int, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """`ForestReport` of each seed, all on the same samples, which no run has seen."""
    return [
        {"seed": seed}
        | asdict(
            evaluate_forest(
                sae,
                arm.features,
                n_samples=samples,
                generator=torch.Generator().manual_seed(EVALUATION_SEED),
            )
        )
        for seed, sae in trained(arm, seeds, device).items()
    ]


def benchmark_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row per run: arm, seed and the fields of `ForestReport`, without the bands."""
    about = {slug(title): {"arm": title} for title in TITLES}
    return arm_table(values, about).drop(columns="bands")


def band_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row per run and frequency band: arm, seed, band (a title) and its measures."""
    import pandas as pd

    return pd.DataFrame(
        {"arm": title, "seed": row["seed"]}
        | {"band": f"{band['lowest_rate']:g} to {band['highest_rate']:g}"}
        | band
        for title in TITLES
        for row in values[slug(title)]
        for band in row["bands"]
    )

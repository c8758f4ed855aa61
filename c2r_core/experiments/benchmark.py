"""Study `benchmark`, of notebook 10: BatchTopK SAEs on a `GatedForest`, many features of unlike frequency."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache
from typing import Any

import pandas as pd
import torch

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import BenchmarkProfile, Profile, training_seeds
from c2r_core.data.forest import GatedForest
from c2r_core.experiments.study import NamedArm, Study
from c2r_core.experiments.synthetic import EVALUATION_SEED, Arm, trained
from c2r_core.metrics.forest import ForestSample, evaluate_forest, forest_sample
from c2r_core.saes import SAE
from c2r_core.training import C2R, Orthogonality, Regulariser, TrainConfig, weight_from_strength

TITLES = ("baseline", "C²R", "OrtSAE")


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, C²R and OrtSAE with the profile's weights."""
    benchmark = profile.benchmark
    study = Study("benchmark", profile, training_seeds(benchmark.seeds, seed), device)
    arms = arms_with_each_penalty(benchmark, benchmark_features(benchmark))
    return study.cells(arms, measure, samples=benchmark.evaluation_samples)


def arms_with_each_penalty(benchmark: BenchmarkProfile, features: GatedForest) -> list[NamedArm]:
    """The arms of TITLES on these features, with the profile's weights."""
    sizes = {"batch_size": benchmark.batch_size, "d_sae": benchmark.d_sae}
    every = benchmark.penalty_every
    c2r = C2R(weight_from_strength(benchmark.c2r_strength, **sizes), every=every)
    penalties = (None, c2r, Orthogonality(benchmark.orthogonality_weight, every=every))
    return [
        NamedArm(title, benchmark_arm(benchmark, features, penalty), {"arm": title})
        for title, penalty in zip(TITLES, penalties, strict=True)
    ]


@cache
def benchmark_features(benchmark: BenchmarkProfile) -> GatedForest:
    """The profile's features; one object a process, since measuring their rates takes seconds."""
    return GatedForest(
        n_features=benchmark.n_features, d_in=benchmark.d_in, n_roots=benchmark.n_roots
    )


def benchmark_arm(
    benchmark: BenchmarkProfile, features: GatedForest, regulariser: Regulariser | None
) -> Arm:
    """A BatchTopK SAE on the features, None for the baseline."""
    config = TrainConfig(steps=benchmark.steps, lr=benchmark.lr, clip_norm=benchmark.clip_norm)
    return Arm(
        features=features,
        architecture="batch_topk",
        d_sae=benchmark.d_sae,
        batch_size=benchmark.batch_size,
        config=config,
        arguments={"k": benchmark.k},
        regulariser=regulariser,
    )


def measure(arm: Arm, samples: int, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """`ForestReport` of each seed, on samples that no run has seen."""
    return reports(trained(arm, seeds, device), arm.features, samples)


def reports(saes: Mapping[int, SAE], features: GatedForest, samples: int) -> list[dict[str, Any]]:
    """`ForestReport` of SAEs by seed."""
    sample = evaluation_sample(features, samples)
    return [
        {"seed": seed} | asdict(evaluate_forest(sae, features, sample))
        for seed, sae in saes.items()
    ]


@lru_cache(maxsize=1)
def evaluation_sample(features: GatedForest, samples: int) -> ForestSample:
    """The samples on which all SAEs on these features are measured."""
    return forest_sample(features, samples, torch.Generator().manual_seed(EVALUATION_SEED))


def benchmark_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row per run: arm, seed and the fields of `ForestReport`, without the bands."""
    return pd.DataFrame(
        {"arm": title} | row for title in TITLES for row in values[slug(title)]
    ).drop(columns="bands")


def band_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row per run and frequency band: arm, seed, band (a title) and its measures."""
    return pd.DataFrame(
        {"arm": title, "seed": row["seed"]}
        | {"band": f"{band['lowest_rate']:g} to {band['highest_rate']:g}"}
        | band
        for title in TITLES
        for row in values[slug(title)]
        for band in row["bands"]
    )

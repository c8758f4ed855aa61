"""The synthetic benchmark's experiments: BatchTopK SAEs on a `GatedForest`, each arm's seeds as one stack."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import BenchmarkProfile
from c2r_core.data.batches import ToyBatches
from c2r_core.data.forest import GatedForest
from c2r_core.saes import SAE, BatchTopKSAE, load_sae, save_sae
from c2r_core.training import (
    C2R,
    Orthogonality,
    Regulariser,
    TrainConfig,
    train,
    weight_from_strength,
)

BenchmarkRuns = dict[tuple[str, int], SAE]


@cache
def benchmark_features(benchmark: BenchmarkProfile) -> GatedForest:
    """The profile's features; measured once a process, since their rates take seconds."""
    return GatedForest(
        n_features=benchmark.n_features, d_in=benchmark.d_in, n_roots=benchmark.n_roots
    )


def c2r_of(benchmark: BenchmarkProfile, strength: float) -> C2R:
    """C²R of a dimensionless strength at the profile's batch size and width."""
    sizes = {"batch_size": benchmark.batch_size, "d_sae": benchmark.d_sae}
    return C2R(weight_from_strength(strength, **sizes), every=benchmark.penalty_every)


def benchmark_arms(benchmark: BenchmarkProfile) -> dict[str, Regulariser | None]:
    """Baseline, C²R and OrtSAE with the profile's weights."""
    return {
        "baseline": None,
        "C²R": c2r_of(benchmark, benchmark.c2r_strength),
        "OrtSAE": Orthogonality(benchmark.orthogonality_weight, every=benchmark.penalty_every),
    }


def train_benchmark_arms(
    benchmark: BenchmarkProfile,
    arms: Mapping[str, Regulariser | None],
    seeds: Sequence[int],
    device: str = "cpu",
) -> BenchmarkRuns:
    """Train every arm with every seed; the same seed means the same start and the same data.

    Parameters
    ----------
    arms : mapping from the arm's name to its regulariser, None for the baseline
    seeds : sequence of int

    Returns
    -------
    dict from (arm, seed) to a trained SAE
    """
    runs: BenchmarkRuns = {}
    for name, regulariser in arms.items():
        folder = _trained(benchmark, regulariser, list(seeds), device)
        runs |= {(name, seed): load_sae(folder / str(seed)) for seed in seeds}
    return runs


def _trained(
    benchmark: BenchmarkProfile, regulariser: Regulariser | None, seeds: list[int], device: str
) -> Path:
    features = benchmark_features(benchmark)
    config = TrainConfig(steps=benchmark.steps, lr=benchmark.lr, clip_norm=benchmark.clip_norm)
    key = {
        "features": asdict(features),
        "d_sae": benchmark.d_sae,
        "k": benchmark.k,
        "batch_size": benchmark.batch_size,
        "config": asdict(config),
        "regulariser": regulariser and {"name": regulariser.name} | asdict(regulariser),
        "seeds": seeds,
        "device": device.partition(":")[0],
    }

    def build(folder: Path) -> None:
        stack = BatchTopKSAE(features.d_in, benchmark.d_sae, benchmark.k, seed=seeds).to(device)
        stack.norm_factor = features.norm_factor
        batches = ToyBatches(features, benchmark.batch_size, seeds)
        train(stack, batches, config, [regulariser] if regulariser else [], progress=False)
        for seed, sae in zip(seeds, stack.unstack(), strict=True):
            save_sae(sae, folder / str(seed))

    return cached("benchmark", key, build)

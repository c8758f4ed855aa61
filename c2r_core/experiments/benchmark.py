"""What the synthetic benchmark's runs are worth: tables, and how the weights were chosen.

    python -m c2r_core.experiments.benchmark

chooses them: the same number of weights in geometric steps for C²R and OrtSAE, on seeds that no claim
uses, the one of highest F1. The outcome is results/tuning/benchmark.json; profiles.yml repeats it.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

import torch

from c2r_core.artefacts.profiles import BenchmarkProfile, load_profile
from c2r_core.artefacts.results import tuning_dir, write_json
from c2r_core.experiments.benchmark_runs import (
    BenchmarkRuns,
    benchmark_features,
    c2r_of,
    train_benchmark_arms,
)
from c2r_core.metrics.benchmark import BenchmarkReport, evaluate_benchmark
from c2r_core.training import Orthogonality

if TYPE_CHECKING:
    import pandas as pd

EVALUATION_SEED = 10**6  # no training seed comes near, so evaluation samples are new
TUNING_SEEDS = (0, 1)
C2R_STRENGTHS = (0.02, 0.08, 0.32, 1.28)
ORTHOGONALITY_WEIGHTS = (0.03, 0.12, 0.48, 1.92)
SHOWN = ["f1", "mcc", "uniqueness", "absorption", "near_duplicates", "fvu", "l0", "live_share"]


def benchmark_reports(
    benchmark: BenchmarkProfile, runs: BenchmarkRuns
) -> dict[tuple[str, int], BenchmarkReport]:
    """`evaluate_benchmark` of every run, all on the same samples, which no run has seen."""
    features = benchmark_features(benchmark)
    return {
        run: evaluate_benchmark(
            sae,
            features,
            n_samples=benchmark.evaluation_samples,
            generator=torch.Generator().manual_seed(EVALUATION_SEED),
        )
        for run, sae in runs.items()
    }


def benchmark_table(reports: dict[tuple[str, int], BenchmarkReport]) -> pd.DataFrame:
    """One row per run: arm, seed and the fields of `BenchmarkReport`, without the bands."""
    import pandas as pd

    rows = [{"arm": arm, "seed": seed} | asdict(report) for (arm, seed), report in reports.items()]
    return pd.DataFrame(rows).drop(columns="bands")


def band_table(reports: dict[tuple[str, int], BenchmarkReport]) -> pd.DataFrame:
    """One row per run and frequency band: arm, seed, band (a title) and its measures."""
    import pandas as pd

    return pd.DataFrame(
        {"arm": arm, "seed": seed, "band": f"{band.lowest_rate:g} to {band.highest_rate:g}"}
        | asdict(band)
        for (arm, seed), report in reports.items()
        for band in report.bands
    )


def main() -> None:
    """Train every candidate, write means and the choice."""
    benchmark = load_profile("default").benchmark
    every = benchmark.penalty_every
    candidates = {
        "c2r_strength": {s: c2r_of(benchmark, s) for s in C2R_STRENGTHS},
        "orthogonality_weight": {w: Orthogonality(w, every=every) for w in ORTHOGONALITY_WEIGHTS},
    }
    outcome = {}
    for name, arms in {"baseline": {0.0: None}, **candidates}.items():
        tried = []
        for weight, regulariser in arms.items():
            runs = train_benchmark_arms(benchmark, {"arm": regulariser}, TUNING_SEEDS)
            means = benchmark_table(benchmark_reports(benchmark, runs))[SHOWN].mean()
            tried.append({"weight": weight} | means.round(4).to_dict())
            print(name, tried[-1], flush=True)
        chosen = max(tried, key=lambda row: row["f1"])["weight"]
        outcome[name] = {"chosen": chosen, "tried": tried}
    write_json(
        tuning_dir() / "benchmark.json",
        {"criterion": "highest F1, mean over seeds", "seeds": TUNING_SEEDS, "outcome": outcome},
    )


if __name__ == "__main__":
    main()

"""Study `tuning`: how the synthetic features' settings were chosen, on seeds that no claim uses.

Every penalty, C²R, OrtSAE and each ablation, gets the same grid on every architecture: no penalty at all,
and POINTS weights in steps of RATIO about a centre of its own, since units differ. Where the best weight is
the smallest or the largest tried, the grid goes on in that direction until it is not (at most EXTENSIONS
times; `on_edge` says if that was not enough). What is best has the highest recovery (the benchmark: F1), mean
over seeds; among equals the smallest weight. A weight that kills every latent of a seed is not evaluable
there and is never chosen.

Before that, the sparsity: that at which latents are the best detectors (F1), mean over the baseline, C²R and
OrtSAE at the centres of their grids. The baseline alone would choose a sparsity that suits it and not the
penalties: on ReLU half of this one, where C²R recovers 0.68 of the features instead of 0.94. An architecture
that keeps a fixed number of latents keeps the true one, 3 features a sample.

profiles.yml repeats what was chosen, and a test holds them together. A setting that is in use there stays
unless another is better by more than WITHIN: of nearly equal ones, another processor's rounding would choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile
from c2r_core.data.forest import GatedForest
from c2r_core.data.toy import FeatureTree
from c2r_core.errors import NotEvaluable
from c2r_core.experiments.benchmark import benchmark_arm, benchmark_features
from c2r_core.experiments.benchmark import reports as benchmark_reports
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm, trained, trained_at
from c2r_core.experiments.toy import reports as toy_reports
from c2r_core.experiments.toy import toy_arm
from c2r_core.saes import SAE
from c2r_core.training import REGULARISERS, Regulariser, create_regulariser, weight_from_strength

SEEDS = (0, 1, 2)
POINTS, RATIO, EXTENSIONS = 7, 2.5, 4
CENTRES = {
    "c2r": 0.3,
    "orthogonality": 1.0,
    "unweighted_sum": 0.03,
    "group_lasso": 0.01,
    "product": 0.3,
    "minimum": 0.3,
    "co_activation": 3.0,
}
"""Middle of each grid: C²R's as a strength (see `weight_from_strength`), the others' as weights."""
WITHIN = 0.02
"""Recovery or F1 by which a setting must be better to replace the one in use: as for `cells.differing`."""
ABLATED = ("relu", "batch_topk")
L1_WEIGHTS = (0.0125, 0.025, 0.05, 0.1, 0.2)
SPARSITIES: dict[str, list[dict[str, float]]] = {
    "relu": [{"l1_weight": weight} for weight in L1_WEIGHTS],
    "relu_april": [{"l1_weight": weight} for weight in L1_WEIGHTS],
    "jump_relu": [{"target_l0": 3, "bandwidth": width} for width in (0.1, 0.3, 0.9)],
    "gated": [{"l1_weight": 8 * weight} for weight in L1_WEIGHTS],
    "p_anneal": [{"l1_weight": weight} for weight in L1_WEIGHTS],
}
SHOWN = {
    "toy": ["detector_f1", "recovery", "absorption", "latents_per_parent", "near_duplicates"]
    + ["fvu", "l0"],
    "benchmark": ["f1", "mcc", "uniqueness", "absorption", "near_duplicates", "fvu", "l0"],
}
REPORTS: dict[str, Callable[..., list[dict[str, Any]]]] = {
    "toy": toy_reports,
    "benchmark": benchmark_reports,
}


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Sparsity of each architecture, then each penalty on it; the seeds are always SEEDS."""
    del seed
    study = Study("tuning", profile, SEEDS, device)
    made = []
    for architecture in profile.toy.architectures:
        baseline = toy_arm(profile.toy, architecture, None)
        given = {"on": "toy", "samples": profile.toy.evaluation_samples}
        if architecture in SPARSITIES:
            arms = [replace(baseline, arguments=own) for own in SPARSITIES[architecture]]
            how = {"arms": _Arms(arms), "by": "detector_f1"}
            made.append(study.cell(f"{architecture}, sparsity", tune_sparsity, **how, **given))
        for penalty in penalties(architecture):
            how = {"arm": baseline, "penalty": penalty, "by": "recovery"}
            how["modules"] = _modules(penalty)
            made.append(study.cell(f"{architecture}, {penalty}", tune, **how, **given))
    forest = benchmark_arm(profile.benchmark, benchmark_features(profile.benchmark), None)
    for penalty in ("c2r", "orthogonality"):
        how = {"arm": forest, "penalty": penalty, "by": "f1", "on": "benchmark"}
        samples = profile.benchmark.evaluation_samples
        how["modules"] = _modules(penalty)
        made.append(study.cell(f"benchmark, {penalty}", tune, samples=samples, **how))
    return made


def _modules(penalty: str) -> list[str]:
    return [REGULARISERS[penalty].__module__]


def penalties(architecture: str) -> list[str]:
    """The penalties that are tuned on an architecture."""
    everywhere = ("c2r", "orthogonality")
    return [name for name in CENTRES if name in everywhere or architecture in ABLATED]


class _Arms(list):
    """Arms whose settings are a list."""

    def settings(self) -> list[dict[str, Any]]:
        return [arm.settings() for arm in self]

    def code(self) -> list[str]:
        return [module for arm in self for module in arm.code()]


def tune_sparsity(
    arms: Sequence[Arm], on: str, by: str, samples: int, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """What was tried, means over the seeds, and the arguments that are best for all penalties together."""
    tried = []
    for arm in arms:
        penalised = {"none": arm} | {
            penalty: replace(arm, regulariser=regulariser_of(penalty, CENTRES[penalty], arm))
            for penalty in ("c2r", "orthogonality")
        }
        found = {
            name: means(trained(own, seeds, device), arm.features, on, samples)
            for name, own in penalised.items()
        }
        score = sum(of[by] or 0.0 for of in found.values()) / len(found)
        tried.append({"arguments": dict(arm.arguments)} | found | {by: score})
    return {"chosen": _best(tried, by)["arguments"], "tried": tried}


def tune(
    arm: Arm, penalty: str, on: str, by: str, samples: int, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """What was tried, by rising weight, means over the seeds; the best weight, and if it is on an edge."""
    penalised = replace(arm, regulariser=regulariser_of(penalty, CENTRES[penalty], arm))

    def measured(weight: float, saes: Mapping[int, SAE]) -> dict[str, Any]:
        return {"weight": weight} | means(saes, arm.features, on, samples)

    def tried_at(points: Sequence[float]) -> list[dict[str, Any]]:
        weights = [regulariser_of(penalty, point, arm).weight for point in points]
        found = trained_at(penalised, weights, seeds, device)
        return [measured(point, found[w]) for point, w in zip(points, weights, strict=True)]

    powers = range(-(POINTS // 2), POINTS // 2 + 1)
    tried = [measured(0.0, trained(arm, seeds, device))]  # the same for every penalty: kept
    tried += tried_at([_rounded(CENTRES[penalty] * RATIO**i) for i in powers])
    for _ in range(EXTENSIONS):
        best = _best(tried[1:], by)
        if best is tried[1]:
            tried[1:1] = tried_at([_rounded(best["weight"] / RATIO)])
        elif best is tried[-1]:
            tried += tried_at([_rounded(best["weight"] * RATIO)])
        else:
            break
    best = _best(tried[1:], by)
    return {
        "chosen": best["weight"],
        "better_than_none": (best[by] or 0.0) > (tried[0][by] or 0.0),
        "on_edge": best in (tried[1], tried[-1]),
        "tried": tried,
    }


def regulariser_of(penalty: str, weight: float, arm: Arm) -> Regulariser:
    """A penalty at a weight of its grid."""
    if penalty == "c2r":
        weight = weight_from_strength(weight, batch_size=arm.batch_size, d_sae=arm.d_sae)
    return create_regulariser(penalty, weight=weight)


def means(
    saes: Mapping[int, SAE], features: FeatureTree | GatedForest, on: str, samples: int
) -> dict[str, float | None]:
    """Means over the seeds of what is shown; None, and why, where a seed's SAE cannot be measured."""
    try:
        rows = REPORTS[on](saes, features, samples)
    except NotEvaluable as error:
        return dict.fromkeys(SHOWN[on]) | {"not_evaluable": str(error)}
    return {name: _mean([row[name] for row in rows]) for name in SHOWN[on]}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return round(sum(known) / len(known), 4) if known else None


def _rounded(weight: float) -> float:
    return float(f"{weight:.3g}")


def _best(tried: Sequence[dict[str, Any]], by: str) -> dict[str, Any]:
    """The first of the highest."""
    return max(tried, key=lambda row: -math.inf if row[by] is None else row[by])


def tuning_table(values: Mapping[str, Any], architectures: Sequence[str] = ABLATED) -> pd.DataFrame:
    """Penalty, architecture, weight, chosen (bool), and means over the tuning seeds; weight 0 is none."""
    return pd.DataFrame(
        {"penalty": penalty, "architecture": architecture, "chosen": row["weight"] == of["chosen"]}
        | row
        for architecture in architectures
        for penalty in penalties(architecture)
        for of in [values[slug(f"{architecture}, {penalty}")]]
        for row in of["tried"]
    )


def chosen(values: Mapping[str, Any], profile: Profile) -> dict[str, Any]:
    """What the cells choose, as the fields of the profile that repeat it; see WITHIN."""
    toy, benchmark = profile.toy, profile.benchmark

    def weights(penalty: str, in_use: Mapping[str, float]) -> dict[str, float]:
        return {
            architecture: _in_use_or_chosen(values[slug(f"{architecture}, {penalty}")], weight)
            for architecture, weight in in_use.items()
        }

    return {
        "architectures": toy.architectures
        | {
            a: _in_use_or_chosen(
                values[slug(f"{a}, sparsity")], toy.architectures[a], "detector_f1"
            )
            for a in SPARSITIES
        },
        "c2r_strength": weights("c2r", toy.c2r_strength),
        "orthogonality_weight": weights("orthogonality", toy.orthogonality_weight),
        "ablation_weight": {
            penalty: weights(penalty, in_use) for penalty, in_use in toy.ablation_weight.items()
        },
        "benchmark": {
            name: _in_use_or_chosen(values[f"benchmark-{penalty}"], getattr(benchmark, name), "f1")
            for name, penalty in (
                ("c2r_strength", "c2r"),
                ("orthogonality_weight", "orthogonality"),
            )
        },
    }


def _in_use_or_chosen(of: Mapping[str, Any], in_use: Any, by: str = "recovery") -> Any:
    """The setting in use, if it was tried and is as good as the one chosen but for WITHIN; else that one."""

    def score(setting: Any) -> float:
        found = [
            row[by] for row in of["tried"] if row.get("arguments", row.get("weight")) == setting
        ]
        return -math.inf if found in ([], [None]) else found[0]

    return in_use if score(in_use) >= score(of["chosen"]) - WITHIN else of["chosen"]

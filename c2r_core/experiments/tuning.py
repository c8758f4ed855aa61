"""How the toys' settings were chosen: python -m c2r_core.experiments.tuning

On seeds that no claim uses, for each architecture:

1. the sparsity at which the baseline's latents are the best detectors (F1). Where an architecture keeps
   a fixed number, that is the true one, 3 features a sample;
2. the weight of each penalty, C²R and OrtSAE, at which recovery is highest. Both get the same number of
   weights, in geometric steps, each over its own range from no effect to breakage.

The ablations of C²R get a weight of their own in the same way, with the first step's sparsity.

The outcome is written to results/tuning/toy.json and ablations.json and committed; profiles.yml repeats what
was chosen, and a test holds them together. (Twenty minutes on two cores.)
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from c2r_core.artefacts.profiles import ToyProfile, load_profile
from c2r_core.artefacts.results import tuning_dir, write_json
from c2r_core.experiments.synthetic import c2r_of, train_toy_arms
from c2r_core.experiments.toy import toy_table
from c2r_core.training import Orthogonality, Regulariser, create_regulariser

SEEDS = (0, 1, 2)
L1_WEIGHTS = (0.0125, 0.025, 0.05, 0.1, 0.2)
SPARSITIES: dict[str, list[dict[str, float]]] = {
    "relu": [{"l1_weight": weight} for weight in L1_WEIGHTS],
    "relu_april": [{"l1_weight": weight} for weight in L1_WEIGHTS],
    "topk": [{"k": 3}],
    "batch_topk": [{"k": 3}],
    "matryoshka_batch_topk": [{"k": 3}],
    "jump_relu": [{"target_l0": 3, "bandwidth": width} for width in (0.1, 0.3, 0.9)],
    "gated": [{"l1_weight": 8 * weight} for weight in L1_WEIGHTS],
    "p_anneal": [{"l1_weight": weight} for weight in L1_WEIGHTS],
}
C2R_STRENGTHS = (0.075, 0.15, 0.3, 0.6, 1.2, 2.4, 4.8)
ORTHOGONALITY_WEIGHTS = (0.1, 0.25, 0.625, 1.5625, 3.90625, 9.765625, 24.4140625)
ABLATIONS = {
    "unweighted_sum": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "group_lasso": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "product": (0.003, 0.01, 0.03, 0.1, 0.3, 1.0),
    "minimum": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
    "co_activation": (0.03, 0.1, 0.3, 1.0, 3.0, 10.0),
}
ABLATED = ("relu", "batch_topk")
SHOWN = [
    "detector_f1",
    "recovery",
    "absorption",
    "latents_per_parent",
    "near_duplicates",
    "fvu",
    "l0",
]


def tune(toy: ToyProfile, architecture: str) -> dict[str, Any]:
    """What was tried for an architecture, means over the seeds, and what was chosen."""
    settings = [
        toy.model_copy(update={"architectures": {architecture: own}})
        for own in SPARSITIES[architecture]
    ]
    sparsity = [_means(setting, architecture, None) for setting in settings]
    best = max(range(len(settings)), key=lambda i: sparsity[i]["detector_f1"])
    c2r = {strength: c2r_of(toy, strength) for strength in C2R_STRENGTHS}
    orthogonality = {weight: Orthogonality(weight) for weight in ORTHOGONALITY_WEIGHTS}
    tried = {
        "sparsity": [
            {"arguments": own} | result
            for own, result in zip(SPARSITIES[architecture], sparsity, strict=True)
        ],
        "c2r": _sweep(settings[best], architecture, c2r),
        "orthogonality": _sweep(settings[best], architecture, orthogonality),
    }
    return {
        "architectures": SPARSITIES[architecture][best],
        "c2r_strength": _best(tried["c2r"]),
        "orthogonality_weight": _best(tried["orthogonality"]),
        "tried": tried,
    }


def tune_ablation(toy: ToyProfile, name: str, architecture: str) -> dict[str, Any]:
    """What was tried for an ablation of C²R on an architecture, and the weight chosen."""
    arms = {weight: create_regulariser(name, weight=weight) for weight in ABLATIONS[name]}
    tried = _sweep(toy, architecture, arms)
    return {"weight": _best(tried), "tried": tried}


def _sweep(
    toy: ToyProfile, architecture: str, arms: Mapping[float, Regulariser]
) -> list[dict[str, float]]:
    return [
        {"weight": weight} | _means(toy, architecture, regulariser)
        for weight, regulariser in arms.items()
    ]


def _means(toy: ToyProfile, architecture: str, regulariser: Regulariser | None) -> dict[str, float]:
    runs = train_toy_arms(toy, architecture, {"arm": regulariser}, SEEDS)
    try:
        return toy_table(toy, runs)[SHOWN].mean().round(4).to_dict()
    except ValueError:  # the weight killed every latent of a seed: nothing to measure
        return dict.fromkeys(SHOWN) | {"recovery": 0.0}


def _best(tried: list[dict[str, float]]) -> float:
    return max(tried, key=lambda row: row["recovery"])["weight"]


def main() -> None:
    """Tune every architecture and ablation, print and write the outcome."""
    toy = load_profile("default").toy
    outcome = {}
    for architecture in SPARSITIES:
        outcome[architecture] = tune(toy, architecture)
        chosen = {name: value for name, value in outcome[architecture].items() if name != "tried"}
        print(architecture, chosen, flush=True)
    _write("toy", outcome)
    tuned = toy.model_copy(
        update={"architectures": {name: one["architectures"] for name, one in outcome.items()}}
    )
    ablations = {
        name: {architecture: tune_ablation(tuned, name, architecture) for architecture in ABLATED}
        for name in ABLATIONS
    }
    print({n: {a: one["weight"] for a, one in by.items()} for n, by in ablations.items()})
    _write("ablations", ablations)


def _write(name: str, outcome: Mapping[str, Any]) -> None:
    criterion = "weights: highest recovery; sparsity: highest detector F1 of the baseline (means)"
    write_json(
        tuning_dir() / f"{name}.json",
        {"criterion": criterion, "seeds": SEEDS, "outcome": outcome},
    )


if __name__ == "__main__":
    main()

"""How the toys' settings were chosen: python -m c2r_core.support.tune_toys

On seeds that no claim uses, for each architecture:

1. the sparsity at which the baseline's latents are the best detectors (F1). Where an architecture keeps
   a fixed number, that is the true one, 3 features a sample;
2. the weight of each penalty, C²R and OrtSAE, at which recovery is highest. Both get the same number of
   weights, in geometric steps, each over its own range from no effect to breakage.

The outcome is written to results/tuning/toy.json and committed; profiles.yml repeats what was chosen, and a
test holds the two together. (A quarter of an hour on two cores.)
"""

from __future__ import annotations

from typing import Any

from c2r_core.support.profiles import ToyProfile, load_profile
from c2r_core.support.results import results_dir, write_json
from c2r_core.support.toy_runs import c2r_of, train_toy_arms
from c2r_core.support.toy_tables import toy_table
from c2r_core.training import Orthogonality, Regulariser

SEEDS = (0, 1, 2)
L1_WEIGHTS = (0.0125, 0.025, 0.05, 0.1, 0.2)
SPARSITIES: dict[str, list[dict[str, float]]] = {
    "relu": [{"l1_weight": weight} for weight in L1_WEIGHTS],
    "relu_april": [{"l1_weight": weight} for weight in L1_WEIGHTS],
    "topk": [{"k": 3}],
    "batch_topk": [{"k": 3}],
    "matryoshka_batch_topk": [{"k": 3}],
    "jump_relu": [{"target_l0": 3, "bandwidth": width} for width in (0.03, 0.1, 0.3)],
    "gated": [{"l1_weight": 8 * weight} for weight in L1_WEIGHTS],
    "p_anneal": [{"l1_weight": weight} for weight in L1_WEIGHTS],
}
C2R_STRENGTHS = (0.075, 0.15, 0.3, 0.6, 1.2, 2.4)
ORTHOGONALITY_WEIGHTS = (0.1, 0.25, 0.625, 1.5625, 3.90625, 9.765625)
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

    def means(toy: ToyProfile, regulariser: Regulariser | None) -> dict[str, float]:
        runs = train_toy_arms(toy, architecture, {"arm": regulariser}, SEEDS)
        return toy_table(toy, runs)[SHOWN].mean().round(4).to_dict()

    settings = [
        toy.model_copy(update={"architectures": {architecture: own}})
        for own in SPARSITIES[architecture]
    ]
    sparsity = [means(setting, None) for setting in settings]
    best = max(range(len(settings)), key=lambda i: sparsity[i]["detector_f1"])
    c2r = [means(settings[best], c2r_of(toy, strength)) for strength in C2R_STRENGTHS]
    orthogonality = [
        means(settings[best], Orthogonality(weight)) for weight in ORTHOGONALITY_WEIGHTS
    ]
    return {
        "architectures": SPARSITIES[architecture][best],
        "c2r_strength": _of_highest_recovery(C2R_STRENGTHS, c2r),
        "orthogonality_weight": _of_highest_recovery(ORTHOGONALITY_WEIGHTS, orthogonality),
        "tried": {
            "sparsity": [
                {"arguments": own} | result
                for own, result in zip(SPARSITIES[architecture], sparsity, strict=True)
            ],
            "c2r": _rows(C2R_STRENGTHS, c2r),
            "orthogonality": _rows(ORTHOGONALITY_WEIGHTS, orthogonality),
        },
    }


def _of_highest_recovery(weights: tuple[float, ...], results: list[dict[str, float]]) -> float:
    return max(zip(weights, results, strict=True), key=lambda pair: pair[1]["recovery"])[0]


def _rows(weights: tuple[float, ...], results: list[dict[str, float]]) -> list[dict[str, float]]:
    return [{"weight": w} | result for w, result in zip(weights, results, strict=True)]


def main() -> None:
    """Tune every architecture, print and write the outcome."""
    toy = load_profile("default").toy
    outcome = {}
    for architecture in SPARSITIES:
        outcome[architecture] = tune(toy, architecture)
        chosen = {name: value for name, value in outcome[architecture].items() if name != "tried"}
        print(architecture, chosen, flush=True)
    write_json(
        results_dir("full").parent / "tuning" / "toy.json",
        {
            "criterion": "sparsity: highest detector F1 of the baseline; weights: highest recovery; "
            "means over the seeds",
            "seeds": SEEDS,
            "outcome": outcome,
        },
    )


if __name__ == "__main__":
    main()

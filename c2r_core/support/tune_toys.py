"""How the toys' weights were chosen: python -m c2r_core.support.tune_toys

C²R and OrtSAE get the same number of weights, in geometric steps, each over its own range from no
effect to breakage, on seeds that no claim uses. For each architecture the weight of highest
recovery, mean over seeds, is taken. The outcome is written to results/tuning/toy.json and committed;
profiles.yml repeats the chosen weights, and a test holds the two together. (Four minutes on two cores.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from c2r_core.support.profiles import load_profile
from c2r_core.support.results import results_dir, write_json
from c2r_core.support.toy_runs import ToyArm, train_toy_arms
from c2r_core.support.toy_tables import toy_table

SEEDS = (0, 1, 2)
ARCHITECTURES = ("relu", "batch_topk")
WEIGHTS = {
    "c2r_weight": [0.025, 0.05, 0.1, 0.2, 0.4, 0.8],
    "orthogonality_weight": [0.1, 0.25, 0.625, 1.5625, 3.90625, 9.765625],
}
SHOWN = ["recovery", "absorption", "latents_per_parent", "near_duplicates", "fvu"]


def choose(recovery: Mapping[tuple[str, str], float]) -> dict[str, dict[str, float]]:
    """Best weight of each penalty and architecture, from recoveries by (arm, architecture)."""
    return {
        name: {
            architecture: max(weights, key=lambda w: recovery[f"{name}={w:g}", architecture])  # noqa: B023
            for architecture in ARCHITECTURES
        }
        for name, weights in WEIGHTS.items()
    }


def main() -> None:
    """Train every candidate, write means and the choice."""
    import pandas as pd

    toy = load_profile("default").toy
    arms = {"baseline": ToyArm()} | {
        f"{name}={weight:g}": replace(ToyArm(), **{name: weight})
        for name, weights in WEIGHTS.items()
        for weight in weights
    }
    tables = [
        toy_table(toy, train_toy_arms(toy, architecture, arms, SEEDS)).assign(
            architecture=architecture
        )
        for architecture in ARCHITECTURES
    ]
    means = pd.concat(tables).groupby(["arm", "architecture"], sort=False)[SHOWN].mean()
    chosen = choose(means["recovery"].to_dict())
    print(means.round(3).to_string())
    print("chosen:", chosen)
    write_json(
        results_dir("full").parent / "tuning" / "toy.json",
        {
            "criterion": "highest recovery, mean over seeds",
            "seeds": SEEDS,
            "architectures": ARCHITECTURES,
            "weights": WEIGHTS,
            "means": means.reset_index().to_dict("records"),
            "chosen": chosen,
        },
    )


if __name__ == "__main__":
    main()

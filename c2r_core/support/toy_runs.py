"""The toy experiments: arms times seeds as one stack, trained once and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2r_core.data.toy import FeatureTree, ToyBatches
from c2r_core.metrics.intervals import Interval, paired_interval
from c2r_core.metrics.toy import evaluate_toy
from c2r_core.saes import SAE, create_sae, load_sae, save_sae
from c2r_core.support.cache import cached
from c2r_core.support.profiles import ToyProfile
from c2r_core.training import C2R, Orthogonality, TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd

EVALUATION_SEED = 10**6  # no training seed comes near, so evaluation samples are new


@dataclass(frozen=True)
class ToyArm:
    """Weights of the regularisers of one arm; both 0 is the baseline."""

    c2r_weight: float = 0.0
    orthogonality_weight: float = 0.0


FIRST_SEED = 10  # λ was chosen on seeds below it; effects are confirmed on seeds from it on

ToyRuns = dict[tuple[str, int], SAE]


def feature_tree(toy: ToyProfile) -> FeatureTree:
    """The profile's features."""
    names = FeatureTree.__dataclass_fields__.keys() - {"seed"}
    return FeatureTree(**{name: getattr(toy, name) for name in names})


def standard_arms(toy: ToyProfile) -> dict[str, ToyArm]:
    """Baseline, C²R and OrtSAE with the profile's weights."""
    return {
        "baseline": ToyArm(),
        "C²R": ToyArm(c2r_weight=toy.c2r_weight),
        "OrtSAE": ToyArm(orthogonality_weight=toy.orthogonality_weight),
    }


def confirmation_seeds(toy: ToyProfile, seed: int) -> list[int]:
    """The profile's number of seeds, none of which was used to choose a weight."""
    return [FIRST_SEED + seed + i for i in range(toy.seeds)]


def train_toy_arms(
    toy: ToyProfile,
    architecture: str,
    arms: Mapping[str, ToyArm],
    seeds: Sequence[int],
    device: str = "cpu",
) -> ToyRuns:
    """Train every arm with every seed; the same seed means the same start and the same data.

    Parameters
    ----------
    architecture : "relu" or "batch_topk" or "topk"
    arms : mapping from the arm's name to its weights
    seeds : sequence of int

    Returns
    -------
    dict from (arm, seed) to a trained SAE
    """
    runs = [(arm, seed) for arm in arms for seed in seeds]
    key = {
        "toy": toy.model_dump(
            exclude={"seeds", "evaluation_samples", "c2r_weight", "orthogonality_weight"}
        ),
        "architecture": architecture,
        "arms": {name: asdict(arm) for name, arm in arms.items()},
        "seeds": list(seeds),
        "device": device.partition(":")[0],
    }

    def build(folder: Path) -> None:
        own = {"l1_weight": toy.l1_weight} if architecture == "relu" else {"k": toy.k}
        stack = create_sae(
            architecture, d_in=toy.d_in, d_sae=toy.d_sae, seed=[seed for _, seed in runs], **own
        ).to(device)
        train(
            stack,
            ToyBatches(feature_tree(toy), toy.batch_size, [seed for _, seed in runs]),
            TrainConfig(steps=toy.steps, lr=toy.lr, aux_k_coefficient=0.0),
            [
                C2R([arms[arm].c2r_weight for arm, _ in runs]),
                Orthogonality([arms[arm].orthogonality_weight for arm, _ in runs]),
            ],
            progress=False,
        )
        for number, sae in enumerate(stack.unstack()):
            save_sae(sae, folder / str(number))

    folder = cached("toy", key, build)
    return {run: load_sae(folder / str(number)) for number, run in enumerate(runs)}


def toy_table(toy: ToyProfile, runs: ToyRuns) -> pd.DataFrame:
    """One row per run: arm, seed and the fields of `ToyReport`, on samples no run has seen."""
    import pandas as pd

    tree = feature_tree(toy)
    sample = tree.sample(toy.evaluation_samples, torch.Generator().manual_seed(EVALUATION_SEED))
    return pd.DataFrame(
        [
            {"arm": arm, "seed": seed} | asdict(evaluate_toy(sae, tree, sample))
            for (arm, seed), sae in runs.items()
        ]
    )


def values_by_seed(table: pd.DataFrame, arm: str, metric: str) -> list[float]:
    """One arm's values of a metric, ordered by seed."""
    return table[table["arm"] == arm].sort_values("seed")[metric].tolist()


def paired_difference(
    table: pd.DataFrame,
    metric: str,
    *,
    arm: str = "C²R",
    baseline: str = "baseline",
    scale: float = 1.0,
) -> Interval:
    """95 % interval of arm − scale · baseline in one metric of a `toy_table`, paired by seed."""
    values = (values_by_seed(table, name, metric) for name in (arm, baseline))
    return paired_interval(*values, scale=scale)


@torch.no_grad()
def family_cosines(
    sae: SAE, tree: FeatureTree, parent: int = 0, n: int = 8
) -> tuple[list[str], Tensor]:
    """The n latents nearest to a parent or one of its children, as names and a matrix.

    The matrix (n, 1 + children) holds their cosines with the true directions, parent first; rows
    are ordered by the direction they are nearest to.
    """
    family = tree.directions[[parent, *tree.children[parent].tolist()]]
    cosines = torch.nn.functional.normalize(sae.W_dec.cpu(), dim=-1) @ family.T
    nearest = cosines.max(1)
    chosen = nearest.values.topk(n).indices
    chosen = chosen[torch.argsort(nearest.indices[chosen] * 10 - nearest.values[chosen])]
    return [f"latent {i}" for i in chosen.tolist()], cosines[chosen]

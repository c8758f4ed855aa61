"""The toy experiments: arms times seeds as one stack, trained once and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from c2r_core.data.toy import FeatureTree, ToyBatches
from c2r_core.saes import SAE, create_sae, load_sae, save_sae
from c2r_core.support.cache import cached
from c2r_core.support.profiles import ToyProfile
from c2r_core.training import C2R, Orthogonality, TrainConfig, train


@dataclass(frozen=True)
class ToyArm:
    """Weights of the regularisers of one arm; both 0 is the baseline."""

    c2r_weight: float = 0.0
    orthogonality_weight: float = 0.0


ToyRuns = dict[tuple[str, int], SAE]


def feature_tree(toy: ToyProfile) -> FeatureTree:
    """The profile's features."""
    names = FeatureTree.__dataclass_fields__.keys() - {"seed"}
    return FeatureTree(**{name: getattr(toy, name) for name in names})


def standard_arms(toy: ToyProfile, architecture: str) -> dict[str, ToyArm]:
    """Baseline, C²R and OrtSAE with the profile's weights for an architecture."""
    return {
        "baseline": ToyArm(),
        "C²R": ToyArm(c2r_weight=toy.c2r_weight[architecture]),
        "OrtSAE": ToyArm(orthogonality_weight=toy.orthogonality_weight[architecture]),
    }


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

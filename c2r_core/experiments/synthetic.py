"""The toy experiments: each arm's seeds as one stack, trained once and kept in the cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import ToyProfile
from c2r_core.data.toy import FeatureTree, ToyBatches
from c2r_core.saes import SAE, create_sae, load_sae, save_sae
from c2r_core.training import (
    C2R,
    Orthogonality,
    Regulariser,
    TrainConfig,
    train,
    weight_from_strength,
)

ToyRuns = dict[tuple[str, int], SAE]


def feature_tree(toy: ToyProfile) -> FeatureTree:
    """The profile's features."""
    names = FeatureTree.__dataclass_fields__.keys() - {"seed"}
    return FeatureTree(**{name: getattr(toy, name) for name in names})


def c2r_of(toy: ToyProfile, strength: float, **settings: Any) -> C2R:
    """C²R of a dimensionless strength at the profile's batch size and width.

    Parameters
    ----------
    strength : float
        As in `weight_from_strength`.
    **settings
        Other fields of `C2R`, such as alpha or every.
    """
    weight = weight_from_strength(
        strength, batch_size=toy.batch_size, d_sae=toy.d_sae, alpha=settings.get("alpha", 1.0)
    )
    return C2R(weight, **settings)


def standard_arms(toy: ToyProfile, architecture: str) -> dict[str, Regulariser | None]:
    """Baseline, C²R and OrtSAE with the profile's weights for an architecture."""
    return {
        "baseline": None,
        "C²R": c2r_of(toy, toy.c2r_strength[architecture]),
        "OrtSAE": Orthogonality(toy.orthogonality_weight[architecture]),
    }


def train_toy_arms(
    toy: ToyProfile,
    architecture: str,
    arms: Mapping[str, Regulariser | None],
    seeds: Sequence[int],
    device: str = "cpu",
) -> ToyRuns:
    """Train every arm with every seed; the same seed means the same start and the same data.

    An arm's seeds are one stack, and the unit of the cache: an arm that two notebooks share is
    trained once, whatever stands beside it.

    Parameters
    ----------
    architecture : str
        One of the profile's `architectures`.
    arms : mapping from the arm's name to its regulariser, None for the baseline
    seeds : sequence of int

    Returns
    -------
    dict from (arm, seed) to a trained SAE
    """
    runs: ToyRuns = {}
    for name, regulariser in arms.items():
        folder = _trained(toy, architecture, regulariser, list(seeds), device)
        runs |= {(name, seed): load_sae(folder / str(seed)) for seed in seeds}
    return runs


def _trained(
    toy: ToyProfile,
    architecture: str,
    regulariser: Regulariser | None,
    seeds: list[int],
    device: str,
) -> Path:
    own = toy.architectures[architecture]
    features = feature_tree(toy)
    config = TrainConfig(steps=toy.steps, lr=toy.lr, aux_k_coefficient=0.0)
    penalty = regulariser and {"name": regulariser.name} | asdict(regulariser)
    key = {
        "features": asdict(features),
        "architecture": architecture,
        "arguments": own,
        "d_sae": toy.d_sae,
        "batch_size": toy.batch_size,
        "config": asdict(config),
        "regulariser": penalty,
        "seeds": seeds,
        "device": device.partition(":")[0],
    }

    def build(folder: Path) -> None:
        stack = create_sae(architecture, d_in=toy.d_in, d_sae=toy.d_sae, seed=seeds, **own).to(
            device
        )
        batches = ToyBatches(features, toy.batch_size, seeds)
        train(stack, batches, config, [regulariser] if regulariser else [], progress=False)
        for seed, sae in zip(seeds, stack.unstack(), strict=True):
            save_sae(sae, folder / str(seed))

    return cached("toy", key, build)

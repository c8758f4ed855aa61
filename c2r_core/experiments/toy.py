"""Study `toy`, of notebook 03: C²R and OrtSAE on a tree of features; and what other toy studies share."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile, ToyProfile, training_seeds
from c2r_core.data.toy import FeatureTree, ToySample
from c2r_core.experiments.study import NamedArm, Study, arm_table
from c2r_core.experiments.synthetic import EVALUATION_SEED, Arm, trained
from c2r_core.metrics.toy import evaluate_toy
from c2r_core.saes import SAE
from c2r_core.training import C2R, Orthogonality, Regulariser, TrainConfig, weight_from_strength

ARCHITECTURES = {"relu": "ReLU", "batch_topk": "BatchTopK"}


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Baseline, C²R and OrtSAE on a ReLU SAE, which splits, and on BatchTopK, which absorbs."""
    return toy_cells("toy", arms(profile.toy), profile, profile.toy.seeds, seed, device)


def arms(toy: ToyProfile) -> Iterator[NamedArm]:
    """The study's arms, by architecture."""
    for name, title in ARCHITECTURES.items():
        for arm, penalty in standard_arms(toy, name).items():
            about = {"architecture": title, "arm": arm}
            yield NamedArm(f"{title}, {arm}", toy_arm(toy, name, penalty), about)


def feature_tree(toy: ToyProfile) -> FeatureTree:
    """The profile's features."""
    names = FeatureTree.__dataclass_fields__.keys() - {"seed"}
    return FeatureTree(**{name: getattr(toy, name) for name in names})


def toy_arm(toy: ToyProfile, architecture: str, regulariser: Regulariser | None) -> Arm:
    """An architecture of the profile with a regulariser, None for the baseline."""
    return Arm(
        features=feature_tree(toy),
        architecture=architecture,
        d_sae=toy.d_sae,
        batch_size=toy.batch_size,
        config=TrainConfig(steps=toy.steps, lr=toy.lr, aux_k_coefficient=0.0),
        arguments=toy.architectures[architecture],
        regulariser=regulariser,
    )


def c2r_of(toy: ToyProfile, strength: float, **settings: Any) -> C2R:
    """C²R of a dimensionless strength at the profile's batch size and width; settings are its fields."""
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


def toy_cells(
    name: str, arms: Iterable[NamedArm], profile: Profile, n_seeds: int, seed: int, device: str
) -> list[Cell]:
    """The cells of a study on trees: for each arm a list of `ToyReport`s, one a seed."""
    study = Study(name, profile, training_seeds(n_seeds, seed), device)
    return study.cells(arms, measure, samples=profile.toy.evaluation_samples)


def measure(arm: Arm, samples: int, seeds: Sequence[int], device: str) -> list[dict[str, Any]]:
    """`ToyReport` of each seed, on samples that no run has seen."""
    return reports(trained(arm, seeds, device), arm.features, samples)


def reports(saes: Mapping[int, SAE], features: FeatureTree, samples: int) -> list[dict[str, Any]]:
    """`ToyReport` of SAEs by seed."""
    sample = evaluation_sample(features, samples)
    return [
        {"seed": seed} | asdict(evaluate_toy(sae, features, sample)) for seed, sae in saes.items()
    ]


@functools.lru_cache(maxsize=2)
def evaluation_sample(features: FeatureTree, samples: int) -> ToySample:
    """The samples on which all SAEs on these features are measured."""
    return features.sample(samples, torch.Generator().manual_seed(EVALUATION_SEED))


def toy_table(values: Mapping[str, Any], architecture: str, toy: ToyProfile) -> pd.DataFrame:
    """Arm, seed and the fields of `ToyReport`, from the values of the study's cells."""
    table = arm_table(values, arms(toy))
    own = table[table["architecture"] == ARCHITECTURES[architecture]]
    return own.drop(columns="architecture").reset_index(drop=True)


def values_by_seed(table: pd.DataFrame, arm: str, metric: str) -> list[float]:
    """One arm's values of a metric, ordered by seed."""
    return table[table["arm"] == arm].sort_values("seed")[metric].tolist()


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

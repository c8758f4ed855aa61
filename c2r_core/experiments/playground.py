"""Study `playground`: a grid of small SAEs on a small tree of features, for the page with sliders.

One cell for each world: how often a parent comes with a child, and how alike two single features are. In it
C²R is trained at every strength and exponent of the profile, beside one point without a penalty.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import PlaygroundProfile, Profile, training_seeds
from c2r_core.data.toy import FeatureTree
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm, trained, trained_at
from c2r_core.experiments.toy import evaluation_sample, reports
from c2r_core.metrics.encoding import encode
from c2r_core.metrics.toy import trained_scale
from c2r_core.saes import SAE
from c2r_core.training import C2R, TrainConfig, weight_from_strength

SHOWN = ("mcc", "recovery", "absorption", "latents_per_feature", "fvu", "live_share")
"""Fields of `ToyReport` that the page shows."""
DECIMALS = 4


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell for each world."""
    own = profile.playground
    study = Study("playground", profile, training_seeds(own.seeds, seed), device)
    given = {"strengths": own.strengths, "alphas": own.alphas}
    return [
        study.cell(name, measure, arm=arm, **given, samples=profile.toy.evaluation_samples)
        for name, (arm, _) in worlds(profile).items()
    ]


def worlds(profile: Profile) -> dict[str, tuple[Arm, dict[str, float]]]:
    """By the cell's name: an arm of C²R, whose weight and α are replaced, and where the world stands."""
    toy, own = profile.toy, profile.playground
    found = {}
    for child_probability in own.child_probabilities:
        for cosine in own.cosines:
            arm = Arm(
                features=_tree(own, toy.magnitude_sd, child_probability, cosine),
                architecture=own.architecture,
                d_sae=own.d_sae,
                batch_size=toy.batch_size,
                config=TrainConfig(steps=own.steps, lr=toy.lr, aux_k_coefficient=0.0),
                arguments=own.arguments,
                regulariser=C2R(1.0),
            )
            about = {"child": child_probability, "cosine": cosine}
            found[slug(f"child {child_probability:g}, cosine {cosine:g}")] = arm, about
    return found


def _tree(
    own: PlaygroundProfile, magnitude_sd: float, child_probability: float, cosine: float
) -> FeatureTree:
    return FeatureTree(
        d_in=own.d_in,
        n_parents=own.n_parents,
        children_per_parent=own.children_per_parent,
        n_singles=own.n_singles,
        parent_probability=own.parent_probability,
        parent_alone=round(1 - child_probability, 6),
        single_probability=own.single_probability,
        magnitude_sd=magnitude_sd,
        group_size=own.group_size,
        group_cosine=cosine,
    )


def measure(
    arm: Arm,
    strengths: Sequence[float],
    alphas: Sequence[float],
    samples: int,
    seeds: Sequence[int],
    device: str,
) -> list[dict[str, Any]]:
    """The point without a penalty (α null), then C²R's at every α and strength.

    A point has `alpha`, `strength`, `weight` (λ), each of SHOWN as a list by seed, and `cosines`, the first
    seed's live latents, as `cosine_rows` writes them.
    """
    plain = trained(replace(arm, regulariser=None), seeds, device)
    points = [_point(plain, arm.features, samples, None, 0.0, 0.0)]
    for alpha in alphas:
        weights = [
            weight_from_strength(s, batch_size=arm.batch_size, d_sae=arm.d_sae, alpha=alpha)
            for s in strengths
        ]
        of_alpha = replace(arm, regulariser=C2R(1.0, alpha=alpha))
        by_weight = trained_at(of_alpha, weights, seeds, device)
        for strength, weight in zip(strengths, weights, strict=True):
            saes = by_weight[weight]
            points.append(_point(saes, arm.features, samples, alpha, strength, weight))
    return points


def _point(
    saes: Mapping[int, SAE],
    features: FeatureTree,
    samples: int,
    alpha: float | None,
    strength: float,
    weight: float,
) -> dict[str, Any]:
    rows = reports(saes, features, samples)
    values = {name: [round(row[name], DECIMALS) for row in rows] for name in SHOWN}
    first = next(iter(saes.values()))
    x = evaluation_sample(features, samples).x * trained_scale(first)
    live = (encode(first, x) > 0).any(0)
    about = {"alpha": alpha, "strength": strength, "weight": weight}
    return about | values | {"cosines": cosine_rows(first.W_dec.cpu()[live], features)}


@torch.no_grad()
def cosine_rows(rows: Tensor, features: FeatureTree) -> str:
    """Cosines with the true directions in hundredths: a line for each row of (n, d_in), with "/" between.

    Rows are ordered by the feature that they are nearest to, and by that cosine where it is the same.

    Examples
    --------
    >>> tree = FeatureTree(d_in=3, n_parents=0, n_singles=3)
    >>> cosine_rows(tree.directions[[2, 0]], tree)
    '100 0 0/0 0 100'
    """
    cosines = torch.nn.functional.normalize(rows, dim=-1) @ features.directions.T
    nearest = cosines.max(1)
    order = torch.argsort(nearest.indices * 10 - nearest.values)
    hundredths = (100 * cosines[order]).round().int().tolist()
    return "/".join(" ".join(map(str, row)) for row in hundredths)


def feature_names(features: FeatureTree) -> list[str]:
    """A short name for each true feature, in order: parents "A", "B", …, children "a1", "a2", …, singles.

    Singles of a group share a number: "1x", "1y", "2x", …

    Examples
    --------
    >>> tree = FeatureTree(d_in=8, n_parents=1, children_per_parent=2, n_singles=4, group_size=2)
    >>> feature_names(tree)
    ['A', 'a1', 'a2', '1x', '1y', '2x', '2y']
    """
    return list(_names(features))


def _names(features: FeatureTree) -> Iterator[str]:
    parents = [chr(ord("A") + i) for i in range(features.n_parents)]
    yield from parents
    for parent in parents:
        yield from (f"{parent.lower()}{i + 1}" for i in range(features.children_per_parent))
    for single in range(features.n_singles):
        group, place = divmod(single, features.group_size)
        yield f"{group + 1}{chr(ord('x') + place) if features.group_size > 1 else ''}"

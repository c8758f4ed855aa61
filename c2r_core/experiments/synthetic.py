"""The one way to train on synthetic features: an arm's seeds are one stack, trained once, and cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from c2r_core.artefacts.cache import cached
from c2r_core.data.batches import ToyBatches
from c2r_core.data.forest import GatedForest
from c2r_core.data.toy import FeatureTree
from c2r_core.saes import ARCHITECTURES, SAE, create_sae, load_sae, save_sae
from c2r_core.training import Regulariser, TrainConfig, train

EVALUATION_SEED = 10**6  # no training seed comes near, so evaluation samples are new
AT_ONCE = 24
"""SAEs in a stack."""


@dataclass(frozen=True)
class Arm:
    """One way to train an SAE on synthetic features.

    The same seed means the same first weights and the same data, whatever else differs between arms.
    """

    features: FeatureTree | GatedForest
    architecture: str
    d_sae: int
    batch_size: int
    config: TrainConfig
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the architecture's class, beside d_in, d_sae and seed."""
    regulariser: Regulariser | None = None

    def settings(self) -> dict[str, Any]:
        """All that decides the trained SAE, but its seed: JSON."""
        penalty = self.regulariser
        return {
            "features": {"name": type(self.features).__name__} | asdict(self.features),
            "architecture": {"name": self.architecture} | dict(self.arguments),
            "d_sae": self.d_sae,
            "batch_size": self.batch_size,
            "config": self.config.decides(),
            "regulariser": penalty and {"name": penalty.name} | asdict(penalty),
        }

    def code(self) -> list[str]:
        """The modules of its features, its architecture and its regulariser."""
        taken = [type(self.features), ARCHITECTURES[self.architecture]]
        taken += [type(self.regulariser)] if self.regulariser else []
        return [one.__module__ for one in taken]


def trained(arm: Arm, seeds: Sequence[int], device: str = "cpu") -> dict[int, SAE]:
    """The arm's SAE of every seed, trained or from the cache."""
    weight = arm.regulariser.weight if arm.regulariser else 0.0
    return trained_at(arm, [weight], seeds, device)[weight]


def trained_at(
    arm: Arm, weights: Sequence[float], seeds: Sequence[int], device: str = "cpu"
) -> dict[float, dict[int, SAE]]:
    """By weight of the arm's penalty, in place of its own: the SAE of every seed, trained or from the cache.

    Each SAE is what it would be alone. Up to AT_ONCE of them are trained in one stack, with each seed's
    batches drawn once for all weights.
    """
    seeds, found = list(seeds), {}
    per_stack = max(1, AT_ONCE // len(seeds))
    for first in range(0, len(weights), per_stack):
        found |= _stack(arm, list(weights[first : first + per_stack]), seeds, device)
    return found


def _stack(
    arm: Arm, weights: list[float], seeds: list[int], device: str
) -> dict[float, dict[int, SAE]]:
    pairs = [(weight, seed) for weight in weights for seed in seeds]

    def build(folder) -> None:
        stack = create_sae(
            arm.architecture,
            d_in=arm.features.d_in,
            d_sae=arm.d_sae,
            seed=[seed for _, seed in pairs],
            **arm.arguments,
        ).to(device)
        batches = ToyBatches(arm.features, arm.batch_size, [seed for _, seed in pairs])
        penalties = []
        if arm.regulariser:
            penalties = [replace(arm.regulariser, weight=[weight for weight, _ in pairs])]
        train(stack, batches, arm.config, penalties, progress=False)
        for (weight, seed), sae in zip(pairs, stack.unstack(), strict=True):
            save_sae(sae, folder / str(weights.index(weight)) / str(seed))

    penalty = arm.regulariser and replace(arm.regulariser, weight=weights)
    key = replace(arm, regulariser=penalty).settings()
    key |= {"seeds": seeds, "device": device.partition(":")[0]}
    code = ["c2r_core.experiments.synthetic:trained", *arm.code()]
    folder = cached("sae", key, build, code=code)
    return {
        weight: {seed: load_sae(folder / str(number) / str(seed)) for seed in seeds}
        for number, weight in enumerate(weights)
    }

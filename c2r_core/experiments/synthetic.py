"""The one way to train on synthetic features: an arm's seeds are one stack, trained once, and cached."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from c2r_core.artefacts.cache import cached
from c2r_core.data.batches import ToyBatches
from c2r_core.data.forest import GatedForest
from c2r_core.data.toy import FeatureTree
from c2r_core.saes import SAE, create_sae, load_sae, save_sae
from c2r_core.training import Regulariser, TrainConfig, train

EVALUATION_SEED = 10**6  # no training seed comes near, so evaluation samples are new


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
            "config": asdict(self.config),
            "regulariser": penalty and {"name": penalty.name} | asdict(penalty),
        }


def trained(arm: Arm, seeds: Sequence[int], device: str = "cpu") -> dict[int, SAE]:
    """The arm's SAE of every seed, trained or from the cache."""
    seeds = list(seeds)

    def build(folder) -> None:
        d_in = arm.features.d_in
        stack = create_sae(
            arm.architecture, d_in=d_in, d_sae=arm.d_sae, seed=seeds, **arm.arguments
        )
        stack = stack.to(device)
        batches = ToyBatches(arm.features, arm.batch_size, seeds)
        penalties = [arm.regulariser] if arm.regulariser else []
        train(stack, batches, arm.config, penalties, progress=False)
        for seed, sae in zip(seeds, stack.unstack(), strict=True):
            save_sae(sae, folder / str(seed))

    key = arm.settings() | {"seeds": seeds, "device": device.partition(":")[0]}
    folder = cached("sae", key, build, code=["c2r_core.experiments.synthetic:trained"])
    return {seed: load_sae(folder / str(seed)) for seed in seeds}

"""Does assignment consistency foretell how far a latent can be used? `make validate` asks many SAEs.

Each SAE of a stated list (architectures, widths, k, penalties, one training cut short) is measured on
two disjoint halves of the words: assignment consistency and absorption on one, and
what picking a latent there is worth on the other. One JSON a cell, in results/validation/: a
rerun fills only what is missing. `summary.json` holds the rank correlations over SAEs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from c2r_core import (
    C2R,
    Orthogonality,
    TrainConfig,
    create_sae,
    load_sae,
    save_sae,
    train,
    weight_from_strength,
)
from c2r_core.data.activations import ActivationStore, StoreBatches
from c2r_core.saes import SAE
from c2r_core.support.cache import cached
from c2r_core.support.language_model_runs import resolve_precision
from c2r_core.support.profiles import LanguageModelProfile

SEED = 10


@dataclass(frozen=True)
class Spec:
    """One SAE of the list."""

    architecture: str
    d_sae: int
    k: int
    c2r_strength: float = 0.0
    orthogonality_weight: float = 0.0
    steps: int = 1000
    seed: int = SEED

    @property
    def name(self) -> str:
        parts = [self.architecture, f"{self.d_sae}", f"k{self.k}"]
        if self.c2r_strength:
            parts.append(f"c2r{self.c2r_strength:g}")
        if self.orthogonality_weight:
            parts.append(f"ort{self.orthogonality_weight:g}")
        if self.steps != Spec.steps:
            parts.append(f"{self.steps}steps")
        return "-".join([*parts, f"seed{self.seed}"])


def specs(lm: LanguageModelProfile) -> Iterator[Spec]:
    """The list."""
    c2r, ort = lm.c2r_strength, lm.orthogonality_weight
    penalties = [{}, {"c2r_strength": c2r}, {"orthogonality_weight": ort}]
    for d_sae in (1024, 2048):
        for k in (5, 10, 32):
            for penalty in penalties:
                yield Spec("batch_topk", d_sae, k, **penalty)
        yield Spec("batch_topk", d_sae, 10, c2r_strength=0.3)
        for architecture in ("topk", "matryoshka_batch_topk"):
            for penalty in penalties[:2]:
                yield Spec(architecture, d_sae, 10, **penalty)
        yield Spec("batch_topk", d_sae, 10, steps=200)
    for penalty in penalties:
        yield Spec("batch_topk", 4096, 10, **penalty)


def trained(spec: Spec, lm: LanguageModelProfile, store: ActivationStore) -> SAE:
    """The SAE, from the cache where it is there."""
    config = TrainConfig(
        steps=spec.steps,
        lr=lm.lr,
        clip_norm=lm.clip_norm,
        aux_k_coefficient=lm.aux_k_coefficient,
        precision=resolve_precision(lm.precision, "cpu"),
        seed=spec.seed,
    )
    regularisers = []
    if spec.c2r_strength:
        weight = weight_from_strength(spec.c2r_strength, batch_size=lm.batch_size, d_sae=spec.d_sae)
        regularisers.append(C2R(weight, every=lm.penalty_every))
    if spec.orthogonality_weight:
        regularisers.append(Orthogonality(spec.orthogonality_weight, every=lm.penalty_every))
    key = {
        "spec": asdict(spec),
        "batch_size": lm.batch_size,
        "config": asdict(config),
        "every": lm.penalty_every,
        "data": asdict(store.manifest),
    }

    def build(folder: Path) -> None:
        sae = create_sae(
            spec.architecture, d_in=store.d_in, d_sae=spec.d_sae, k=spec.k, seed=spec.seed
        )
        sae.norm_factor = store.norm_factor
        batches = StoreBatches(store, lm.batch_size, spec.seed)
        checkpoint = folder / "checkpoint.safetensors"
        train(sae, batches, config, regularisers, checkpoint=checkpoint)
        save_sae(sae, folder / "sae")
        checkpoint.unlink(missing_ok=True)

    return load_sae(cached("validation", key, build, resumable=True) / "sae")

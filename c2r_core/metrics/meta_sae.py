"""Meta-SAE: are latents made of other latents?

A small BatchTopK SAE, a quarter as many latents, k = 4, is trained on the decoder rows themselves (Bussmann
et al., arXiv 2502.04878; SAEBench 0.6.0). If four shared directions rebuild most rows, latents are composed:
a dictionary with "Einstein" and "Bohr" in place of "physicist". Any rows of few dimensions would be rebuilt
well, so the same is measured on random rows of the same covariance: what counts is the difference.

The rows are the whole data: there is nothing to hold out, and the variance explained is that of the rows
trained on, on either side.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.reconstruction import Reconstruction, evaluate_reconstruction
from c2r_core.saes import BatchTopKSAE
from c2r_core.seeds import mix_seeds
from c2r_core.training import TrainConfig, train

if TYPE_CHECKING:
    from c2r_core.metrics.inputs import Inputs

WIDTH_RATIO = 4
K = 4
MIN_ROWS = 64
BATCH_SIZE = 512
LR = 2e-3


@dataclass(frozen=True)
class MetaSAE:
    """Variance of all decoder rows, live or not, about their mean, that a meta-SAE explains."""

    explained_variance: float
    random_explained_variance: float
    """On normal rows with the same mean and covariance, at norm 1 as the others."""
    n_rows: int
    """Decoder rows that are not zero."""
    d_meta: int
    """Latents of the meta-SAE."""
    l0: float
    """Meta-latents active per row; near k on either side, or the two are not to be compared."""
    random_l0: float


@metric(
    "meta_sae",
    group="meta_sae",
    headline={"explained_variance": Headline("none", "random_explained_variance")},
    reads_model=False,
)
def measure(inputs: Inputs) -> MetaSAE:
    """How much of the decoder rows a small SAE on them explains."""
    return measure_meta_sae(inputs.sae.W_dec, steps=inputs.sizes.meta_sae_steps, seed=inputs.seed)


def measure_meta_sae(W_dec: Tensor, *, steps: int = 1000, seed: int = 0) -> MetaSAE:
    """Train a meta-SAE on decoder rows, and another on random rows.

    Parameters
    ----------
    W_dec : Tensor, shape (d_sae, d_in)
        Rows of any norm; those of norm 0 are left out.
    steps : int
        Of training.
    seed : int
        Of the meta-SAE, of the order of the rows, and of the random rows.

    Raises NotEvaluable if rows are NaN or infinite, or fewer than 64 are not zero.
    """
    if not W_dec.isfinite().all():
        raise NotEvaluable("A NaN or an infinity is among the decoder rows.")
    rows = W_dec.detach().float()
    rows = torch.nn.functional.normalize(rows[rows.norm(dim=1) > 0], dim=1)
    if len(rows) < MIN_ROWS:
        raise NotEvaluable(
            f"{len(rows)} decoder rows are not zero; a meta-SAE needs at least {MIN_ROWS}."
        )
    own, random = (_fit(some, steps, seed) for some in (rows, _random_like(rows, seed)))
    return MetaSAE(
        n_rows=len(rows),
        d_meta=len(rows) // WIDTH_RATIO,
        explained_variance=own.explained_variance,
        random_explained_variance=random.explained_variance,
        l0=own.l0,
        random_l0=random.l0,
    )


def _fit(rows: Tensor, steps: int, seed: int) -> Reconstruction:
    sae = BatchTopKSAE(rows.shape[1], len(rows) // WIDTH_RATIO, K, seed=mix_seeds(seed, 1))
    sae = sae.to(rows.device)
    generator = torch.Generator().manual_seed(mix_seeds(seed, 2))
    size = min(BATCH_SIZE, len(rows))
    # Drawn beforehand, so that batches(step) is a function.
    order = torch.stack(
        [torch.randperm(len(rows), generator=generator)[:size] for _ in range(steps)]
    )
    config = TrainConfig(steps=steps, lr=LR, aux_k_coefficient=0.0, seed=seed)
    train(sae, lambda step: rows[order[step]], config, progress=False)
    return evaluate_reconstruction(sae, rows.split(4096))[0]


def _random_like(rows: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(mix_seeds(seed, 3))
    exact = rows.double().cpu()
    mean, centred = exact.mean(0), exact - exact.mean(0)
    values, vectors = torch.linalg.eigh(centred.T @ centred / len(rows))
    root = vectors * values.clamp(min=0).sqrt()
    noise = torch.randn(rows.shape, generator=generator, dtype=torch.float64)
    return torch.nn.functional.normalize((mean + noise @ root.T).to(rows), dim=1)

"""One small SAE of every registered architecture, for the tests that run over the registry."""

from __future__ import annotations

import pytest
import torch

from c2r_core.saes import ARCHITECTURES, SAE, create_sae

D_IN, D_SAE, BATCH = 12, 40, 16
# Arguments beside d_in, d_sae and seed, where an architecture needs some.
ARGUMENTS = {
    "relu": {"l1_weight": 0.01},
    "relu_april": {"l1_weight": 0.01},
    "topk": {"k": 3},
    "batch_topk": {"k": 3},
    "matryoshka_batch_topk": {"k": 3},
    "jump_relu": {"target_l0": 3, "bandwidth": 0.3},  # so wide that a small batch meets the kernel
    "gated": {"l1_weight": 0.01},
    "p_anneal": {"l1_weight": 0.01},
}
every_architecture = pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))


def new_sae(architecture: str, d_in: int = D_IN, d_sae: int = D_SAE, seed=0) -> SAE:
    """A fresh SAE of the architecture, or a stack where `seed` is a sequence."""
    own = ARGUMENTS.get(architecture, {})
    try:
        return create_sae(architecture, d_in=d_in, d_sae=d_sae, seed=seed, **own)
    except TypeError as error:
        if own:
            raise
        pytest.skip(f"{architecture} needs arguments, which tests/architectures.py lacks ({error})")


def make(architecture: str, seed=0) -> SAE:
    """As `new_sae`, with every bias and scale moved away from its start."""
    sae = new_sae(architecture, seed=seed)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if not name.startswith("W_"):
                parameter += 0.1 * torch.randn(parameter.shape[-1], generator=rng)
        if not sae.unit_norm_decoder:
            sae.W_dec *= 0.5 + torch.rand(D_SAE, 1, generator=rng)
        if hasattr(sae, "threshold"):
            sae.threshold += 0.4
    return sae


def batch(seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    """Samples (BATCH, D_IN)."""
    return torch.randn(BATCH, D_IN, generator=torch.Generator().manual_seed(seed), dtype=dtype)

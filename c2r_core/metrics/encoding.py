"""Feature activations, checked and sparse: the one way in which metrics encode much."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CHUNK = 8192
CHUNK_ENTRIES = 2**25


def chunk_size(sae: AnySAE) -> int:
    """Rows to encode at a time: 8192, fewer where a wide SAE would need over 128 MB for them."""
    return max(1, min(CHUNK, CHUNK_ENTRIES // max(1, len(sae.W_dec))))


@torch.no_grad()
def encode(sae: AnySAE, x: Tensor) -> Tensor:
    """Feature activations of x, (n, d_sae), float32 and on the CPU.

    Raises NotEvaluable if one of them is NaN or infinite, or x has another width than the SAE.
    """
    d_in = sae.W_dec.shape[1]
    if x.shape[-1] != d_in:
        raise NotEvaluable(
            f"The SAE takes activations of width {d_in}; these have {x.shape[-1]}. Was it trained for "
            "this model and hook?"
        )
    acts = sae.encode(x.to(sae.W_dec.device)).float().cpu()
    if not acts.isfinite().all():
        raise NotEvaluable("The SAE's feature activations hold NaN or infinite values.")
    return acts


def encode_sparse(sae: AnySAE, x: Tensor | Iterable[Tensor]) -> csr_array:
    """Feature activations without the zeros, (n, d_sae), float32: 8 bytes each.

    x is (n, d_in), of which `chunk_size` rows are encoded at a time; or chunks of it. Memory beside the
    result is that of a few dense chunks: at most 128 MB each, whatever the SAE's width. Raises as `encode`.
    """
    from scipy.sparse import csr_array, vstack

    chunks = [x] if isinstance(x, Tensor) else x
    parts = (part for chunk in chunks for part in chunk.split(chunk_size(sae)))
    rows = [csr_array(encode(sae, part).numpy()) for part in parts]
    return vstack(rows, format="csr") if rows else csr_array((0, len(sae.W_dec)), dtype="float32")

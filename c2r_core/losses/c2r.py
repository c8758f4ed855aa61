"""C²R, the Cross-sample Consistency Regularization (Jin et al., ICML 2026, arXiv 2606.30609).

    ŵ_i   = w_i / ‖w_i‖                            direction of latent i
    j(i)  = argmax_{j≠i} ŵ_i · ŵ_j                 its nearest neighbour, held constant
    s_i   = max(0, ŵ_i · ŵ_{j(i)})²                how alike the two are
    n_i   = ‖f_{:,i}‖₂                             norm over the batch: the root of a sum, not of a mean
    L_C²R = (1/F) Σ_i s_i · (n_i + n_{j(i)})^α

A concept whose energy E is kept in one latent costs √E; split over two latents it costs
√E₁ + √E₂ > √E. The weight s_i charges that only between near-parallel latents.

The value grows with √B and with the scale of the activations: state both wherever a weight is quoted.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from c2r_core.losses.neighbours import (
    check_decoder,
    nearest_neighbours,
    pair_cosines,
)


def c2r_loss(
    feature_acts: Tensor,
    W_dec: Tensor,
    alpha: float = 1.0,
    *,
    chunk_size: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """C²R penalty of one batch, to be added to a loss with a weight λ.

    Parameters
    ----------
    feature_acts : Tensor, shape (..., batch, d_sae)
        Activations of the latents, >= 0.
    W_dec : Tensor, shape (..., d_sae, d_in)
        Decoder rows, one per latent; need not be normalised. This is the published form, in which
        their norms play no part: where they are not kept at 1, shrinking f and growing w makes the
        value 0 for nothing. Pass f_i ‖w_i‖ there, as `c2r_core.C2R` does.
    alpha : float
        Exponent of the pair's activation norm, > 0; 1 in the paper.
    chunk_size, generator
        As in `nearest_neighbours`: None searches all latents, 8192 with a generator is the paper's form.

    Returns
    -------
    Tensor, shape (...)
        One value per dictionary, in float32 at least. Gradients flow to both arguments and are
        finite everywhere: a pair that is silent in the whole batch has gradient 0, for every alpha.

    Raises
    ------
    ValueError
        If the shapes do not fit together, alpha is not positive, an activation is negative, or an argument
        holds a NaN or infinity.

    Examples
    --------
    >>> import torch
    >>> W_dec = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # latents 0 and 1 are duplicates
    >>> feature_acts = torch.tensor([[3.0, 0.0, 1.0], [0.0, 4.0, 1.0]])
    >>> c2r_loss(feature_acts, W_dec)  # (7 + 7 + 0) / 3
    tensor(4.6667)
    """
    check_decoder(W_dec)
    _check_last_dimension(feature_acts, W_dec, "feature_acts", "(..., batch, d_sae)", dimensions=2)
    if (feature_acts < 0).any():
        raise ValueError(
            f"feature_acts holds negative values, the least {feature_acts.min():g}; expected activations "
            ">= 0, after the SAE's activation function."
        )
    acts = feature_acts.to(torch.promote_types(feature_acts.dtype, torch.float32))
    norms = torch.linalg.vector_norm(acts, dim=-2)
    return c2r_from_norms(norms, W_dec, alpha, chunk_size=chunk_size, generator=generator)


def c2r_from_norms(
    norms: Tensor,
    W_dec: Tensor,
    alpha: float = 1.0,
    *,
    chunk_size: int | None = None,
    generator: Generator | None = None,
) -> Tensor:
    """C²R from the latents' activation norms over the batch, shape (..., d_sae).

    The form that a sparse training step uses, which never holds the dense activations.
    Otherwise as `c2r_loss`.
    """
    if not alpha > 0:
        raise ValueError(f"alpha is {alpha}; expected a positive exponent (1 in the paper).")
    _check_last_dimension(norms, W_dec, "norms", "(..., d_sae)", dimensions=1)
    if not torch.isfinite(norms).all():
        raise ValueError(
            "feature_acts holds a NaN or an infinity; check the activations that go into the SAE."
        )
    index = nearest_neighbours(W_dec, chunk_size=chunk_size, generator=generator).index
    similarity = pair_cosines(W_dec, index).relu() ** 2
    pair_norms = norms + norms.gather(-1, index)
    return (similarity * power(pair_norms, alpha)).mean(-1)


def orthogonality_loss(
    W_dec: Tensor, *, chunk_size: int | None = None, generator: Generator | None = None
) -> Tensor:
    """OrtSAE penalty (Korznikov et al., arXiv 2509.22033): mean squared cosine to the nearest neighbour.

    Equal to C²R with alpha = 1 and every activation norm ½. Arguments and errors as in
    `c2r_loss`; returns a Tensor of shape (...).
    """
    index = nearest_neighbours(W_dec, chunk_size=chunk_size, generator=generator).index
    return (pair_cosines(W_dec, index).relu() ** 2).mean(-1)


def power(base: Tensor, exponent: float) -> Tensor:
    """base ** exponent for base >= 0, with gradient 0 at base = 0, where the plain one is infinite."""
    if exponent == 1:
        return base
    active = base > 0
    return torch.where(active, torch.where(active, base, 1.0) ** exponent, 0.0)


def _check_last_dimension(
    given: Tensor, W_dec: Tensor, name: str, expected: str, dimensions: int
) -> None:
    d_sae = W_dec.shape[-2]
    copies = given.shape[: given.ndim - dimensions]
    if given.ndim >= dimensions and given.shape[-1] == d_sae and copies == W_dec.shape[:-2]:
        return
    transposed = given.ndim >= dimensions and given.shape[-1] == W_dec.shape[-1]
    hint = " W_dec looks transposed: pass W_dec.T." if transposed else ""
    raise ValueError(
        f"{name} has shape {tuple(given.shape)}; expected {expected} with d_sae={d_sae}, "
        f"since W_dec has shape {tuple(W_dec.shape)}, one row per latent, and leading dimensions "
        f"equal to W_dec's.{hint}"
    )

"""A weight of C²R that carries over: the dimensionless strength beside the paper's λ.

λ multiplies a sum of norms over the batch, so its effect grows with the batch size and falls with the
width. Take an SAE of d_sae latents that fire equally often, k of them a sample, on activations with
E‖x‖² = c². Over a batch of B samples a latent's norm is then about √(B k / d_sae) · c / √k; k cancels. So
the penalty is in proportion to (c √(B / d_sae))^α and the reconstruction error to c², and

    strength = λ · (B / d_sae)^(α/2) · c^(α − 2)

is the weight of the one relative to the other. The paper's λ = 5 at batch 2048 and 65 536 latents is 0.88.
A latent that fires less than once a batch is outside of this argument: its mean norm grows with B.
"""

from __future__ import annotations

PAPER_STRENGTH = 5 * (2048 / 65536) ** 0.5
"""λ = 5 at batch size 2048 and d_sae 65 536 (arXiv 2606.30609)."""


def weight_from_strength(
    strength: float,
    *,
    batch_size: int,
    d_sae: int,
    alpha: float = 1.0,
    mean_square_norm: float = 1.0,
) -> float:
    """λ of `C2R` that has this strength; the exact inverse of `strength_from_weight`.

    Parameters
    ----------
    strength : float
        Dimensionless, >= 0; 0.88 in the paper.
    batch_size : int
        Samples in a training batch.
    d_sae : int
        Number of latents.
    alpha : float
        Exponent of the pair's norm, > 0.
    mean_square_norm : float
        E‖x‖² of the activations as the SAE sees them, > 0.

    Raises
    ------
    ValueError
        If an argument is out of its range.

    Examples
    --------
    >>> round(weight_from_strength(PAPER_STRENGTH, batch_size=2048, d_sae=65536), 6)
    5.0
    >>> round(weight_from_strength(PAPER_STRENGTH, batch_size=2048, d_sae=4096), 6)
    1.25
    """
    _check("strength", strength, at_least_0=True)
    return strength / _strength_of_one(batch_size, d_sae, alpha, mean_square_norm)


def strength_from_weight(
    weight: float,
    *,
    batch_size: int,
    d_sae: int,
    alpha: float = 1.0,
    mean_square_norm: float = 1.0,
) -> float:
    """Dimensionless strength of a λ. Parameters are those of `weight_from_strength`.

    Examples
    --------
    >>> strength_from_weight(5.0, batch_size=2048, d_sae=65536) == PAPER_STRENGTH
    True
    """
    _check("weight", weight, at_least_0=True)
    return weight * _strength_of_one(batch_size, d_sae, alpha, mean_square_norm)


def _strength_of_one(batch_size: int, d_sae: int, alpha: float, mean_square_norm: float) -> float:
    """Strength of λ = 1."""
    for name, value in (
        ("batch_size", batch_size),
        ("d_sae", d_sae),
        ("alpha", alpha),
        ("mean_square_norm", mean_square_norm),
    ):
        _check(name, value)
    return (batch_size / d_sae) ** (alpha / 2) * mean_square_norm ** (alpha / 2 - 1)


def _check(name: str, value: float, *, at_least_0: bool = False) -> None:
    in_range = value >= 0 if at_least_0 else value > 0
    if not (in_range and value < float("inf")):
        expected = "a finite number >= 0" if at_least_0 else "a positive number"
        raise ValueError(f"{name} is {value}; expected {expected}.")

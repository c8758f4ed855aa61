"""Penalties that a training adds to any SAE's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Generator, Tensor

from c2r_core.losses import c2r_from_norms, orthogonality_loss
from c2r_core.saes.sparse import FeatureActs, latent_norms


class Regulariser(Protocol):
    """The one seam through which a penalty enters the training.

    Implementations are frozen dataclasses: a checkpoint records their fields. The trainer adds
    weight · every · value on every `every`-th step from `start` on, the weight rising linearly over
    the first `warmup` steps of these.
    """

    name: ClassVar[str]
    weight: float | Sequence[float]
    every: int
    start: int
    warmup: int

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """Value of the penalty, shape (...), one for each SAE of a stack.

        Parameters
        ----------
        feature_acts : Tensor (..., batch, d_sae) or SparseActs
        W_dec : Tensor, shape (..., d_sae, d_in)
        generator : torch.Generator
            Seeded anew for every step, for penalties that draw at random.
        """
        ...


def strength_at(regulariser: Regulariser, step: int) -> float:
    """Factor of the weight at a step: 0 where the penalty is off, `every` at full strength."""
    since_start = step - regulariser.start
    if since_start < 0 or since_start % regulariser.every:
        return 0.0
    return regulariser.every * min(1.0, (since_start + 1) / max(1, regulariser.warmup))


# -- registry ---------------------------------------------------------------------------------

REGULARISERS: dict[str, type[Regulariser]] = {}


def register_regulariser(regulariser_class: type) -> type:
    """Class decorator: makes a regulariser known to `create_regulariser`."""
    REGULARISERS[regulariser_class.name] = regulariser_class
    return regulariser_class


def create_regulariser(name: str, **arguments: Any) -> Regulariser:
    """A regulariser by name, such as create_regulariser("c2r", weight=0.1).

    Raises
    ------
    ValueError
        If the name is unknown; the message lists the known ones.
    """
    if name not in REGULARISERS:
        known = ", ".join(sorted(REGULARISERS))
        raise ValueError(f"Unknown regulariser {name!r}; known are: {known}.")
    return REGULARISERS[name](**arguments)


# -- the two of the paper ---------------------------------------------------------------------


@register_regulariser
@dataclass(frozen=True)
class C2R:
    """Cross-sample Consistency Regularization, `c2r_core.c2r_loss`.

    Parameters
    ----------
    weight : float or sequence of float
        λ >= 0, for activations of mean squared norm 1; a sequence gives each SAE of a stack its own.
        5 in the paper, at batch 2048 and d_sae 65 536. The same strength elsewhere is about
        0.88 √(d_sae / batch), an upper guide: good trade-offs lay at a half to a tenth of it.
    alpha : float
        Exponent of the pair's norm, > 0.
    every : int
        Apply on every T-th step, T times as strong (5 in the paper; take 1 in short toy runs).
    start : int
        First step on which it applies.
    chunk_size : int, optional
        Random chunks of the neighbour search (8192 in the paper); None searches all latents.
    warmup : int
        Steps from `start` on over which λ rises linearly; 0, as in the paper, has it in full at once.
    decoder_norm : bool
        Measure a latent by what it writes, n_i = ‖w_i‖ · ‖f_{:,i}‖. False is the paper's ‖f_{:,i}‖, the
        same where decoder rows have norm 1; where they are free it can be driven to 0 at no cost
        by shrinking f and growing w.
    """

    weight: float | Sequence[float]
    alpha: float = 1.0
    every: int = 1
    start: int = 0
    chunk_size: int | None = None
    warmup: int = 0
    decoder_norm: bool = True
    name: ClassVar[str] = "c2r"

    def __post_init__(self) -> None:
        check_schedule(self)
        if not self.alpha > 0:
            raise ValueError(
                f"alpha is {self.alpha}; expected a positive exponent (1 in the paper)."
            )

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        norms = (
            written_norms(feature_acts, W_dec) if self.decoder_norm else latent_norms(feature_acts)
        )
        return c2r_from_norms(
            norms, W_dec, self.alpha, chunk_size=self.chunk_size, generator=generator
        )


@register_regulariser
@dataclass(frozen=True)
class Orthogonality:
    """OrtSAE's penalty, `c2r_core.orthogonality_loss`; weight 0.25 in arXiv 2509.22033.

    Parameters are those of `C2R`.
    """

    weight: float | Sequence[float]
    every: int = 1
    start: int = 0
    chunk_size: int | None = None
    warmup: int = 0
    name: ClassVar[str] = "orthogonality"

    def __post_init__(self) -> None:
        check_schedule(self)

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        return orthogonality_loss(W_dec, chunk_size=self.chunk_size, generator=generator)


def written_norms(feature_acts: FeatureActs, W_dec: Tensor) -> Tensor:
    """‖w_i‖ · ‖f_{:,i}‖ of each latent, shape (..., d_sae): the norm over the batch of what it writes."""
    return latent_norms(feature_acts) * torch.linalg.vector_norm(W_dec, dim=-1)


def check_schedule(regulariser: Regulariser) -> None:
    """Raise a ValueError unless weight, every, start and warmup are in their ranges."""
    weights = regulariser.weight
    for weight in [weights] if isinstance(weights, (int, float)) else weights:
        if not 0 <= weight < float("inf"):
            raise ValueError(f"weight is {weight}; expected a finite number >= 0.")
    if regulariser.every < 1:
        raise ValueError(f"every is {regulariser.every}; expected a number of steps >= 1.")
    if regulariser.start < 0:
        raise ValueError(f"start is {regulariser.start}; expected a step >= 0.")
    if regulariser.warmup < 0:
        raise ValueError(f"warmup is {regulariser.warmup}; expected a number of steps >= 0.")

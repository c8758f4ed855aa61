"""Penalties that a training adds to any SAE's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar

import torch
from torch import Generator, Tensor

from c2r_core.losses import c2r_from_norms, orthogonality_loss
from c2r_core.saes.sparse import FeatureActs, latent_norms


@dataclass(frozen=True)
class Regulariser:
    """The one seam through which a penalty enters the training.

    A subclass has a `name` and a `__call__`; with parameters of its own it is a frozen dataclass too.
    The trainer adds weight · every · value on every `every`-th step from `start` on.

    Parameters
    ----------
    weight : float or sequence of float
        λ >= 0; a sequence gives each SAE of a stack its own.
    every : int
        Apply on every T-th step, T times as strong (5 in the paper; take 1 in short toy runs).
    start : int
        First step on which it applies.
    warmup : int
        Steps from `start` on over which λ rises linearly; 0, as in the paper, has it in full at once.
    """

    weight: float | Sequence[float]
    _: KW_ONLY
    every: int = 1
    start: int = 0
    warmup: int = 0
    name: ClassVar[str]

    def __post_init__(self) -> None:
        weights = self.weight
        for weight in [weights] if isinstance(weights, (int, float)) else weights:
            if not 0 <= weight < float("inf"):
                raise ValueError(f"weight is {weight}; expected a finite number >= 0.")
        for field, least in (("every", 1), ("start", 0), ("warmup", 0)):
            if getattr(self, field) < least:
                raise ValueError(
                    f"{field} is {getattr(self, field)}; expected a number of steps >= {least}."
                )

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """Value of the penalty, shape (...), one for each SAE of a stack.

        Parameters
        ----------
        feature_acts : Tensor (..., batch, d_sae) or SparseActs
        W_dec : Tensor, shape (..., d_sae, d_in)
        generator : torch.Generator
            Seeded anew for every step, for penalties that draw at random.
        """
        raise NotImplementedError

    def strength_at(self, step: int) -> float:
        """Factor of the weight at a step: 0 where the penalty is off, `every` at full strength."""
        since_start = step - self.start
        if since_start < 0 or since_start % self.every:
            return 0.0
        return self.every * min(1.0, (since_start + 1) / max(1, self.warmup))


REGULARISERS: dict[str, type[Regulariser]] = {}


def register_regulariser(regulariser_class: type[Regulariser]) -> type[Regulariser]:
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


@register_regulariser
@dataclass(frozen=True)
class C2R(Regulariser):
    """Cross-sample Consistency Regularization, `c2r_core.c2r_loss`.

    Parameters
    ----------
    weight, every, start, warmup
        As in `Regulariser`. λ is for activations of mean squared norm 1: 5 in the paper, at batch 2048 and
        d_sae 65 536. The same strength elsewhere is about 0.88 √(d_sae / batch); those tuned on toys lie
        between 0.3 and 0.75 √(d_sae / batch).
    alpha : float
        Exponent of the pair's norm, > 0.
    chunk_size : int, optional
        Random chunks of the neighbour search (8192 in the paper); None searches all latents.
    decoder_norm : bool
        Measure a latent by what it writes, n_i = ‖w_i‖ · ‖f_{:,i}‖. False is the paper's ‖f_{:,i}‖, the
        same where decoder rows have norm 1; where they are free it can be driven to 0 at no cost
        by shrinking f and growing w.
    """

    alpha: float = 1.0
    _: KW_ONLY
    chunk_size: int | None = None
    decoder_norm: bool = True
    name: ClassVar[str] = "c2r"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.alpha > 0:
            raise ValueError(
                f"alpha is {self.alpha}; expected a positive exponent (1 in the paper)."
            )

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        measure = written_norms if self.decoder_norm else lambda acts, _: latent_norms(acts)
        norms = measure(feature_acts, W_dec)
        search = {"chunk_size": self.chunk_size, "generator": generator}
        return c2r_from_norms(norms, W_dec, self.alpha, **search)


@register_regulariser
@dataclass(frozen=True)
class Orthogonality(Regulariser):
    """OrtSAE's penalty, `c2r_core.orthogonality_loss`; weight 0.25 in arXiv 2509.22033.

    Parameters are those of `C2R`.
    """

    _: KW_ONLY
    chunk_size: int | None = None
    name: ClassVar[str] = "orthogonality"

    def __call__(self, feature_acts: FeatureActs, W_dec: Tensor, generator: Generator) -> Tensor:
        """As in `Regulariser`."""
        return orthogonality_loss(W_dec, chunk_size=self.chunk_size, generator=generator)


def written_norms(feature_acts: FeatureActs, W_dec: Tensor) -> Tensor:
    """‖w_i‖ · ‖f_{:,i}‖ of each latent, shape (..., d_sae): the norm over the batch of what it writes."""
    return latent_norms(feature_acts) * torch.linalg.vector_norm(W_dec, dim=-1)

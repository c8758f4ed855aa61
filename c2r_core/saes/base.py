"""What every sparse autoencoder is: its parameters and its contract.

Shapes: x is (..., batch, d_in), feature activations (..., batch, d_sae), decoder rows
W_dec (..., d_sae, d_in). A *stack* holds several SAEs in one set of parameters, with one leading
dimension more, and trains them all in the same step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from c2r_core.saes.sparse import FeatureActs


class StepInput(NamedTuple):
    """What an SAE is given in one training step.

    Fields
    ------
    x : Tensor, shape (..., batch, d_in)
    progress : float in [0, 1]
        Share of the training done, for architectures that change with it.
    dead : Tensor of bool, shape (..., d_sae), optional
        Latents to be revived by an auxiliary loss; None computes none.
    precision : torch.dtype, optional
        Of the encoder's product; None is that of the parameters.
    """

    x: Tensor
    progress: float = 1.0
    dead: Tensor | None = None
    precision: torch.dtype | None = None


class TrainingLosses(NamedTuple):
    """What an SAE computes from one training batch; nothing is changed by computing it.

    reconstruction, sparsity and aux_k are means over the batch, shape (...), one value per SAE of
    a stack; terms that an architecture lacks are 0. min_active is the smallest kept activation
    where an architecture keeps a fixed number, else None. gate_reconstruction is the error of the
    gate's own reconstruction where an architecture has a gate, else None.
    """

    reconstruction: Tensor
    sparsity: Tensor
    aux_k: Tensor
    feature_acts: FeatureActs
    min_active: Tensor | None = None
    gate_reconstruction: Tensor | None = None

    def total(self, aux_k_coefficient: float = 0.0) -> Tensor:
        """The architecture's own objective, shape (...), before any regulariser."""
        own = self.reconstruction + self.sparsity + aux_k_coefficient * self.aux_k
        return own if self.gate_reconstruction is None else own + self.gate_reconstruction


class SAE(nn.Module):
    """Base of all sparse autoencoders.

    A subclass names its `architecture`, lists its `hyper_parameters` (constructor arguments beside d_in,
    d_sae and seed, kept as attributes) and implements `activate`; most add a `sparsity`. One that needs
    more, such as another path in training, replaces `training_losses`.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations and number of latents.
    seed : int or sequence of int
        Draws the decoder; the encoder starts as its transpose. A sequence makes a stack with one
        SAE per seed, each equal to the SAE that its seed alone would give.

    Attributes
    ----------
    W_enc : Parameter, shape (..., d_in, d_sae)
    b_enc : Parameter, shape (..., d_sae)
    W_dec : Parameter, shape (..., d_sae, d_in)
        Rows of norm 1 at the start.
    b_dec : Parameter, shape (..., d_in)
    unit_norm_decoder : bool
        Whether training keeps the decoder rows at norm 1; a class that leaves them free says False.
    resamples : bool
        Whether W_enc, b_enc and W_dec are all there is to a latent, so that a dead one can be drawn anew.
    norm_factor : float
        The SAE was trained on norm_factor * x; `train` takes it from the batches. See `fold_norm_factor`.
    trained_on : dict
        What the training was, as `train` and `save_sae` record it: model, hook_name, steps and the
        like, text or numbers by name.
    """

    architecture: ClassVar[str]
    hyper_parameters: ClassVar[tuple[str, ...]] = ()
    unit_norm_decoder: ClassVar[bool] = True
    resamples: ClassVar[bool] = False

    def __init__(self, d_in: int, d_sae: int, *, seed: int | Sequence[int] = 0) -> None:
        super().__init__()
        for name, value in (("d_in", d_in), ("d_sae", d_sae)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer.")
        self.d_in, self.d_sae = d_in, d_sae
        if isinstance(seed, int):
            rows = _random_rows(d_sae, d_in, seed)
        elif len(seed) > 0:
            rows = torch.stack([_random_rows(d_sae, d_in, one) for one in seed])
        else:
            raise ValueError("seed is an empty sequence; give one seed for each SAE of the stack.")
        self.W_dec = nn.Parameter(rows)
        # Stored as the transpose of a (d_sae, d_in) block: both the product and its sparse
        # gradient are then written row by row.
        self.W_enc = nn.Parameter(rows.clone().mT)
        self.b_enc = nn.Parameter(torch.zeros(rows.shape[:-1]))
        self.b_dec = nn.Parameter(torch.zeros(*rows.shape[:-2], d_in))
        self.norm_factor = 1.0
        self.trained_on: dict[str, Any] = {}

    # -- the contract -----------------------------------------------------------------------

    def activate(self, pre_acts: Tensor) -> Tensor:
        """Feature activations from the encoder's output, both (..., batch, d_sae)."""
        raise NotImplementedError

    def sparsity(self, feature_acts: Tensor, step: StepInput) -> Tensor:
        """Weighted penalty on the activations, a mean over the batch, shape (...); 0 where there is none."""
        return feature_acts.new_zeros(feature_acts.shape[:-2])

    def training_losses(self, step: StepInput) -> TrainingLosses:
        """Loss terms of one batch."""
        feature_acts = self.activate(self.pre_acts(step.x, step.precision).to(step.x.dtype))
        reconstruction = reconstruction_loss(step.x, self.decode(feature_acts))
        sparsity = self.sparsity(feature_acts, step)
        return TrainingLosses(
            reconstruction, sparsity, torch.zeros_like(reconstruction), feature_acts
        )

    def after_step(self, losses: TrainingLosses, ema_decay: float) -> None:
        """What is to be done once a step is taken, such as moving a running mean; mostly nothing."""

    def fold_scale(self, factor: float) -> None:
        """Make this SAE, trained on factor * x, take x itself. A subclass with more state extends it."""
        with torch.no_grad():
            self.b_enc /= factor
            self.b_dec /= factor

    @property
    def target_l0(self) -> float | None:
        """Active latents per sample that training aims at; None where it aims at no number."""
        return None

    # -- shared by all ----------------------------------------------------------------------

    @property
    def n_stacked(self) -> int | None:
        """Number of SAEs in the stack, or None for a single SAE."""
        return self.W_dec.shape[0] if self.W_dec.ndim == 3 else None

    @property
    def config(self) -> dict[str, Any]:
        """Constructor arguments, JSON-ready."""
        names = ("d_in", "d_sae", *self.hyper_parameters)
        return {"architecture": self.architecture} | {name: getattr(self, name) for name in names}

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., batch, d_sae) of x (..., batch, d_in), as used at inference."""
        return self.activate(self.pre_acts(x))

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction (..., batch, d_in) from activations (..., batch, d_sae)."""
        return feature_acts @ self.W_dec + self.b_dec.unsqueeze(-2)

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction of x, shape (..., batch, d_in)."""
        return self.decode(self.encode(x))

    def pre_acts(self, x: Tensor, precision: torch.dtype | None = None) -> Tensor:
        """Encoder output before the activation function, (..., batch, d_sae), in `precision`."""
        self.check_input(x)
        precision = precision or self.W_enc.dtype
        centred = (x - self.b_dec.unsqueeze(-2)).to(precision)
        W_enc, b_enc = self.W_enc.to(precision), self.b_enc.to(precision)
        if self.n_stacked is None:
            return nn.functional.linear(centred, W_enc.mT, b_enc)
        return torch.baddbmm(b_enc.unsqueeze(-2), centred, W_enc)

    def check_input(self, x: Tensor) -> None:
        """Raise a ValueError unless x is (..., batch, d_in) for this SAE or stack."""
        if x.ndim < 2 or x.shape[-1] != self.d_in:
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this {type(self).__name__} expects "
                f"(..., batch, d_in={self.d_in})."
            )
        if self.n_stacked is not None and (x.ndim != 3 or x.shape[0] != self.n_stacked):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this stack of {self.n_stacked} SAEs expects "
                f"({self.n_stacked}, batch, {self.d_in}): one batch for each."
            )

    def unstack(self) -> list[SAE]:
        """The stack's SAEs as single ones that share no memory with it."""
        if self.n_stacked is None:
            raise ValueError("This is a single SAE, not a stack; there is nothing to take apart.")
        own = {name: getattr(self, name) for name in self.hyper_parameters}
        singles = []
        for i in range(self.n_stacked):
            single = type(self)(d_in=self.d_in, d_sae=self.d_sae, **own).to(self.W_dec)
            single.load_state_dict(
                {k: tensor[i].clone() for k, tensor in self.state_dict().items()}
            )
            single.norm_factor = self.norm_factor
            single.trained_on = {  # a list has an entry for each SAE
                k: v[i] if isinstance(v, list) else v for k, v in self.trained_on.items()
            }
            singles.append(single)
        return singles


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Squared error summed over d_in, averaged over the batch: (..., batch, d_in) -> (...)."""
    return (x - x_hat).square().sum(-1).mean(-1)


def _random_rows(d_sae: int, d_in: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)

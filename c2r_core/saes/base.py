"""What every sparse autoencoder is: its parameters, its contract, its file format.

Shapes: x is (..., batch, d_in), feature activations (..., batch, d_sae), decoder rows
W_dec (..., d_sae, d_in). A *stack* holds several SAEs in one set of parameters, with one leading
dimension more, and trains them all in the same step.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from c2r_core.artefacts.files import whole_folder
from c2r_core.saes.sparse import FeatureActs

FORMAT_VERSION = 1


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

    A subclass names its `architecture`, lists its `hyper_parameters` (constructor arguments beside
    d_in, d_sae and seed, kept as attributes), and implements `encode` and `training_losses`.

    Parameters
    ----------
    d_in, d_sae : int
        Width of the activations and number of latents.
    seed : int or sequence of int
        Draws the decoder; the encoder starts as its transpose. A sequence makes a stack with one
        SAE per seed, each equal to the SAE that its seed alone would give.

    Attributes
    ----------
    W_enc : (..., d_in, d_sae); b_enc : (..., d_sae); W_dec : (..., d_sae, d_in), rows of norm 1
    at the start; b_dec : (..., d_in)
    unit_norm_decoder : bool
        Whether training keeps the decoder rows at norm 1; a class that leaves them free says False.
    resamples : bool
        Whether W_enc, b_enc and W_dec are all there is to a latent, so that a dead one can be drawn anew.
    norm_factor : float
        The SAE was trained on norm_factor * x (set by whoever trains it); see `fold_norm_factor`.
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

    # -- the contract -----------------------------------------------------------------------

    def encode(self, x: Tensor) -> Tensor:
        """Feature activations (..., batch, d_sae) of x (..., batch, d_in), as used at inference."""
        raise NotImplementedError

    def training_losses(
        self, x: Tensor, *, progress: float = 1.0, dead: Tensor | None = None, precision=None
    ) -> TrainingLosses:
        """Loss terms of one batch.

        Parameters
        ----------
        x : Tensor, shape (..., batch, d_in)
        progress : float in [0, 1]
            Share of the training done, for architectures that change with it.
        dead : Tensor of bool, shape (..., d_sae), optional
            Latents to be revived by an auxiliary loss; None computes none.
        precision : torch.dtype, optional
            Of the encoder's product; None is that of the parameters.
        """
        raise NotImplementedError

    def update_statistics(self, losses: TrainingLosses, ema_decay: float) -> None:
        """Learn from a finished step what inference needs. Most architectures need nothing."""

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
        return centred @ self.W_enc.to(precision) + self.b_enc.unsqueeze(-2).to(precision)

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
        state = self.state_dict()
        singles = []
        for i in range(self.n_stacked):
            single = create_sae(**self.config).to(self.W_dec)  # device and dtype
            single.load_state_dict({name: tensor[i].clone() for name, tensor in state.items()})
            single.norm_factor = self.norm_factor
            singles.append(single)
        return singles


def reconstruction_loss(x: Tensor, x_hat: Tensor) -> Tensor:
    """Squared error summed over d_in, averaged over the batch: (..., batch, d_in) -> (...)."""
    return (x - x_hat).square().sum(-1).mean(-1)


# -- registry and files -------------------------------------------------------------------------

ARCHITECTURES: dict[str, type[SAE]] = {}


def register(sae_class: type[SAE]) -> type[SAE]:
    """Class decorator: makes an architecture known to `create_sae` and `load_sae`."""
    ARCHITECTURES[sae_class.architecture] = sae_class
    return sae_class


def create_sae(architecture: str, **arguments: Any) -> SAE:
    """A new SAE of a registered architecture, by name.

    Raises
    ------
    ValueError
        If the architecture is unknown; the message lists the known ones.
    """
    if architecture not in ARCHITECTURES:
        known = ", ".join(sorted(ARCHITECTURES))
        raise ValueError(f"Unknown architecture {architecture!r}; known are: {known}.")
    return ARCHITECTURES[architecture](**arguments)


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Write a single SAE as `sae.safetensors` and `config.json`; returns the folder.

    The folder appears complete or not at all; an SAE already there is replaced.

    Raises
    ------
    ValueError
        If `sae` is a stack: save what `unstack` returns.
    OSError
        If the disk is full or the place cannot be written; an SAE already there is left as it was.
    """
    if sae.n_stacked is not None:
        raise ValueError(
            f"This is a stack of {sae.n_stacked} SAEs; save each SAE that sae.unstack() returns."
        )
    folder = Path(folder)
    state = {name: tensor.contiguous() for name, tensor in sae.state_dict().items()}
    config = {"format_version": FORMAT_VERSION, "norm_factor": sae.norm_factor} | sae.config
    try:
        with whole_folder(folder) as part:
            save_file(state, part / "sae.safetensors")
            (part / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    except (OSError, SafetensorError) as error:
        raise OSError(f"Could not write the SAE to {folder} ({error}); free some space.") from error
    return folder


def load_sae(folder: str | Path, device: str | torch.device = "cpu") -> SAE:
    """Read an SAE that `save_sae` wrote.

    Raises
    ------
    FileNotFoundError
        If the folder lacks `config.json` or `sae.safetensors`.
    ValueError
        If the config is damaged, of another format version or architecture, or does not fit the
        tensors.
    """
    folder = Path(folder)
    for name in ("config.json", "sae.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"{folder} holds no {name}; expected a folder written by save_sae."
            )
    try:
        config = json.loads((folder / "config.json").read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{folder}/config.json is damaged ({error}).") from error
    version = config.pop("format_version", None)
    if version != FORMAT_VERSION:
        raise ValueError(
            f"{folder} has format version {version!r}; this code reads {FORMAT_VERSION}."
        )
    try:
        norm_factor = config.pop("norm_factor")
        sae = create_sae(**config)
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{folder}/config.json lacks an entry, or has one too many: {error}"
        ) from error
    sae.norm_factor = norm_factor
    try:
        sae.load_state_dict(load_file(folder / "sae.safetensors"))
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{folder}/sae.safetensors does not fit config.json: {error}") from error
    return sae.to(device)


def fold_norm_factor(sae: SAE) -> SAE:
    """A copy of the SAE that takes raw activations, its normalising factor folded in.

    Trained on c·x, the copy satisfies folded.encode(x) = sae.encode(c·x) / c and
    folded(x) = sae(c·x) / c: decoder rows stay as they are and activations have the units of x.
    """
    folded = copy.deepcopy(sae)
    if not (math.isfinite(sae.norm_factor) and sae.norm_factor > 0):
        raise ValueError(f"norm_factor is {sae.norm_factor}; expected a positive number.")
    folded.fold_scale(sae.norm_factor)
    folded.norm_factor = 1.0
    return folded


def _random_rows(d_sae: int, d_in: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)

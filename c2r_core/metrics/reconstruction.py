"""How well and how sparsely an SAE writes activations, streaming in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:  # toys are measured here too, and read no language model
    from c2r_core.data.store import ActivationStore
    from c2r_core.metrics.inputs import Inputs


@dataclass(frozen=True)
class Reconstruction:
    """How well and how sparsely held-out activations are written; dropped tokens do not count."""

    explained_variance: float
    """1 − fvu. SAEBench 0.6.0 takes the variance about zero under this name."""
    fvu: float
    """E‖x − x̂‖² / (E‖x‖² − ‖E x‖²) over all tokens."""
    cossim: float
    """Mean cosine of x and x̂."""
    l2_ratio: float
    """Mean of ‖x̂‖ / ‖x‖."""
    relative_reconstruction_bias: float | None
    """E‖x̂‖² / E[x·x̂]; null where x̂ is zero throughout."""
    l0: float
    """Mean number of active latents (f ≠ 0) per token."""
    frac_alive: float
    """Share of latents that fire at all."""
    num_alive: int
    """Latents that fire at all."""
    freq_under_001_percent: float
    """Ours: share of latents that fire on less than 0.01 % of the tokens, silent ones included."""
    freq_over_1_percent: float
    """Share of latents that fire on over 1 % of the tokens."""
    freq_over_10_percent: float
    """Share of latents that fire on over 10 % of the tokens."""
    normalized_freq_over_1_percent: float
    """Their share of all firings; 0 if nothing fires."""
    normalized_freq_over_10_percent: float
    """Their share of all firings; 0 if nothing fires."""
    total_tokens_eval_reconstruction: int
    """Tokens measured."""
    fvu_with_dropped_tokens: float | None = None
    """Ours: fvu with the first token of each context and tokens of huge norm."""
    fvu_on_training_documents: float | None = None
    """Ours: fvu on as many tokens of training; null if their store is not given."""
    warning: str | None = None
    """If the SAE seems to expect activations of another scale."""


@metric(
    "reconstruction",
    group="core",
    headline={
        "fvu": Headline("lower", 1.0),
        "l0": "none",
        "l2_ratio": "near 1",
        "frac_alive": "higher",
    },
)
def measure_reconstruction(inputs: Inputs) -> Reconstruction:
    """FVU, L0, shrinkage and densities on held-out activations."""
    sae, store, train = inputs.sae, inputs.activations, inputs.options.train_store
    report, _ = streamed(inputs)
    # The sums over all tokens are those over the kept ones and those over the few others.
    kept, dropped = _streamed_sums(inputs), _Sums.of(sae, _dropped(store, inputs.chunk))
    on_training = None
    if train is not None:
        rows = np.linspace(0, len(train) - 1, min(len(train), len(store))).astype(int)
        parts = (rows[i : i + inputs.chunk] for i in range(0, len(rows), inputs.chunk))
        on_training = evaluate_reconstruction(sae, map(train.batch, parts))[0].fvu
    return replace(
        report,
        fvu_with_dropped_tokens=(kept + dropped).fvu(),
        fvu_on_training_documents=on_training,
        warning=_scale_warning(sae, next(iter(store.chunks(inputs.chunk)))),
    )


def streamed(inputs: Inputs) -> tuple[Reconstruction, Tensor]:
    """The report on held-out activations, and each latent's density; the activations are read once."""
    return _report(_streamed_sums(inputs))


def _streamed_sums(inputs: Inputs) -> _Sums:
    return inputs.once(
        "reconstruction", lambda: _Sums.of(inputs.sae, inputs.activations.chunks(inputs.chunk))
    )


def _dropped(store: ActivationStore, chunk: int) -> Iterator[Tensor]:
    """Activations of the tokens that are no rows of the store."""
    chunks = store.chunks(chunk, dropped=True)
    for start, x in zip(range(0, len(store.kept), chunk), chunks, strict=True):
        x = x[torch.from_numpy(~store.kept[start : start + chunk])]
        if len(x):
            yield x


def evaluate_reconstruction(sae: AnySAE, chunks: Iterable[Tensor]) -> tuple[Reconstruction, Tensor]:
    """Measure an SAE on activations that come in chunks.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes the chunks as they are: fold the normalising factor in first for raw activations.
    chunks : iterable of Tensor, each (n, d_in)
        Memory is that of a few (n, d_sae) in float32: see `chunk_size`.

    Returns
    -------
    report : Reconstruction
    density : Tensor of float64, shape (d_sae,), on the CPU
        Share of tokens on which each latent fires.

    Raises NotEvaluable if there are no tokens, if all activations are equal (nothing can be explained), or
    if something is not finite.
    """
    return _report(_Sums.of(sae, chunks))


@dataclass(frozen=True, eq=False)
class _Sums:
    """Sums over n tokens, float64: the same of two sets of tokens, added, are those of both."""

    n: int
    fires: Tensor  # (d_sae,)
    x: Tensor  # (d_in,)
    error: float
    square: float
    x_hat: float
    product: float
    cosine: float
    ratio: float

    def __add__(self, other: _Sums) -> _Sums:
        return _Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(_Sums)))

    @classmethod
    def of(cls, sae: AnySAE, chunks: Iterable[Tensor]) -> _Sums:
        none = (torch.zeros(n, dtype=torch.float64) for n in sae.W_dec.shape)
        return sum((cls.of_chunk(sae, x) for x in chunks), cls(0, *none, *[0.0] * 6))

    @classmethod
    @torch.no_grad()
    def of_chunk(cls, sae: AnySAE, x: Tensor) -> _Sums:
        x = x.to(sae.W_dec.device)
        feature_acts = sae.encode(x)
        x_hat = sae.decode(feature_acts).double()
        x = x.double()
        squares, hat_squares = x.square().sum(-1), x_hat.square().sum(-1)
        products = (x * x_hat).sum(-1)
        norms, hat_norms = squares.sqrt().clamp(min=1e-12), hat_squares.sqrt()
        return cls(
            n=len(x),
            fires=(feature_acts != 0).sum(0).double().cpu(),
            x=x.sum(0).cpu(),
            error=float((x - x_hat).square().sum()),
            square=float(squares.sum()),
            x_hat=float(hat_squares.sum()),
            product=float(products.sum()),
            cosine=float((products / (norms * hat_norms.clamp(min=1e-12))).sum()),
            ratio=float((hat_norms / norms).sum()),
        )

    def fvu(self) -> float:
        """Raises as `evaluate_reconstruction`."""
        if self.n == 0:
            raise NotEvaluable("There are no tokens to evaluate on; expected at least one chunk.")
        variance = self.square / self.n - float((self.x / self.n).square().sum())
        if not math.isfinite(variance + self.error):
            raise NotEvaluable(
                "A NaN or an infinity is among the activations or their reconstructions."
            )
        if variance <= 0:
            raise NotEvaluable(
                f"All {self.n} activations are equal, so there is no variance to explain."
            )
        return self.error / self.n / variance


def _report(sums: _Sums) -> tuple[Reconstruction, Tensor]:
    fvu, n, density = sums.fvu(), sums.n, sums.fires / sums.n
    over_1, over_10 = density > 0.01, density > 0.1
    n_firings = float(density.sum()) or 1.0
    report = Reconstruction(
        explained_variance=1 - fvu,
        fvu=fvu,
        cossim=sums.cosine / n,
        l2_ratio=sums.ratio / n,
        relative_reconstruction_bias=sums.x_hat / sums.product if sums.product else None,
        l0=float(sums.fires.sum()) / n,
        frac_alive=float((density > 0).double().mean()),
        num_alive=int((density > 0).sum()),
        freq_under_001_percent=float((density < 1e-4).double().mean()),
        freq_over_1_percent=float(over_1.double().mean()),
        freq_over_10_percent=float(over_10.double().mean()),
        normalized_freq_over_1_percent=float(density[over_1].sum()) / n_firings,
        normalized_freq_over_10_percent=float(density[over_10].sum()) / n_firings,
        total_tokens_eval_reconstruction=n,
    )
    return report, density


class _Scaled:
    """An SAE asked about c·x, its answer divided by c."""

    def __init__(self, sae: AnySAE, scale: float) -> None:
        self.sae, self.W_dec, self.scale = sae, sae.W_dec, scale

    def encode(self, x: Tensor) -> Tensor:
        return self.sae.encode(self.scale * x)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return self.sae.decode(feature_acts) / self.scale


def _scale_warning(sae: AnySAE, x: Tensor) -> str | None:
    """Would the SAE do much better on activations of E‖x‖² = 1, or = d_in, as trainers scale them?"""
    norm = float(x.square().sum(-1).mean().sqrt())
    scales = {1.0: "raw", 1 / norm: "1", x.shape[1] ** 0.5 / norm: "d_in"}
    fvu = {c: _Sums.of_chunk(_Scaled(sae, c), x).fvu() for c in scales}
    best = min(fvu, key=fvu.get)
    if fvu[best] > 0.8 * fvu[1.0]:
        return None
    return (
        f"On activations scaled to E‖x‖² = {scales[best]}, that is times {best:.4g}, the SAE reaches an "
        f"FVU of {fvu[best]:.3f} instead of {fvu[1.0]:.3f}: it seems to be trained on scaled "
        "activations. Fold the factor in (sae.norm_factor and fold_norm_factor for an SAE of this "
        "package)."
    )

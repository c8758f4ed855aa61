"""What a language model loses when an SAE's reconstruction replaces its activations.

The reconstruction is judged by the model's own next-token loss, between two marks: the untouched
model, and the model with the activation ablated (set to zero, or to its mean).

How tokens are treated, in every arm alike:

- The first token of each context, and tokens whose activation norm is over `drop_norm_ratio` times
  the median, were left out of training (see `c2r_core.data.harvest`). They keep their original
  activation: an SAE is not charged for tokens that it never saw, and ablation spares them too.
- Every predicted token counts once, and nothing else is excluded: a context of T tokens gives T − 1
  predictions, those made at unchanged tokens included.

What no SAE changes, the loss untouched and ablated, is measured once and kept (`ModelMarks`).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.artefacts.records import Record
from c2r_core.data.forward import activations, log_probs
from c2r_core.data.harvest import is_kept
from c2r_core.data.precision import Precision
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import metric
from c2r_core.metrics.inputs import Inputs
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class ModelPreservation:
    """The language model's own loss with the activation replaced, in nats per predicted token.

    The first token of each context and tokens of huge norm keep their activation in every arm;
    SAEBench replaces them too. Ablation sets the activation to zero.
    """

    ce_loss_score: float | None
    """(ce_loss_with_ablation − ce_loss_with_sae) / (ce_loss_with_ablation − ce_loss_without_sae): 1 if
    the reconstruction is as good as the activation, 0 if as bad as none. Says nothing where ablation
    lowers the loss, as in untrained models; null where it leaves it as it is."""
    ce_loss_with_ablation: float
    ce_loss_with_sae: float
    ce_loss_without_sae: float
    kl_div_score: float | None
    """(kl_div_with_ablation − kl_div_with_sae) / kl_div_with_ablation."""
    kl_div_with_ablation: float
    kl_div_with_sae: float
    """KL(p_model ‖ p_sae)."""
    ce_loss_score_mean_ablation: float | None
    """Ours: ce_loss_score with the mean activation as the floor."""
    ce_loss_with_mean_ablation: float
    n_predicted_tokens: int
    n_unchanged_tokens: int
    """Tokens that kept their activation."""


@metric(
    "model_preservation",
    group="core",
    headline={"ce_loss_score": "higher", "kl_div_score": "higher"},
)
def measure_model_preservation(inputs: Inputs) -> ModelPreservation:
    """Cross-entropy and KL divergence on evenly spaced held-out contexts."""
    store, lm = inputs.activations, inputs.lm
    n = min(lm.cross_entropy_contexts, len(store.contexts))
    chosen = np.linspace(0, len(store.contexts) - 1, n).astype(int)
    tokens = torch.from_numpy(store.contexts[chosen])
    max_norm = lm.drop_norm_ratio * store.manifest.median_norm
    same = {"max_norm": max_norm, "precision": inputs.precision}

    def build(folder: Path) -> None:
        model_marks(inputs.language_model, tokens, lm.hook_name, **same).save(folder)

    contexts = hashlib.sha256(tokens.long().numpy().tobytes()).hexdigest()
    settings = {"contexts": contexts, "max_norm": max_norm}
    marks = ModelMarks.load(inputs.kept("marks", settings, build, code=[__name__]))
    return model_preservation(
        inputs.language_model, inputs.sae, tokens, lm.hook_name, marks=marks, **same
    )


@dataclass(frozen=True, eq=False)
class ModelMarks(Record):
    """What no SAE changes: the model untouched and ablated. Losses and divergence in nats per token."""

    FILES: ClassVar[str] = "marks"

    ce_model: float
    ce_zero: float
    ce_mean: float
    kl_zero: float
    n_unchanged: int
    """Tokens that keep their activation."""


def model_marks(
    model: TransformerBridge,
    tokens: Tensor,
    hook_name: str,
    *,
    max_norm: float = math.inf,
    mean_activation: Tensor | None = None,
    batch_size: int = 8,
    precision: Precision = "float32",
) -> ModelMarks:
    """Loss of the untouched and of the ablated model, between which SAEs are judged: three passes a token.

    Parameters and errors are those of `model_preservation`, but for

    mean_activation : Tensor, shape (d_in,), optional
        What mean ablation puts in. None measures it on the replaced tokens, at the cost of one pass up
        to the hook.
    """
    batches = _batches(model, tokens, batch_size)
    # One context through the model finds a wrong hook or precision before the work begins.
    activations(model, batches[0][:1], hook_name, precision=precision)
    if mean_activation is None:
        mean_activation = _mean_activation(model, batches, hook_name, precision, max_norm)
    ce = dict.fromkeys(("model", "zero", "mean"), 0.0)
    kl_zero, n_unchanged = 0.0, 0
    for batch in batches:
        untouched = _untouched(model, batch, hook_name, precision, max_norm)
        n_unchanged += int((~untouched.is_replaced).sum())
        ce["model"] += _cross_entropy(untouched.log_p, batch)
        zero = _with_replaced(model, untouched, torch.zeros_like(untouched.x))
        ce["zero"] += _cross_entropy(zero, batch)
        kl_zero += _kl_divergence(untouched.log_p, zero)
        mean = _with_replaced(model, untouched, mean_activation.expand_as(untouched.x))
        ce["mean"] += _cross_entropy(mean, batch)
    n = tokens[:, 1:].numel()
    return ModelMarks(
        **{f"ce_{arm}": value / n for arm, value in ce.items()},
        kl_zero=kl_zero / n,
        n_unchanged=n_unchanged,
    )


def model_preservation(
    model: TransformerBridge,
    sae: AnySAE,
    tokens: Tensor,
    hook_name: str,
    *,
    max_norm: float = math.inf,
    marks: ModelMarks | None = None,
    batch_size: int = 8,
    precision: Precision = "float32",
) -> ModelPreservation:
    """Loss and KL divergence with the activation reconstructed, beside the marks: two passes a token.

    Parameters
    ----------
    sae : any object with encode and decode
        Takes raw activations, each row on its own.
    tokens : Tensor of int, shape (n_contexts, context_size)
        Full contexts, cut like those of training (first token included).
    hook_name : str
        Such as `blocks.4.hook_resid_post`.
    max_norm : float
        Tokens of a larger norm keep their activation.
    marks : ModelMarks, optional
        What `model_marks` returned for the same model, tokens and settings. None measures them.
    batch_size : int
        Contexts per forward pass. Memory is about 5 · batch_size · context_size · vocabulary
        floats.
    precision : "float32" or "bfloat16"
        Of the model's matrix products, as in `activations`.

    Raises NotEvaluable if no token is replaced, or the SAE returns another shape, NaN or infinite values.
    Raises ValueError if `tokens` has no two-dimensional shape with contexts of two tokens or more, or if
    `activations` refuses the hook or the precision.
    """
    if marks is None:
        same = {"max_norm": max_norm, "batch_size": batch_size, "precision": precision}
        marks = model_marks(model, tokens, hook_name, **same)
    ce_sae = kl_sae = 0.0
    for batch in _batches(model, tokens, batch_size):
        untouched = _untouched(model, batch, hook_name, precision, max_norm)
        log_p = _with_replaced(model, untouched, _reconstruct(sae, untouched.x))
        ce_sae += _cross_entropy(log_p, batch)
        kl_sae += _kl_divergence(untouched.log_p, log_p)
    n_tokens = tokens[:, 1:].numel()
    ce_sae, kl_sae = ce_sae / n_tokens, kl_sae / n_tokens
    return ModelPreservation(
        ce_loss_score=_recovered(marks.ce_zero, ce_sae, marks.ce_model),
        ce_loss_with_ablation=marks.ce_zero,
        ce_loss_with_sae=ce_sae,
        ce_loss_without_sae=marks.ce_model,
        kl_div_score=(marks.kl_zero - kl_sae) / marks.kl_zero if marks.kl_zero else None,
        kl_div_with_ablation=marks.kl_zero,
        kl_div_with_sae=kl_sae,
        ce_loss_score_mean_ablation=_recovered(marks.ce_mean, ce_sae, marks.ce_model),
        ce_loss_with_mean_ablation=marks.ce_mean,
        n_predicted_tokens=n_tokens,
        n_unchanged_tokens=marks.n_unchanged,
    )


class _Untouched(NamedTuple):
    """A batch of contexts through the model as it is, and what a pass with other activations needs."""

    tokens: Tensor
    hook_name: str
    precision: Precision
    log_p: Tensor
    activation: Tensor
    """(batch, context, d_in)."""
    is_replaced: Tensor
    """Which tokens an SAE may replace, bool, (batch, context)."""

    @property
    def x(self) -> Tensor:
        """The activations to be replaced, float32, (n, d_in)."""
        return self.activation[self.is_replaced].float()


def _untouched(
    model: TransformerBridge, batch: Tensor, hook_name: str, precision: Precision, max_norm: float
) -> _Untouched:
    seen: list[Tensor] = []
    log_p = log_probs(model, batch, hook_name, seen.append, precision=precision)
    return _Untouched(batch, hook_name, precision, log_p, seen[0], _is_replaced(seen[0], max_norm))


def _with_replaced(model: TransformerBridge, untouched: _Untouched, x: Tensor) -> Tensor:
    """Log-probabilities of the same batch with x, (n, d_in), in the place of what is replaced."""
    edited = untouched.activation.clone()
    edited[untouched.is_replaced] = x.to(edited)
    return log_probs(
        model,
        untouched.tokens,
        untouched.hook_name,
        lambda _: edited,
        precision=untouched.precision,
    )


def _batches(model: TransformerBridge, tokens: Tensor, batch_size: int) -> Sequence[Tensor]:
    """The contexts batch by batch, on the model's device."""
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected (n_contexts, context_size) with at "
            "least one context of at least two tokens."
        )
    return tokens.to(next(model.parameters()).device, torch.long).split(batch_size)


def _recovered(ce_ablated: float, ce_sae: float, ce_model: float) -> float | None:
    if ce_ablated == ce_model:
        return None
    return (ce_ablated - ce_sae) / (ce_ablated - ce_model)


def _mean_activation(
    model: TransformerBridge,
    batches: Sequence[Tensor],
    hook_name: str,
    precision: Precision,
    max_norm: float,
) -> Tensor:
    total, count = 0.0, 0
    for batch in batches:
        activation = activations(model, batch, hook_name, precision=precision)
        x = activation[_is_replaced(activation, max_norm)]
        total, count = total + x.double().sum(0), count + len(x)
    if count == 0:
        raise NotEvaluable(
            "Every token keeps its activation: beside the first of each context, none has a norm "
            f"of at most {max_norm:.4g}."
        )
    return (total / count).float()


def _is_replaced(activation: Tensor, max_norm: float) -> Tensor:
    """Which tokens of (batch, context, d_in) an SAE may replace: those that a harvest keeps."""
    return is_kept(activation.float().norm(dim=-1), max_norm)


@torch.no_grad()
def _reconstruct(sae: AnySAE, x: Tensor) -> Tensor:
    x_hat = sae.decode(sae.encode(x))
    if x_hat.shape != x.shape or not x_hat.isfinite().all():
        fault = (
            f"shape {tuple(x_hat.shape)}" if x_hat.shape != x.shape else "NaN or infinite values"
        )
        raise NotEvaluable(
            f"The SAE returned {fault} for activations of shape {tuple(x.shape)}; expected finite "
            "reconstructions of the same shape. Was it trained for this hook, and does it take raw "
            "activations?"
        )
    return x_hat


def _cross_entropy(log_p: Tensor, tokens: Tensor) -> float:
    """Sum over the predicted tokens."""
    return -float(log_p.gather(-1, tokens[:, 1:, None]).double().sum())


def _kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over the predicted tokens."""
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(per_token.double().sum())

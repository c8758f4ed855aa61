"""What a language model loses when an SAE's reconstruction replaces its activations.

The reconstruction is judged by the model's own next-token loss, between two marks: the untouched
model, and the model with the activation ablated (set to zero, or to its mean).

How tokens are treated, in every arm alike:

- The first token of each context, and tokens whose activation norm is over `drop_norm_ratio` times
  the median, were left out of training (see `c2r_core.data.harvest`). They keep their original
  activation: an SAE is not charged for tokens that it never saw, and ablation spares them too.
- Every predicted token counts once, and nothing else is excluded: a context of T tokens gives T − 1
  predictions, those made at unchanged tokens included.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.forward import Precision, activations, log_probs
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
    store = inputs.activations
    n = min(inputs.lm.cross_entropy_contexts, len(store.contexts))
    chosen = np.linspace(0, len(store.contexts) - 1, n).astype(int)
    return model_preservation(
        inputs.language_model,
        inputs.sae,
        torch.from_numpy(store.contexts[chosen]),
        inputs.lm.hook_name,
        max_norm=inputs.lm.drop_norm_ratio * store.manifest.median_norm,
        precision=inputs.precision,
    )


def model_preservation(
    model: TransformerBridge,
    sae: AnySAE,
    tokens: Tensor,
    hook_name: str,
    *,
    max_norm: float = math.inf,
    mean_activation: Tensor | None = None,
    batch_size: int = 8,
    precision: Precision = "float32",
) -> ModelPreservation:
    """Loss and KL divergence with the activation kept, reconstructed and ablated: four passes a token.

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
    mean_activation : Tensor, shape (d_in,), optional
        What mean ablation puts in. None measures it on the replaced tokens, at the cost of one pass up
        to the hook.
    batch_size : int
        Contexts per forward pass. Memory is about 5 · batch_size · context_size · vocabulary
        floats.
    precision : "float32" or "bfloat16"
        Of the model's matrix products, as in `activations`.

    Raises NotEvaluable if no token is replaced, or the SAE returns another shape, NaN or infinite values.
    Raises ValueError if `tokens` has no two-dimensional shape with contexts of two tokens or more, or if
    `activations` refuses the hook or the precision.
    """
    if tokens.ndim != 2 or tokens.shape[0] < 1 or tokens.shape[1] < 2:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}; expected (n_contexts, context_size) with at "
            "least one context of at least two tokens."
        )
    tokens = tokens.to(next(model.parameters()).device, torch.long)
    # One context through the model finds a wrong hook or precision before the work begins.
    activations(model, tokens[:1], hook_name, precision=precision)
    batches = tokens.split(batch_size)
    if mean_activation is None:
        mean_activation = _mean_activation(model, batches, hook_name, precision, max_norm)
    mean_activation = mean_activation.to(tokens.device)

    ce = dict.fromkeys(("model", "zero", "mean", "sae"), 0.0)
    kl = dict.fromkeys(("zero", "sae"), 0.0)
    n_unchanged = 0
    for batch in batches:
        seen: list[Tensor] = []
        log_p_model = log_probs(model, batch, hook_name, seen.append, precision=precision)
        activation, is_replaced = seen[0], _is_replaced(seen[0], max_norm)
        n_unchanged += int((~is_replaced).sum())
        x = activation[is_replaced].float()
        ce["model"] += _cross_entropy(log_p_model, batch)
        replacements = {
            "zero": torch.zeros_like(x),
            "mean": mean_activation.expand_as(x),
            "sae": _reconstruct(sae, x),
        }
        for arm, replacement in replacements.items():
            edited = activation.clone()
            edited[is_replaced] = replacement.to(edited)
            log_p = log_probs(
                model, batch, hook_name, lambda _, new=edited: new, precision=precision
            )
            ce[arm] += _cross_entropy(log_p, batch)
            if arm in kl:
                kl[arm] += _kl_divergence(log_p_model, log_p)

    n_tokens = tokens[:, 1:].numel()
    ce, kl = ({arm: value / n_tokens for arm, value in sums.items()} for sums in (ce, kl))
    return ModelPreservation(
        ce_loss_score=_recovered(ce["zero"], ce["sae"], ce["model"]),
        ce_loss_with_ablation=ce["zero"],
        ce_loss_with_sae=ce["sae"],
        ce_loss_without_sae=ce["model"],
        kl_div_score=(kl["zero"] - kl["sae"]) / kl["zero"] if kl["zero"] else None,
        kl_div_with_ablation=kl["zero"],
        kl_div_with_sae=kl["sae"],
        ce_loss_score_mean_ablation=_recovered(ce["mean"], ce["sae"], ce["model"]),
        ce_loss_with_mean_ablation=ce["mean"],
        n_predicted_tokens=n_tokens,
        n_unchanged_tokens=n_unchanged,
    )


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
    """Which tokens of (batch, context, d_in) an SAE may replace; the rule of `harvest`."""
    is_replaced = activation.float().norm(dim=-1) <= max_norm
    is_replaced[:, 0] = False
    return is_replaced


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

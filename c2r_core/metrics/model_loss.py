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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.forward import Precision, activations, log_probs
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class CrossEntropyReport:
    """Next-token cross-entropies, means per predicted token, in nats.

    Attributes
    ----------
    ce_model : float
        Of the untouched model.
    ce_sae, ce_zero, ce_mean : float
        With the activation replaced by the SAE's reconstruction, by zero, by its mean.
    recovered_zero : float or None
        (ce_zero − ce_sae) / (ce_zero − ce_model): 1 if the reconstruction is as good as the
        activation, 0 if it is as bad as zero ablation, negative if worse. Says nothing where
        ablation lowers the loss, as in untrained models; None where it leaves it as it is.
    recovered_mean : float or None
        Likewise with mean ablation.
    kl : float
        KL(p_model ‖ p_sae).
    n_tokens : int
        Predicted tokens.
    n_unchanged : int
        Tokens that kept their activation in every arm.
    """

    ce_model: float
    ce_sae: float
    ce_zero: float
    ce_mean: float
    recovered_zero: float | None
    recovered_mean: float | None
    kl: float
    n_tokens: int
    n_unchanged: int


def cross_entropy_recovered(
    model: TransformerBridge,
    sae: AnySAE,
    tokens: Tensor,
    hook_name: str,
    *,
    drop_norm_ratio: float = 6.0,
    median_norm: float | None = None,
    mean_activation: Tensor | None = None,
    batch_size: int = 8,
    precision: Precision = "float32",
) -> CrossEntropyReport:
    """Cross-entropy recovered by one SAE; see `compare_cross_entropy` for parameters and errors."""
    reports = compare_cross_entropy(
        model,
        {"sae": sae},
        tokens,
        hook_name,
        drop_norm_ratio=drop_norm_ratio,
        median_norm=median_norm,
        mean_activation=mean_activation,
        batch_size=batch_size,
        precision=precision,
    )
    return reports["sae"]


def compare_cross_entropy(
    model: TransformerBridge,
    saes: Mapping[str, AnySAE],
    tokens: Tensor,
    hook_name: str,
    *,
    drop_norm_ratio: float = 6.0,
    median_norm: float | None = None,
    mean_activation: Tensor | None = None,
    batch_size: int = 8,
    precision: Precision = "float32",
) -> dict[str, CrossEntropyReport]:
    """Cross-entropy recovered by several SAEs of one hook, on the same tokens.

    The untouched model and the two ablated ones run once for all SAEs, so n SAEs cost n + 3
    forward passes instead of 4 n. Blocks below the hook run again in each, because
    transformer_lens's bridge cannot start in the middle.

    Parameters
    ----------
    model : TransformerBridge
    saes : mapping of name to SAE
        Each takes raw activations. Rows are encoded and decoded independently of each other.
    tokens : Tensor of int, shape (n_contexts, context_size)
        Full contexts, cut like those of training (first token included).
    hook_name : str
        Such as `blocks.4.hook_resid_post`.
    drop_norm_ratio : float
        Tokens of a norm over this many times the median keep their activation.
    median_norm : float, optional
        Of the activations, the first of each context excepted; `ActivationStore.manifest` has it.
        None measures it on `tokens`, at the price of one pass up to the hook.
    mean_activation : Tensor, shape (d_in,), optional
        What mean ablation puts in. None measures it on the replaced tokens, at the same price.
    batch_size : int
        Contexts per forward pass. Memory is about 5 · batch_size · context_size · vocabulary
        floats.
    precision : "float32" or "bfloat16"
        Of the model's matrix products, as in `activations`.

    Returns
    -------
    dict of CrossEntropyReport, in the order of `saes`

    Raises
    ------
    ValueError
        If `tokens` has no two-dimensional shape with contexts of two tokens or more, if
        `activations` refuses the hook or the precision, if no token is replaced, or if an SAE
        returns another shape, NaN or infinite values.
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
    if median_norm is None:
        median_norm = _median_norm(model, batches, hook_name, precision)
    max_norm = drop_norm_ratio * median_norm
    if mean_activation is None:
        mean_activation = _mean_activation(model, batches, hook_name, precision, max_norm)

    mean_activation = mean_activation.to(tokens.device)

    ce_model = ce_zero = ce_mean = 0.0
    ce_sae, kl = dict.fromkeys(saes, 0.0), dict.fromkeys(saes, 0.0)
    n_unchanged = 0
    for batch in batches:
        seen: list[Tensor] = []
        log_p_model = log_probs(model, batch, hook_name, seen.append, precision=precision)
        activation = seen[0]
        is_replaced = _is_replaced(activation, max_norm)
        n_unchanged += int((~is_replaced).sum())
        x = activation[is_replaced].float()
        run = partial(
            _replaced_log_probs, model, batch, hook_name, activation, is_replaced, precision
        )
        ce_model += _cross_entropy(log_p_model, batch)
        ce_zero += _cross_entropy(run(torch.zeros_like(x)), batch)
        ce_mean += _cross_entropy(run(mean_activation.expand_as(x)), batch)
        for name, sae in saes.items():
            log_p = run(_reconstruct(name, sae, x))
            ce_sae[name] += _cross_entropy(log_p, batch)
            kl[name] += _kl_divergence(log_p_model, log_p)

    n_tokens = tokens[:, 1:].numel()
    ce_model, ce_zero, ce_mean = ce_model / n_tokens, ce_zero / n_tokens, ce_mean / n_tokens
    return {
        name: CrossEntropyReport(
            ce_model=ce_model,
            ce_sae=ce_sae[name] / n_tokens,
            ce_zero=ce_zero,
            ce_mean=ce_mean,
            recovered_zero=_recovered(ce_zero, ce_sae[name] / n_tokens, ce_model),
            recovered_mean=_recovered(ce_mean, ce_sae[name] / n_tokens, ce_model),
            kl=kl[name] / n_tokens,
            n_tokens=n_tokens,
            n_unchanged=n_unchanged,
        )
        for name in saes
    }


def _recovered(ce_ablated: float, ce_sae: float, ce_model: float) -> float | None:
    if ce_ablated == ce_model:
        return None
    return (ce_ablated - ce_sae) / (ce_ablated - ce_model)


def _median_norm(
    model: TransformerBridge, batches: Sequence[Tensor], hook_name: str, precision: Precision
) -> float:
    norms = [
        activations(model, batch, hook_name, precision=precision)[:, 1:]
        .norm(dim=-1)
        .flatten()
        .cpu()
        for batch in batches
    ]
    return float(np.median(torch.cat(norms).numpy()))


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
        raise ValueError(
            "Every token keeps its activation: beside the first of each context, none has a norm "
            f"of at most {max_norm:.4g}. Check median_norm and drop_norm_ratio."
        )
    return (total / count).float()


def _is_replaced(activation: Tensor, max_norm: float) -> Tensor:
    """Which tokens of (batch, context, d_in) an SAE may replace; the rule of `harvest`."""
    is_replaced = activation.float().norm(dim=-1) <= max_norm
    is_replaced[:, 0] = False
    return is_replaced


def _reconstruct(name: str, sae: AnySAE, x: Tensor) -> Tensor:
    with torch.no_grad():
        x_hat = sae.decode(sae.encode(x))
    if x_hat.shape != x.shape or not x_hat.isfinite().all():
        fault = (
            f"shape {tuple(x_hat.shape)}" if x_hat.shape != x.shape else "NaN or infinite values"
        )
        raise ValueError(
            f"SAE {name!r} returned {fault} for activations of shape {tuple(x.shape)}; expected "
            "finite reconstructions of the same shape. Was it trained for this hook, and does it "
            "take raw activations?"
        )
    return x_hat


def _replaced_log_probs(
    model: TransformerBridge,
    tokens: Tensor,
    hook_name: str,
    activation: Tensor,
    is_replaced: Tensor,
    precision: Precision,
    replacement: Tensor,
) -> Tensor:
    edited = activation.clone()
    edited[is_replaced] = replacement.to(edited)
    return log_probs(model, tokens, hook_name, lambda _: edited, precision=precision)


def _cross_entropy(log_p: Tensor, tokens: Tensor) -> float:
    """Sum over the predicted tokens."""
    return -float(log_p.gather(-1, tokens[:, 1:, None]).double().sum())


def _kl_divergence(log_p: Tensor, log_q: Tensor) -> float:
    """Sum over the predicted tokens."""
    per_token = (log_p.exp() * (log_p - log_q)).sum(-1)
    return float(per_token.double().sum())

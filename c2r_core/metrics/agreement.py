"""Do two runs find the same latents? Two seeds, say, or two halves of the documents.

The latents of two SAEs come in no common order, so they are first matched: one to one, such that the
sum of the cosines of their decoder rows is as large as it can be.

    report = compare_saes(sae_a, sae_b, store.chunks(8192))  # both take raw activations
    report.live_latents.pw_mcc, report.live_latents.random.mean

PW-MCC is the mean cosine of the matched rows (Song et al., arXiv 2505.20254). By itself it says
little: the best matching of random rows has a mean cosine well above 0 too, so that is measured
beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Generator, Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.losses.neighbours import unit_rows
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.matching import EXACT_LIMIT, Matching, match_latents
from c2r_core.saes.interface import AnySAE
from c2r_core.seeds import mix_seeds

SHARED_COSINE = 0.7
"""Cosine above which two matched latents count as the same one."""


@dataclass(frozen=True)
class RandomBaseline:
    """Mean cosine of matched *random* dictionaries, over some draws."""

    mean: float
    low: float
    """With `high`, where one draw more would fall, 95 % of the time (Student's t)."""
    high: float
    n_draws: int


@dataclass(frozen=True)
class DictionaryAgreement:
    """How alike two dictionaries are, latent by matched latent."""

    n_latents_a: int
    """The pairs are as many as the smaller of the two has latents."""
    n_latents_b: int
    pw_mcc: float
    """Mean signed cosine of the matched decoder rows."""
    pw_mcc_at_most: float
    """The same number, unless the dictionaries were too wide for an exact matching: then the optimum
    lies between `pw_mcc` and this."""
    random: RandomBaseline
    """Both dictionaries replaced by rows that are uniform on the sphere, of the same shapes."""
    random_of_same_covariance: RandomBaseline
    """By normal rows whose covariance (about 0) is that of the rows they replace: what two dictionaries
    agree on because both crowd into the directions in which activations vary."""
    shared_share: float
    """Share of pairs with decoder cosine > 0.7."""
    encoder_shared_share: float | None
    """Share of the same pairs with encoder cosine > 0.7; null if an SAE has no W_enc of shape
    (d_in, d_sae)."""
    both_shared_share: float | None
    """Share of pairs with both."""


@dataclass(frozen=True)
class FunctionalAgreement:
    """Whether matched latents fire on the same tokens, equally strongly."""

    mean_correlation: float | None
    """Of the Pearson correlation of a pair's activations over all tokens, over the evaluable pairs."""
    median_correlation: float | None
    share_above_07: float | None
    """Share of the evaluable pairs with a correlation > 0.7."""
    n_evaluable: int
    n_not_evaluable: int
    """Pairs of which a latent never fires, or never changes: they have no correlation."""


@dataclass(frozen=True)
class Agreement:
    """Agreement of two SAEs on held-out tokens."""

    all_latents: DictionaryAgreement
    """Beware of runs that start from the same seed: a latent that died early is still where it began,
    in both."""
    live_latents: DictionaryAgreement | None
    """Of the latents that fire on the tokens at all, matched among themselves. The number to quote."""
    live_not_evaluable: str | None
    """Why there is no `live_latents`."""
    functional: FunctionalAgreement
    """Of the pairs of the matching over all latents."""
    n_tokens: int


@metric(
    "agreement",
    group="consistency",
    headline={
        "live_latents.pw_mcc": Headline("higher", "live_latents.random_of_same_covariance.mean"),
        "live_latents.shared_share": "higher",
        "functional.mean_correlation": "higher",
    },
    needs="against",
)
def measure_agreement(inputs: Inputs) -> Agreement:
    """Latent by latent against another SAE, on held-out tokens: PW-MCC, shared share, correlations."""
    if inputs.against is None:
        raise NotEvaluable(
            "There is no other SAE to compare with: name its folder with --against, or give "
            "Options(against=...)."
        )
    chunks = inputs.activations.chunks(inputs.chunk)
    return compare_saes(inputs.sae, inputs.against, chunks, seed=inputs.seed, n_draws=2)


@torch.no_grad()
def compare_saes(
    sae_a: AnySAE,
    sae_b: AnySAE,
    chunks: Iterable[Tensor],
    *,
    seed: int = 0,
    n_draws: int = 3,
    exact_limit: int = EXACT_LIMIT,
) -> Agreement:
    """How far two SAEs, trained apart on the same kind of activations, agree.

    Time is that of the matchings: one, and 2 · n_draws for the baselines, over all latents and again over the
    live ones unless all are.

    Each SAE takes the chunks of held-out tokens, (n, d_in), as they are: fold the normalising factors in
    first. They may differ in width; then PW-MCC is over as many pairs as the smaller has, its best ones, so
    compare it with that of other pairs of the same widths only. The seed is of the random dictionaries,
    `n_draws` ≥ 2 for each baseline; `exact_limit` is as in `match_latents`.

    Raises NotEvaluable if there are no tokens, or if an SAE gives NaN or infinite activations; ValueError for
    the reasons that `match_latents` gives.
    """
    if sae_a.W_dec.shape[1] != sae_b.W_dec.shape[1]:
        raise NotEvaluable(
            f"The SAEs take activations of widths {sae_a.W_dec.shape[1]} and {sae_b.W_dec.shape[1]}; "
            "only SAEs of the same hook can be compared."
        )
    matching = match_latents(sae_a.W_dec, sae_b.W_dec, exact_limit=exact_limit)
    correlations, n_tokens, live_a, live_b = _correlations(sae_a, sae_b, chunks, matching)
    baseline = partial(random_baseline, seed=seed, n_draws=n_draws, exact_limit=exact_limit)
    everyone = torch.arange(len(live_a)), torch.arange(len(live_b))
    agreement = _agreement(sae_a, sae_b, *everyone, matching, baseline)
    chosen = live_a.nonzero()[:, 0], live_b.nonzero()[:, 0]
    live, reason = None, None
    if live_a.all() and live_b.all():
        live = agreement
    elif min(len(one) for one in chosen) < 2:
        reason = f"{len(chosen[0])} and {len(chosen[1])} latents fire; both need at least 2"
    else:
        rows = (sae.W_dec.cpu()[one] for sae, one in zip((sae_a, sae_b), chosen, strict=True))
        live_matching = match_latents(*rows, exact_limit=exact_limit)
        live = _agreement(sae_a, sae_b, *chosen, live_matching, baseline)
    return Agreement(
        all_latents=agreement,
        live_latents=live,
        live_not_evaluable=reason,
        functional=_summarise(correlations),
        n_tokens=n_tokens,
    )


@torch.no_grad()
def random_baseline(
    W_dec_a: Tensor,
    W_dec_b: Tensor,
    *,
    same_covariance: bool,
    seed: int = 0,
    n_draws: int = 3,
    exact_limit: int = EXACT_LIMIT,
) -> RandomBaseline:
    """The mean cosine that `match_latents` reaches on random rows of the same shapes, over `n_draws` ≥ 2.

    With `same_covariance`, rows are drawn with the covariance, about 0, of each decoder's unit rows, instead
    of uniformly on the sphere.
    """
    from scipy.stats import t  # slow to import

    if n_draws < 2:
        raise ValueError(f"n_draws is {n_draws}; expected at least 2, or there is no spread.")
    spreads = [
        _root_of_covariance(W_dec) if same_covariance else None for W_dec in (W_dec_a, W_dec_b)
    ]
    means = []
    for draw in range(n_draws):
        generator = torch.Generator().manual_seed(mix_seeds(seed, draw))
        rows = [
            _random_rows(W_dec, spread, generator)
            for W_dec, spread in zip((W_dec_a, W_dec_b), spreads, strict=True)
        ]
        means.append(float(match_latents(*rows, exact_limit=exact_limit).cosine.double().mean()))
    means = torch.tensor(means, dtype=torch.float64)
    reach = float(t.ppf(0.975, n_draws - 1) * means.std() * (1 + 1 / n_draws) ** 0.5)
    mean = float(means.mean())
    return RandomBaseline(mean, mean - reach, mean + reach, n_draws)


def _random_rows(W_dec: Tensor, spread: Tensor | None, generator: Generator) -> Tensor:
    rows = torch.randn(W_dec.shape, generator=generator)
    return rows if spread is None else rows @ spread


def _root_of_covariance(W_dec: Tensor) -> Tensor:
    """The symmetric root of the second moments of the unit rows, (d_in, d_in)."""
    rows = unit_rows(W_dec).double().cpu()
    values, vectors = torch.linalg.eigh(rows.T @ rows / len(rows))
    return (vectors * values.clamp(min=0).sqrt() @ vectors.T).float()


def _agreement(
    sae_a: AnySAE,
    sae_b: AnySAE,
    chosen_a: Tensor,
    chosen_b: Tensor,
    matching: Matching,
    baseline: Callable[..., RandomBaseline],
) -> DictionaryAgreement:
    """The report on the chosen latents of both, of which `matching` numbers only these."""
    decoders = [
        sae.W_dec.detach().cpu()[chosen] for sae, chosen in ((sae_a, chosen_a), (sae_b, chosen_b))
    ]
    same = matching.cosine > SHARED_COSINE
    encoders = _encoder_rows(sae_a), _encoder_rows(sae_b)
    encoder_share = both_share = None
    if encoders[0] is not None and encoders[1] is not None:
        rows_a = encoders[0][chosen_a[matching.latents_a]]
        rows_b = encoders[1][chosen_b[matching.latents_b]]
        same_encoder = (rows_a * rows_b).sum(1) > SHARED_COSINE
        encoder_share = float(same_encoder.double().mean())
        both_share = float((same & same_encoder).double().mean())
    return DictionaryAgreement(
        n_latents_a=len(chosen_a),
        n_latents_b=len(chosen_b),
        pw_mcc=float(matching.cosine.double().mean()),
        pw_mcc_at_most=matching.mean_at_most,
        random=baseline(*decoders, same_covariance=False),
        random_of_same_covariance=baseline(*decoders, same_covariance=True),
        shared_share=float(same.double().mean()),
        encoder_shared_share=encoder_share,
        both_shared_share=both_share,
    )


def _encoder_rows(sae: AnySAE) -> Tensor | None:
    """One unit row a latent, (d_sae, d_in), of an SAE that has such an encoder."""
    W_enc = getattr(sae, "W_enc", None)
    if W_enc is None or tuple(W_enc.shape) != tuple(sae.W_dec.shape)[::-1]:
        return None
    return unit_rows(W_enc.detach().T.cpu())


def _correlations(
    sae_a: AnySAE, sae_b: AnySAE, chunks: Iterable[Tensor], matching: Matching
) -> tuple[np.ndarray, int, Tensor, Tensor]:
    """Pearson correlation of each pair's activations, NaN where one does not vary; the number of tokens;
    which latents of either SAE fire on them."""
    pairs = matching.latents_a.numpy(), matching.latents_b.numpy()
    fires = [np.zeros(len(sae.W_dec), dtype=bool) for sae in (sae_a, sae_b)]
    n, sums, squares, products = 0, 0.0, 0.0, 0.0
    for x in chunks:
        acts = [encode_sparse(sae, x).astype(float) for sae in (sae_a, sae_b)]
        for seen, of_sae in zip(fires, acts, strict=True):
            seen[np.unique(of_sae.indices)] = True
        a, b = (of_sae[:, latents] for of_sae, latents in zip(acts, pairs, strict=True))
        n += len(x)
        sums = sums + np.stack([a.sum(0), b.sum(0)])
        squares = squares + np.stack([(one * one).sum(0) for one in (a, b)])
        products = products + (a * b).sum(0)
    if n == 0:
        raise NotEvaluable("There are no tokens to compare on; expected at least one chunk.")
    mean = sums / n
    variance = squares / n - mean**2
    varies = (variance > 1e-12 * mean**2).all(0) & (variance > 0).all(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        correlations = (products / n - mean.prod(0)) / np.sqrt(variance.prod(0))
    correlations[~varies] = np.nan
    return correlations, n, *map(torch.from_numpy, fires)


def _summarise(correlations: np.ndarray) -> FunctionalAgreement:
    known = correlations[~np.isnan(correlations)]
    some = len(known) > 0
    return FunctionalAgreement(
        mean_correlation=float(known.mean()) if some else None,
        median_correlation=float(np.median(known)) if some else None,
        share_above_07=float((known > 0.7).mean()) if some else None,
        n_evaluable=len(known),
        n_not_evaluable=len(correlations) - len(known),
    )

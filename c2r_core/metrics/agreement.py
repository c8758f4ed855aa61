"""Do two runs find the same latents? Two seeds, say, or two halves of the documents.

The latents of two SAEs come in no common order, so they are first matched: one to one, such that the
sum of the cosines of their decoder rows is as large as it can be.

    report = compare_runs(sae_a, sae_b, store.chunks(8192))  # both take raw activations
    report.live_latents.pw_mcc, report.live_latents.random.mean

PW-MCC is the mean cosine of the matched rows (Song et al., arXiv 2505.20254). By itself it says
little: the best matching of random rows has a mean cosine well above 0 too, so that is measured
beside it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from scipy import stats
from scipy.optimize import linear_sum_assignment
from torch import Generator, Tensor

from c2r_core.losses.neighbours import check_decoder, unit_rows
from c2r_core.saes.interface import AnySAE
from c2r_core.seeds import mix_seeds

SHARED_COSINE = 0.7
"""Cosine above which two matched latents count as the same one."""

EXACT_LIMIT = 16_384
"""Widest pair of dictionaries to match exactly: about 36 s of one core (4096: about 4.5 s)."""

# A block of cosines holds at most this many entries (64 MiB in float32).
_BLOCK_ENTRIES = 2**24
# Tokens whose activations are held in float64 at a time.
_ROWS_AT_ONCE = 1024


# -- matching ----------------------------------------------------------------------------------


class Matching(NamedTuple):
    """One-to-one pairs of latents, in the order of the first dictionary; see `match_latents`.

    Attributes
    ----------
    latents_a, latents_b : Tensor of int, shape (n_pairs,)
        n_pairs is the size of the smaller dictionary.
    cosine : Tensor of float32, shape (n_pairs,)
        Of the pair's decoder rows, signed.
    mean_at_most : float
        No matching has a larger mean cosine; this one's own where it is exact.
    """

    latents_a: Tensor
    latents_b: Tensor
    cosine: Tensor
    mean_at_most: float


@torch.no_grad()
def match_latents(W_dec_a: Tensor, W_dec_b: Tensor, *, exact_limit: int = EXACT_LIMIT) -> Matching:
    """The one-to-one matching of decoder rows with the largest sum of signed cosines.

    Up to `exact_limit` latents this is the optimum (Hungarian method, scipy). Wider dictionaries are
    matched in rounds: pairs that are each other's nearest are taken out, until the rest can be
    matched exactly. That mean cosine is a lower bound on the optimum; `mean_at_most` is an upper
    one, the mean of the best cosines if partners could be shared.

    Parameters
    ----------
    W_dec_a, W_dec_b : Tensor, shapes (d_sae_a, d_in) and (d_sae_b, d_in)
        Decoder rows; need not be normalised. Rows of zero norm have cosine 0 to everything.
    exact_limit : int
        Match exactly up to exact_limit² pairs.

    Raises
    ------
    ValueError
        If a decoder has fewer than two rows, is not two-dimensional or holds a NaN, or if their d_in
        differ; if exact_limit is below 1.
    """
    if exact_limit < 1:
        raise ValueError(f"exact_limit is {exact_limit}; expected a positive number of latents.")
    rows_a, rows_b = (unit_rows(check_decoder(W_dec)).float().cpu() for W_dec in (W_dec_a, W_dec_b))
    if rows_a.ndim != 2 or rows_b.ndim != 2 or rows_a.shape[1] != rows_b.shape[1]:
        raise ValueError(
            f"The decoders have shapes {tuple(W_dec_a.shape)} and {tuple(W_dec_b.shape)}; expected "
            "(d_sae, d_in) with the same d_in."
        )
    pairs, left_a, left_b = [], torch.arange(len(rows_a)), torch.arange(len(rows_b))
    mean_at_most = None
    while len(left_a) * len(left_b) > exact_limit**2:
        best_of_a, best_of_b = _best_partners(rows_a[left_a], rows_b[left_b])
        if mean_at_most is None:
            n_pairs = min(len(rows_a), len(rows_b))
            best = (best_of_a.values, best_of_b.values)
            mean_at_most = min(float(v.topk(n_pairs).values.double().mean()) for v in best)
        partner = best_of_a.indices
        mutual = best_of_b.indices[partner] == torch.arange(len(left_a))
        pairs.append((left_a[mutual], left_b[partner[mutual]]))
        left_b = left_b[~torch.isin(left_b, pairs[-1][1])]
        left_a = left_a[~mutual]
    if len(left_a) and len(left_b):
        # Minus the cosines, since scipy would copy the whole matrix to maximise.
        found = linear_sum_assignment((-rows_a[left_a] @ rows_b[left_b].T).numpy())
        in_a, in_b = map(torch.from_numpy, found)
        pairs.append((left_a[in_a], left_b[in_b]))
    latents_a, latents_b = (torch.cat(side) for side in zip(*pairs, strict=True))
    latents_a, order = latents_a.sort()
    latents_b = latents_b[order]
    cosine = (rows_a[latents_a] * rows_b[latents_b]).sum(1)
    if mean_at_most is None:
        mean_at_most = float(cosine.double().mean())
    return Matching(latents_a, latents_b, cosine, mean_at_most)


class _Best(NamedTuple):
    values: Tensor
    indices: Tensor


def _best_partners(rows_a: Tensor, rows_b: Tensor) -> tuple[_Best, _Best]:
    """Each row's largest cosine with the other side, and with which (ties: the lowest index)."""
    best_of_b = _Best(torch.full((len(rows_b),), -torch.inf), torch.zeros(len(rows_b)).long())
    best_of_a = []
    block = max(1, _BLOCK_ENTRIES // len(rows_b))
    for start in range(0, len(rows_a), block):
        cosines = rows_a[start : start + block] @ rows_b.T
        best_of_a.append(cosines.max(1))
        values, indices = cosines.max(0)
        better = values > best_of_b.values
        best_of_b.values[better] = values[better]
        best_of_b.indices[better] = indices[better] + start
    return _Best(*(torch.cat(parts) for parts in zip(*best_of_a, strict=True))), best_of_b


# -- agreement of two dictionaries -------------------------------------------------------------


@dataclass(frozen=True)
class RandomBaseline:
    """Mean cosine of matched *random* dictionaries, over some draws.

    low and high are where one draw more would fall, 95 % of the time (Student's t).
    """

    mean: float
    low: float
    high: float
    n_draws: int


@dataclass(frozen=True)
class DictionaryAgreement:
    """How alike two dictionaries are, latent by matched latent.

    Attributes
    ----------
    n_latents_a, n_latents_b : int
        The pairs are as many as the smaller of the two.
    pw_mcc : float in [-1, 1]
        Mean signed cosine of the matched decoder rows.
    pw_mcc_at_most : float
        The same number, unless the dictionaries were too wide for an exact matching: then the
        optimum lies between `pw_mcc` and this.
    random : RandomBaseline
        Both dictionaries replaced by rows that are uniform on the sphere, of the same shapes.
    random_of_same_covariance : RandomBaseline
        By normal rows whose covariance (about 0) is that of the rows they replace: what two dictionaries
        agree on because both crowd into the directions in which activations vary.
    shared_share : float in [0, 1]
        Share of pairs with decoder cosine > 0.7.
    encoder_shared_share, both_shared_share : float in [0, 1] or None
        Share of the same pairs with encoder cosine > 0.7, and with both; None if an SAE has no W_enc
        of shape (d_in, d_sae).
    """

    n_latents_a: int
    n_latents_b: int
    pw_mcc: float
    pw_mcc_at_most: float
    random: RandomBaseline
    random_of_same_covariance: RandomBaseline
    shared_share: float
    encoder_shared_share: float | None
    both_shared_share: float | None


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
    """The mean cosine that `match_latents` reaches on random rows of the same shapes.

    Parameters
    ----------
    W_dec_a, W_dec_b : Tensor, shapes (d_sae_a, d_in) and (d_sae_b, d_in)
    same_covariance : bool
        Draw rows with the covariance, about 0, of each decoder's unit rows, instead of uniformly on
        the sphere.
    seed : int
        Of all draws.
    n_draws : int, at least 2
    exact_limit : int
        As in `match_latents`.
    """
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
    reach = float(stats.t.ppf(0.975, n_draws - 1) * means.std() * (1 + 1 / n_draws) ** 0.5)
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
    *,
    seed: int,
    n_draws: int,
    exact_limit: int,
) -> DictionaryAgreement:
    """The report on the chosen latents of both, of which `matching` numbers only these."""
    decoders = [
        sae.W_dec.detach().cpu()[chosen] for sae, chosen in ((sae_a, chosen_a), (sae_b, chosen_b))
    ]
    baselines = [
        random_baseline(
            *decoders, same_covariance=same, seed=seed, n_draws=n_draws, exact_limit=exact_limit
        )
        for same in (False, True)
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
        random=baselines[0],
        random_of_same_covariance=baselines[1],
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


# -- agreement of what the latents do ----------------------------------------------------------


@dataclass(frozen=True)
class FunctionalAgreement:
    """Whether matched latents fire on the same tokens, equally strongly.

    Attributes
    ----------
    mean_correlation, median_correlation : float in [-1, 1] or None
        Of the Pearson correlation of a pair's activations over all tokens, over the evaluable pairs;
        None if there is none.
    share_above_07 : float in [0, 1] or None
        Share of the evaluable pairs with a correlation > 0.7.
    n_evaluable : int
    n_not_evaluable : int
        Pairs of which a latent never fires, or never changes: they have no correlation.
    """

    mean_correlation: float | None
    median_correlation: float | None
    share_above_07: float | None
    n_evaluable: int
    n_not_evaluable: int


class _Correlations:
    """Running Pearson correlations of pairs of columns, in float64.

    Means and sums of products about them are merged block by block (Chan, Golub & LeVeque 1983), so
    that nothing cancels.
    """

    def __init__(self, n_pairs: int) -> None:
        self.n = 0
        self.mean = torch.zeros(2, n_pairs, dtype=torch.float64)
        self.square = torch.zeros(2, n_pairs, dtype=torch.float64)
        self.product = torch.zeros(n_pairs, dtype=torch.float64)

    def add(self, acts_a: Tensor, acts_b: Tensor) -> None:
        """Take in activations of the pairs, each (n, n_pairs)."""
        acts = torch.stack([acts_a, acts_b]).double().cpu()
        n = acts.shape[1]
        mean = acts.mean(1)
        acts -= mean.unsqueeze(1)
        shift = mean - self.mean
        weight = self.n * n / (self.n + n)
        self.square += acts.square().sum(1) + weight * shift.square()
        self.product += (acts[0] * acts[1]).sum(0) + weight * shift[0] * shift[1]
        self.n += n
        self.mean += shift * (n / self.n)

    def result(self) -> Tensor:
        """Correlations (n_pairs,), NaN where a column does not vary."""
        varies = (self.square > 1e-12 * self.n * self.mean.square()).all(0) & (self.square > 0).all(
            0
        )
        spread = (self.square[0] * self.square[1]).sqrt()
        return torch.where(varies, self.product / spread, torch.nan)


def _summarise(correlations: Tensor) -> FunctionalAgreement:
    known = correlations[~correlations.isnan()]
    some = len(known) > 0
    return FunctionalAgreement(
        mean_correlation=float(known.mean()) if some else None,
        median_correlation=float(known.quantile(0.5)) if some else None,
        share_above_07=float((known > 0.7).double().mean()) if some else None,
        n_evaluable=len(known),
        n_not_evaluable=len(correlations) - len(known),
    )


# -- the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class BetweenRunsReport:
    """Agreement of two runs; see `compare_runs`.

    Attributes
    ----------
    all_latents : DictionaryAgreement
        Beware of runs that start from the same seed: a latent that died early is still where it began,
        in both.
    live_latents : DictionaryAgreement or None
        Of the latents that fire on the tokens at all, matched among themselves. The number to quote.
    live_not_evaluable : str or None
        Why there is no `live_latents`.
    functional : FunctionalAgreement
        Of the pairs of the matching over all latents.
    n_tokens : int
    """

    all_latents: DictionaryAgreement
    live_latents: DictionaryAgreement | None
    live_not_evaluable: str | None
    functional: FunctionalAgreement
    n_tokens: int


@torch.no_grad()
def compare_runs(
    sae_a: AnySAE,
    sae_b: AnySAE,
    chunks: Iterable[Tensor],
    *,
    seed: int = 0,
    n_draws: int = 3,
    exact_limit: int = EXACT_LIMIT,
) -> BetweenRunsReport:
    """How far two SAEs, trained apart on the same kind of activations, agree.

    Time is that of the matchings: one, and 2 · n_draws for the baselines, over all latents and again
    over the live ones unless all are.

    Parameters
    ----------
    sae_a, sae_b : any objects with encode, decode and W_dec
        Each takes the chunks as they are: fold the normalising factors in first. They may differ in
        width; then PW-MCC is over as many pairs as the smaller has, its best ones, so compare it
        with that of other pairs of the same widths only.
    chunks : iterable of Tensor, each (n, d_in)
        Held-out tokens, the same for both.
    seed : int
        Of the random dictionaries.
    n_draws : int, at least 2
        Random dictionaries for each baseline.
    exact_limit : int
        As in `match_latents`.

    Raises
    ------
    ValueError
        If there are no tokens, if an SAE gives NaN or infinite activations, or for the reasons that
        `match_latents` gives.
    """
    matching = match_latents(sae_a.W_dec, sae_b.W_dec, exact_limit=exact_limit)
    correlations = _Correlations(len(matching.cosine))
    live_a, live_b = (torch.zeros(len(sae.W_dec), dtype=torch.bool) for sae in (sae_a, sae_b))
    for chunk in chunks:
        for x in chunk.split(_ROWS_AT_ONCE):
            acts_a, acts_b = (sae.encode(x.to(sae.W_dec.device)).cpu() for sae in (sae_a, sae_b))
            if not (acts_a.isfinite().all() and acts_b.isfinite().all()):
                raise ValueError(
                    "The SAEs' feature activations hold NaN or infinite values. Check their "
                    "weights, and that the chunks hold none."
                )
            live_a |= (acts_a != 0).any(0)
            live_b |= (acts_b != 0).any(0)
            correlations.add(acts_a[:, matching.latents_a], acts_b[:, matching.latents_b])
    if correlations.n == 0:
        raise ValueError("There are no tokens to compare on; expected at least one chunk.")

    settings = {"seed": seed, "n_draws": n_draws, "exact_limit": exact_limit}
    everyone = torch.arange(len(live_a)), torch.arange(len(live_b))
    agreement = _agreement(sae_a, sae_b, *everyone, matching, **settings)
    chosen = live_a.nonzero()[:, 0], live_b.nonzero()[:, 0]
    live, reason = None, None
    if live_a.all() and live_b.all():
        live = agreement
    elif min(len(one) for one in chosen) < 2:
        reason = f"{len(chosen[0])} and {len(chosen[1])} latents fire; both need at least 2"
    else:
        rows = (sae.W_dec.cpu()[one] for sae, one in zip((sae_a, sae_b), chosen, strict=True))
        live_matching = match_latents(*rows, exact_limit=exact_limit)
        live = _agreement(sae_a, sae_b, *chosen, live_matching, **settings)
    return BetweenRunsReport(
        all_latents=agreement,
        live_latents=live,
        live_not_evaluable=reason,
        functional=_summarise(correlations.result()),
        n_tokens=correlations.n,
    )

"""Assignment consistency: is one concept carried by one latent, in sample after sample?

Definition, version 1.0; docs/assignment_consistency.md is the whole of it on one page. A concept c has a
label on every sample and a direction u (norm 1) in activation space. For each of n samples x that
hold c:

- the *carrier* is the latent i of largest f_i (w_i · u), f_i its activation and w_i its decoder row;
- it counts if cos(w_i, u) ≥ 0.1 and f_i (w_i · u) ≥ 0.4 (x · u) > 0; else the sample has no carrier, an
  outcome that agrees with nothing, not even with another sample without one.

With n_i samples carried by latent i, assignment consistency is

    AC = Σ_i n_i (n_i − 1) / (n (n − 1)),

without bias the chance that two samples of c are carried by the same latent. AC alone can be gamed:
a latent that is always on scores 1, and fewer live latents raise it. So `measure_assignment` always
gives its guards with it: how well the modal latent (the most frequent carrier) detects c, AC on
shuffled labels, and AC of a baseline dictionary. AC is not to be quoted without them.

    report = measure_assignment(sae, activations, labels, directions, n_samples=20)
    report = letter_assignment(sae, task, probes)  # first letters, in a language model
    report = toy_assignment(sae, tree, sample)  # true features
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import NamedTuple

import torch
from torch import Tensor

from c2r_core.data.forest import GatedForest
from c2r_core.data.toy import FeatureTree, ToySample
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.metrics.absorption import LetterProbes
from c2r_core.saes.interface import AnySAE
from c2r_core.seeds import mix_seeds

VERSION = "1.0"
"""Of the definition. It changes whenever a score could."""

MIN_COSINE = 0.1
MIN_SHARE = 0.4
N_SAMPLES = 20
N_HALVES = 1000
NO_CARRIER = -1


# -- the carrier of a sample -------------------------------------------------------------------


def carriers(activations: Tensor, feature_acts: Tensor, W_dec: Tensor, direction: Tensor) -> Tensor:
    """The latent that carries a direction in each sample, or `NO_CARRIER` (−1).

    Parameters
    ----------
    activations : Tensor, shape (n, d_in)
    feature_acts : Tensor, shape (n, d_sae)
    W_dec : Tensor, shape (d_sae, d_in)
        Rows of any norm: scale may move between a latent's activation and its row.
    direction : Tensor, shape (d_in,)
        Of any norm; nothing carries a direction that is zero.

    Returns
    -------
    Tensor of int, shape (n,)
        Ties go to the lowest number.

    Examples
    --------
    >>> rows, x = torch.eye(2), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    >>> carriers(x, x, rows, direction=torch.tensor([1.0, 0.0]))
    tensor([ 0, -1])
    """
    return _Geometry.of(W_dec, direction[None]).carriers(activations, feature_acts)[0]


class _Geometry(NamedTuple):
    """Directions against decoder rows, in float64; directions that are zero are carried by nothing."""

    units: Tensor  # (n_concepts, d_in)
    along: Tensor  # w_i · u, (n_concepts, d_sae)
    cosine: Tensor  # cos(w_i, u), (n_concepts, d_sae)

    @classmethod
    def of(cls, W_dec: Tensor, directions: Tensor) -> _Geometry:
        tiny = torch.finfo(torch.float64).tiny
        rows, units = W_dec.double(), directions.to(W_dec.device).double()
        units = units / units.norm(dim=1, keepdim=True).clamp_min(tiny)
        along = units @ rows.T
        return cls(units, along, along / rows.norm(dim=1).clamp_min(tiny))

    def carriers(self, activations: Tensor, feature_acts: Tensor) -> Tensor:
        """(n_concepts, n), one concept at a time to hold only one (n, d_sae) product."""
        totals = self.units @ activations.double().T
        found = []
        for along, cosine, total in zip(self.along, self.cosine, totals, strict=True):
            carried, latent = (feature_acts * along).max(dim=1)
            counts = (cosine[latent] >= MIN_COSINE) & (carried >= MIN_SHARE * total) & (total > 0)
            found.append(torch.where(counts, latent, NO_CARRIER))
        return torch.stack(found)


# -- what the carriers of n samples say --------------------------------------------------------


def assignment_consistency(carried_by: Tensor) -> float:
    """AC = Σ n_i (n_i − 1) / (n (n − 1)) of samples carried by these latents.

    Parameters
    ----------
    carried_by : Tensor of int, shape (n,), n ≥ 2
        As `carriers` gives them.

    Examples
    --------
    >>> assignment_consistency(torch.tensor([7, 7, 7, 2]))  # 6 of 12 ordered pairs agree
    0.5
    >>> assignment_consistency(torch.tensor([NO_CARRIER, NO_CARRIER]))
    0.0
    """
    _check_carriers(carried_by)
    return float(_consistency(carried_by[None])[0])


def consistency_interval(carried_by: Tensor, *, seed: int = 0) -> tuple[float, float]:
    """95 % interval of AC: the middle of what random halves of the samples score.

    A half drawn without replacement varies about the whole as the whole does about the truth (half-sampling,
    the delete-half jackknife of Shao & Wu 1989). A bootstrap would draw a sample twice, and a sample
    agrees with itself. Where no sample disagrees with another the interval has no width; see the page.

    Parameters
    ----------
    carried_by : Tensor of int, shape (n,), n ≥ 4
    seed : int
        Of the 1000 halves.
    """
    _check_carriers(carried_by, at_least=4)
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(N_HALVES, len(carried_by), generator=generator).argsort(1)
    scores = _consistency(carried_by[order[:, : len(carried_by) // 2]])
    low, high = scores.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def effective_latents(carried_by: Tensor) -> float | None:
    """exp(entropy) of the carriers: over how many equally busy latents the concept is spread.

    The entropy, in nats, is the plug-in estimate plus (K − 1) / 2n for K latents seen (Miller–Madow); it
    still falls short where there are more latents than samples (10 equal ones read 7.9 at n = 10).
    Samples without a carrier are left out; None if fewer than two have one.
    """
    _check_carriers(carried_by)
    counts = _counts(carried_by)
    n = int(counts.sum())
    if n < 2:
        return None
    shares = counts.double() / n
    entropy = -(shares * shares.log()).sum() + (len(counts) - 1) / (2 * n)
    return float(entropy.exp())


def modal_latent(carried_by: Tensor) -> int | None:
    """The most frequent carrier (ties: the lowest number); None if no sample has one."""
    carried = carried_by[carried_by != NO_CARRIER]
    if not len(carried):
        return None
    latents, counts = carried.unique(return_counts=True)
    return int(latents[counts.argmax()])


def _counts(carried_by: Tensor) -> Tensor:
    return carried_by[carried_by != NO_CARRIER].unique(return_counts=True)[1]


def _consistency(carried_by: Tensor) -> Tensor:
    """AC of each row (..., n), float64."""
    n = carried_by.shape[-1]
    latents, codes = carried_by.unique(return_inverse=True)
    counts = torch.zeros(len(carried_by), len(latents), dtype=torch.float64)
    counts.scatter_add_(1, codes, torch.ones(codes.shape, dtype=torch.float64))
    counts = counts[:, latents != NO_CARRIER]
    return (counts * (counts - 1)).sum(1) / (n * (n - 1))


def _check_carriers(carried_by: Tensor, at_least: int = 2) -> None:
    if carried_by.ndim != 1 or len(carried_by) < at_least or carried_by.is_floating_point():
        raise ValueError(
            f"carried_by has shape {tuple(carried_by.shape)} and type {carried_by.dtype}; expected "
            f"the latents of at least {at_least} samples, as integers of shape (n,)."
        )


# -- the baseline dictionary -------------------------------------------------------------------


class NotEnoughSamples(ValueError):
    """More latents than samples to make them of."""


class ExemplarDictionary:
    """An untrained dictionary: each decoder row is the direction of a sample, seen from the mean.

    A latent's activation is its row's product with x − mean, where that is positive and above one
    common threshold. It has as many latents as asked for and, on the samples given, as many active
    at a time: what a dictionary of that size scores without having learnt anything.

    Parameters
    ----------
    activations : Tensor, shape (n, d_in)
    n_latents : int, at most n
    l0 : float
        Mean number of active latents a sample.
    seed : int
        Draws the samples that become rows.

    Raises
    ------
    NotEnoughSamples
        If there are fewer samples than latents, or no latent is asked for.
    """

    def __init__(self, activations: Tensor, n_latents: int, l0: float, *, seed: int = 0) -> None:
        if not 1 <= n_latents <= len(activations):
            raise NotEnoughSamples(
                f"{n_latents} latents were asked for and there are {len(activations)} samples; each "
                "latent is a sample of its own"
            )
        x = activations.float()
        self.mean = x.mean(0)
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(x), generator=generator)[:n_latents].to(x.device)
        self.W_dec = torch.nn.functional.normalize(x[chosen] - self.mean, dim=1)
        # A few thousand samples place the threshold well, and keep the sort small.
        acts = self._products(x[:: max(1, len(x) // 2000)])
        active = min(acts.numel(), max(1, round(l0 * len(acts))))
        lowest = float(acts.flatten().topk(active).values[-1])
        # A little below it, so that samples which are equal are all active or none.
        self.threshold = max(1e-6, lowest * (1 - 1e-5))

    def _products(self, x: Tensor) -> Tensor:
        return (x.float() - self.mean) @ self.W_dec.T

    def encode(self, x: Tensor) -> Tensor:
        acts = self._products(x)
        return acts * (acts >= self.threshold)

    def decode(self, feature_acts: Tensor) -> Tensor:
        return feature_acts @ self.W_dec + self.mean


# -- the report --------------------------------------------------------------------------------


@dataclass(frozen=True)
class ConceptAssignment:
    """One concept of a report; None stands for what could not be measured.

    Attributes
    ----------
    concept : str
    n_holding : int
        Samples that hold the concept, of which the report's `n_samples` were drawn.
    consistency, low, high : float in [0, 1]
        AC and its interval.
    effective_latents : float, at least 1
        See `effective_latents`.
    exception_rate : float in [0, 1]
        Share of the drawn samples that the modal latent does not carry.
    no_carrier_share : float in [0, 1]
        Share of them that no latent carries.
    modal_latent : int
        The most frequent carrier.
    prevalence : float in [0, 1]
        Share of all samples that hold the concept: the precision of a latent that is always on.
    precision, recall, f1 : float in [0, 1]
        Guard: of (modal latent > 0) as a detector of the concept, on all samples.
    shuffled_consistency : float in [0, 1]
        Guard: AC of the same direction on samples drawn without regard to their label.
    baseline_consistency : float in [0, 1]
        Guard: AC of the baseline dictionary on the same samples.
    not_evaluable : str
        The reason, if there is no score; else None.
    """

    concept: str
    n_holding: int
    consistency: float | None = None
    low: float | None = None
    high: float | None = None
    effective_latents: float | None = None
    exception_rate: float | None = None
    no_carrier_share: float | None = None
    modal_latent: int | None = None
    prevalence: float | None = None
    precision: float | None = None
    recall: float | None = None
    f1: float | None = None
    shuffled_consistency: float | None = None
    baseline_consistency: float | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class AssignmentReport:
    """Assignment consistency of one SAE; see `measure_assignment`.

    Means are over the evaluated concepts that have the value, None if none has.

    Attributes
    ----------
    version : str
        Of the definition.
    n_samples : int
        Samples drawn of each concept; scores of another n are not comparable in `effective_latents`.
    concepts : tuple of ConceptAssignment
    n_evaluated : int
        Concepts with a score.
    live_latents, baseline_live_latents : int or None
        Latents that fire on the samples at all.
    baseline_not_evaluable : str or None
        Why there is no baseline.
    """

    version: str
    n_samples: int
    concepts: tuple[ConceptAssignment, ...]
    n_evaluated: int
    mean_consistency: float | None
    mean_effective_latents: float | None
    mean_exception_rate: float | None
    mean_no_carrier_share: float | None
    mean_precision: float | None
    mean_recall: float | None
    mean_f1: float | None
    mean_shuffled_consistency: float | None
    mean_baseline_consistency: float | None
    live_latents: int
    baseline_live_latents: int | None
    baseline_not_evaluable: str | None


@torch.no_grad()
def measure_assignment(
    sae: AnySAE,
    activations: Tensor,
    labels: Tensor,
    directions: Tensor,
    *,
    names: Sequence[str] | None = None,
    n_samples: int = N_SAMPLES,
    baseline: AnySAE | None = None,
    exemplars: Tensor | None = None,
    seed: int = 0,
    chunk_size: int = 512,
) -> AssignmentReport:
    """Assignment consistency of every concept, with its guards. Definition in the module's docstring.

    Of each concept `n_samples` samples that hold it are drawn; which ones depends on the labels and the
    seed only, so that every SAE is measured on the same. The expectation of AC over all ways to shuffle the
    labels is the AC of all samples, which is what is computed.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes the activations as they are, each row on its own.
    activations : Tensor, shape (n, d_in)
        Samples that hold the concepts and samples that do not.
    labels : Tensor of bool, shape (n, n_concepts)
        Which samples hold which concept.
    directions : Tensor, shape (n_concepts, d_in)
        Each concept's direction, of any norm: a true direction, or the weights of a linear probe.
    names : sequence of str, optional
        Of the concepts; "concept 0" and so on by default.
    n_samples : int, at least 4
        A concept that fewer samples hold is not evaluable.
    baseline : any object with encode, decode and W_dec, optional
        An SAE to compare with, of as many live latents; by default an `ExemplarDictionary` with as many
        latents as the SAE has live ones, and as many active at a time.
    exemplars : Tensor, shape (m, d_in), optional
        Samples of which that default baseline is made; by default the activations themselves.
    seed : int
        Of the samples that are drawn, the halves of the interval, and the default baseline.
    chunk_size : int
        Samples encoded at a time.

    Raises
    ------
    ValueError
        If shapes do not fit, labels are not bool, something is NaN or infinite, or n_samples is below 4.
    """
    names = _check(sae, activations, labels, directions, names, n_samples)
    own = _carry(sae, activations, directions, chunk_size)
    other, no_baseline = None, None
    try:
        if baseline is None:
            samples = activations if exemplars is None else exemplars
            baseline = ExemplarDictionary(samples, own.n_live, own.l0, seed=seed)
        other = _carry(baseline, activations, directions, chunk_size)
    except NotEnoughSamples as error:
        no_baseline = str(error)

    rows = []
    for c, name in enumerate(names):
        holding = labels[:, c].nonzero()[:, 0]
        row = ConceptAssignment(name, len(holding), prevalence=len(holding) / len(labels))
        if not directions[c].any():
            rows.append(replace(row, not_evaluable="its direction is zero"))
        elif len(holding) < n_samples:
            reason = f"{len(holding)} samples hold it; {n_samples} are drawn of each concept"
            rows.append(replace(row, not_evaluable=reason))
        else:
            own_seed = mix_seeds(seed, c)
            generator = torch.Generator().manual_seed(own_seed)
            drawn = holding[torch.randperm(len(holding), generator=generator)[:n_samples]]
            row = _score(row, own.carriers[c], drawn, own_seed)
            if other is not None:
                agreement = assignment_consistency(other.carriers[c, drawn])
                row = replace(row, baseline_consistency=agreement)
            rows.append(row)
    return _report(
        _with_detection(rows, sae, activations, labels, chunk_size),
        n_samples=n_samples,
        live_latents=own.n_live,
        baseline_live_latents=None if other is None else other.n_live,
        baseline_not_evaluable=no_baseline,
    )


class _Carried(NamedTuple):
    carriers: Tensor  # (n_concepts, n)
    n_live: int
    l0: float


def _carry(sae: AnySAE, activations: Tensor, directions: Tensor, chunk_size: int) -> _Carried:
    """Every sample's carrier of every concept, and how many latents fire."""
    geometry = _Geometry.of(sae.W_dec.detach(), directions)
    fires = torch.zeros(len(sae.W_dec), dtype=torch.long)
    found = []
    for x in activations.split(chunk_size):
        acts = _encode(sae, x)
        found.append(geometry.carriers(x.to(acts.device), acts).cpu())
        fires += (acts != 0).sum(0).cpu()
    l0 = float(fires.sum()) / len(activations)
    return _Carried(torch.cat(found, dim=1), int((fires > 0).sum()), l0)


def _encode(sae: AnySAE, x: Tensor) -> Tensor:
    acts = sae.encode(x.to(sae.W_dec.device))
    if not acts.isfinite().all():
        raise ValueError("The SAE's feature activations hold NaN or infinite values.")
    return acts


def _score(
    row: ConceptAssignment, carried_by: Tensor, drawn: Tensor, seed: int
) -> ConceptAssignment:
    """The row with all that the carriers say; `carried_by` is of all samples, (n,)."""
    sample = carried_by[drawn]
    modal = modal_latent(sample)
    low, high = consistency_interval(sample, seed=seed)
    return replace(
        row,
        consistency=assignment_consistency(sample),
        low=low,
        high=high,
        effective_latents=effective_latents(sample),
        exception_rate=1 - float((sample == modal).double().mean()) if modal is not None else 1.0,
        no_carrier_share=float((sample == NO_CARRIER).double().mean()),
        modal_latent=modal,
        shuffled_consistency=assignment_consistency(carried_by),
    )


def _with_detection(
    rows: Sequence[ConceptAssignment],
    sae: AnySAE,
    activations: Tensor,
    labels: Tensor,
    chunk_size: int,
) -> list[ConceptAssignment]:
    """The rows with precision, recall and F1 of those that have a modal latent."""
    which = [c for c, row in enumerate(rows) if row.modal_latent is not None]
    latents = [rows[c].modal_latent for c in which]
    fires = torch.cat(
        [_encode(sae, x)[:, latents].cpu() > 0 for x in activations.split(chunk_size)]
    )
    rows = list(rows)
    for c, detected in zip(which, fires.T, strict=True):
        both, n_detected = int((detected & labels[:, c]).sum()), int(detected.sum())
        rows[c] = replace(
            rows[c],
            precision=both / n_detected,
            recall=both / rows[c].n_holding,
            f1=2 * both / (n_detected + rows[c].n_holding),
        )
    return rows


_AVERAGED = (
    "consistency",
    "effective_latents",
    "exception_rate",
    "no_carrier_share",
    "precision",
    "recall",
    "f1",
    "shuffled_consistency",
    "baseline_consistency",
)


def _report(rows: Sequence[ConceptAssignment], **settings: object) -> AssignmentReport:
    evaluated = [row for row in rows if row.not_evaluable is None]
    means = {}
    for name in _AVERAGED:
        values = [getattr(row, name) for row in evaluated if getattr(row, name) is not None]
        means[f"mean_{name}"] = fmean(values) if values else None
    return AssignmentReport(
        version=VERSION, concepts=tuple(rows), n_evaluated=len(evaluated), **means, **settings
    )


def _check(
    sae: AnySAE,
    activations: Tensor,
    labels: Tensor,
    directions: Tensor,
    names: Sequence[str] | None,
    n_samples: int,
) -> tuple[str, ...]:
    """The concepts' names; raises a ValueError for what `measure_assignment` cannot take."""
    shapes = {
        "activations": (activations.shape, "(n, d_in)"),
        "labels": (labels.shape, "(n, n_concepts)"),
        "directions": (directions.shape, "(n_concepts, d_in)"),
        "the SAE's W_dec": (sae.W_dec.shape, "(d_sae, d_in)"),
    }
    for name, (shape, expected) in shapes.items():
        if len(shape) != 2 or 0 in shape:
            raise ValueError(f"{name} has shape {tuple(shape)}; expected {expected}, not empty.")
    (n, d_in), n_concepts = activations.shape, labels.shape[1]
    if len(labels) != n or directions.shape != (n_concepts, d_in) or sae.W_dec.shape[1] != d_in:
        given = ", ".join(f"{name} {tuple(shape)}" for name, (shape, _) in shapes.items())
        raise ValueError(
            f"The shapes do not fit: {given}; expected (n, d_in), (n, n_concepts), (n_concepts, "
            "d_in) and (d_sae, d_in)."
        )
    if labels.dtype != torch.bool:
        raise ValueError(f"labels are {labels.dtype}; expected bool, such as features > 0.")
    finite = {"activations": activations, "directions": directions, "the SAE's W_dec": sae.W_dec}
    for name, tensor in finite.items():
        if not tensor.isfinite().all():
            raise ValueError(f"{name} hold NaN or infinite values.")
    if n_samples < 4:
        raise ValueError(
            f"n_samples is {n_samples}; expected at least 4, so that halves of them have pairs."
        )
    names = tuple(names or (f"concept {c}" for c in range(n_concepts)))
    if len(names) != n_concepts:
        raise ValueError(f"There are {len(names)} names for {n_concepts} concepts.")
    return names


# -- concepts that are at hand -----------------------------------------------------------------


def letter_assignment(
    sae: AnySAE,
    task: FirstLetterTask,
    probes: LetterProbes,
    *,
    n_samples: int = N_SAMPLES,
    baseline: AnySAE | None = None,
    seed: int = 0,
    chunk_size: int = 512,
) -> AssignmentReport:
    """Assignment consistency of "starts with this letter", on test words.

    A word holds a letter if it starts with it and the letter's probe recognises it, as in the first-letter
    absorption; the letter's direction is the probe's weights. A letter without a good probe stays in
    the report, with the probe's reason. The exemplars of the default baseline are drawn from all words.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations (see `fold_norm_factor`).
    task : FirstLetterTask
    probes : LetterProbes
        Trained on this task.
    n_samples, baseline, seed, chunk_size
        As in `measure_assignment`.
    """
    x, letters = task.activations[task.is_test], task.letters[task.is_test]
    recognised = x @ probes.weights.T + probes.biases > 0
    labels = recognised & (letters[:, None] == torch.arange(len(LETTERS)))
    usable = torch.tensor([reason is None for reason in probes.not_evaluable])
    report = measure_assignment(
        sae,
        x,
        labels,
        probes.weights * usable[:, None],
        names=LETTERS,
        n_samples=n_samples,
        baseline=baseline,
        exemplars=task.activations,
        seed=seed,
        chunk_size=chunk_size,
    )
    rows = tuple(
        replace(row, not_evaluable=reason) if reason else row
        for row, reason in zip(report.concepts, probes.not_evaluable, strict=True)
    )
    return replace(report, concepts=rows)


def toy_assignment(
    sae: AnySAE,
    features: FeatureTree | GatedForest,
    sample: ToySample,
    *,
    n_samples: int = N_SAMPLES,
    baseline: AnySAE | None = None,
    seed: int = 0,
    chunk_size: int = 512,
) -> AssignmentReport:
    """Assignment consistency of true features: their directions, and the samples in which they are on.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes x · features.norm_factor.
    features : FeatureTree or GatedForest
    sample : ToySample
        Held-out samples, x not normalised.
    n_samples, baseline, seed, chunk_size
        As in `measure_assignment`.
    """
    return measure_assignment(
        sae,
        sample.x * features.norm_factor,
        sample.features > 0,
        features.directions,
        names=[f"feature {i}" for i in range(len(features.directions))],
        n_samples=n_samples,
        baseline=baseline,
        seed=seed,
        chunk_size=chunk_size,
    )

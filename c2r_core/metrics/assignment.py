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
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from statistics import fmean
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.carriers import (
    NO_CARRIER,
    STANDARD_RULE,
    Carried,
    CarrierRule,
    Concepts,
    assignment_consistency,
    carry,
    check_concepts,
    consistency_interval,
    effective_latents,
    modal_latent,
)
from c2r_core.metrics.exemplars import ExemplarDictionary
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_latents import letter_acts
from c2r_core.metrics.letter_probes import LetterProbes, letter_splits
from c2r_core.metrics.rows import mean_of, none_of
from c2r_core.saes.interface import AnySAE
from c2r_core.seeds import mix_seeds
from c2r_core.statistics import paired_interval

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from c2r_core.data.forest import GatedForest
    from c2r_core.data.toy import FeatureTree, ToySample

VERSION = "1.0"
"""Of the definition. It changes whenever a score could."""

N_SAMPLES = 20


@dataclass(frozen=True)
class ConceptAssignment:
    """One concept; null stands for what could not be measured."""

    concept: str
    n_holding: int
    """Samples that hold the concept, of which `n_samples` were drawn."""
    consistency: float | None = None
    """AC, from 0 to 1."""
    low: float | None = None
    """With `high`, the 95 % interval of AC."""
    high: float | None = None
    effective_latents: float | None = None
    """Over how many equally busy latents the concept is spread; at least 1."""
    exception_rate: float | None = None
    """Share of the drawn samples that the modal latent does not carry."""
    no_carrier_share: float | None = None
    """Share of them that no latent carries."""
    modal_latent: int | None = None
    """The most frequent carrier."""
    prevalence: float | None = None
    """Share of all samples that hold the concept: the precision of a latent that is always on."""
    precision: float | None = None
    """Guard: with `recall` and `f1`, of (modal latent > 0) as a detector of the concept, on all samples."""
    recall: float | None = None
    f1: float | None = None
    shuffled_consistency: float | None = None
    """Guard: AC of the same direction on samples drawn without regard to their label."""
    baseline_consistency: float | None = None
    """Guard: AC of the baseline dictionary on the same samples."""
    not_evaluable: str | None = None
    """The reason, where there is no score."""


@dataclass(frozen=True)
class AssignmentConsistency:
    """Assignment consistency (AC) of one SAE; means are over the evaluated concepts that have the value."""

    version: str
    """Of the definition, docs/assignment_consistency.md."""
    n_samples: int
    """Samples drawn of each concept; scores of another n are not comparable in `effective_latents`."""
    n_evaluated: int
    """Concepts with a score."""
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
    """Latents that fire on the samples at all."""
    baseline_live_latents: int | None
    baseline_not_evaluable: str | None
    """Why there is no baseline."""
    warning: str | None
    """If the scores say nothing of this SAE."""
    concepts: tuple[ConceptAssignment, ...]


@metric(
    "assignment_consistency",
    group="consistency",
    headline={
        "mean_consistency": Headline("higher", "mean_baseline_consistency"),
        "mean_exception_rate": "lower",
        "mean_no_carrier_share": "lower",
        "mean_f1": "higher",
    },
)
def measure_assignment_consistency(inputs: Inputs) -> AssignmentConsistency:
    """Is a first letter carried by one latent? On words of the held-out documents, with its guards."""
    split, acts = letter_splits(inputs)[0], letter_acts(inputs)
    report = letter_assignment(inputs.sae, *split, acts=acts, seed=inputs.seed)
    if report.n_evaluated == 0:
        raise none_of("letters", report.concepts)
    return report


def measure_assignment(
    sae: AnySAE,
    activations: Tensor,
    labels: Tensor,
    directions: Tensor,
    *,
    names: Sequence[str] | None = None,
    n_samples: int = N_SAMPLES,
    baseline: AnySAE | Tensor | None = None,
    seed: int = 0,
) -> AssignmentConsistency:
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
    directions : Tensor, shape (n_concepts, d_in)
        Of any norm: true directions, or the weights of linear probes.
    names : sequence of str, optional
        Of the concepts; "concept 0" and so on by default.
    n_samples : int, at least 4
        A concept that fewer samples hold is not evaluable.
    baseline : any object with encode, decode and W_dec, or Tensor of shape (m, d_in), optional
        An SAE to compare with, of as many live latents; or samples to make an `ExemplarDictionary` of, with
        as many latents as the SAE has live ones, and as many active at a time. By default the activations.
    seed : int
        Of the samples that are drawn, the halves of the interval, and the exemplars.

    Raises NotEvaluable if the SAE is made for another width, or something is NaN or infinite; ValueError if
    shapes do not fit, labels are not bool, or n_samples is below 4.
    """
    names = tuple(names or (f"concept {c}" for c in range(labels.shape[-1])))
    concepts = Concepts(activations, labels, directions, names)
    return _measure(sae, concepts, n_samples=n_samples, baseline=baseline, seed=seed)


def _measure(
    sae: AnySAE,
    concepts: Concepts,
    *,
    n_samples: int,
    baseline: AnySAE | Tensor | None,
    seed: int,
    rule: CarrierRule = STANDARD_RULE,
    acts: csr_array | None = None,
) -> AssignmentConsistency:
    """As `measure_assignment`; `acts` are the SAE's of the activations, where they are at hand."""
    check_concepts(concepts, sae.W_dec)
    activations, labels, directions, names = concepts
    if n_samples < 4:
        raise ValueError(
            f"n_samples is {n_samples}; expected at least 4, so that halves of them have pairs."
        )
    if not (-1 <= rule.min_cosine <= 1 and rule.min_share >= 0):
        raise ValueError(
            f"rule is {rule}; expected a cosine from -1 to 1 and a share of at least 0."
        )
    own = carry(sae, activations, directions, acts, rule)
    other, no_baseline = None, None
    try:
        if baseline is None or isinstance(baseline, Tensor):
            samples = activations if baseline is None else baseline
            baseline = ExemplarDictionary(samples, own.n_live, own.l0, seed=seed)
    except NotEvaluable as error:
        no_baseline = str(error)
    else:
        other = carry(baseline, activations, directions, rule=rule)

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
            row = _score(row, own, own.carriers[c], drawn, labels[:, c], own_seed)
            if other is not None:
                agreement = assignment_consistency(other.carriers[c, drawn])
                row = replace(row, baseline_consistency=agreement)
            rows.append(row)
    changed = "".join(f", {name} {value:g}" for name, value in rule._asdict().items())
    return _report(
        rows,
        version=VERSION if rule == STANDARD_RULE else VERSION + changed,
        n_samples=n_samples,
        live_latents=own.n_live,
        baseline_live_latents=None if other is None else other.n_live,
        baseline_not_evaluable=no_baseline,
    )


def _score(
    row: ConceptAssignment,
    own: Carried,
    carried_by: Tensor,
    drawn: Tensor,
    holds: Tensor,
    seed: int,
) -> ConceptAssignment:
    """The row with all that the carriers say; `carried_by` and `holds` are of all samples, (n,)."""
    sample = carried_by[drawn]
    modal, (low, high) = modal_latent(sample), consistency_interval(sample, seed=seed)
    row = replace(
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
    if modal is None:
        return row
    detected = own.acts[:, [modal]].toarray()[:, 0] > 0
    both, n_detected = int((detected & holds.numpy()).sum()), int(detected.sum())
    return replace(
        row,
        precision=both / n_detected,
        recall=both / row.n_holding,
        f1=2 * both / (n_detected + row.n_holding),
    )


def _report(
    rows: Sequence[ConceptAssignment], **settings: int | str | None
) -> AssignmentConsistency:
    evaluated = [row for row in rows if row.not_evaluable is None]
    means = [field.name for field in fields(AssignmentConsistency) if "mean_" in field.name]
    return AssignmentConsistency(
        concepts=tuple(rows),
        n_evaluated=len(evaluated),
        warning=_warning(evaluated, len(rows)),
        **{name: mean_of(evaluated, name.removeprefix("mean_")) for name in means},
        **settings,
    )


def _warning(evaluated: Sequence[ConceptAssignment], n_concepts: int) -> str | None:
    """Said where AC is not above its baseline, or rests on few of the concepts."""
    said = []
    if 2 * len(evaluated) < n_concepts:
        said.append(f"only {len(evaluated)} of {n_concepts} concepts could be measured")
    compared = [row for row in evaluated if row.baseline_consistency is not None]
    own, baseline = (
        [getattr(row, name) for row in compared] for name in ("consistency", "baseline_consistency")
    )
    if len(compared) > 1 and not paired_interval(own, baseline).low > 0:
        said.append(
            f"AC, {fmean(own):.4f}, is not above {fmean(baseline):.4f}, that of an untrained dictionary with "
            f"as many live latents (95 % interval over {len(compared)} concepts)"
        )
    return "; ".join(said) + "." if said else None


# -- concepts that are at hand -----------------------------------------------------------------


def letter_assignment(
    sae: AnySAE,
    task: FirstLetterTask,
    probes: LetterProbes,
    *,
    acts: csr_array | None = None,
    n_samples: int = N_SAMPLES,
    baseline: AnySAE | None = None,
    seed: int = 0,
    rule: CarrierRule = STANDARD_RULE,
) -> AssignmentConsistency:
    """Assignment consistency of "starts with this letter", on test words.

    A word holds a letter if it starts with it and the letter's probe recognises it, as in the first-letter
    absorption; the letter's direction is the probe's weights. A letter without a good probe stays in
    the report, with the probe's reason. The exemplars of the default baseline are drawn from all words.

    The SAE takes raw activations (see `fold_norm_factor`); the probes are trained on this task; `acts` are
    the feature activations of all words, (n_words, d_sae), where they are at hand. A rule that is not the
    standard one is named in the report's `version`. The other arguments are as in `measure_assignment`.

    ValueError if the rule's cosine is not from -1 to 1, or its share below 0.
    """
    x, letters = task.activations[task.is_test], task.letters[task.is_test]
    labels = probes.holds(x, letters)
    usable = torch.tensor([reason is None for reason in probes.not_evaluable])
    report = _measure(
        sae,
        Concepts(x, labels, probes.weights * usable[:, None], tuple(LETTERS)),
        n_samples=n_samples,
        baseline=task.activations if baseline is None else baseline,
        seed=seed,
        rule=rule,
        acts=None if acts is None else acts[task.is_test.numpy()],
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
) -> AssignmentConsistency:
    """Assignment consistency of true features: their directions, and the samples in which they are on.

    The SAE takes x · features.norm_factor; the sample's x is not normalised. `n_samples`, `baseline` and
    `seed` are as in `measure_assignment`.
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
    )

"""SCR and TPP: does taking out the latents of one attribute take out that attribute and no other?

Both as in SAEBench 0.6.0 (arXiv 2503.09532; SHIFT, arXiv 2403.19647), on activations averaged over a text.
Linear probes say what is in them; an attribute's latents are those of largest

    |(mean of f where it holds − mean of f where it does not) · (w_probe · w_i)|   on training texts.

Averages are linear, so taking latents S out of every token is x̄ − Σ_{i∈S} f̄_i w_i; the SAE's error stays.

- SCR (spurious correlation removal): a probe for a target is trained where an unwanted attribute always
  goes with it, and tested where it does not. (acc_ablated − acc_biased) / (acc_clean − acc_biased), with the
  unwanted attribute's latents taken out: 1 if the probe is then as good as one trained on clean data.
- TPP (targeted probe perturbation): take out class i's latents; mean over i of the accuracy that probe i
  loses, less what the other classes' probes lose on average.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from c2r_core.data.passages import UNKNOWN
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.pooling import (
    PooledActs,
    balanced,
    pooled_passages,
    split_by_document,
    task_rows,
)
from c2r_core.metrics.probing import MIN_PASSAGES
from c2r_core.metrics.rows import none_of

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

    from c2r_core.metrics.inputs import Inputs

THRESHOLDS = (2, 5, 10, 20, 50, 100)
MIN_QUADRANT = 10  # ours: passages of each combination of target and unwanted attribute, on a side
MIN_BIAS = 0.1  # ours: accuracy that the bias must cost, or there is nothing to restore
WHEN_AND_WHO = ("century", "party", "spoken")
"""Labels of a whole document, which go with topics by chance: the spurious ones of SCR."""


@dataclass(frozen=True)
class SpuriousPair:
    """One target and one unwanted attribute; null stands for what could not be measured."""

    target: str
    unwanted: str
    acc_clean: float | None = None
    """Accuracy on clean test data of the probe trained on clean data."""
    acc_biased: float | None = None
    """The same of the probe trained where the unwanted attribute goes with the target."""
    scr: dict[str, float] | None = None
    """By the number of latents taken out. 0 leaves the bias as it was, 1 removes it."""
    not_evaluable: str | None = None
    """The reason, if there is no score."""


@dataclass(frozen=True)
class SCR:
    """Spurious correlation removal, mean over pairs, with n latents taken out: 0 nothing, 1 all the bias."""

    scr_metric_threshold_2: float
    scr_metric_threshold_5: float
    scr_metric_threshold_10: float
    scr_metric_threshold_20: float
    scr_metric_threshold_50: float
    scr_metric_threshold_100: float
    num_pairs: int
    """With a score."""
    pairs: tuple[SpuriousPair, ...]


@dataclass(frozen=True)
class TPP:
    """Targeted probe perturbation with n latents of a class taken out: accuracy that its own probe loses
    (intended), that the others lose (unintended), and the difference (total)."""

    tpp_threshold_2_total_metric: float
    tpp_threshold_2_intended_diff_only: float
    tpp_threshold_2_unintended_diff_only: float
    tpp_threshold_5_total_metric: float
    tpp_threshold_5_intended_diff_only: float
    tpp_threshold_5_unintended_diff_only: float
    tpp_threshold_10_total_metric: float
    tpp_threshold_10_intended_diff_only: float
    tpp_threshold_10_unintended_diff_only: float
    tpp_threshold_20_total_metric: float
    tpp_threshold_20_intended_diff_only: float
    tpp_threshold_20_unintended_diff_only: float
    tpp_threshold_50_total_metric: float
    tpp_threshold_50_intended_diff_only: float
    tpp_threshold_50_unintended_diff_only: float
    tpp_threshold_100_total_metric: float
    tpp_threshold_100_intended_diff_only: float
    tpp_threshold_100_unintended_diff_only: float
    accuracy: dict[str, float]
    """Of each class's probe on untouched activations."""
    classes_not_evaluable: dict[str, str]
    """Classes left out, with the reason."""


@metric("scr", group="scr", headline={"scr_metric_threshold_20": Headline("higher", 0.0)})
def measure_scr_of_documents(inputs: Inputs) -> SCR:
    """Pairs of a topic and a label of the whole document, each in both roles."""
    pooled, labels = pooled_passages(inputs)
    pairs = [(t, d) for t in _topics(labels) for d in WHEN_AND_WHO if d in labels]
    if not pairs:
        raise NotEvaluable(
            f"The documents of {inputs.documents.corpus.name!r} have no label of who or when that could "
            "go with a topic by chance; those of the corpus sotu have."
        )
    return measure_scr(pooled, labels, pairs, seed=inputs.seed)


@metric("tpp", group="tpp", headline={"tpp_threshold_20_total_metric": Headline("higher", 0.0)})
def measure_tpp_of_topics(inputs: Inputs) -> TPP:
    """Topics, one probe each."""
    pooled, labels = pooled_passages(inputs)
    return measure_tpp(pooled, _topics(labels), seed=inputs.seed)


def _topics(labels: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: of for name, of in labels.items() if name.startswith("topic")}


def measure_scr(
    pooled: PooledActs,
    labels: Mapping[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
) -> SCR:
    """Spurious correlation removal for pairs of labels, each in both roles.

    Parameters
    ----------
    labels : mapping from a name to a Tensor of int, shape (n,)
        1, 0, or −1 for unknown.
    pairs : sequence of (str, str)
        Names of labels.
    seed : int
        Of the splits by document and of the balancing.

    Raises NotEvaluable if no pair has enough passages and a bias to undo.
    """
    rows = []
    for target, unwanted in [role for a, b in pairs for role in ((a, b), (b, a))]:
        try:
            rows.append(_restore(pooled, labels, target, unwanted, seed))
        except NotEvaluable as error:
            rows.append(SpuriousPair(target, unwanted, not_evaluable=str(error)))
    known = [row for row in rows if row.scr is not None]
    if not known:
        raise none_of("pairs", rows)
    means = {
        f"scr_metric_threshold_{n}": fmean(row.scr[str(n)] for row in known) for n in THRESHOLDS
    }
    return SCR(**means, num_pairs=len(known), pairs=tuple(rows))


def _restore(
    pooled: PooledActs, labels: Mapping[str, Tensor], target: str, unwanted: str, seed: int
) -> SpuriousPair:
    t, u = labels[target], labels[unwanted]
    known = (t != UNKNOWN) & (u != UNKNOWN)
    quadrants = {f"{a}{b}": known & (t == a) & (u == b) for a in (0, 1) for b in (0, 1)}
    is_test = split_by_document(pooled.documents, _steadier(pooled.documents, t, u), seed)
    train, test = (
        balanced(quadrants, side, seed, MIN_QUADRANT, f"{target!r} with {unwanted!r}")
        for side in (~is_test, is_test)
    )
    x, t, u = pooled.x, t.numpy(), u.numpy()
    together = train[t[train] == u[train]]  # where the unwanted attribute goes with the target
    clean, biased = (_fitted(x[rows], t[rows]) for rows in (train, together))
    acc_clean, acc_biased = (float(probe.score(x[test], t[test])) for probe in (clean, biased))
    row = SpuriousPair(target, unwanted, acc_clean, acc_biased)
    if acc_clean - acc_biased < MIN_BIAS:
        reason = (
            f"the bias costs {acc_clean - acc_biased:.2f} of accuracy; less than {MIN_BIAS} leaves "
            "nothing to restore"
        )
        return replace(row, not_evaluable=reason)
    order = _by_effect(pooled, _fitted(x[train], u[train]), train, u)
    scr = {}
    for n in THRESHOLDS:
        accuracy = float(biased.score(_without(pooled, order[:n], test), t[test]))
        scr[str(n)] = (accuracy - acc_biased) / (acc_clean - acc_biased)
    return replace(row, scr=scr)


def _steadier(documents: Sequence[str], t: Tensor, u: Tensor) -> Tensor:
    """The label that changes within fewer documents; split by it, both sides keep both of its classes."""

    def changes(labels: Tensor) -> int:
        held = set(zip(documents, labels.tolist(), strict=True))
        known = [document for document, label in held if label != UNKNOWN]
        return len(known) - len(set(known))

    return t if changes(t) < changes(u) else u


def measure_tpp(pooled: PooledActs, labels: Mapping[str, Tensor], *, seed: int = 0) -> TPP:
    """Targeted probe perturbation over classes, one label each.

    Parameters
    ----------
    labels : mapping from a class's name to a Tensor of int, shape (n,)
        1, 0, or −1 for unknown.
    seed : int
        Of the splits by document and of the balancing.

    Raises NotEvaluable if fewer than two classes have enough passages.
    """
    rows, reasons = {}, {}
    for name, of_class in labels.items():
        try:
            rows[name] = task_rows(pooled.documents, of_class, name, seed, MIN_PASSAGES)
        except NotEvaluable as error:
            reasons[name] = str(error)
    if len(rows) < 2:
        raise NotEvaluable(
            f"{len(rows)} of {len(labels)} classes have enough passages; two are needed. For example, "
            f"{next(iter(reasons.values()), 'there is none')}."
        )
    y = {name: labels[name].numpy() for name in rows}
    probes = {name: _fitted(pooled.x[train], y[name][train]) for name, (train, _) in rows.items()}
    orders = {
        name: _by_effect(pooled, probes[name], train, y[name]) for name, (train, _) in rows.items()
    }

    def accuracy(of: str, latents: np.ndarray) -> float:
        test = rows[of][1]
        return float(probes[of].score(_without(pooled, latents, test), y[of][test]))

    before = {name: accuracy(name, np.arange(0)) for name in rows}
    scores = {}
    for n in THRESHOLDS:
        lost = {
            (i, j): before[j] - accuracy(j, orders[i][:n]) for i, j in itertools.product(rows, rows)
        }
        intended = fmean(lost[i, i] for i in rows)
        unintended = fmean(lost[pair] for pair in itertools.permutations(rows, 2))
        scores[f"tpp_threshold_{n}_total_metric"] = intended - unintended
        scores[f"tpp_threshold_{n}_intended_diff_only"] = intended
        scores[f"tpp_threshold_{n}_unintended_diff_only"] = unintended
    return TPP(**scores, accuracy=before, classes_not_evaluable=reasons)


def _fitted(inputs: np.ndarray, y: np.ndarray) -> LogisticRegression:
    """A logistic regression on raw activations: in their space its weights meet decoder rows."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(inputs, y)


def _by_effect(
    pooled: PooledActs, probe: LogisticRegression, among: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Latents by the size of their effect on a probe, largest first; those without any are left out."""
    with_it, without = (pooled.feature_acts[among[y[among] == c]].mean(0) for c in (1, 0))
    effect = np.abs((with_it - without) * (pooled.directions @ probe.coef_[0]))
    order = np.argsort(-effect, kind="stable")
    return order[effect[order] > 0]


def _without(pooled: PooledActs, latents: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Mean activations of these passages with the latents taken out, (len(among), d_in)."""
    return pooled.x[among] - pooled.feature_acts[among][:, latents] @ pooled.directions[latents]

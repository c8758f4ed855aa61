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
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.metrics.passages import UNKNOWN, PooledActs, balanced, split_by_document
from c2r_core.metrics.probing import fitted, task_rows

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

THRESHOLDS = (2, 5, 10, 20, 50, 100)
MIN_QUADRANT = (
    10  # ours: passages of each combination of target and unwanted attribute, on either side
)
MIN_BIAS = 0.1  # ours: accuracy that the bias must cost, or there is nothing to restore


@dataclass(frozen=True)
class SpuriousPair:
    """One target and one unwanted attribute; None stands for what could not be measured.

    Attributes
    ----------
    target, unwanted : str
    acc_clean, acc_biased : float in [0, 1]
        Of the probes trained on clean and on biased data, on clean test data.
    scr : dict from n to float
        With n latents taken out. 0 leaves the bias as it was, 1 removes it.
    not_evaluable : str
        The reason, if there is no score; else None.
    """

    target: str
    unwanted: str
    acc_clean: float | None = None
    acc_biased: float | None = None
    scr: dict[str, float] | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class SCRReport:
    """Means over the pairs that could be evaluated; None if none could."""

    pairs: tuple[SpuriousPair, ...]
    n_evaluated: int
    mean_scr: dict[str, float] | None


@dataclass(frozen=True)
class TPPReport:
    """TPP of some classes.

    Attributes
    ----------
    classes : tuple of str
        With enough passages.
    not_evaluable : dict from str to str
        The other classes and the reasons.
    accuracy : tuple of float
        Of each class's probe on untouched activations.
    tpp, intended, unintended : dict from n to float
        With n latents of a class taken out: the score, and its two terms.
    """

    classes: tuple[str, ...]
    not_evaluable: dict[str, str]
    accuracy: tuple[float, ...]
    tpp: dict[str, float]
    intended: dict[str, float]
    unintended: dict[str, float]


def measure_scr(
    pooled: PooledActs,
    labels: Mapping[str, Tensor],
    pairs: Sequence[tuple[str, str]],
    *,
    seed: int = 0,
) -> SCRReport:
    """Spurious correlation removal for pairs of labels, each in both roles.

    Parameters
    ----------
    pooled : PooledActs
    labels : mapping from a name to a Tensor of int, shape (n,)
        1, 0, or −1 for unknown.
    pairs : sequence of (str, str)
        Names of labels.
    seed : int
        Of the splits by document and of the balancing.
    """
    rows = []
    for first, second in pairs:
        for target, unwanted in ((first, second), (second, first)):
            try:
                rows.append(_restore(pooled, labels, target, unwanted, seed))
            except ValueError as error:
                rows.append(SpuriousPair(target, unwanted, not_evaluable=str(error)))
    known = [row for row in rows if row.scr is not None]
    means = {str(n): fmean(row.scr[str(n)] for row in known) for n in THRESHOLDS} if known else None
    return SCRReport(tuple(rows), len(known), means)


def _restore(
    pooled: PooledActs,
    labels: Mapping[str, Tensor],
    target: str,
    unwanted: str,
    seed: int,
) -> SpuriousPair:
    t, u = labels[target], labels[unwanted]
    joint = torch.where((t == UNKNOWN) | (u == UNKNOWN), UNKNOWN, 2 * t + u)
    is_test = split_by_document(pooled.documents, _steadier(pooled.documents, t, u), seed)
    name = f"{target!r} with {unwanted!r}"
    train, test = (
        balanced(
            {f"{q // 2}{q % 2}": side & (joint == q) for q in range(4)}, seed, MIN_QUADRANT, name
        ).numpy()
        for side in (~is_test, is_test)
    )
    t, u = t.numpy(), u.numpy()
    together = train[t[train] == u[train]]  # where the unwanted attribute goes with the target
    x = pooled.x
    clean, biased = (fitted(x[rows], t[rows]) for rows in (train, together))
    acc_clean, acc_biased = (float(probe.score(x[test], t[test])) for probe in (clean, biased))
    if acc_clean - acc_biased < MIN_BIAS:
        reason = (
            f"the bias costs {acc_clean - acc_biased:.2f} of accuracy; less than {MIN_BIAS} leaves "
            "nothing to restore"
        )
        return SpuriousPair(target, unwanted, acc_clean, acc_biased, not_evaluable=reason)
    order = _by_effect(pooled, fitted(x[train], u[train]), train, u)
    scr = {}
    for n in THRESHOLDS:
        accuracy = float(biased.score(_without(pooled, order[:n], test), t[test]))
        scr[str(n)] = (accuracy - acc_biased) / (acc_clean - acc_biased)
    return SpuriousPair(target, unwanted, acc_clean, acc_biased, scr)


def _steadier(documents: Sequence[str], t: Tensor, u: Tensor) -> Tensor:
    """The label that changes within fewer documents; split by it, both sides keep both of its classes."""

    def changes(labels: Tensor) -> int:
        of: dict[str, set[int]] = {}
        for document, label in zip(documents, labels.tolist(), strict=True):
            of.setdefault(document, set()).add(label)
        return sum(len(found - {UNKNOWN}) > 1 for found in of.values())

    return t if changes(t) < changes(u) else u


def measure_tpp(pooled: PooledActs, labels: Mapping[str, Tensor], *, seed: int = 0) -> TPPReport:
    """Targeted probe perturbation over classes, one label each.

    Parameters
    ----------
    pooled : PooledActs
    labels : mapping from a class's name to a Tensor of int, shape (n,)
        1, 0, or −1 for unknown.
    seed : int
        Of the splits by document and of the balancing.

    Raises
    ------
    ValueError
        If fewer than two classes have enough passages.
    """
    rows, reasons = {}, {}
    for name, of_class in labels.items():
        try:
            rows[name] = task_rows(pooled.documents, of_class, name, seed)
        except ValueError as error:
            reasons[name] = str(error)
    if len(rows) < 2:
        raise ValueError(
            f"{len(rows)} of {len(labels)} classes have enough passages; two are needed. For example, "
            f"{next(iter(reasons.values()), 'there is none')}."
        )
    names = tuple(rows)
    y = {name: labels[name].numpy() for name in names}
    probes = {name: fitted(pooled.x[rows[name][0]], y[name][rows[name][0]]) for name in names}
    orders = {name: _by_effect(pooled, probes[name], rows[name][0], y[name]) for name in names}

    def accuracy(of: str, inputs: np.ndarray) -> float:
        return float(probes[of].score(inputs, y[of][rows[of][1]]))

    before = {name: accuracy(name, pooled.x[rows[name][1]]) for name in names}
    intended, unintended = {}, {}
    for n in THRESHOLDS:
        lost = {
            (i, j): before[j] - accuracy(j, _without(pooled, orders[i][:n], rows[j][1]))
            for i, j in itertools.product(names, names)
        }
        intended[str(n)] = fmean(lost[i, i] for i in names)
        unintended[str(n)] = fmean(lost[i, j] for i, j in itertools.permutations(names, 2))
    return TPPReport(
        classes=names,
        not_evaluable=reasons,
        accuracy=tuple(before.values()),
        tpp={n: intended[n] - unintended[n] for n in intended},
        intended=intended,
        unintended=unintended,
    )


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

"""Sparse probing: how much of a label do one, two or five latents tell?

Definition and k as in SAEBench 0.6.0 (arXiv 2503.09532): activations are averaged over a text; the k
latents whose mean differs most between the classes, on training texts, are the inputs of a logistic
regression; its accuracy on test texts stands beside that of all latents and of the model's own activations.
Classes are balanced, so chance is 0.5; training and test texts come from different documents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from c2r_core.metrics.passages import UNKNOWN, PooledActs, balanced, split_by_document

if TYPE_CHECKING:
    from sklearn.linear_model import LogisticRegression

KS = (1, 2, 5)
MIN_PASSAGES = 15  # ours: of each class, on either side


@dataclass(frozen=True)
class ProbedTask:
    """One label; None stands for what could not be measured.

    Attributes
    ----------
    task : str
    n_train, n_test : int
        Passages, half of them of either class.
    top_k : dict from k to float in [0, 1]
        Test accuracy with the k best latents.
    latents : tuple of int
        The latents of the largest k, best first.
    sae, model : float in [0, 1]
        Test accuracy with all latents, and with the model's activations.
    not_evaluable : str
        The reason, if there is no score; else None.
    """

    task: str
    n_train: int | None = None
    n_test: int | None = None
    top_k: dict[str, float] | None = None
    latents: tuple[int, ...] | None = None
    sae: float | None = None
    model: float | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class SparseProbingReport:
    """Means over the tasks that could be evaluated; None if none could."""

    tasks: tuple[ProbedTask, ...]
    n_evaluated: int
    mean_top_k: dict[str, float] | None
    mean_sae: float | None
    mean_model: float | None


def probe_sparsely(
    pooled: PooledActs, labels: Mapping[str, Tensor], *, seed: int = 0
) -> SparseProbingReport:
    """Test accuracy of the best latents, of all latents and of the model, for every label.

    Parameters
    ----------
    pooled : PooledActs
    labels : mapping from a task's name to a Tensor of int, shape (n,)
        1, 0, or −1 for passages that the task leaves out.
    seed : int
        Of the split by document and of the balancing.
    """
    acts = pooled.feature_acts
    rows = []
    for task, of_task in labels.items():
        try:
            train, test = task_rows(pooled.documents, of_task, task, seed)
        except ValueError as error:
            rows.append(ProbedTask(task, not_evaluable=str(error)))
            continue
        y = of_task.numpy()
        difference = np.abs(acts[train[y[train] == 1]].mean(0) - acts[train[y[train] == 0]].mean(0))
        best = np.argsort(-difference, kind="stable")[: max(KS)]

        def accuracy(inputs, y=y, train=train, test=test) -> float:
            return float(fitted(inputs[train], y[train]).score(inputs[test], y[test]))

        rows.append(
            ProbedTask(
                task,
                n_train=len(train),
                n_test=len(test),
                top_k={str(k): accuracy(acts[:, best[:k]]) for k in KS},
                latents=tuple(best.tolist()),
                sae=accuracy(acts),
                model=accuracy(pooled.x),
            )
        )
    known = [row for row in rows if row.not_evaluable is None]
    return SparseProbingReport(
        tasks=tuple(rows),
        n_evaluated=len(known),
        mean_top_k={str(k): fmean(row.top_k[str(k)] for row in known) for k in KS}
        if known
        else None,
        mean_sae=fmean(row.sae for row in known) if known else None,
        mean_model=fmean(row.model for row in known) if known else None,
    )


def task_rows(
    documents: Sequence[str], labels: Tensor, task: str, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of balanced training and test passages, from different documents.

    Raises
    ------
    ValueError
        If a class has fewer than MIN_PASSAGES on a side.
    """
    is_test = split_by_document(documents, labels, seed)
    sides = []
    for side, name in ((~is_test, "training"), (is_test, "test")):
        known = side & (labels != UNKNOWN)
        groups = {c: known & (labels == c) for c in (0, 1)}
        sides.append(balanced(groups, seed, MIN_PASSAGES, f"the {name} side of {task!r}").numpy())
    return sides[0], sides[1]


def fitted(inputs: object, y: np.ndarray) -> LogisticRegression:
    """A logistic regression on raw inputs, which may be sparse."""
    from sklearn.linear_model import LogisticRegression

    return LogisticRegression(max_iter=1000).fit(inputs, y)

"""Sparse probing: how much of a label do one, two or five latents tell?

Definition and k as in SAEBench 0.6.0 (arXiv 2503.09532): activations are averaged over a text; the k
latents whose mean differs most between the classes, on training texts, are the inputs of a logistic
regression; its accuracy on test texts stands beside that of all latents and of the model's own activations.
Classes are balanced, so chance is 0.5; training and test texts come from different documents.

Ours: inputs are standardised. The two probes with many inputs choose their penalty on halves of the training
documents. They are a reference for the k latents and no bound: with few documents a probe with many inputs
overfits, and k latents can do better. Topics are lexical, a passage has one if it holds one of a list of
words: a latent for a single token can tell much of such a label.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from c2r_core.errors import NotEvaluable
from c2r_core.metrics import Headline, metric
from c2r_core.metrics.pooling import PooledActs, pooled_passages, split_by_document, task_rows
from c2r_core.metrics.rows import none_of

if TYPE_CHECKING:
    from c2r_core.metrics.inputs import Inputs

KS = (1, 2, 5)
MIN_PASSAGES = 15  # ours: of each class, on either side
PENALTIES = (1e-4, 1e-3, 1e-2, 1e-1)
"""Inverse strengths, C, that the probes with many inputs choose from."""


@dataclass(frozen=True)
class ProbedTask:
    """One label; null stands for what could not be measured."""

    task: str
    n_train: int | None = None
    """Passages, half of them of either class."""
    n_test: int | None = None
    top_k: dict[str, float] | None = None
    """Test accuracy with the k best latents, by k."""
    latents: tuple[int, ...] | None = None
    """Those of the largest k, best first."""
    sae: float | None = None
    """Test accuracy with all latents."""
    model: float | None = None
    """Test accuracy with the model's activations."""
    not_evaluable: str | None = None
    """The reason, if there is no score."""


@dataclass(frozen=True)
class SparseProbing:
    """Test accuracy on labelled passages of held-out documents, means over tasks; chance is 0.5."""

    llm_test_accuracy: float
    sae_test_accuracy: float
    sae_top_1_test_accuracy: float
    sae_top_2_test_accuracy: float
    sae_top_5_test_accuracy: float
    num_tasks: int
    """With a score."""
    tasks: tuple[ProbedTask, ...]


@metric(
    "sparse_probing",
    group="probing",
    headline={
        "sae_top_1_test_accuracy": Headline("higher", 0.5),
        "sae_test_accuracy": Headline("higher", "llm_test_accuracy"),
    },
)
def measure(inputs: Inputs) -> SparseProbing:
    """How much of each label one, two or five latents tell."""
    return probe_sparsely(*pooled_passages(inputs), seed=inputs.seed)


def probe_sparsely(
    pooled: PooledActs, labels: Mapping[str, Tensor], *, seed: int = 0
) -> SparseProbing:
    """Test accuracy of the best latents, of all latents and of the model, for every label.

    Parameters
    ----------
    labels : mapping from a task's name to a Tensor of int, shape (n,)
        1, 0, or −1 for passages that the task leaves out.
    seed : int
        Of the split by document and of the balancing.

    Raises NotEvaluable if no label has enough passages.
    """
    rows = []
    for task, of_task in labels.items():
        try:
            rows.append(_probe(pooled, of_task, task, seed))
        except NotEvaluable as error:
            rows.append(ProbedTask(task, not_evaluable=str(error)))
    known = [row for row in rows if row.not_evaluable is None]
    if not known:
        raise none_of("labels", rows)
    return SparseProbing(
        llm_test_accuracy=fmean(row.model for row in known),
        sae_test_accuracy=fmean(row.sae for row in known),
        **{f"sae_top_{k}_test_accuracy": fmean(row.top_k[str(k)] for row in known) for k in KS},
        num_tasks=len(known),
        tasks=tuple(rows),
    )


def _probe(pooled: PooledActs, labels: Tensor, task: str, seed: int) -> ProbedTask:
    train, test = task_rows(pooled.documents, labels, task, seed, MIN_PASSAGES)
    acts, y = pooled.feature_acts, labels.numpy()
    difference = np.abs(acts[train[y[train] == 1]].mean(0) - acts[train[y[train] == 0]].mean(0))
    best = np.argsort(-difference, kind="stable")[: max(KS)]
    documents = [pooled.documents[i] for i in train]
    half = split_by_document(documents, labels[train], seed).numpy()

    def accuracy(inputs, penalties: Sequence[float]) -> float:
        probe = _fitted(inputs[train], y[train], half, penalties)
        return float(probe.score(inputs[test], y[test]))

    return ProbedTask(
        task,
        n_train=len(train),
        n_test=len(test),
        top_k={str(k): accuracy(acts[:, best[:k]], (1.0,)) for k in KS},
        latents=tuple(best.tolist()),
        sae=accuracy(acts, PENALTIES),
        model=accuracy(pooled.x, PENALTIES),
    )


def _fitted(inputs, y: np.ndarray, half: np.ndarray, penalties: Sequence[float]):
    """A logistic regression on standardised inputs, its C chosen on two halves of the documents."""
    from scipy.sparse import issparse
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def probe(C: float):
        scale = StandardScaler(with_mean=not issparse(inputs))
        return make_pipeline(scale, LogisticRegression(C=C, max_iter=1000))

    if len(penalties) == 1:
        return probe(*penalties).fit(inputs, y)
    sides = [np.flatnonzero(half), np.flatnonzero(~half)]
    # A class of one document has no halves: then every second passage of each class.
    if any(len(np.unique(y[side])) < 2 for side in sides):
        sides = [np.argsort(y, kind="stable")[i::2] for i in (0, 1)]
    folds = [(sides[0], sides[1]), (sides[1], sides[0])]
    grid = {"logisticregression__C": list(penalties)}
    return GridSearchCV(probe(1.0), grid, cv=folds, error_score="raise").fit(inputs, y)

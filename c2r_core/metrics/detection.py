"""Detection score: can a judge that is no language model predict from the text where a latent fires?

For each latent, as many contexts in which it fires as in which it does not: the token itself and the ten
before it (a latent has seen no more). A logistic regression on which tokens are there, the token itself
counted apart from those before, is fitted on half of the contexts and judged on the other half: balanced
accuracy, 0.5 is chance. It needs no network and no key, and finds what words can tell; a latent that fires by
meaning or by syntax may score low and still be sound. Never to be mixed with AutoInterp's score.
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np

from c2r_core.metrics import Headline, metric
from c2r_core.metrics.firings import TOKENS_AROUND, Firings, drawn_latents, firings_of
from c2r_core.metrics.rows import none_of
from c2r_core.statistics import mean_interval

if TYPE_CHECKING:
    from scipy.sparse import csr_matrix

    from c2r_core.metrics.inputs import Inputs

MAX_CONTEXTS = 100
"""Of each kind, for a latent."""
MIN_FIRINGS = 30
MIN_PER_SIDE = 5


@dataclass(frozen=True)
class DetectedLatent:
    """One latent; null stands for what could not be measured."""

    latent: int
    n_firings: int
    """Tokens on which it fires."""
    score: float | None = None
    """Balanced accuracy on contexts that the judge had not seen."""
    shuffled: float | None = None
    """Of a judge that was fitted to shuffled labels: chance."""
    tokens: tuple[int, ...] = ()
    """Token ids that speak most for the latent, the strongest first; negative ones, −1 − id, stand for a
    token before the one on which it fires."""
    not_evaluable: str | None = None
    """The reason, if there is no score."""


@dataclass(frozen=True)
class Detection:
    """Detection scores of latents drawn among those that fire on 30 tokens or more; chance is 0.5."""

    mean_score: float
    low: float | None
    """Ends of a 95 % interval over latents; null with a single one."""
    high: float | None
    share_above_09: float
    mean_shuffled: float
    """Of judges fitted to shuffled labels: chance, as measured."""
    n_evaluated: int
    n_often_enough: int
    """Latents that fire often enough, of which these were drawn."""
    latents: tuple[DetectedLatent, ...]


@metric(
    "detection",
    group="detection",
    headline={"mean_score": Headline("higher", "mean_shuffled")},
)
def measure(inputs: Inputs) -> Detection:
    """Can the text alone predict where latents fire? On held-out tokens, without a language model."""
    n = inputs.sizes.detection_latents
    return measure_detection(firings_of(inputs), n_latents=n, seed=inputs.seed)


def measure_detection(firings: Firings, *, n_latents: int = 100, seed: int = 0) -> Detection:
    """Score latents drawn among those that fire often enough; the seed also draws and splits the contexts.

    Raises NotEvaluable if no latent fires often enough, or none of those drawn can be judged.
    """
    drawn = drawn_latents(firings, n_latents, MIN_FIRINGS, seed)
    rows = tuple(_judge(firings, int(latent), seed) for latent in drawn)
    known = [row for row in rows if row.score is not None]
    if not known:
        raise none_of("latents", rows)
    scores = [row.score for row in known]
    interval = mean_interval(scores) if len(scores) > 1 else None
    return Detection(
        mean_score=fmean(scores),
        low=interval.low if interval else None,
        high=interval.high if interval else None,
        share_above_09=fmean(score > 0.9 for score in scores),
        mean_shuffled=fmean(row.shuffled for row in known),
        n_evaluated=len(known),
        n_often_enough=int((firings.n_firings() >= MIN_FIRINGS).sum()),
        latents=rows,
    )


def _judge(firings: Firings, latent: int, seed: int) -> DetectedLatent:
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score

    generator = np.random.default_rng(firings.identity(latent, seed))
    fires = firings.of(latent)[firings.place] > 0
    n_firings = int(fires.sum())
    kinds = [np.flatnonzero(fires), np.flatnonzero(~fires)]
    n = min(MAX_CONTEXTS, *(len(kind) for kind in kinds))
    rows = np.concatenate([generator.permutation(kind)[:n] for kind in kinds])
    y = fires[rows].astype(int)
    # By context, so that no text is on both sides.
    is_test = (generator.permutation(len(firings.contexts)) % 2 == 0)[firings.context_of[rows]]
    sides = [np.bincount(y[side], minlength=2) for side in (is_test, ~is_test)]
    if np.min(sides) < MIN_PER_SIDE:
        reason = (
            f"it fires on {n_firings} tokens, too close together or too many: five contexts with it and "
            "five without are needed on either side"
        )
        return DetectedLatent(latent, n_firings, not_evaluable=reason)
    words, x = _words(firings, rows)

    def judged(labels: np.ndarray) -> tuple[np.ndarray, float]:
        judge = LogisticRegression(max_iter=500, class_weight="balanced")
        judge.fit(x[~is_test], labels)
        return judge.coef_[0], float(balanced_accuracy_score(y[is_test], judge.predict(x[is_test])))

    weights, score = judged(y[~is_test])
    best = np.argsort(-weights, kind="stable")[:5]
    return DetectedLatent(
        latent=latent,
        n_firings=n_firings,
        score=score,
        shuffled=judged(generator.permutation(y[~is_test]))[1],
        tokens=tuple(int(words[i]) for i in best if weights[i] > 0),
    )


def _words(firings: Firings, rows: np.ndarray) -> tuple[np.ndarray, csr_matrix]:
    """The distinct words, and which of them are in each row's context, (len(rows), n_words).

    The token itself is its id; one of those before it is −1 − id.
    """
    from sklearn.preprocessing import MultiLabelBinarizer

    found = []
    for place in firings.place[rows]:
        context, position = divmod(int(place), firings.contexts.shape[1])
        before = firings.contexts[context, max(0, position - TOKENS_AROUND) : position]
        found.append([firings.contexts[context, position], *(-1 - before)])
    binarizer = MultiLabelBinarizer(sparse_output=True)
    held = binarizer.fit_transform(found).astype(float)
    held.sort_indices()
    return binarizer.classes_, held

"""Study `absorption`, of notebook 05: why protocols for one score disagree, and what the score can resolve.

Every arm is scored under protocols that differ in one thing at a time: how many of the words are used and
how they are split, and how many steps the probes and the selector of the letter's latents are trained.
SAEBench gives both 50 epochs of batches of 4096, which makes 500 steps on this model's whole vocabulary, but
100 on 9000 words and 50 on 4500. After 50 steps the selector has not converged: all weights begin at zero,
Adam moves each about equally far, and the latents that rank first fire on one training word. They detect no
letter, and so most words count as absorbed, whatever the SAE.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.experiments.language_model import Sources, of_trained, standard_arms
from c2r_core.experiments.study import Study
from c2r_core.metrics.absorption import AbsorptionFirstLetter, evaluate_first_letter
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_probes import (
    PROBE_EPOCHS,
    LetterSplit,
    letters,
    split_words,
    train_letter_probes,
)
from c2r_core.seeds import mix_seeds

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True)
class Protocol:
    """How the words are split, and how long probes and selector are trained.

    Attributes
    ----------
    half : bool
        Half of the words, half of these to test on; otherwise all words, a fifth to test on.
    probe_steps, selector_steps : int, optional
        The metric's own numbers, 500 or more, if not given.
    """

    half: bool = False
    probe_steps: int | None = None
    selector_steps: int | None = None


METRIC = "all words, 500 steps"
PROTOCOLS = {
    "all words, 100 steps": Protocol(False, 100, 100),
    "all words, 100 steps, probes 50": Protocol(False, 50, 100),
    "all words, 100 steps, selector 50": Protocol(False, 100, 50),
    "half of the words, 50 steps": Protocol(True, 50, 50),
    "half of the words, 50 steps, probes 100": Protocol(True, 100, 50),
    "half of the words, 50 steps, selector 100": Protocol(True, 50, 100),
    "half of the words, 500 steps": Protocol(True),
    METRIC: Protocol(),
    "all words, 2000 steps": Protocol(False, 2000, 2000),
}
"""The first is SAEBench's recipe on 9000 words, the fourth on half of them; `METRIC` is the metric's."""


COMPARED = ("baseline", "C²R")
"""Arms that are scored under every protocol."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Each protocol on the arms of `COMPARED`, the metric's own on every arm; the first training seed."""
    sources = Sources(profile)
    study = Study("absorption", profile, training_seeds(1, seed), device)
    return [
        study.cell(
            f"{title}, {name}",
            measure,
            arm=arm,
            protocol=protocol,
            splits=profile.evaluation.word_splits,
            sources=sources,
        )
        for title, arm in standard_arms(profile.language_model, device).items()
        for name, protocol in PROTOCOLS.items()
        if title in COMPARED or name == METRIC
    ]


@of_trained
def measure(inputs: Inputs, protocol: Protocol, splits: int) -> list[dict[str, Any]]:
    """The scores of each split of the words, and what latents were taken for the letters' own.

    A split in which no letter can be measured has the reason instead.
    """
    rows = []
    for number in range(splits):
        task = split(letters(inputs), protocol, number)
        n_train = int((~task.is_test).sum())
        probes = train_letter_probes(task, batch_size=batch_size(n_train, protocol.probe_steps))
        try:
            acts = encode_sparse(inputs.sae, task.activations)
            report = evaluate_first_letter(
                inputs.sae,
                [LetterSplit(task, probes)],
                acts=acts,
                selector_batch_size=batch_size(n_train, protocol.selector_steps),
            )
        except NotEvaluable as error:
            rows.append({"split": number, "not_evaluable": str(error)})
            continue
        rows.append({"split": number} | scores(report, acts, task))
    return rows


def split(task: FirstLetterTask, protocol: Protocol, number: int) -> FirstLetterTask:
    """The words that a protocol uses, split into training and test words; another way for each number."""
    if not protocol.half:
        return split_words(task, number)
    generator = torch.Generator().manual_seed(mix_seeds(1, number))
    used = torch.randperm(len(task.words), generator=generator)[: len(task.words) // 2]
    return replace(
        task,
        words=tuple(task.words[i] for i in used),
        activations=task.activations[used],
        letters=task.letters[used],
        is_test=torch.arange(len(used)) % 2 == 0,
    )


def batch_size(n_train: int, steps: int | None) -> int | None:
    """The batch size that gives so many steps; None leaves it to the metric."""
    return None if steps is None else math.ceil(n_train * PROBE_EPOCHS / steps)


def scores(
    report: AbsorptionFirstLetter, acts: csr_array, task: FirstLetterTask
) -> dict[str, float]:
    """One split's scores; F1 of the letters' own latents; words on which the best of them fires."""
    measured = [row for row in report.letters if row.num_splits]
    fires = []
    for row in measured:
        of_letter = ~task.is_test & (task.letters == LETTERS.index(row.first_letter))
        best = acts[of_letter.nonzero()[:, 0].numpy()][:, [row.split_features[0]]]
        fires.append(best.count_nonzero())
    return {
        "fraction": report.mean_absorption_fraction_score,
        "full": report.mean_full_absorption_score,
        "split_size": report.mean_num_split_features,
        "f1": fmean(row.split_f1[int(row.num_split_features) - 1] for row in measured),
        "fires_on": float(median(fires)),
        "letters": float(len(measured)),
    }


def of_protocol(values: Mapping[str, Any], arm: str, protocol: str, score: str) -> list[float]:
    """One score of an arm, in every split; NaN where no letter could be measured."""
    return [row.get(score, math.nan) for row in values[slug(f"{arm}, {protocol}")]]


def protocol_table(values: Mapping[str, Any], arms: Sequence[str] = COMPARED) -> pd.DataFrame:
    """A row for each protocol: what it makes of the arms, and why.

    Columns: the mean absorbed fraction of each arm; for the first arm the F1 of the letters' own latents, and
    on how many training words of its letter the best one fires (median over letters, mean over splits).
    """
    rows = []
    for protocol in PROTOCOLS:
        means = {arm: fmean(of_protocol(values, arm, protocol, "fraction")) for arm in arms}
        own = {
            title: fmean(of_protocol(values, arms[0], protocol, score))
            for title, score in (("F1 of own latents", "f1"), ("fires on", "fires_on"))
        }
        rows.append({"protocol": protocol} | means | own)
    return pd.DataFrame(rows).set_index("protocol")


def reliability_table(
    values: Mapping[str, Any],
    arms: Sequence[str],
    *,
    protocol: str = METRIC,
    score: str = "fraction",
) -> pd.DataFrame:
    """A row for each arm: its score, how far that varies with the split, and what can be told apart.

    Columns: mean and standard deviation (n − 1) over splits; then of the difference to the first arm, on the
    same splits: mean, standard deviation, and the smallest difference that can be told from none, which is
    two standard errors of the mean over the splits. Splits share words, so that is a lower bound; letters
    and training seeds are not in it.
    """
    first, rows = of_protocol(values, arms[0], protocol, score), []
    for arm in arms:
        own = of_protocol(values, arm, protocol, score)
        row = {"arm": arm, "mean": fmean(own), "sd over splits": sd(own)}
        if arm != arms[0]:
            apart = [a - b for a, b in zip(own, first, strict=True)]
            row |= {
                "difference": fmean(apart),
                "sd of difference": sd(apart),
                "resolves": 2 * sd(apart) / math.sqrt(len(apart)),
            }
        rows.append(row)
    return pd.DataFrame(rows).set_index("arm")


def sd(values: Sequence[float]) -> float:
    """Standard deviation (n − 1); NaN for a single value, and where one of them is NaN."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else math.nan

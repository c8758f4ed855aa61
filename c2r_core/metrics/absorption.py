"""First-letter splitting and absorption: is "starts with S" one latent, or is it scattered?

A word's first letter is a feature with perfect labels that language models use. Linear probes find
its direction in the model's activations, a selector finds the SAE's own latents for it, and both
are compared word by word. A word is *absorbed* when the probe sees the letter but the letter's
latents are silent, and another latent that points the letter's way fires in their place.

    words = letter_words(model.tokenizer, corpus, limit=9000)
    task = harvest_words(model, words, "blocks.4.hook_resid_post")  # once per model and hook
    splits = [LetterSplit(t, train_letter_probes(t)) for t in (split_words(task, i) for i in range(5))]
    report = evaluate_first_letter(sae, splits)  # for each SAE

Method: "A is for Absorption" (arXiv 2409.14507), with the steps and constants of SAEBench 0.6.0.
Where this file differs from it:

- The score is a mean over several splits of the words into training and test words, and says how far it
  varies between them and between words; SAEBench has one split.
- Probes and selector take at least 500 steps, as SAEBench's do on a whole vocabulary, however few the words:
  its fixed batch size would give a few thousand words 50 steps, too few for the selector to converge.
- All words share one few-shot prefix; SAEBench draws 10 examples anew for each word.
- Decoder rows may have any norm: f ‖w‖ and w / ‖w‖ stand for f and w everywhere, so a score does
  not change when scale moves between a latent's activation and its decoder row.
- Probes start at zero instead of at random. A latent that never fires then keeps a weight of
  exactly zero, and only latents of positive weight can be a letter's own.
- A letter that cannot be measured stays in the report, with the reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING

import numpy as np
import torch

from c2r_core.data.words import LETTERS
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import metric
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_latents import (
    SplitLatents,
    absorption,
    letter_acts,
    split_latents,
    true_positives,
)
from c2r_core.metrics.letter_probes import LetterSplit, letter_splits, why_no_letter
from c2r_core.metrics.rows import mean_of, sd_of
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

N_RESAMPLES = 1000
"""Draws of the bootstrap over words."""


@dataclass(frozen=True)
class Letter:
    """One letter, means over the splits that could measure it; null stands for none."""

    first_letter: str
    mean_absorption_fraction: float | None = None
    """Mean share of the letter, over test words, that other latents carry."""
    full_absorption_rate: float | None = None
    """Share of the words that another latent has absorbed completely."""
    num_full_absorption: float | None = None
    num_probe_true_positives: float | None = None
    """Test words of the letter that its probe recognises; the means are over them."""
    num_split_features: float | None = None
    """The letter's own latents; 1 means no splitting."""
    split_features: tuple[int, ...] | None = None
    """Those of the first split that could measure the letter, best first."""
    split_f1: tuple[float, ...] | None = None
    """Ours: test F1 of the best 1, 2, … latents there, up to the first set that was not accepted."""
    probe_f1: float | None = None
    """Of the probe on the model's activations, on test words."""
    num_splits: int = 0
    """Splits that could measure the letter."""
    not_evaluable: str | None = None
    """The reason, where there is no score."""


@dataclass(frozen=True)
class Split:
    """The scores of one split of the words."""

    mean_absorption_fraction_score: float
    mean_full_absorption_score: float
    mean_num_split_features: float
    num_letters: int


@dataclass(frozen=True)
class AbsorptionFirstLetter:
    """First-letter splitting and absorption, with SAEBench's constants.

    A split's score is the mean over the letters that it could measure, and the score the mean over splits.
    All words share one prompt of four examples; SAEBench draws ten anew for each word.
    """

    mean_absorption_fraction_score: float
    mean_full_absorption_score: float
    mean_num_split_features: float
    std_dev_absorption_fraction_score: float | None
    """Over letters (n − 1); null with a single one."""
    std_dev_full_absorption_score: float | None
    std_dev_num_split_features: float | None
    split_sd_absorption_fraction_score: float | None
    """Ours: standard deviation (n − 1) over splits; null with a single one."""
    split_sd_full_absorption_score: float | None
    absorption_fraction_interval: tuple[float, float]
    """Ours: 95 % of what resampled words score (bootstrap), with the same probes and latents."""
    full_absorption_interval: tuple[float, float]
    num_letters: int
    """Letters with a score."""
    num_good_probes: float
    """Letters that the model itself tells (probe F1 above 0.6), mean over splits; SAEBench reports
    nothing below 20."""
    num_words: int
    """The most frequent words of the held-out documents."""
    letters: tuple[Letter, ...]
    splits: tuple[Split, ...]


@metric(
    "absorption",
    group="absorption",
    headline={
        "mean_absorption_fraction_score": "lower",
        "mean_full_absorption_score": "lower",
        "mean_num_split_features": "near 1",
    },
)
def measure_absorption(inputs: Inputs) -> AbsorptionFirstLetter:
    """Splitting and absorption of first letters, on words of the held-out documents."""
    splits, acts = letter_splits(inputs), letter_acts(inputs)
    return evaluate_first_letter(inputs.sae, splits, acts=acts, seed=inputs.seed)


def evaluate_first_letter(
    sae: AnySAE,
    splits: Sequence[LetterSplit],
    *,
    acts: csr_array | None = None,
    seed: int = 0,
    selector_batch_size: int | None = None,
) -> AbsorptionFirstLetter:
    """Splitting and absorption of every letter that has a good probe, in every split.

    The SAE takes raw activations (see `fold_norm_factor`), each row on its own. The splits are of the same
    words, each with the probes trained on it. `acts` are the words' feature activations, (n_words, d_sae),
    where they are at hand. `seed` is of the order in which the selector sees the words, and of the bootstrap.
    `selector_batch_size` is in place of that of `train_letter_probes`. Memory is that of `encode_sparse`, and
    of a few (d_sae, 26) in float32.

    Raises NotEvaluable if SAE or probes are made for another width, if the SAE returns NaN or infinite
    values, or if no letter can be measured.
    """
    words = splits[0].task
    for split in splits:
        if split.probes.weights.shape[1] != words.activations.shape[1]:
            raise NotEvaluable(
                f"The probes' weights have shape {tuple(split.probes.weights.shape)}; expected rows of "
                f"{words.activations.shape[1]} entries, the width of the activations at {words.hook_name!r}."
            )
    norms = sae.W_dec.detach().float().norm(dim=1).cpu().numpy()
    if acts is None:
        acts = encode_sparse(sae, words.activations)
    scaled = acts.copy()
    scaled.data *= norms[scaled.indices]
    select = partial(split_latents, scaled, seed=seed, batch_size=selector_batch_size)
    scored = [_score(sae, split, acts, select) for split in splits]
    if not any(scores for _, scores in scored):
        raise NotEvaluable(why_no_letter(splits))
    return _report(splits, scored, seed)


_Scores = tuple[np.ndarray, np.ndarray]
"""One letter's test words in one split, (n,); and the fraction and fullness of each one's absorption, (n, 2).
"""


def _score(
    sae: AnySAE,
    split: LetterSplit,
    acts: csr_array,
    select: Callable[..., dict[int, SplitLatents]],
) -> tuple[list[Letter], dict[int, _Scores]]:
    """Every letter's row in one split, and the words of those that could be measured."""
    task, probes = split
    W_dec = sae.W_dec.detach().float().cpu()
    good = [i for i, reason in enumerate(probes.not_evaluable) if reason is None]
    own = select(task.letters, task.is_test, evaluable=good)
    rows, found = [], {}
    for i, letter in enumerate(LETTERS):
        row = {"first_letter": letter, "probe_f1": probes.f1[i]}
        if i not in own:
            rows.append(Letter(**row, not_evaluable=probes.not_evaluable[i]))
            continue
        latents, of_size = own[i]
        chosen = true_positives(task, probes, i)
        row |= {"split_f1": of_size, "num_probe_true_positives": len(chosen)}
        if not latents:
            reason = "no latent has a positive weight in the selector"
        elif not len(chosen):
            reason = "the probe recognises no test word of this letter"
        else:
            reason = None
            # The letter's own latents come first; one that fires on none of these words carries nothing.
            of_words = acts[chosen.numpy()]
            among = np.concatenate([latents, np.setdiff1d(of_words.indices, latents)])
            scores = absorption(
                task.activations[chosen],
                torch.from_numpy(of_words[:, among].toarray()),
                W_dec[among],
                probes.weights[i],
                range(len(latents)),
            )
            both = np.stack([scores.fraction.numpy(), scores.full.numpy()], 1)
            found[i] = chosen.numpy(), both
            row |= {
                "mean_absorption_fraction": float(scores.fraction.mean()),
                "full_absorption_rate": float(scores.full.double().mean()),
                "num_full_absorption": int(scores.full.sum()),
                "num_split_features": len(latents),
                "split_features": latents,
                "num_splits": 1,
            }
        rows.append(Letter(**row, not_evaluable=reason))
    return rows, found


def _report(
    splits: Sequence[LetterSplit],
    scored: Sequence[tuple[list[Letter], dict[int, _Scores]]],
    seed: int,
) -> AbsorptionFirstLetter:
    of_splits = [
        Split(
            **{f"mean_{s}": mean_of(rows, name) for s, name in _SCORES.items()},
            num_letters=len(found),
        )
        for rows, found in scored
        if found
    ]
    letters = [_mean_row(rows) for rows in zip(*(rows for rows, _ in scored), strict=True)]
    n_words = len(splits[0].task.words)
    fraction, full = _intervals([found for _, found in scored if found], n_words, seed)
    return AbsorptionFirstLetter(
        **{f"mean_{s}": mean_of(of_splits, f"mean_{s}") for s in _SCORES},
        **{f"std_dev_{s}": sd_of(letters, name) for s, name in _SCORES.items()},
        split_sd_absorption_fraction_score=sd_of(of_splits, "mean_absorption_fraction_score"),
        split_sd_full_absorption_score=sd_of(of_splits, "mean_full_absorption_score"),
        absorption_fraction_interval=fraction,
        full_absorption_interval=full,
        num_letters=sum(row.num_splits > 0 for row in letters),
        num_good_probes=fmean(split.probes.not_evaluable.count(None) for split in splits),
        num_words=n_words,
        letters=tuple(letters),
        splits=tuple(of_splits),
    )


_SCORES = {
    "absorption_fraction_score": "mean_absorption_fraction",
    "full_absorption_score": "full_absorption_rate",
    "num_split_features": "num_split_features",
}
"""The score's name in the report, and that of the field of `Letter` of which it is a mean."""
_AVERAGED = (*_SCORES.values(), "num_full_absorption", "num_probe_true_positives", "probe_f1")


def _mean_row(rows: Sequence[Letter]) -> Letter:
    measured = [row for row in rows if row.not_evaluable is None]
    first = (measured or rows)[0]
    return Letter(
        first_letter=first.first_letter,
        split_features=first.split_features,
        split_f1=first.split_f1,
        num_splits=len(measured),
        not_evaluable=first.not_evaluable,
        **{name: mean_of(measured or rows, name) for name in _AVERAGED},
    )


def _intervals(
    found: Sequence[dict[int, _Scores]], n_words: int, seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """95 % intervals of both scores: words drawn with replacement, the same ones in every split."""
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(n_words, np.full(n_words, 1 / n_words), size=N_RESAMPLES)
    scores = []
    for split in found:
        of_letters = []
        for words, both in split.values():
            times = draws[:, words].astype(float)
            with np.errstate(invalid="ignore"):  # a letter whose words were not drawn
                of_letters.append(times @ both / times.sum(1)[:, None])
        scores.append(np.nanmean(of_letters, axis=0))
    low, high = np.quantile(np.mean(scores, axis=0), [0.025, 0.975], axis=0)
    return tuple((float(a), float(b)) for a, b in zip(low, high, strict=True))

"""A letter's own latents, as many as its F1 asks for; and what other latents absorb, word by word."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.metrics.encoding import encode, encode_sparse
from c2r_core.metrics.letter_probes import LetterProbes, f1, fit_probes, letters, one_hot
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from c2r_core.metrics.inputs import Inputs

# Constants of SAEBench 0.6.0.
MAX_SPLIT_SIZE = 10
SPLIT_F1_GAIN = 0.03
MAX_ABSORBERS = 3
ABSORBER_MIN_COSINE = 0.1
FULL_ABSORBER_MIN_COSINE = 0.025
MIN_ABSORBED_SHARE = 0.4


def letter_acts(inputs: Inputs) -> csr_array:
    """The SAE's feature activations of all words, (n_words, d_sae): encoded once."""
    words = letters(inputs)
    return inputs.once("letter acts", lambda: encode_sparse(inputs.sae, words.activations))


class SplitLatents(NamedTuple):
    """The latents over which a letter is split."""

    latents: tuple[int, ...]
    """Best first; empty if no latent has a positive weight in the selector."""
    f1: tuple[float, ...]
    """Test F1 with the best 1, 2, ... latents, up to the first set that was not accepted."""


def split_latents(
    feature_acts: csr_array | np.ndarray,
    letters: Tensor,
    is_test: Tensor,
    *,
    evaluable: Iterable[int] = range(len(LETTERS)),
    seed: int = 0,
    batch_size: int | None = None,
) -> dict[int, SplitLatents]:
    """The latents that detect each letter: as many as its F1 on test words asks for.

    The selector is a probe on all latents, trained like those of `train_letter_probes` but with weight decay
    1e-6 and a penalty of 0.01 · (mean over letters of Σ|w|); a letter's latents are ranked by its (signed)
    weights. Then a logistic regression with balanced classes is fitted to the first k, for k = 1, 2, ... 10,
    as long as each gains over 0.03 in F1 on the last.

    `feature_acts` (n_words, d_sae) are activations times the norms of their decoder rows; `letters` and the
    mask `is_test` are (n_words,). Each of the letters `evaluable` needs a training word. `seed` and
    `batch_size` are the selector's, as in `train_letter_probes`.
    """
    from scipy.sparse import csr_array

    feature_acts, is_letter = csr_array(feature_acts), one_hot(letters)
    train, test = (~is_test).numpy(), is_test.numpy()
    acts_train, acts_test = feature_acts[train], feature_acts[test]
    # The weight of a latent that no training word makes fire stays at zero, where it starts.
    firing = np.unique(acts_train.indices)
    acts_train, acts_test = acts_train[:, firing], acts_test[:, firing]
    penalties = {"weight_decay": 1e-6, "l1": 0.01}
    weights, _ = fit_probes(
        acts_train, is_letter[train], **penalties, seed=seed, batch_size=batch_size
    )
    by_latent_train, by_latent_test = acts_train.tocsc(), acts_test.tocsc()
    splits = {}
    for i in evaluable:
        best = np.argsort(-weights[:, i], kind="stable")[:MAX_SPLIT_SIZE]
        best = best[weights[best, i] > 0]
        x_train, x_test = by_latent_train[:, best].toarray(), by_latent_test[:, best].toarray()
        of_size, size = [], 0
        for k in range(1, len(best) + 1):
            predicted = _refit(x_train[:, :k], is_letter[train, i], x_test[:, :k])
            of_size.append(f1(predicted, is_letter[test, i]))
            if k > 1 and of_size[-1] <= of_size[-2] + SPLIT_F1_GAIN:
                break
            size = k
        splits[i] = SplitLatents(tuple(firing[best[:size]].tolist()), tuple(of_size))
    return splits


def _refit(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Predictions of a logistic regression on a few latents, classes balanced.

    Words on which none of the latents fires are all alike: one of each class stands for them, with their
    weight.
    """
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    fires = x_train.any(1)
    x, y = np.pad(x_train[fires], ((0, 2), (0, 0))), np.append(y_train[fires], [False, True])
    times = np.append(np.ones(fires.sum()), np.bincount(y_train[~fires], minlength=2))
    balance = len(y_train) / (2 * np.bincount(y_train, minlength=2))
    classifier = LogisticRegression(max_iter=500)
    with warnings.catch_warnings():
        # Stopping after 500 iterations, converged or not, is part of the definition.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(x, y, sample_weight=times * balance[y.astype(int)])
    return classifier.decision_function(x_test) > 0


class Absorption(NamedTuple):
    """Absorption of one letter, word by word, each (n_words,); see `absorption`."""

    fraction: Tensor
    """Float64 in [0, 1]: share of the letter that other latents carry instead of the letter's own."""
    full: Tensor
    """Bool: the letter's own latents are silent, and one other latent stands in for them."""
    strongest_latent: Tensor
    """The latent that carries most of the letter; where `full`, the one that absorbed it."""


def absorption(
    activations: Tensor,
    feature_acts: Tensor,
    W_dec: Tensor,
    probe: Tensor,
    split_latents: Sequence[int] | Tensor,
) -> Absorption:
    """How far a letter is carried, in each word, by latents other than the letter's own.

    With unit decoder rows w_i, let c_i = cos(probe, w_i), p_i = f_i c_i, and P = x·probe / ‖probe‖.
    M is the sum of p over the letter's own latents, S the sum of the 3 largest positive p among
    other latents with c ≥ 0.1.

    - fraction = 0 if M ≥ P or S < 0.4 P; else 1 if M ≤ 0; else t / (t + M) with t = min(S, P − M).
    - full = all own latents are silent, P > 0, and the latent of largest p has c ≥ 0.025 and
      p ≥ 0.4 P.

    `activations` (n_words, d_in) and `feature_acts` (n_words, d_sae) are of words of the letter that its
    probe (d_in,) recognises; `split_latents` are the letter's own. Rows of W_dec (d_sae, d_in) have any norm,
    and rows of zero carry nothing.
    """
    own = torch.as_tensor(split_latents, dtype=torch.long, device=W_dec.device)
    direction = probe / probe.norm()
    total = activations.double() @ direction.double()
    along_probe = (W_dec @ direction.to(W_dec)).double()
    cosine = along_probe / W_dec.norm(dim=1).double().clamp_min(torch.finfo(torch.float64).tiny)
    projection = feature_acts * along_probe

    is_other = cosine >= ABSORBER_MIN_COSINE
    is_other[own] = False
    by_others = (projection * is_other).clamp_min(0)
    by_others = by_others.topk(min(MAX_ABSORBERS, len(W_dec)), dim=1).values.sum(1)
    by_own = projection[:, own].sum(1)
    is_absorbed = (by_own < total) & (total > 0) & (by_others >= MIN_ABSORBED_SHARE * total)
    taken = torch.minimum(by_others, total - by_own)
    fraction = torch.where(by_own <= 0, 1.0, taken / (taken + by_own))
    fraction = torch.where(is_absorbed, fraction, 0.0)

    largest, strongest = projection.max(dim=1)
    full = (
        (feature_acts[:, own] == 0).all(1)
        & (total > 0)
        & (cosine[strongest] >= FULL_ABSORBER_MIN_COSINE)
        & (largest >= MIN_ABSORBED_SHARE * total)
    )
    return Absorption(fraction, full, strongest)


def absorption_by_word(
    sae: AnySAE,
    task: FirstLetterTask,
    probes: LetterProbes,
    letter: str,
    split_latents: Sequence[int],
) -> tuple[tuple[str, ...], Absorption]:
    """The test words of a letter (one of A to Z) that its probe recognises, and the absorption of each.

    SAE, task and probes are as in `evaluate_first_letter`, where a split is a task with its probes;
    `split_latents` are the letter's own, such as `Letter.split_features`.
    """
    i = LETTERS.index(letter)
    chosen = true_positives(task, probes, i)
    x, W_dec = task.activations[chosen], sae.W_dec.detach().float().cpu()
    scores = absorption(x, encode(sae, x), W_dec, probes.weights[i], split_latents)
    return tuple(task.words[j] for j in chosen), scores


def true_positives(task: FirstLetterTask, probes: LetterProbes, i: int) -> Tensor:
    """Numbers of a letter's test words that its probe recognises."""
    holds = probes.holds(task.activations, task.letters)[:, i]
    return (holds & task.is_test).nonzero()[:, 0]

"""First-letter splitting and absorption: is "starts with S" one latent, or is it scattered?

A word's first letter is a feature with perfect labels that language models use. Linear probes find
its direction in the model's activations, a selector finds the SAE's own latents for it, and both
are compared word by word. A word is *absorbed* when the probe sees the letter but the letter's
latents are silent, and another latent that points the letter's way fires in their place.

    words = letter_words(model.tokenizer, corpus, limit=9000)
    task = harvest_words(model, words, "blocks.4.hook_resid_post")  # once per model and hook
    probes = train_letter_probes(task)
    report = evaluate_first_letter(sae, task, probes)  # for each SAE

Method: "A is for Absorption" (arXiv 2409.14507), with the steps and constants of SAEBench 0.6.0.
Where this file differs from it:

- All words share one few-shot prefix; SAEBench draws 10 examples anew for each word.
- Decoder rows may have any norm: f ‖w‖ and w / ‖w‖ stand for f and w everywhere, so a score does
  not change when scale moves between a latent's activation and its decoder row.
- Probes start at zero instead of at random. A latent that never fires then keeps a weight of
  exactly zero, and only latents of positive weight can be a letter's own.
- A letter that cannot be measured stays in the report, with the reason.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, stdev
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

# Constants of SAEBench 0.6.0.
GOOD_PROBE_F1 = 0.6
PROBE_EPOCHS = 50
PROBE_BATCH_SIZE = 4096
MAX_SPLIT_SIZE = 10
SPLIT_F1_GAIN = 0.03
MAX_ABSORBERS = 3
ABSORBER_MIN_COSINE = 0.1
FULL_ABSORBER_MIN_COSINE = 0.025
MIN_ABSORBED_SHARE = 0.4

# Ours: with fewer words, neither a letter's probe nor its score means anything.
MIN_TRAIN_WORDS = 20
MIN_TEST_WORDS = 5

# -- step 1: what the model knows --------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class LetterProbes:
    """One linear probe a letter: x · weight + bias > 0 means "starts with it".

    Attributes
    ----------
    weights : Tensor, shape (26, d_in)
    biases : Tensor, shape (26,)
    f1 : tuple of 26 float or None
        On test words; None, and a probe of zeros, for letters with too few words.
    not_evaluable : tuple of 26 str or None
        Why a letter is not evaluated; None if it is.
    """

    weights: Tensor
    biases: Tensor
    f1: tuple[float | None, ...]
    not_evaluable: tuple[str | None, ...]


def train_letter_probes(task: FirstLetterTask, *, seed: int = 0) -> LetterProbes:
    """26 one-vs-rest logistic probes on raw activations, trained together as one matrix.

    Binary cross-entropy with positives weighted by negatives / positives; Adam with weight decay
    1e-4, its learning rate falling exponentially from 1e-2 to 1e-5 over 50 epochs of batches of
    4096. That learning rate fits raw activations: do not rescale them.

    A letter is evaluable with 20 training words, 5 test words, and a test F1 above 0.6.

    Parameters
    ----------
    task : FirstLetterTask
    seed : int
        Of the order of the words.

    Raises
    ------
    ValueError
        If activations are NaN or infinite.
    """
    if not task.activations.isfinite().all():
        raise ValueError(f"The activations at {task.hook_name!r} hold NaN or infinite values.")
    x, is_letter = task.activations.numpy(), _one_hot(task.letters)
    train, test = (~task.is_test).numpy(), task.is_test.numpy()
    weights, biases = _fit_probes(x[train], is_letter[train], weight_decay=1e-4, l1=0, seed=seed)
    recognised = x[test] @ weights + biases > 0

    f1, not_evaluable = [], []
    for i, letter in enumerate(LETTERS):
        n_train, n_test = int(is_letter[train, i].sum()), int(is_letter[test, i].sum())
        if n_train < MIN_TRAIN_WORDS or n_test < MIN_TEST_WORDS:
            weights[:, i], biases[i] = 0, 0
            f1.append(None)
            not_evaluable.append(
                f"{n_train} training and {n_test} test words start with {letter}; at least "
                f"{MIN_TRAIN_WORDS} and {MIN_TEST_WORDS} are needed"
            )
        else:
            f1.append(_f1(recognised[:, i], is_letter[test, i]))
            reason = f"the probe's F1, {f1[-1]:.2f}, is not above {GOOD_PROBE_F1}"
            not_evaluable.append(None if f1[-1] > GOOD_PROBE_F1 else reason)
    return LetterProbes(
        weights=torch.from_numpy(weights.T.copy()),
        biases=torch.from_numpy(biases),
        f1=tuple(f1),
        not_evaluable=tuple(not_evaluable),
    )


# -- steps 2 and 3: the letter's own latents ---------------------------------------------------


class SplitLatents(NamedTuple):
    """The latents over which a letter is split.

    Attributes
    ----------
    latents : tuple of int
        Best first; empty if no latent has a positive weight in the selector.
    f1 : tuple of float
        Test F1 with the best 1, 2, ... latents: one for each of `latents` and, unless the search
        ended there, one for the first set that was not accepted.
    """

    latents: tuple[int, ...]
    f1: tuple[float, ...]


def split_latents(
    feature_acts: csr_array | np.ndarray,
    letters: Tensor,
    is_test: Tensor,
    *,
    evaluable: Iterable[int] = range(len(LETTERS)),
    seed: int = 0,
) -> dict[int, SplitLatents]:
    """The latents that detect each letter: as many as its F1 on test words asks for.

    The selector is a probe on all latents, trained like those of `train_letter_probes` but with
    weight decay 1e-6 and a penalty of 0.01 · (mean over letters of Σ|w|); a letter's latents are
    ranked by its (signed) weights. Then a logistic regression with balanced classes is fitted to
    the first k, for k = 1, 2, ... 10, as long as each gains over 0.03 in F1 on the last.

    Parameters
    ----------
    feature_acts : scipy.sparse.csr_array or array, shape (n_words, d_sae)
        Activations times the norms of their decoder rows.
    letters : Tensor of int, shape (n_words,)
    is_test : Tensor of bool, shape (n_words,)
    evaluable : iterable of int
        The letters to do; each needs a training word.
    seed : int
        Of the order in which the selector sees the words.
    """
    from scipy.sparse import csr_array

    feature_acts, is_letter = csr_array(feature_acts), _one_hot(letters)
    train, test = (~is_test).numpy(), is_test.numpy()
    acts_train, acts_test = feature_acts[train], feature_acts[test]
    weights, _ = _fit_probes(acts_train, is_letter[train], weight_decay=1e-6, l1=0.01, seed=seed)
    splits = {}
    for i in evaluable:
        best = np.argsort(-weights[:, i], kind="stable")[:MAX_SPLIT_SIZE]
        best = best[weights[best, i] > 0]
        x_train, x_test = acts_train[:, best].toarray(), acts_test[:, best].toarray()
        f1, size = [], 0
        for k in range(1, len(best) + 1):
            predicted = _refit(x_train[:, :k], is_letter[train, i], x_test[:, :k])
            f1.append(_f1(predicted, is_letter[test, i]))
            if k > 1 and f1[-1] <= f1[-2] + SPLIT_F1_GAIN:
                break
            size = k
        splits[i] = SplitLatents(tuple(best[:size].tolist()), tuple(f1))
    return splits


# -- step 4: absorption ------------------------------------------------------------------------


class Absorption(NamedTuple):
    """Absorption of one letter, word by word; see `absorption`.

    Attributes
    ----------
    fraction : Tensor of float64, shape (n_words,), in [0, 1]
        Share of the letter that other latents carry instead of the letter's own.
    full : Tensor of bool, shape (n_words,)
        The letter's own latents are silent, and one other latent stands in for them.
    strongest_latent : Tensor of int, shape (n_words,)
        The latent that carries most of the letter; where `full`, the one that absorbed it.
    """

    fraction: Tensor
    full: Tensor
    strongest_latent: Tensor


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

    Parameters
    ----------
    activations : Tensor, shape (n_words, d_in)
        Of words of the letter that its probe recognises.
    feature_acts : Tensor, shape (n_words, d_sae)
    W_dec : Tensor, shape (d_sae, d_in)
        Rows of any norm; rows of zero carry nothing.
    probe : Tensor, shape (d_in,)
    split_latents : sequence of int
        The letter's own latents.
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
    *,
    chunk_size: int = 256,
) -> tuple[tuple[str, ...], Absorption]:
    """The test words of a letter that its probe recognises, and the absorption of each.

    Parameters
    ----------
    sae, task, probes, chunk_size
        As in `evaluate_first_letter`.
    letter : str
        One of A to Z.
    split_latents : sequence of int
        The letter's own latents, such as `LetterRow.split_latents`.
    """
    i = LETTERS.index(letter)
    probe = probes.weights[i]
    recognised = task.activations @ probe + probes.biases[i] > 0
    chosen = (recognised & task.is_test & (task.letters == i)).nonzero()[:, 0]
    chunks = []
    with torch.no_grad():
        W_dec = sae.W_dec.float()
        probe = probe.to(W_dec.device)
        for x in task.activations[chosen].to(W_dec.device).split(chunk_size):
            chunks.append(absorption(x, sae.encode(x), W_dec, probe, split_latents))
    scores = Absorption(*(torch.cat(values).cpu() for values in zip(*chunks, strict=True)))
    return tuple(task.words[j] for j in chosen), scores


# -- step 5: the report ------------------------------------------------------------------------


@dataclass(frozen=True)
class LetterRow:
    """One letter of a report; None stands for what could not be measured.

    Attributes
    ----------
    letter : str
    probe_f1 : float
        Of the ground-truth probe, on test words.
    n_true_positives : int
        Test words of the letter that its probe recognises; absorption is a mean over them.
    split_size : int
        Number of the letter's own latents; 1 means no splitting.
    split_latents : tuple of int
    split_f1 : tuple of float
        As in `SplitLatents`.
    absorption_fraction : float in [0, 1]
        Mean share of the letter that other latents carry.
    full_absorption : float in [0, 1]
        Share of words that another latent has absorbed completely.
    not_evaluable : str
        The reason, if there is no score; else None.
    """

    letter: str
    probe_f1: float | None
    n_true_positives: int | None = None
    split_size: int | None = None
    split_latents: tuple[int, ...] | None = None
    split_f1: tuple[float, ...] | None = None
    absorption_fraction: float | None = None
    full_absorption: float | None = None
    not_evaluable: str | None = None


@dataclass(frozen=True)
class FirstLetterReport:
    """First-letter splitting and absorption of one SAE.

    Means and standard deviations (n − 1) are over the evaluated letters; None if these are too few.

    Attributes
    ----------
    letters : tuple of 26 LetterRow
    n_evaluated : int
        Letters with a score.
    n_good_probes : int
        Letters with a probe F1 above 0.6; SAEBench wants 20 or more.
    """

    letters: tuple[LetterRow, ...]
    n_evaluated: int
    n_good_probes: int
    mean_absorption_fraction: float | None
    sd_absorption_fraction: float | None
    mean_full_absorption: float | None
    sd_full_absorption: float | None
    mean_split_size: float | None
    sd_split_size: float | None


def evaluate_first_letter(
    sae: AnySAE,
    task: FirstLetterTask,
    probes: LetterProbes,
    *,
    seed: int = 0,
    chunk_size: int = 256,
) -> FirstLetterReport:
    """Splitting and absorption of every letter that has a good probe.

    Memory: 8 bytes for each feature activation that is not zero, and `chunk_size` rows of d_sae.

    Parameters
    ----------
    sae : any object with `encode` and `W_dec`, shape (d_sae, d_in)
        Takes raw activations (see `fold_norm_factor`), each row on its own.
    task : FirstLetterTask
    probes : LetterProbes
        Trained on this task.
    seed : int
        Of the order in which the selector sees the words, the only random choice here.
    chunk_size : int
        Words encoded at a time.

    Raises
    ------
    ValueError
        If SAE or probes are made for another width, or if the SAE returns NaN or infinite values.
    """
    d_in = task.activations.shape[1]
    for name, weights in (("the SAE's W_dec", sae.W_dec), ("the probes' weights", probes.weights)):
        if weights.ndim != 2 or weights.shape[1] != d_in:
            raise ValueError(
                f"{name} has shape {tuple(weights.shape)}; expected rows of {d_in} entries, the "
                f"width of the task's activations at {task.hook_name!r}."
            )
    splits = split_latents(
        _encode_sparse(sae, task.activations, chunk_size),
        task.letters,
        task.is_test,
        evaluable=[i for i, reason in enumerate(probes.not_evaluable) if reason is None],
        seed=seed,
    )
    rows = []
    for i, letter in enumerate(LETTERS):
        if i in splits:
            rows.append(_score_letter(sae, task, probes, i, splits[i], chunk_size))
        else:
            reason = probes.not_evaluable[i]
            rows.append(LetterRow(letter, probes.f1[i], not_evaluable=reason))
    return _summarise(rows)


def _score_letter(
    sae: AnySAE,
    task: FirstLetterTask,
    probes: LetterProbes,
    i: int,
    split: SplitLatents,
    chunk_size: int,
) -> LetterRow:
    words, scores = absorption_by_word(
        sae, task, probes, LETTERS[i], split.latents, chunk_size=chunk_size
    )
    row = LetterRow(LETTERS[i], probes.f1[i], n_true_positives=len(words), split_f1=split.f1)
    if not split.latents:
        return replace(row, not_evaluable="no latent has a positive weight in the selector")
    if not words:
        return replace(row, not_evaluable="the probe recognises no test word of this letter")
    return replace(
        row,
        split_size=len(split.latents),
        split_latents=split.latents,
        absorption_fraction=float(scores.fraction.mean()),
        full_absorption=float(scores.full.double().mean()),
    )


def _summarise(rows: Sequence[LetterRow]) -> FirstLetterReport:
    evaluated = [row for row in rows if row.not_evaluable is None]
    moments = {}
    for name in ("absorption_fraction", "full_absorption", "split_size"):
        values = [getattr(row, name) for row in evaluated]
        moments[f"mean_{name}"] = fmean(values) if values else None
        moments[f"sd_{name}"] = stdev(values) if len(values) > 1 else None
    return FirstLetterReport(
        letters=tuple(rows),
        n_evaluated=len(evaluated),
        n_good_probes=sum((row.probe_f1 or 0) > GOOD_PROBE_F1 for row in rows),
        **moments,
    )


# -- probes ------------------------------------------------------------------------------------


def _one_hot(letters: Tensor) -> np.ndarray:
    return torch.nn.functional.one_hot(letters, len(LETTERS)).bool().numpy()


def _fit_probes(
    inputs: np.ndarray | csr_array,
    is_letter: np.ndarray,
    *,
    weight_decay: float,
    l1: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d, 26) and biases (26,) fitted to inputs (n, d), dense or sparse, float32."""
    targets = torch.from_numpy(is_letter).float()
    positives = targets.sum(0)
    pos_weight = (len(targets) - positives) / positives.clamp_min(1)
    weights, biases = torch.zeros(inputs.shape[1], len(LETTERS)), torch.zeros(len(LETTERS))
    optimiser = torch.optim.Adam([weights, biases], lr=1e-2, weight_decay=weight_decay)
    decay = (1e-5 / 1e-2) ** (1 / PROBE_EPOCHS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, decay)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(PROBE_EPOCHS):
        for rows in torch.randperm(len(targets), generator=generator).split(PROBE_BATCH_SIZE):
            batch = inputs[rows.numpy()]
            logits = (torch.from_numpy(batch @ weights.numpy()) + biases).requires_grad_()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, targets[rows], pos_weight=pos_weight
            )
            (error,) = torch.autograd.grad(loss, logits)
            # By hand from here on: SciPy's sparse product is ten times faster than torch's.
            weights.grad = torch.from_numpy(batch.T @ error.numpy())
            weights.grad += l1 / len(LETTERS) * weights.sign()
            biases.grad = error.sum(0)
            optimiser.step()
        schedule.step()
    return weights.numpy(), biases.numpy()


def _refit(x_train: np.ndarray, y_train: np.ndarray, x_test: np.ndarray) -> np.ndarray:
    """Predictions of a logistic regression on a few latents."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression

    classifier = LogisticRegression(class_weight="balanced", max_iter=500)
    with warnings.catch_warnings():
        # Stopping after 500 iterations, converged or not, is part of the definition.
        warnings.simplefilter("ignore", ConvergenceWarning)
        classifier.fit(x_train, y_train)
    return classifier.decision_function(x_test) > 0


def _f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    true_positives = int((predicted & actual).sum())
    return 2 * true_positives / max(1, int(predicted.sum()) + int(actual.sum()))


def _encode_sparse(sae: AnySAE, activations: Tensor, chunk_size: int) -> csr_array:
    """Feature activations times the norms of their decoder rows, (n_words, d_sae)."""
    from scipy.sparse import csr_array, vstack

    norms = sae.W_dec.detach().float().norm(dim=1)
    chunks = []
    for x in activations.split(chunk_size):
        with torch.no_grad():
            feature_acts = sae.encode(x.to(norms.device)).float() * norms
        if not feature_acts.isfinite().all():
            raise ValueError(
                "The SAE's feature activations hold NaN or infinite values. Check its weights, and "
                "that it takes raw activations."
            )
        chunks.append(csr_array(feature_acts.cpu().numpy()))
    return vstack(chunks, format="csr")

"""What the model itself knows of first letters: words, their splits, a probe for each letter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.artefacts.records import Record
from c2r_core.data.words import LETTERS, FirstLetterTask, harvest_words, letter_words
from c2r_core.errors import NotEvaluable
from c2r_core.seeds import mix_seeds

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from c2r_core.metrics.inputs import Inputs

# Constants of SAEBench 0.6.0.
GOOD_PROBE_F1 = 0.6
PROBE_EPOCHS = 50
PROBE_BATCH_SIZE = 4096

MIN_BATCHES_PER_EPOCH = 10
"""Ours: as many as SAEBench takes on a whole vocabulary. Batches of 4096 would leave a few thousand words 50
steps, after which the selector still ranks latents of a single word first, and all count as absorbed."""
N_FOLDS = 5

# Ours: with fewer words, neither a letter's probe nor its score means anything.
MIN_TRAIN_WORDS = 20
MIN_TEST_WORDS = 5


@dataclass(frozen=True, eq=False)
class LetterProbes(Record):
    """One linear probe a letter: x · weight + bias > 0 means "starts with it"."""

    FILES: ClassVar[str] = "probes"

    weights: Tensor
    """Shape (26, d_in)."""
    biases: Tensor
    """Shape (26,)."""
    f1: tuple[float | None, ...]
    """On test words; None, and a probe of zeros, for letters with too few words."""
    not_evaluable: tuple[str | None, ...]
    """Why a letter is not evaluated; None if it is."""

    def recognises(self, activations: Tensor) -> Tensor:
        """Which of (n, d_in) each probe takes for a word of its letter: bool, (n, 26)."""
        return activations @ self.weights.T + self.biases > 0

    def holds(self, activations: Tensor, letters: Tensor) -> Tensor:
        """Which letter each word holds, if any: the one that it starts with, if its probe recognises it.

        `activations` are (n, d_in), `letters` int (n,); the answer is bool, (n, 26).
        """
        return self.recognises(activations) & (letters[:, None] == torch.arange(len(LETTERS)))


class LetterSplit(NamedTuple):
    """Words, some for training and the others for testing, and the probes trained on the former."""

    task: FirstLetterTask
    probes: LetterProbes


def letters(inputs: Inputs) -> FirstLetterTask:
    """Words of the held-out documents with their activations; harvested once.

    Raises NotEvaluable if there are no words, or the tokenizer does not keep one whole in the prompt.
    """
    limit = inputs.lm.first_letter_words

    def build(folder: Path) -> None:
        model = inputs.language_model
        words = letter_words(model.tokenizer, inputs.documents.corpus, limit=limit)
        harvest_words(model, words, inputs.lm.hook_name, precision=inputs.precision).save(folder)

    def make() -> FirstLetterTask:
        return FirstLetterTask.load(inputs.kept("words", {"words": limit}, build))

    return inputs.once("letters", make)


def letter_splits(inputs: Inputs) -> list[LetterSplit]:
    """The words split into training and test words, several times, each time with its probes."""

    def split(number: int) -> LetterSplit:
        task = split_words(letters(inputs), number, seed=inputs.seed)
        settings = {"words": inputs.lm.first_letter_words, "split": number, "seed": inputs.seed}

        def build(folder: Path) -> None:
            train_letter_probes(task, seed=inputs.seed).save(folder)

        folder = inputs.kept("letter_probes", settings, build, code=[__name__])
        return LetterSplit(task, LetterProbes.load(folder))

    return inputs.once("letter splits", lambda: [split(i) for i in range(inputs.sizes.word_splits)])


def split_words(task: FirstLetterTask, number: int, *, seed: int = 0) -> FirstLetterTask:
    """The task with other test words, a fifth of all: each word is one in just one of splits 0 to 4.

    Splits 5 to 9 are those of another permutation, and so on.
    """
    permutation, fold = divmod(number, N_FOLDS)
    generator = torch.Generator().manual_seed(mix_seeds(seed, permutation))
    order = torch.randperm(len(task.words), generator=generator)
    is_test = torch.zeros(len(order), dtype=torch.bool)
    is_test[order.tensor_split(N_FOLDS)[fold]] = True
    return replace(task, is_test=is_test)


def train_letter_probes(
    task: FirstLetterTask, *, seed: int = 0, batch_size: int | None = None
) -> LetterProbes:
    """26 one-vs-rest logistic probes on raw activations, trained together as one matrix.

    Binary cross-entropy with positives weighted by negatives / positives; Adam with weight decay 1e-4, its
    learning rate falling exponentially from 1e-2 to 1e-5 over 50 epochs of batches of `batch_size`: by
    default 4096, or a tenth of the words if these are fewer. That learning rate fits raw activations: do not
    rescale them. `seed` is of the order of the words.

    A letter is evaluable with 20 training words, 5 test words, and a test F1 above 0.6.
    Raises NotEvaluable if activations are NaN or infinite.
    """
    if not task.activations.isfinite().all():
        raise NotEvaluable(f"The activations at {task.hook_name!r} hold NaN or infinite values.")
    x, is_letter = task.activations.numpy(), one_hot(task.letters)
    train, test = (~task.is_test).numpy(), task.is_test.numpy()
    weights, biases = fit_probes(
        x[train], is_letter[train], weight_decay=1e-4, l1=0, seed=seed, batch_size=batch_size
    )
    recognised = x[test] @ weights + biases > 0

    found, not_evaluable = [], []
    for i, letter in enumerate(LETTERS):
        n_train, n_test = int(is_letter[train, i].sum()), int(is_letter[test, i].sum())
        if n_train < MIN_TRAIN_WORDS or n_test < MIN_TEST_WORDS:
            weights[:, i], biases[i] = 0, 0
            found.append(None)
            not_evaluable.append(
                f"{n_train} training and {n_test} test words start with {letter}; at least "
                f"{MIN_TRAIN_WORDS} and {MIN_TEST_WORDS} are needed"
            )
        else:
            found.append(f1(recognised[:, i], is_letter[test, i]))
            reason = f"the probe's F1, {found[-1]:.2f}, is not above {GOOD_PROBE_F1}"
            not_evaluable.append(None if found[-1] > GOOD_PROBE_F1 else reason)
    return LetterProbes(
        weights=torch.from_numpy(weights.T.copy()),
        biases=torch.from_numpy(biases),
        f1=tuple(found),
        not_evaluable=tuple(not_evaluable),
    )


def why_no_letter(splits: Sequence[LetterSplit]) -> str:
    """What is said where no letter of the first split could be measured."""
    task, probes = splits[0]
    too_few = probes.f1.count(None)
    good = probes.not_evaluable.count(None)
    return (
        f"None of the {len(LETTERS)} letters could be measured on {len(task.words)} words: {too_few} "
        f"begin too few of them, {len(LETTERS) - too_few - good} are not told by a probe on the model "
        f"itself, and for {good} the SAE has no latent."
    )


def fit_probes(
    x: np.ndarray | csr_array,
    labels: np.ndarray,
    *,
    weight_decay: float,
    l1: float,
    seed: int,
    batch_size: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Weights (d, n_concepts) and biases (n_concepts,), fitted to x (n, d), dense or sparse, float32.

    `labels` say which rows hold which concept: bool, (n, n_concepts).
    """
    targets = torch.from_numpy(labels).float()
    positives = targets.sum(0)
    pos_weight = (len(targets) - positives) / positives.clamp_min(1)
    n_concepts = labels.shape[1]
    weights, biases = torch.zeros(x.shape[1], n_concepts), torch.zeros(n_concepts)
    optimiser = torch.optim.Adam([weights, biases], lr=1e-2, weight_decay=weight_decay)
    decay = (1e-5 / 1e-2) ** (1 / PROBE_EPOCHS)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimiser, decay)
    generator = torch.Generator().manual_seed(seed)
    if batch_size is None:
        batch_size = min(PROBE_BATCH_SIZE, math.ceil(len(targets) / MIN_BATCHES_PER_EPOCH))
    for _ in range(PROBE_EPOCHS):
        for rows in torch.randperm(len(targets), generator=generator).split(batch_size):
            batch = x[rows.numpy()]
            logits = (torch.from_numpy(batch @ weights.numpy()) + biases).requires_grad_()
            loss = torch.nn.functional.binary_cross_entropy_with_logits(
                logits, targets[rows], pos_weight=pos_weight
            )
            (error,) = torch.autograd.grad(loss, logits)
            # By hand from here on: SciPy's sparse product is ten times faster than torch's.
            weights.grad = torch.from_numpy(batch.T @ error.numpy())
            weights.grad += l1 / n_concepts * weights.sign()
            biases.grad = error.sum(0)
            optimiser.step()
        schedule.step()
    return weights.numpy(), biases.numpy()


def one_hot(letters: Tensor) -> np.ndarray:
    """Bool, (n, 26)."""
    return torch.nn.functional.one_hot(letters, len(LETTERS)).bool().numpy()


def f1(predicted: np.ndarray, actual: np.ndarray) -> float:
    """2 · true positives / (predicted + actual positives); 0 where there are none."""
    true_positives = int((predicted & actual).sum())
    return 2 * true_positives / max(1, int(predicted.sum()) + int(actual.sum()))

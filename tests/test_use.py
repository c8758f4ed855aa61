"""Erasing and steering with one latent, on a model whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.words import LetterWords, harvest_words
from c2r_core.metrics.use import UseTask, letter_use_task, measure_use, measure_use_of_means

N_CONCEPTS, D_IN, PER_CONCEPT = 4, 12, 60


@dataclass
class Dictionary:
    """Latents read the activation along one direction each and write along another."""

    W_enc: torch.Tensor  # (d_in, d_sae)
    W_dec: torch.Tensor
    threshold: float = 0.5

    def encode(self, x):
        acts = x @ self.W_enc
        return acts * (acts > self.threshold)

    def decode(self, feature_acts):
        return feature_acts @ self.W_dec


def answers(x):
    """A model that answers by the largest of the first coordinates, and anything else by the last."""
    return (10 * torch.cat([x[:, :N_CONCEPTS], torch.full((len(x), 1), 0.2)], 1)).log_softmax(1)


@pytest.fixture
def task():
    """Concept c is coordinate c; coordinates from N_CONCEPTS on tell two kinds of each concept apart."""
    generator = torch.Generator().manual_seed(0)
    concepts = torch.arange(N_CONCEPTS).repeat(PER_CONCEPT)
    n = len(concepts)
    x = torch.zeros(n, D_IN)
    x[:, :N_CONCEPTS] = 0.1  # what the model falls back on; no latent fires on so little
    x[torch.arange(n), concepts] = 1
    x[torch.arange(n), N_CONCEPTS + concepts] = (torch.arange(n) // N_CONCEPTS % 3 == 0).float()
    x += 0.01 * torch.randn(x.shape, generator=generator)
    for_picking = torch.rand(n, generator=generator) < 0.5

    def respond(rows, replacements):
        return answers(x[rows] if replacements is None else replacements)

    return UseTask(tuple("abcd"), x, concepts, for_picking, respond)


def clean():
    return Dictionary(torch.eye(D_IN), torch.eye(D_IN))


def test_a_latent_that_is_the_concept_erases_and_steers_all_of_it(task):
    report = measure_use(clean(), task)
    assert report.n_evaluated == N_CONCEPTS
    assert (report.mean_erased, report.mean_steered, report.mean_collateral) == (1, 1, 0)
    assert report.mean_picking_f1 == report.mean_using_f1 == 1
    assert [row.latent for row in report.concepts] == list(range(N_CONCEPTS))


def test_exceptions_of_a_latent_are_what_erasing_misses(task):
    """The general latent is silent on one kind of the concept, which another latent has absorbed."""
    W_enc, W_dec = torch.eye(D_IN), torch.eye(D_IN)
    for c in range(N_CONCEPTS):
        W_enc[N_CONCEPTS + c, c] = -1  # silent where the special kind is
        W_dec[N_CONCEPTS + c, c] = 1  # which writes the concept too
    report = measure_use(Dictionary(W_enc, W_dec), task)
    exceptions = []
    for c in range(N_CONCEPTS):
        right = (task.concepts == c) & ~task.for_picking
        exceptions.append(float(task.activations[right, N_CONCEPTS + c].mean()))
    assert report.mean_steered == 1
    assert 0.5 < report.mean_erased < 0.8
    assert report.mean_erased == pytest.approx(1 - sum(exceptions) / N_CONCEPTS, abs=0.1)


def test_a_latent_that_also_fires_elsewhere_breaks_other_samples(task):
    dirty = clean()
    dirty.W_enc[N_CONCEPTS + 1, 0] = 1  # latent 0 fires on one kind of concept 1 as well
    dirty.W_dec[0, 1] = 1
    row = measure_use(dirty, task).concepts[0]
    assert row.latent == 0 and row.picking_f1 < 1
    assert row.collateral > 0.1
    assert measure_use(clean(), task).concepts[0].collateral == 0


def test_an_unrelated_dictionary_moves_nothing(task):
    unrelated = clean()
    unrelated.W_dec = torch.eye(D_IN).roll(2 * N_CONCEPTS, dims=1)
    report = measure_use(unrelated, task)
    assert (report.mean_erased, report.mean_steered, report.mean_collateral) == (0, 0, 0)


def test_permuted_and_rescaled_latents_score_the_same(task):
    order = torch.randperm(D_IN, generator=torch.Generator().manual_seed(3))
    scale = torch.linspace(0.5, 3, D_IN)
    other = Dictionary(
        (torch.eye(D_IN) * scale)[:, order], (torch.eye(D_IN) / scale[:, None])[order]
    )
    other.threshold = 0.2
    expected, found = measure_use(clean(), task), measure_use(other, task)
    for name in ("mean_erased", "mean_steered", "mean_collateral", "mean_using_f1"):
        assert getattr(found, name) == pytest.approx(getattr(expected, name), abs=1e-6)


def test_the_difference_of_means_is_a_direction_without_an_sae(task):
    report = measure_use_of_means(task)
    assert (report.mean_erased, report.mean_steered) == (1, 1)
    assert report.concepts[0].latent is None and report.mean_using_f1 is None


def test_what_cannot_be_measured_says_why(task):
    silent = clean()
    silent.W_enc = torch.zeros(D_IN, D_IN)
    report = measure_use(silent, task)
    assert report.n_evaluated == 0 and report.mean_erased is None
    assert all("no latent fires" in row.not_evaluable for row in report.concepts)
    few = measure_use(clean(), task, n_samples=1000)
    assert all("1000 are needed" in row.not_evaluable for row in few.concepts)
    deaf = replace(task, respond=lambda rows, x: answers(torch.zeros(len(rows), D_IN)))
    assert "0 rightly answered" in measure_use(clean(), deaf).concepts[1].not_evaluable
    with pytest.raises(ValueError, match="W_dec has shape"):
        measure_use(Dictionary(torch.eye(3), torch.eye(3)), task)
    broken = clean()
    broken.W_enc[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        measure_use(broken, task)


def test_the_same_seed_gives_the_same_report(task):
    assert measure_use(clean(), task, seed=3) == measure_use(clean(), task, seed=3)


# -- the language model ------------------------------------------------------------------------


def test_letters_as_a_task():
    model = load_language_model(RANDOM)
    tokens = [" apple", " bread", " corn", " door", " apples"]
    ids = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in tokens]
    words = [(word, i[0]) for word, i in zip(tokens, ids, strict=True) if len(i) == 1]
    letter_words = LetterWords(
        tuple(word for word, _ in words),
        torch.tensor([i for _, i in words]),
        torch.zeros(len(words), dtype=torch.bool),
    )
    task = harvest_words(model, letter_words, "blocks.0.hook_resid_post")
    half = torch.arange(len(task.words)) % 2 == 0
    use = letter_use_task(model, task, for_picking=half)
    assert torch.equal(use.activations, task.activations) and torch.equal(use.for_picking, half)
    rows = torch.arange(len(task.words))
    before = use.respond(rows, None)
    assert before.exp().sum(1).allclose(torch.ones(len(rows)), atol=1e-4)
    assert torch.allclose(use.respond(rows, use.activations), before, atol=1e-5)
    assert "are needed" in measure_use_of_means(use).concepts[0].not_evaluable

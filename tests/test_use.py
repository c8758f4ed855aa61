"""Erasing and steering with one latent, on a model whose answers are known."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch

from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.words import LetterWords, harvest_words
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import use as module
from c2r_core.metrics import use_task
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_probes import letter_splits
from c2r_core.metrics.use import measure_use, measure_use_of_means, use_examples
from c2r_core.metrics.use_task import UseTask, letter_use_task, letters_to_use
from c2r_core.seeds import mix_seeds

HOOK = "blocks.0.hook_resid_post"
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

    samples = tuple(f"{'abcd'[c]}{i}" for i, c in enumerate(concepts))
    return UseTask(tuple("abcd"), samples, x, concepts, for_picking, respond)


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


def test_examples_show_answers_before_and_after(task):
    examples = use_examples(clean(), task, n=3)
    assert len(examples) == 3 and len({one.before for one in examples}) == 3
    for one in examples:
        assert one.sample[0] == one.before == task.names[one.latent] and one.fires
        assert one.after_erasing != one.before
        assert one.after_steering == one.steered_to != one.before
    exceptions = clean()
    for c in range(N_CONCEPTS):
        exceptions.W_enc[N_CONCEPTS + c, c] = -1
    unheard = [
        one for i in range(20) for one in use_examples(exceptions, task, seed=i) if not one.fires
    ]
    assert unheard and all(one.after_erasing == one.before for one in unheard)
    assert "silent here" in str(unheard[0])
    assert "→" in str(examples[0]) and use_examples(clean(), task, n=3) == examples


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
    with pytest.raises(NotEvaluable, match="takes activations of width 3; these have 12"):
        measure_use(Dictionary(torch.eye(3), torch.eye(3)), task)
    broken = clean()
    broken.W_enc[0, 0] = torch.nan
    with pytest.raises(NotEvaluable, match="NaN"):
        measure_use(broken, task)


def test_all_is_asked_together_and_scored_as_one_by_one(task):
    dirty = clean()
    dirty.W_enc[N_CONCEPTS + 1, 0] = 1
    dirty.W_dec[0, 1] = 1
    asked = []

    def respond(rows, replacements):
        asked.append(replacements is None)
        return task.respond(rows, replacements)

    report = measure_use(dirty, replace(task, respond=respond))
    assert asked == [True, False]
    acts, n, is_right = dirty.encode(task.activations), 20, task.is_right()
    for c, row in enumerate(report.concepts):
        generator = torch.Generator().manual_seed(mix_seeds(0, c))
        holds = task.concepts == c
        draw = [(holds & is_right).nonzero()[:, 0], (~holds & ~task.for_picking).nonzero()[:, 0]]
        held, others = (s[torch.randperm(len(s), generator=generator)[:n]] for s in draw)

        def without(i, c=c):
            x = task.activations[i] - acts[i, c] * dirty.W_dec[c]
            return task.respond(torch.tensor([i]), x[None])[0]

        erased = [int(without(i)[:-1].argmax()) != c for i in held]
        kl = [task.before[i].exp() @ (task.before[i] - without(i)) for i in others]
        mean_with, mean_without = task.means(c)
        along = dirty.W_dec[c] / dirty.W_dec[c].norm()
        shift = 2 * (mean_with - mean_without).norm() * along
        to = [task.respond(i[None], (task.activations[i] + shift)[None])[0, :-1] for i in others]
        assert row.erased == pytest.approx(sum(erased) / n)
        assert row.collateral == pytest.approx(float(sum(kl)) / n, abs=1e-6)
        assert row.steered == pytest.approx(sum(int(one.argmax()) == c for one in to) / n)


def test_the_same_seed_gives_the_same_report(task):
    assert measure_use(clean(), task, seed=3) == measure_use(clean(), task, seed=3)


# -- the language model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def words(model):
    """One-token words of a few letters, every third of them scored by other metrics."""
    candidates = [
        f" {word}"
        for word in "apple air arm area bread boat book bank corn case city door day dog death".split()
    ]
    ids = [model.tokenizer(word, add_special_tokens=False)["input_ids"] for word in candidates]
    kept = [(word, i[0]) for word, i in zip(candidates, ids, strict=True) if len(i) == 1]
    names, tokens = zip(*kept, strict=True)
    is_test = torch.arange(len(names)) % 3 == 0
    return harvest_words(model, LetterWords(names, torch.tensor(tokens), is_test), HOOK)


def test_no_word_that_another_metric_scores_is_picked_on_or_used(model, words):
    use = letter_use_task(model, words, seed=1)
    scored = {word for word, is_test in zip(words.words, words.is_test, strict=True) if is_test}
    assert scored and not scored & set(use.samples)
    assert set(use.samples) | scored == set(words.words)
    assert 0 < int(use.for_picking.sum()) <= len(use.samples) // 2
    few = letter_use_task(model, words, seed=1, per_letter=1)
    used = [few.samples[i].strip()[0] for i in (~few.for_picking).nonzero()[:, 0]]
    assert len(used) == len(set(used)), "one word of a letter"
    assert int(few.for_picking.sum()) == int(use.for_picking.sum())


def test_letters_as_a_task(model, words):
    use = letter_use_task(model, words)
    where = [words.words.index(word) for word in use.samples]
    assert torch.equal(use.activations, words.activations[where])
    assert torch.equal(use.concepts, words.letters[where])
    rows = torch.arange(len(use.samples))
    before = use.respond(rows, None)
    assert before.exp().sum(1).allclose(torch.ones(len(rows)), atol=1e-4)
    assert torch.allclose(use.respond(rows, use.activations), before, atol=1e-5)
    assert "are needed" in measure_use_of_means(use).concepts[0].not_evaluable


def test_samples_asked_together_answer_as_each_alone(model, words):
    use = letter_use_task(model, words)
    rows = torch.arange(len(use.samples))
    moved = use.activations.flip(0)
    together = use.respond(rows, moved)
    alone = torch.cat([use.respond(i[None], moved[i][None]) for i in rows])
    assert torch.allclose(together, alone, atol=1e-5)


# -- what no SAE changes -----------------------------------------------------------------------


@pytest.fixture
def some_inputs(model, few_documents, monkeypatch, tmp_path):
    """Inputs of one SAE after another, with nothing kept at first."""
    monkeypatch.setenv("C2R_CACHE", str(tmp_path))
    profile = load_profile("smoke")

    def new():
        return Inputs(
            Dictionary(torch.eye(64), torch.eye(64)),
            profile.language_model,
            profile.evaluation,
            language_model=model,
            corpus=few_documents,
        )

    return new


def test_a_second_sae_finds_the_untouched_answers(some_inputs, model, monkeypatch):
    first = letters_to_use(some_inputs())
    plain = letter_use_task(model, letter_splits(some_inputs())[0].task)
    assert torch.allclose(first.before, plain.before, atol=1e-5, equal_nan=True)
    assert torch.equal(first.is_right(), plain.is_right())
    monkeypatch.setattr(use_task, "answer_log_probs", None)
    again = letters_to_use(some_inputs())
    assert torch.equal(again.before.nan_to_num(), first.before.nan_to_num())
    assert again.samples == first.samples


def test_a_second_sae_finds_the_reference(some_inputs, task, monkeypatch):
    expected = measure_use_of_means(task)
    assert module._kept_use_of_means(some_inputs(), task) == expected
    monkeypatch.setattr(module, "measure_use_of_means", None)
    assert module._kept_use_of_means(some_inputs(), task) == expected


def test_letters_of_several_tokens_are_named():
    def tokenizer(text, add_special_tokens):
        return {"input_ids": [1, 2] if text.strip() in "QX" else [1]}

    model = SimpleNamespace(tokenizer=tokenizer)
    with pytest.raises(NotEvaluable, match="The letters Q, X behind a space are several tokens"):
        letter_use_task(model, None)

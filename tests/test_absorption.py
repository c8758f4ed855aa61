"""Absorption against SAEBench's own numbers, and planted: what is absorbed must be found, nothing else."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array
from sklearn.linear_model import LogisticRegression

from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.absorption import evaluate_first_letter
from c2r_core.metrics.letter_latents import (
    _refit,
    absorption,
    absorption_by_word,
    split_latents,
)
from c2r_core.metrics.letter_probes import (
    LetterProbes,
    LetterSplit,
    split_words,
    train_letter_probes,
)

DATA = Path(__file__).parent / "data"
HOOK = "blocks.1.hook_resid_post"


# -- step 4 against SAEBench -------------------------------------------------------------------


@pytest.mark.parametrize("name", ["one_latent", "three_latents"])
def test_absorption_equals_saebench(name):
    with np.load(DATA / f"absorption_{name}.npz") as file:
        golden = {key: torch.from_numpy(file[key]) for key in file}
    arguments = ("activations", "feature_acts", "W_dec", "probe", "split_latents")
    scores = absorption(*(golden[key] for key in arguments))
    torch.testing.assert_close(scores.fraction, golden["absorption_fraction"], atol=1e-5, rtol=0)
    assert torch.equal(scores.full, golden["full_absorption"])


# -- planted dictionaries ----------------------------------------------------------------------
#
# Words of A, B and C have activation 10 · (their letter's direction). Word number n also has 10 ·
# (a direction of its own), by which an SAE can tell words apart.

PER_LETTER = 50
N_WORDS = 3 * PER_LETTER
N_TEST = 10  # per letter: the last ones


class LinearSAE:
    """relu(x W_enc) with decoder rows W_dec."""

    def __init__(self, W_enc, W_dec):
        self.W_enc, self.W_dec = W_enc, W_dec

    def encode(self, x):
        return torch.relu(x @ self.W_enc)


def letter_direction(i):
    return torch.eye(3 + N_WORDS)[i]


def word_direction(n):
    return torch.eye(3 + N_WORDS)[3 + n]


@pytest.fixture
def task():
    letters = torch.arange(3).repeat_interleave(PER_LETTER)
    activations = torch.stack(
        [10 * letter_direction(i) + 10 * word_direction(n) for n, i in enumerate(letters)]
    )
    return FirstLetterTask(
        words=tuple(f"{LETTERS[i].lower()}{n}" for n, i in enumerate(letters)),
        activations=activations,
        letters=letters,
        is_test=(torch.arange(PER_LETTER) >= PER_LETTER - N_TEST).repeat(3),
        hook_name=HOOK,
        prefix="",
        n_dropped=0,
    )


@pytest.fixture
def probes():
    """Exactly the letters' directions; the other letters have none."""
    weights, biases = torch.zeros(26, 3 + N_WORDS), torch.zeros(26)
    weights[:3], biases[:3] = 2 * torch.eye(3 + N_WORDS)[:3], -10.0
    return LetterProbes(
        weights=weights,
        biases=biases,
        f1=(1.0,) * 3 + (None,) * 23,
        not_evaluable=(None,) * 3 + ("no words",) * 23,
    )


def clean_sae():
    """One latent a letter; a fourth is dead."""
    rows = torch.cat([torch.eye(3 + N_WORDS)[:3], torch.zeros(1, 3 + N_WORDS)])
    return LinearSAE(rows.T.clone(), rows)


def absorbing_sae(absorbed, own_share=0.0, cosine=0.8):
    """On each of the absorbed words the letter's latent drops to `own_share` of its activation, and
    a latent for that very word, at `cosine` to the letter, fires with 10 instead."""
    clean = clean_sae()
    encoder, decoder = [clean.W_enc], [clean.W_dec]
    for n in absorbed:
        letter, word = letter_direction(n // PER_LETTER), word_direction(n)
        clean.W_enc[:, n // PER_LETTER] -= (1 - own_share) * word
        encoder.append(word[:, None])
        decoder.append((cosine * letter + (1 - cosine**2) ** 0.5 * word)[None])
    return LinearSAE(torch.cat(encoder, dim=1), torch.cat(decoder))


def scored(sae, task, probes, **settings):
    """The report of a single split."""
    return evaluate_first_letter(sae, [LetterSplit(task, probes)], **settings)


def words_of(letter, *, train, test):
    """The first `train` training words and `test` test words of a letter, as word numbers."""
    start, first_test = letter * PER_LETTER, (letter + 1) * PER_LETTER - N_TEST
    return [*range(start, start + train), *range(first_test, first_test + test)]


def test_clean_dictionary_has_no_absorption(task, probes):
    for report in (
        scored(clean_sae(), task, probes),
        scored(clean_sae(), task, train_letter_probes(task)),
    ):
        assert report.num_letters == report.num_good_probes == 3
        assert report.mean_absorption_fraction_score == report.mean_full_absorption_score == 0
        assert report.std_dev_absorption_fraction_score == 0
        assert [row.split_features for row in report.letters[:3]] == [(0,), (1,), (2,)]
        assert [row.num_probe_true_positives for row in report.letters[:3]] == [N_TEST] * 3


def test_planted_absorption_is_found_word_by_word(task, probes):
    absorbed = words_of(0, train=16, test=4)
    sae = absorbing_sae(absorbed)
    report = scored(sae, task, probes)
    a, b, c = report.letters[:3]
    assert (a.num_split_features, a.split_features) == (1, (0,))
    assert a.full_absorption_rate == 0.4  # 4 of 10 test words
    assert a.mean_absorption_fraction == pytest.approx(0.4)
    assert (b.full_absorption_rate, c.full_absorption_rate) == (0, 0)
    assert report.mean_full_absorption_score == pytest.approx(0.4 / 3)
    assert report.std_dev_full_absorption_score == pytest.approx(0.4 / 3**0.5)

    words, scores = absorption_by_word(sae, task, probes, "A", a.split_features)
    assert words == tuple(f"a{n}" for n in range(40, 50))
    assert scores.full.tolist() == [True] * 4 + [False] * 6
    assert scores.strongest_latent.tolist() == [20, 21, 22, 23, 0, 0, 0, 0, 0, 0]


def test_planted_absorption_is_found_with_trained_probes(task):
    sae = absorbing_sae(words_of(1, train=12, test=3))
    report = scored(sae, task, train_letter_probes(task))
    assert [row.full_absorption_rate for row in report.letters[:3]] == [0, 0.3, 0]


def test_partial_absorption_by_hand(task, probes):
    # P = 10, M = 3 (the letter's latent), S = 5 (the word's): 5 / (5 + 3), on half of the words.
    sae = absorbing_sae(words_of(2, train=20, test=5), own_share=0.3, cosine=0.5)
    row = scored(sae, task, probes).letters[2]
    assert row.mean_absorption_fraction == pytest.approx(0.5 * 5 / 8)
    assert row.full_absorption_rate == 0
    # S = 3 is less than 0.4 P: not absorption.
    sae = absorbing_sae(words_of(2, train=20, test=5), own_share=0.3, cosine=0.3)
    assert scored(sae, task, probes).letters[2].mean_absorption_fraction == 0


def test_latents_that_do_not_fire_on_a_letters_words_change_nothing(task, probes):
    """Scores of the latents that fire equal the plain form, that of all latents."""
    generator = torch.Generator().manual_seed(0)
    sae = absorbing_sae(words_of(0, train=16, test=4), own_share=0.25)
    noise = 0.3 * torch.randn(200, 3 + N_WORDS, generator=generator)
    sae.W_enc, sae.W_dec = torch.cat([sae.W_enc, noise.T], 1), torch.cat([sae.W_dec, noise])
    sae.encode = lambda x: torch.relu(x @ sae.W_enc - 2)
    report = scored(sae, task, probes)
    for row in report.letters[:3]:
        _, plain = absorption_by_word(sae, task, probes, row.first_letter, row.split_features)
        assert row.mean_absorption_fraction == pytest.approx(float(plain.fraction.mean()))
        assert row.full_absorption_rate == pytest.approx(float(plain.full.double().mean()))
    assert report.mean_absorption_fraction_score > 0


def test_letter_over_two_latents_has_split_size_two(task, probes):
    clean = clean_sae()
    encoder, decoder = clean.W_enc, clean.W_dec
    encoder[:, 3], decoder[3] = encoder[:, 0], decoder[0]
    for n in range(PER_LETTER):
        encoder[:, 0 if n % 2 else 3] -= word_direction(n)
    row = scored(LinearSAE(encoder, decoder), task, probes).letters[0]
    assert row.num_split_features == 2
    assert set(row.split_features) == {0, 3}
    assert row.split_f1[:2] == pytest.approx((2 / 3, 1.0))
    assert row.mean_absorption_fraction == row.full_absorption_rate == 0


def test_scale_between_activation_and_decoder_does_not_matter(task, probes):
    sae = absorbing_sae(words_of(0, train=16, test=4), own_share=0.25)
    scale = 2.0 ** torch.randint(
        -5, 6, (len(sae.W_dec),), generator=torch.Generator().manual_seed(0)
    )
    scaled = LinearSAE(sae.W_enc / scale, sae.W_dec * scale[:, None])
    assert scored(scaled, task, probes) == scored(sae, task, probes)


def test_chunks_do_not_matter_and_a_seed_repeats(task, probes, monkeypatch):
    sae = absorbing_sae(words_of(0, train=16, test=4), own_share=0.25)
    report = scored(sae, task, probes, seed=3)
    assert scored(sae, task, probes, seed=3) == report
    again, other = (train_letter_probes(task, seed=seed) for seed in (0, 0))
    assert torch.equal(again.weights, other.weights) and again.f1 == other.f1
    acts = csr_array(sae.encode(task.activations).numpy())
    assert scored(sae, task, probes, seed=3, acts=acts) == report
    monkeypatch.setattr("c2r_core.metrics.encoding.CHUNK", 7)
    assert scored(sae, task, probes, seed=3) == report


def test_silent_dictionary_is_not_evaluable(task, probes):
    silent = LinearSAE(torch.zeros(3 + N_WORDS, 6), torch.zeros(6, 3 + N_WORDS))
    with pytest.raises(NotEvaluable, match="for 3 the SAE has no latent"):
        scored(silent, task, probes)
    half_silent = clean_sae()
    half_silent.W_enc[:, 0] = 0
    report = scored(half_silent, task, probes)
    assert (report.num_letters, report.num_good_probes) == (2, 3)
    assert "no latent has a positive weight" in report.letters[0].not_evaluable
    assert report.letters[0].mean_absorption_fraction is None
    assert "NaN" not in json.dumps(asdict(report))


def test_letters_with_few_words_are_named_not_dropped(task):
    few = train_letter_probes(replace(task, is_test=torch.zeros(N_WORDS, dtype=torch.bool)))
    assert few.f1 == (None,) * 26
    assert not few.weights.any() and not few.biases.any()
    assert few.not_evaluable[0] == (
        "50 training and 0 test words start with A; at least 20 and 5 are needed"
    )
    report = scored(clean_sae(), task, train_letter_probes(task))
    assert [row.first_letter for row in report.letters] == list(LETTERS)
    assert "start with Z" in report.letters[25].not_evaluable


def test_poor_probe_is_not_evaluable(task):
    activations = torch.randn(N_WORDS, 4, generator=torch.Generator().manual_seed(0))
    noise = train_letter_probes(replace(task, activations=activations))
    assert "is not above 0.6" in noise.not_evaluable[0]
    assert 0 <= noise.f1[0] <= 0.6


def test_probe_that_recognises_nothing_is_not_evaluable(task, probes):
    blind = replace(probes, biases=probes.biases - 100 * (torch.arange(26) == 0))
    row = scored(clean_sae(), task, blind).letters[0]
    assert row.num_probe_true_positives == 0 and "recognises no test word" in row.not_evaluable


def test_words_without_the_latents_count_by_their_weight():
    """Predictions equal those of the plain form, a regression on all words."""
    generator = np.random.default_rng(0)
    y = generator.random(2000) < 0.1
    x = generator.random((2000, 3)) * (generator.random((2000, 3)) < 0.03 + 0.4 * y[:, None])
    plain = LogisticRegression(class_weight="balanced", max_iter=500).fit(x[:1500], y[:1500])
    expected = plain.decision_function(x[1500:]) > 0
    assert 0 < expected.sum() < 500
    assert np.array_equal(_refit(x[:1500], y[:1500], x[1500:]), expected)


def test_silent_latents_never_count(task):
    acts = clean_sae().encode(task.activations).numpy()
    wide = np.zeros((N_WORDS, 500), dtype=np.float32)
    wide[:, [7, 99, 300, 450]] = acts
    narrow = split_latents(acts, task.letters, task.is_test, evaluable=range(3))
    found = split_latents(wide, task.letters, task.is_test, evaluable=range(3))
    assert [found[i].latents for i in range(3)] == [(7,), (99,), (300,)]
    assert [found[i].f1 for i in range(3)] == [narrow[i].f1 for i in range(3)]


def test_sae_of_another_width_or_with_nan_is_explained(task, probes):
    with pytest.raises(NotEvaluable, match="takes activations of width 5; these have 153"):
        scored(LinearSAE(torch.ones(5, 4), torch.ones(4, 5)), task, probes)
    broken = clean_sae()
    broken.W_enc[0, 0] = torch.nan
    with pytest.raises(NotEvaluable, match="NaN or infinite"):
        scored(broken, task, probes)
    with pytest.raises(NotEvaluable, match="NaN or infinite"):
        train_letter_probes(replace(task, activations=task.activations / 0))


# -- splits of the words -----------------------------------------------------------------------


def test_every_word_is_tested_once_in_five_splits(task):
    tested = torch.stack([split_words(task, number).is_test for number in range(10)])
    assert tested[:5].sum(0).tolist() == tested[5:].sum(0).tolist() == [1] * N_WORDS
    assert tested.sum(1).tolist() == [30] * 10
    assert not torch.equal(tested[0], tested[5])
    assert torch.equal(split_words(task, 3).is_test, tested[3])


def test_the_score_is_the_mean_over_splits_and_says_how_far_it_varies(task, probes):
    sae = absorbing_sae(words_of(0, train=16, test=4))
    splits = [LetterSplit(split_words(task, number), probes) for number in range(5)]
    report = evaluate_first_letter(sae, splits)
    alone = [evaluate_first_letter(sae, [split]) for split in splits]
    fractions = [one.mean_absorption_fraction_score for one in alone]
    assert len(set(fractions)) > 1
    assert [one.mean_absorption_fraction_score for one in report.splits] == fractions
    assert report.mean_absorption_fraction_score == pytest.approx(np.mean(fractions))
    assert report.split_sd_absorption_fraction_score == pytest.approx(np.std(fractions, ddof=1))
    of_a = [one.letters[0].mean_absorption_fraction for one in alone]
    assert report.letters[0].mean_absorption_fraction == pytest.approx(np.mean(of_a))
    assert report.letters[0].num_splits == 5
    # Each word is tested once: 20 of the 50 words of A are absorbed, of three letters.
    low, high = report.absorption_fraction_interval
    assert low < report.mean_absorption_fraction_score < high
    sd = (0.4 * 0.6 / PER_LETTER) ** 0.5 / 3
    assert high - low == pytest.approx(2 * 1.96 * sd, rel=0.25)
    assert evaluate_first_letter(sae, splits) == report
    assert alone[0].split_sd_absorption_fraction_score is None


def test_probes_of_another_width_are_explained(task, probes):
    narrow = replace(probes, weights=probes.weights[:, 1:])
    with pytest.raises(NotEvaluable, match="The probes' weights have shape .*expected rows of 153"):
        evaluate_first_letter(None, [LetterSplit(task, narrow)])


def test_probes_are_saved_and_loaded(task, tmp_path):
    probes = train_letter_probes(task)
    probes.save(tmp_path)
    loaded = LetterProbes.load(tmp_path)
    assert torch.equal(loaded.weights, probes.weights) and torch.equal(loaded.biases, probes.biases)
    assert (loaded.f1, loaded.not_evaluable) == (probes.f1, probes.not_evaluable)

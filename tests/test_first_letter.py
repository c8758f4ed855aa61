from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from c2r_core.data.language_models import load_language_model
from c2r_core.data.text import Corpus, Document
from c2r_core.data.words import (
    LETTERS,
    FirstLetterTask,
    LetterWords,
    harvest_words,
    letter_words,
)
from c2r_core.metrics.absorption import (
    LetterProbes,
    absorption,
    absorption_by_word,
    evaluate_first_letter,
    split_latents,
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


def words_of(letter, *, train, test):
    """The first `train` training words and `test` test words of a letter, as word numbers."""
    start, first_test = letter * PER_LETTER, (letter + 1) * PER_LETTER - N_TEST
    return [*range(start, start + train), *range(first_test, first_test + test)]


def test_clean_dictionary_has_no_absorption(task, probes):
    for report in (
        evaluate_first_letter(clean_sae(), task, probes),
        evaluate_first_letter(clean_sae(), task, train_letter_probes(task)),
    ):
        assert report.n_evaluated == report.n_good_probes == 3
        assert report.mean_absorption_fraction == report.mean_full_absorption == 0
        assert report.sd_absorption_fraction == 0
        assert [row.split_latents for row in report.letters[:3]] == [(0,), (1,), (2,)]
        assert [row.n_true_positives for row in report.letters[:3]] == [N_TEST] * 3


def test_planted_absorption_is_found_word_by_word(task, probes):
    absorbed = words_of(0, train=16, test=4)
    sae = absorbing_sae(absorbed)
    report = evaluate_first_letter(sae, task, probes)
    a, b, c = report.letters[:3]
    assert (a.split_size, a.split_latents) == (1, (0,))
    assert a.full_absorption == 0.4  # 4 of 10 test words
    assert a.absorption_fraction == pytest.approx(0.4)
    assert (b.full_absorption, c.full_absorption) == (0, 0)
    assert report.mean_full_absorption == pytest.approx(0.4 / 3)
    assert report.sd_full_absorption == pytest.approx(0.4 / 3**0.5)

    words, scores = absorption_by_word(sae, task, probes, "A", a.split_latents)
    assert words == tuple(f"a{n}" for n in range(40, 50))
    assert scores.full.tolist() == [True] * 4 + [False] * 6
    assert scores.strongest_latent.tolist() == [20, 21, 22, 23, 0, 0, 0, 0, 0, 0]


def test_planted_absorption_is_found_with_trained_probes(task):
    sae = absorbing_sae(words_of(1, train=12, test=3))
    report = evaluate_first_letter(sae, task, train_letter_probes(task))
    assert [row.full_absorption for row in report.letters[:3]] == [0, 0.3, 0]


def test_partial_absorption_by_hand(task, probes):
    # P = 10, M = 3 (the letter's latent), S = 5 (the word's): 5 / (5 + 3), on half of the words.
    sae = absorbing_sae(words_of(2, train=20, test=5), own_share=0.3, cosine=0.5)
    row = evaluate_first_letter(sae, task, probes).letters[2]
    assert row.absorption_fraction == pytest.approx(0.5 * 5 / 8)
    assert row.full_absorption == 0
    # S = 3 is less than 0.4 P: not absorption.
    sae = absorbing_sae(words_of(2, train=20, test=5), own_share=0.3, cosine=0.3)
    assert evaluate_first_letter(sae, task, probes).letters[2].absorption_fraction == 0


def test_letter_over_two_latents_has_split_size_two(task, probes):
    clean = clean_sae()
    encoder, decoder = clean.W_enc, clean.W_dec
    encoder[:, 3], decoder[3] = encoder[:, 0], decoder[0]
    for n in range(PER_LETTER):
        encoder[:, 0 if n % 2 else 3] -= word_direction(n)
    row = evaluate_first_letter(LinearSAE(encoder, decoder), task, probes).letters[0]
    assert row.split_size == 2
    assert set(row.split_latents) == {0, 3}
    assert row.split_f1[:2] == pytest.approx((2 / 3, 1.0))
    assert row.absorption_fraction == row.full_absorption == 0


def test_scale_between_activation_and_decoder_does_not_matter(task, probes):
    sae = absorbing_sae(words_of(0, train=16, test=4), own_share=0.25)
    scale = 2.0 ** torch.randint(
        -5, 6, (len(sae.W_dec),), generator=torch.Generator().manual_seed(0)
    )
    scaled = LinearSAE(sae.W_enc / scale, sae.W_dec * scale[:, None])
    assert evaluate_first_letter(scaled, task, probes) == evaluate_first_letter(sae, task, probes)


def test_chunks_do_not_matter_and_a_seed_repeats(task, probes):
    sae = absorbing_sae(words_of(0, train=16, test=4), own_share=0.25)
    report = evaluate_first_letter(sae, task, probes, seed=3)
    assert evaluate_first_letter(sae, task, probes, seed=3) == report
    assert evaluate_first_letter(sae, task, probes, seed=3, chunk_size=7) == report
    again, other = (train_letter_probes(task, seed=seed) for seed in (0, 0))
    assert torch.equal(again.weights, other.weights) and again.f1 == other.f1


def test_silent_dictionary_is_not_evaluable(task, probes):
    silent = LinearSAE(torch.zeros(3 + N_WORDS, 6), torch.zeros(6, 3 + N_WORDS))
    report = evaluate_first_letter(silent, task, probes)
    assert report.n_evaluated == 0
    assert report.n_good_probes == 3
    assert "no latent has a positive weight" in report.letters[0].not_evaluable
    assert report.mean_absorption_fraction is None and report.sd_split_size is None
    assert "NaN" not in json.dumps(asdict(report))


def test_letters_with_few_words_are_named_not_dropped(task):
    few = train_letter_probes(replace(task, is_test=torch.zeros(N_WORDS, dtype=torch.bool)))
    assert few.f1 == (None,) * 26
    assert not few.weights.any() and not few.biases.any()
    assert few.not_evaluable[0] == (
        "50 training and 0 test words start with A; at least 20 and 5 are needed"
    )
    report = evaluate_first_letter(clean_sae(), task, train_letter_probes(task))
    assert [row.letter for row in report.letters] == list(LETTERS)
    assert "start with Z" in report.letters[25].not_evaluable


def test_poor_probe_is_not_evaluable(task):
    activations = torch.randn(N_WORDS, 4, generator=torch.Generator().manual_seed(0))
    noise = train_letter_probes(replace(task, activations=activations))
    assert "is not above 0.6" in noise.not_evaluable[0]
    assert 0 <= noise.f1[0] <= 0.6


def test_probe_that_recognises_nothing_is_not_evaluable(task, probes):
    blind = replace(probes, biases=probes.biases - 100)
    row = evaluate_first_letter(clean_sae(), task, blind).letters[0]
    assert row.n_true_positives == 0 and "recognises no test word" in row.not_evaluable


def test_silent_latents_never_count(task):
    acts = clean_sae().encode(task.activations).numpy()
    wide = np.zeros((N_WORDS, 500), dtype=np.float32)
    wide[:, [7, 99, 300, 450]] = acts
    narrow = split_latents(acts, task.letters, task.is_test, evaluable=range(3))
    found = split_latents(wide, task.letters, task.is_test, evaluable=range(3))
    assert [found[i].latents for i in range(3)] == [(7,), (99,), (300,)]
    assert [found[i].f1 for i in range(3)] == [narrow[i].f1 for i in range(3)]


def test_sae_of_another_width_or_with_nan_is_explained(task, probes):
    with pytest.raises(ValueError, match=r"W_dec has shape \(4, 5\); expected rows of 153"):
        evaluate_first_letter(LinearSAE(torch.ones(5, 4), torch.ones(4, 5)), task, probes)
    broken = clean_sae()
    broken.W_enc[0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN or infinite"):
        evaluate_first_letter(broken, task, probes)
    with pytest.raises(ValueError, match="NaN or infinite"):
        train_letter_probes(replace(task, activations=task.activations / 0))


# -- words and harvest -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model():
    return load_language_model("random-2-layer")


@pytest.fixture(scope="module")
def tokenizer(model):
    return model.tokenizer


def test_words_are_alphabetic_tokens_and_split_once(tokenizer):
    words = letter_words(tokenizer, limit=1000)
    assert len(words.words) == len(set(words.token_ids.tolist())) == 1000
    assert all(word.removeprefix(" ").isalpha() and word.isascii() for word in words.words)
    assert [tokenizer.decode([i]) for i in words.token_ids] == list(words.words)
    assert int(words.is_test.sum()) == 200
    again, other = letter_words(tokenizer, limit=1000), letter_words(tokenizer, limit=1000, seed=1)
    assert again.words == words.words and torch.equal(again.is_test, words.is_test)
    assert other.words != words.words


def test_words_of_a_corpus_come_by_frequency(tokenizer):
    text = " river river 1862 peace peace peace war."
    words = letter_words(tokenizer, Corpus("rivers", (Document("one", text),)))
    assert words.words == (" peace", " river", " war")
    assert letter_words(tokenizer, Corpus("rivers", (Document("one", text),)), limit=1).words == (
        " peace",
    )


def test_no_words_is_explained(tokenizer):
    with pytest.raises(ValueError, match="No token of corpus 'digits'"):
        letter_words(tokenizer, Corpus("digits", (Document("one", "1 2 3"),)))
    with pytest.raises(ValueError, match="limit is 0"):
        letter_words(tokenizer, limit=0)
    with pytest.raises(ValueError, match="test_share is 1"):
        letter_words(tokenizer, test_share=1)


@pytest.mark.parametrize("shots", [("cat", "dog"), ()])
def test_activations_are_those_of_the_word_in_the_whole_prompt(model, tokenizer, shots):
    words = letter_words(tokenizer, limit=5)
    task = harvest_words(model, words, HOOK, shots=shots, batch_size=2)
    assert task.words == words.words and task.n_dropped == 0
    for word, letter, activation in zip(task.words, task.letters, task.activations, strict=True):
        assert LETTERS[letter] == word.strip()[0].upper()
        prompt = f"{task.prefix}{word} has the first letter:"
        ids = [tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]
        assert tokenizer.decode([ids[-6]]) == word
        with torch.no_grad():
            _, cache = model.run_with_cache(torch.tensor([ids]))
        torch.testing.assert_close(activation, cache[HOOK][0, -6], atol=1e-4, rtol=1e-4)


def test_cache_of_keys_and_values_changes_nothing_but_time(model, tokenizer):
    words = letter_words(tokenizer, limit=7)
    cached = harvest_words(model, words, HOOK, batch_size=3)
    plain = harvest_words(model, words, HOOK, key_value_cache=False)
    torch.testing.assert_close(cached.activations, plain.activations, atol=1e-4, rtol=1e-4)


def test_words_that_break_the_template_are_dropped_and_counted(model, tokenizer):
    ids = tokenizer(" peace cat", add_special_tokens=False)["input_ids"]
    split = LetterWords(
        words=("xyzzyq", " peace", " cat"),  # several tokens; fine; an example of the prefix
        token_ids=torch.tensor([ids[0], *ids]),
        is_test=torch.tensor([False, True, False]),
    )
    task = harvest_words(model, split, HOOK)
    assert (task.words, task.n_dropped, task.is_test.tolist()) == ((" peace",), 2, [True])
    broken = LetterWords(("xyzzyq",), torch.tensor(ids[:1]), torch.tensor([False]))
    with pytest.raises(ValueError, match="None of the 1 words .* is a single token"):
        harvest_words(model, broken, HOOK)


@pytest.mark.parametrize(
    ("hook_name", "precision", "message"),
    [
        ("blocks.1.hook_resid_pots", "float32", "blocks.1.hook_resid_post"),
        ("blocks.1.attn.hook_pattern", "float32", "expected one vector a token"),
        (HOOK, "float16", "expected 'float32' or 'bfloat16'"),
    ],
)
def test_wrong_hook_or_precision_is_explained(model, tokenizer, hook_name, precision, message):
    with pytest.raises(ValueError, match=message):
        harvest_words(model, letter_words(tokenizer, limit=2), hook_name, precision=precision)


def test_bfloat16_is_near_float32(model, tokenizer):
    words = letter_words(tokenizer, limit=20)
    exact = harvest_words(model, words, HOOK).activations
    rounded = harvest_words(model, words, HOOK, precision="bfloat16").activations
    assert 0 < float((rounded - exact).norm() / exact.norm()) < 0.03


def test_task_is_saved_and_loaded(task, tmp_path):
    task.save(tmp_path / "task")
    loaded = FirstLetterTask.load(tmp_path / "task")
    for name, value in vars(task).items():
        same = torch.equal if isinstance(value, torch.Tensor) else lambda a, b: a == b
        assert same(getattr(loaded, name), value), name
    with pytest.raises(FileNotFoundError, match="no task.json"):
        FirstLetterTask.load(tmp_path)
    description = tmp_path / "task" / "task.json"
    description.write_text(description.read_text().replace('version": 1', 'version": 99'))
    with pytest.raises(ValueError, match="format 99"):
        FirstLetterTask.load(tmp_path / "task")

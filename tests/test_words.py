"""Words with their first letters, and a model's activations at them."""

from __future__ import annotations

import pytest
import torch

from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.text import Corpus, Document
from c2r_core.data.words import (
    LETTERS,
    FirstLetterTask,
    LetterWords,
    harvest_words,
    letter_words,
)

HOOK = "blocks.1.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


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


def test_task_is_saved_and_loaded(model, tokenizer, tmp_path):
    task = harvest_words(model, letter_words(tokenizer, limit=5), HOOK)
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

"""Passages are what the model sees; labels are what the corpus says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from c2r_core.data.forward import activations
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.passages import UNKNOWN, Passages, corpus_labels, harvest_passages
from c2r_core.data.text import Corpus, Document
from c2r_core.errors import NotEvaluable

HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    return load_language_model(RANDOM)


@pytest.fixture(scope="module")
def corpus():
    words = "the tax on farms and the war with tribes about gold is a matter of law ".split()
    generator = np.random.default_rng(0)
    texts = [" ".join(generator.choice(words, 200)) for _ in range(3)]
    names = ("1900-McKinley-1", "1934-Roosevelt-1", "1866-Johnson-1")
    documents = tuple(Document(name, text) for name, text in zip(names, texts, strict=True))
    return Corpus("three", documents)


def test_passages_are_what_the_model_sees(model, corpus):
    passages = harvest_passages(model, corpus, HOOK, n_passages=9, n_tokens=16, max_norm=1e9)
    assert len(passages.texts) == 9 and set(passages.documents) == {
        d.name for d in corpus.documents
    }
    ids = model.tokenizer(passages.texts[4], add_special_tokens=False)["input_ids"]
    x = activations(model, torch.tensor([ids]), HOOK)[0, 1:]
    own = passages.activations[passages.passage == 4]
    assert len(own) == 15  # the first token is left out
    assert torch.allclose(own.float(), x, atol=2e-2)


def test_passages_are_read_as_they_were_written(model, corpus, tmp_path):
    passages = harvest_passages(model, corpus, HOOK, n_passages=6, n_tokens=16, max_norm=1e9)
    passages.save(tmp_path)
    again = Passages.load(tmp_path)
    assert (again.texts, again.documents) == (passages.texts, passages.documents)
    assert torch.equal(again.activations, passages.activations)
    assert torch.equal(again.passage, passages.passage)


def test_tokens_of_a_huge_norm_are_left_out_but_no_passage_is(model, corpus):
    every = harvest_passages(model, corpus, HOOK, n_passages=6, n_tokens=16, max_norm=1e9)
    limit = float(every.activations.float().norm(dim=1).median())
    some = harvest_passages(model, corpus, HOOK, n_passages=6, n_tokens=16, max_norm=limit)
    assert len(some.activations) < len(every.activations)
    none = harvest_passages(model, corpus, HOOK, n_passages=6, n_tokens=16, max_norm=0.0)
    assert torch.equal(none.passage, torch.arange(6))
    with pytest.raises(ValueError, match="has 9999 tokens"):
        harvest_passages(model, corpus, HOOK, n_passages=6, n_tokens=9999, max_norm=1.0)


def test_labels_of_known_documents():
    documents = (
        "1790-Washington-1 1866-Johnson-1 1906-Roosevelt-1 1934-Roosevelt-1 1966-Johnson-1 "
        "1930-Hoover-1 1974-Nixon-2 1983-Reagan-1"
    ).split()
    texts = ["A tax on trade.", "The taxing of warm tradesmen.", *["Nothing."] * 6]
    labels = corpus_labels(documents, texts)
    assert labels["topic: taxes"].tolist() == [1, 0, *[0] * 6]  # whole words only
    assert labels["topic: trade"].tolist() == [1, 0, *[0] * 6]
    assert labels["century"].tolist() == [0, 0, 1, 1, 1, 1, 1, 1]
    assert labels["party"].tolist() == [UNKNOWN, UNKNOWN, 0, 1, 1, 0, 0, 0]
    assert labels["spoken"].tolist() == [1, 0, 0, 1, 1, 0, UNKNOWN, 1]
    assert labels["president: Johnson"].tolist() == [0, 1, 0, 0, 1, 0, 0, 0]
    assert set(corpus_labels(["essay.txt"], ["A tax."])) == {
        name for name in labels if name.startswith("topic")
    }


def test_activations_too_large_for_half_precision_are_refused(model, corpus):
    with torch.no_grad():
        big = load_language_model(RANDOM)
        for parameter in big.parameters():
            parameter.mul_(100)
    with pytest.raises(NotEvaluable, match="does not fit into float16 .* max_norm"):
        harvest_passages(big, corpus, HOOK, n_passages=3, n_tokens=16, max_norm=1e30)

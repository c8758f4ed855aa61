"""What an evaluation reads, and what of it is kept."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch

from c2r_core.artefacts.profiles import load_profile
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.text import SPLIT_SEED, Corpus, Document, held_out_documents, split_documents
from c2r_core.errors import NotEvaluable
from c2r_core.evaluate import Options, evaluate
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_latents import letter_acts
from c2r_core.metrics.letter_probes import letter_splits, letters
from c2r_core.metrics.reconstruction import evaluate_reconstruction, measure_reconstruction
from c2r_core.saes import BatchTopKSAE

PROFILE = load_profile("smoke")
SMOKE, SIZES = PROFILE.language_model, PROFILE.evaluation


@pytest.fixture(scope="module")
def sae():
    return BatchTopKSAE(64, 96, k=8, seed=1)


def replace_call(monkeypatch, tokenizer, changed):
    """Let calls of the tokenizer pass through `changed(texts, ids)`, which returns other ids."""
    original = type(tokenizer).__call__

    def call(self, texts, **options):
        encoded = original(self, texts, **options)
        if isinstance(texts, str):
            return {"input_ids": changed([texts], [encoded["input_ids"]])[0]}
        return {"input_ids": changed(texts, encoded["input_ids"])}

    monkeypatch.setattr(type(tokenizer), "__call__", call)


@pytest.fixture
def nothing_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("C2R_CACHE", str(tmp_path / "cache"))


def test_training_documents_are_never_read(
    sae, random_model, few_documents, monkeypatch, nothing_kept
):
    heard = set()

    def listen(texts, ids):
        heard.update(texts)
        return ids

    replace_call(monkeypatch, random_model.tokenizer, listen)
    report = evaluate(sae, model=random_model, corpus=few_documents, options=Options("smoke"))
    training, held_out = split_documents(few_documents, SMOKE.held_out_share, seed=SPLIT_SEED)
    assert heard.isdisjoint(document.text for document in training.documents)
    assert heard >= {document.text for document in held_out.documents}
    assert report.text.fingerprint == held_out.fingerprint != training.fingerprint
    assert report.text.training_fingerprint == training.fingerprint


def test_a_copy_of_a_training_document_is_left_out(few_documents):
    training, held_out = split_documents(few_documents, 0.5, seed=SPLIT_SEED)
    copied = held_out.documents[0].name
    copy = training.documents[0].text
    with_copy = Corpus(
        "copied",
        tuple(replace(d, text=copy) if d.name == copied else d for d in few_documents.documents),
    )
    documents = held_out_documents(with_copy, 0.5)
    assert documents.n_repeated == 1
    assert documents.corpus.documents == held_out.documents[1:]
    with pytest.raises(ValueError, match="nothing is left to evaluate on"):
        held_out_documents(Corpus("same", tuple(Document(str(i), "a") for i in range(4))), 0.5)


def test_a_tokenizer_that_breaks_the_template(
    sae, random_model, few_documents, monkeypatch, nothing_kept
):
    def turn_prompts_around(texts, ids):
        pairs = zip(texts, ids, strict=True)
        return [i[::-1] if "has the first letter" in text else i for text, i in pairs]

    replace_call(monkeypatch, random_model.tokenizer, turn_prompts_around)
    report = evaluate(
        sae,
        model=random_model,
        corpus=few_documents,
        metrics="core, absorption",
        options=Options("smoke"),
    )
    assert list(report.not_evaluable) == ["absorption"]
    assert "ends where a token ends behind" in report.not_evaluable["absorption"]


def test_something_is_made_once_and_so_is_a_refusal(sae):
    inputs, calls = Inputs(sae, SMOKE, SIZES), []

    def make():
        calls.append(1)
        return len(calls)

    def refuse():
        calls.append(1)
        raise NotEvaluable("not here")

    assert [inputs.once("a", make) for _ in range(2)] == [1, 1]
    for _ in range(2):
        with pytest.raises(NotEvaluable, match="not here"):
            inputs.once("b", refuse)
    assert len(calls) == 2


def test_kept_by_the_models_content_not_by_its_name(
    sae, random_model, few_documents, tmp_path, nothing_kept
):
    """New weights under the same name are another model."""
    model = load_language_model(RANDOM)

    def folder():
        inputs = Inputs(sae, SMOKE, SIZES, language_model=model, corpus=few_documents)
        return inputs.activations.folder

    first = folder()
    assert folder() == first
    same = Inputs(sae, SMOKE, SIZES, language_model=random_model, corpus=few_documents)
    assert same.activations.folder == first
    model = load_language_model(RANDOM)
    with torch.no_grad():
        next(iter(model.original_model.parameters())).mul_(2)
    assert folder() != first
    shutil.rmtree(tmp_path / "cache")


def test_every_token_and_word_is_encoded_once_for_all_metrics(sae, random_model, few_documents):
    inputs = Inputs(sae, SMOKE, SIZES, language_model=random_model, corpus=few_documents)
    words = encode_sparse(sae, letters(inputs).activations)
    assert letter_acts(inputs) is letter_acts(inputs)
    assert (letter_acts(inputs) != words).nnz == 0
    report, chunks = measure_reconstruction(inputs), inputs.activations.chunks(64, dropped=True)
    with_dropped, _ = evaluate_reconstruction(sae, chunks)
    assert report.fvu_with_dropped_tokens == pytest.approx(with_dropped.fvu, rel=1e-6)
    assert report.fvu_with_dropped_tokens != report.fvu


def test_probes_of_every_split_are_kept(sae, random_model, few_documents, monkeypatch):
    inputs, again = (
        Inputs(sae, SMOKE, SIZES, language_model=random_model, corpus=few_documents)
        for _ in range(2)
    )
    splits = letter_splits(inputs)
    assert len(splits) == SIZES.word_splits
    assert splits[0].task.words == letters(inputs).words
    assert not (splits[0].task.is_test & splits[1].task.is_test).any()
    monkeypatch.setattr("c2r_core.metrics.letter_probes.train_letter_probes", None)
    for one, other in zip(splits, letter_splits(again), strict=True):
        assert torch.equal(one.probes.weights, other.probes.weights)

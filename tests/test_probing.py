"""Labelled passages, sparse probing, SCR and TPP, on planted cases with known answers."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csr_array

from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.passages import harvest_passages
from c2r_core.data.text import Corpus, Document
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import ablation
from c2r_core.metrics.ablation import measure_scr, measure_tpp
from c2r_core.metrics.pooling import PooledActs, pool, split_by_document
from c2r_core.metrics.probing import PENALTIES, _fitted, probe_sparsely

HOOK = "blocks.0.hook_resid_post"
N, D_IN, N_DOCUMENTS = 800, 16, 20


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


# -- passages ----------------------------------------------------------------------------------


class Linear:
    def __init__(self, W_dec):
        self.W_dec = W_dec

    def encode(self, x):
        return (x @ self.W_dec.T / self.W_dec.norm(dim=1) ** 2).relu()


def test_pooling_by_hand(model, corpus):
    passages = harvest_passages(model, corpus, HOOK, n_passages=6, n_tokens=16, max_norm=1e9)
    sae = Linear(torch.randn(40, 64, generator=torch.Generator().manual_seed(0)))
    pooled = pool(sae, passages, chunk_size=35)  # two passages at a time
    own = passages.activations[passages.passage == 2].float()
    acts = sae.encode(own) * sae.W_dec.norm(dim=1)
    assert np.allclose(pooled.x[2], own.mean(0), atol=1e-4)
    assert np.allclose(pooled.feature_acts[[2]].toarray(), acts.mean(0), atol=1e-4)
    assert np.allclose(np.linalg.norm(pooled.directions, axis=1), 1)
    whole = pool(sae, passages, chunk_size=10_000)
    assert np.allclose(whole.x, pooled.x) and np.allclose(
        whole.feature_acts.toarray(), pooled.feature_acts.toarray()
    )
    with pytest.raises(NotEvaluable, match="takes activations of width 65; these have 64"):
        pool(Linear(torch.ones(3, 65)), passages)
    with pytest.raises(NotEvaluable, match="NaN"):
        pool(Linear(torch.full((3, 64), torch.nan)), passages)


def test_no_document_is_on_both_sides():
    documents = [f"d{i % N_DOCUMENTS}" for i in range(N)]
    labels = torch.tensor([int(i % N_DOCUMENTS < 4) for i in range(N)])
    is_test = split_by_document(documents, labels, seed=1)
    sides = {
        d: {bool(t) for d2, t in zip(documents, is_test, strict=True) if d2 == d} for d in documents
    }
    assert all(len(side) == 1 for side in sides.values())
    assert sum(sides[f"d{i}"] == {True} for i in range(4)) == 2  # half of either class
    assert torch.equal(is_test, split_by_document(documents, labels, seed=1))


# -- probing and ablation ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def planted():
    """Latent i says that label i (0, 1, 2) holds, latent 3 + i that it does not; the others are noise."""
    generator = torch.Generator().manual_seed(0)
    held = torch.rand(N, 3, generator=generator) < 0.5
    acts = torch.rand(N, D_IN, generator=generator) * (
        torch.rand(N, D_IN, generator=generator) < 0.2
    )
    acts[:, :3], acts[:, 3:6] = held.float() * 3, (~held).float() * 3
    documents = tuple(f"d{i % N_DOCUMENTS}" for i in range(N))
    pooled = PooledActs(
        documents, acts.numpy(), csr_array(acts.numpy()), np.eye(D_IN, dtype="float32")
    )
    return pooled, {name: held[:, i].long() for i, name in enumerate("abc")}


def shuffled(pooled, seed=0):
    """The same dictionary with its latents in another order."""
    order = np.random.default_rng(seed).permutation(D_IN)
    return replace(
        pooled, feature_acts=pooled.feature_acts[:, order], directions=pooled.directions[order]
    )


def blind(pooled):
    """Latents that have nothing to do with the labels."""
    acts = pooled.feature_acts.toarray()
    acts[:, :6] = acts[:, 6:12]
    return replace(pooled, feature_acts=csr_array(acts), directions=pooled.directions[::-1])


def test_one_latent_that_is_the_label_tells_it_all(planted):
    report = probe_sparsely(*planted)
    assert report.num_tasks == 3
    assert report.sae_top_1_test_accuracy == report.sae_top_5_test_accuracy == 1
    assert [set(row.latents[:2]) for row in report.tasks] == [{0, 3}, {1, 4}, {2, 5}]
    assert report.sae_test_accuracy == report.llm_test_accuracy == 1


def test_latents_that_know_nothing_are_at_chance(planted):
    pooled, labels = planted
    report = probe_sparsely(blind(pooled), labels)
    assert abs(report.sae_top_1_test_accuracy - 0.5) < 0.1
    assert report.llm_test_accuracy == 1


def test_the_order_of_latents_does_not_matter(planted):
    pooled, labels = planted
    one, other = (probe_sparsely(p, labels) for p in (pooled, shuffled(pooled)))
    assert [row.top_k for row in one.tasks] == [row.top_k for row in other.tasks]
    assert one.sae_test_accuracy == other.sae_test_accuracy
    assert measure_scr(loud(pooled), labels, [("a", "b")]) == measure_scr(
        shuffled(loud(pooled)), labels, [("a", "b")]
    )
    assert measure_tpp(pooled, labels) == measure_tpp(shuffled(pooled), labels)


def test_the_probe_with_many_inputs_does_not_depend_on_their_scale(planted):
    generator = np.random.default_rng(0)
    _, labels = planted
    y = labels["a"].numpy()
    x = (generator.normal(size=(N, 300)) + 0.1 * (2 * y[:, None] - 1)).astype("float32")
    documents = tuple(f"d{i % N_DOCUMENTS}" for i in range(N))
    pooled = PooledActs(documents, x, csr_array(np.abs(x)), np.eye(300, dtype="float32"))
    scaled = replace(pooled, x=x * np.geomspace(1e-3, 1e3, 300, dtype="float32"))
    one, other = (probe_sparsely(p, {"a": labels["a"]}).llm_test_accuracy for p in (pooled, scaled))
    assert one > 0.9 and other == pytest.approx(one, abs=0.01)


def test_the_penalty_is_the_one_that_does_better_on_other_documents():
    """Judged on the half of the documents that the probe was not fitted to."""
    generator = np.random.default_rng(0)
    y, half = np.arange(200) % 2, np.arange(200) % 4 < 2
    x = generator.normal(size=(200, 400)) + 0.15 * (2 * y[:, None] - 1)
    probe = _fitted(x, y, half, PENALTIES)
    scores = probe.cv_results_["mean_test_score"]
    assert probe.best_params_["logisticregression__C"] == PENALTIES[int(scores.argmax())]
    assert {len(train) for train, _ in probe.cv} == {100}
    one_document = np.zeros(200, dtype=bool)  # a class without two halves of documents
    assert _fitted(x, y, one_document, PENALTIES).score(x, y) > 0.9


def loud(pooled):
    """Label b speaks three times as loudly: what leans on the inputs leans on it."""
    acts = pooled.x * np.where(np.isin(np.arange(D_IN), (1, 4)), 3, 1)
    return replace(pooled, x=acts, feature_acts=csr_array(acts))


def test_taking_out_the_unwanted_latent_restores_the_probe(planted):
    pooled, labels = planted
    pooled = loud(pooled)
    report = measure_scr(pooled, labels, [("a", "b")])
    row, other_role = report.pairs
    assert (row.target, row.unwanted) == ("a", "b")
    assert row.acc_clean == 1 and row.acc_biased < 0.9
    assert row.scr["2"] == pytest.approx(1, abs=0.05)
    assert "nothing to restore" in other_role.not_evaluable and other_role.acc_biased == 1
    assert report.num_pairs == 1 and report.scr_metric_threshold_2 == row.scr["2"]
    useless = measure_scr(blind(pooled), labels, [("a", "b")])
    assert abs(useless.scr_metric_threshold_2) < 0.3


def test_taking_out_a_class_harms_its_own_probe_only(planted):
    pooled, labels = planted
    report = measure_tpp(pooled, labels)
    assert report.accuracy == {"a": 1, "b": 1, "c": 1}
    intended = report.tpp_threshold_2_intended_diff_only
    unintended = report.tpp_threshold_2_unintended_diff_only
    assert intended == pytest.approx(0.5, abs=0.1)  # down to chance
    assert unintended == pytest.approx(0, abs=0.05)
    assert report.tpp_threshold_2_total_metric == intended - unintended
    assert abs(measure_tpp(blind(pooled), labels).tpp_threshold_2_total_metric) < 0.1


def test_too_little_to_measure_stays_in_the_report(planted):
    pooled, labels = planted
    rare = torch.zeros(N, dtype=torch.long)
    rare[:5] = 1
    report = probe_sparsely(pooled, labels | {"rare": rare})
    assert report.num_tasks == 3 and "too few passages" in report.tasks[-1].not_evaluable
    assert "rare" in measure_tpp(pooled, labels | {"rare": rare}).classes_not_evaluable
    with pytest.raises(NotEvaluable, match="None of the 2 pairs.*too few passages"):
        measure_scr(pooled, labels | {"rare": rare}, [("a", "rare")])
    with pytest.raises(NotEvaluable, match="None of the 1 labels.*too few passages"):
        probe_sparsely(pooled, {"rare": rare})
    with pytest.raises(NotEvaluable, match="1 of 2 classes"):
        measure_tpp(pooled, {"a": labels["a"], "rare": rare})


def test_documents_without_a_label_are_named(planted, monkeypatch):
    pooled, labels = planted
    monkeypatch.setattr(ablation, "pooled_passages", lambda inputs: (pooled, labels))
    inputs = SimpleNamespace(
        documents=SimpleNamespace(corpus=Corpus("mine", (Document("a", "x"),)))
    )
    with pytest.raises(NotEvaluable, match="The documents of 'mine' have no label of who or when"):
        ablation.measure_scr_of_documents(inputs)


def test_a_bug_is_no_record(planted, monkeypatch):
    """Only NotEvaluable is written down; what numpy or sklearn complain of surfaces."""
    pooled, labels = planted
    broken = replace(pooled, feature_acts=pooled.feature_acts[:, :5])
    for measure in (measure_tpp, probe_sparsely):
        with pytest.raises((ValueError, IndexError)) as caught:
            measure(replace(broken, x=pooled.x[:10]), labels)
        assert not isinstance(caught.value, NotEvaluable)
    with pytest.raises(ValueError) as caught:
        measure_scr(broken, labels, [("b", "a"), ("a", "b")])
    assert not isinstance(caught.value, NotEvaluable)

"""Assignment consistency on planted carriers, and each guard on the case that it is there to catch."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array

from c2r_core.data.forest import GatedForest
from c2r_core.data.toy import FeatureTree
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.metrics import assignment
from c2r_core.metrics.assignment import (
    VERSION,
    letter_assignment,
    measure_assignment,
    toy_assignment,
)
from c2r_core.metrics.carriers import (
    NO_CARRIER,
    CarrierRule,
    assignment_consistency,
    carriers,
    consistency_interval,
    effective_latents,
    modal_latent,
)
from c2r_core.metrics.exemplars import ExemplarDictionary
from c2r_core.metrics.letter_probes import LetterProbes


class Linear:
    """relu(x W_enc − threshold) with decoder rows W_dec."""

    def __init__(self, W_enc, W_dec, threshold=0.0):
        self.W_enc, self.W_dec, self.threshold = W_enc, W_dec, threshold

    def encode(self, x):
        acts = x @ self.W_enc
        return acts * (acts > self.threshold)

    def decode(self, feature_acts):
        return feature_acts @ self.W_dec


def draws(shares, n_draws, n, seed=0):
    """Carriers (n_draws, n) drawn with the given shares."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.multinomial(torch.tensor(shares), n_draws * n, True, generator=generator)
    return flat.view(n_draws, n)


# -- the estimators ----------------------------------------------------------------------------


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(-1, 5), min_size=2, max_size=30))
def test_consistency_is_the_share_of_pairs_that_agree(latents):
    carried_by = torch.tensor(latents)
    n = len(latents)
    agree = sum(
        latents[i] == latents[j] != NO_CARRIER for i in range(n) for j in range(n) if i != j
    )
    assert assignment_consistency(carried_by) == pytest.approx(agree / (n * (n - 1)))
    # Which number a latent has, and which sample comes first, says nothing.
    renamed = torch.where(carried_by == NO_CARRIER, NO_CARRIER, 100 - carried_by).flip(0)
    assert assignment_consistency(renamed) == pytest.approx(agree / (n * (n - 1)))
    assert effective_latents(renamed) == pytest.approx(effective_latents(carried_by))


def test_consistency_is_unbiased_where_the_plug_in_is_not():
    carried_by = draws([1.0] * 50, 4000, 10)  # 50 equally busy latents: the truth is 0.02
    scores = torch.tensor([assignment_consistency(row) for row in carried_by])
    assert float(scores.mean()) == pytest.approx(0.02, abs=0.002)
    plug_in = torch.stack([row.bincount(minlength=50) / 10 for row in carried_by]).square().sum(1)
    assert float(plug_in.mean()) == pytest.approx(0.118, abs=0.002)


@pytest.mark.parametrize("shares", [[0.7, 0.3], [0.4] + [0.1] * 6])
def test_interval_covers_the_truth(shares):
    truth = sum(share**2 for share in shares)
    intervals = [consistency_interval(row) for row in draws(shares, 150, 50)]
    covered = sum(low <= truth <= high for low, high in intervals)
    assert covered >= 0.88 * 150
    assert sum(high - low for low, high in intervals) / 150 < 0.35


def test_a_sample_without_a_carrier_agrees_with_nothing():
    nobody = torch.full((10,), NO_CARRIER)
    assert assignment_consistency(nobody) == 0 and consistency_interval(nobody) == (0, 0)
    assert modal_latent(nobody) is effective_latents(nobody) is None
    half = torch.tensor([3, 3, NO_CARRIER, NO_CARRIER])
    assert assignment_consistency(half) == pytest.approx(2 / 12)
    assert effective_latents(half) == 1 and modal_latent(half) == 3


def test_effective_latents_by_hand():
    assert effective_latents(torch.zeros(10, dtype=torch.long)) == 1
    two = torch.arange(10) % 2
    assert effective_latents(two) == pytest.approx(2 * torch.tensor(1 / 20).exp().item())
    # Less biased than the plug-in estimate, which reads 5.95 here.
    ten = [effective_latents(row) for row in draws([1.0] * 10, 500, 10)]
    assert 7.5 < sum(ten) / 500 < 8.5


def test_ties_for_the_modal_latent_go_to_the_lowest_number():
    assert modal_latent(torch.tensor([5, 2, 2, 5, 9, NO_CARRIER, NO_CARRIER, NO_CARRIER])) == 2


@pytest.mark.parametrize("wrong", [torch.tensor([1]), torch.ones(3, 2).long(), torch.ones(5)])
def test_wrong_carriers_are_explained(wrong):
    for function in (assignment_consistency, effective_latents, consistency_interval):
        with pytest.raises(ValueError, match="carried_by has shape"):
            function(wrong)


# -- carriers ----------------------------------------------------------------------------------


def plain_carriers(x, acts, W_dec, directions):
    """The definition, dense."""
    units = torch.nn.functional.normalize(directions.double(), dim=1)
    rows = []
    for u in units:
        written = acts.double() * (W_dec.double() @ u)
        silent = torch.where(acts > 0, 0, -torch.inf)
        most, latent = (written + silent).max(1)
        cosine = torch.nn.functional.cosine_similarity(W_dec.double(), u[None])[latent]
        total = x.double() @ u
        counts = (cosine >= 0.1) & (total > 0) & (most >= 0.4 * total)
        rows.append(torch.where(counts, latent, NO_CARRIER))
    return torch.stack(rows)


def test_carriers_equal_the_plain_form_whatever_the_blocks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x, W_dec = (torch.randn(n, 12, generator=generator) for n in (200, 50))
    acts = (x @ W_dec.T - 2).relu()
    directions = torch.randn(5, 12, generator=generator)
    plain = plain_carriers(x, acts, W_dec, directions)
    assert (plain >= 0).any() and (plain == NO_CARRIER).any()
    assert torch.equal(carriers(x, csr_array(acts.numpy()), W_dec, directions), plain)
    monkeypatch.setattr("c2r_core.metrics.carriers.ROWS_AT_ONCE", 7)
    assert torch.equal(carriers(x, csr_array(acts.numpy()), W_dec, directions), plain)


def test_carrier_by_hand():
    u = torch.tensor([1.0, 0.0, 0.0])
    W_dec = torch.tensor([[1.0, 0, 0], [0.6, 0.8, 0], [0.09, 0, 0.996], [-1.0, 0, 0]])
    x = torch.tensor([[1.0, 0, 0]] * 6 + [[-1.0, 0, 0]])
    acts = torch.tensor(
        [
            [0.50, 0.00, 0.0, 0.0],  # latent 0 explains 50 %
            [0.30, 1.00, 0.0, 0.0],  # latent 1 explains 60 %, latent 0 only 30 %
            [0.39, 0.00, 0.0, 0.0],  # 39 % is too little
            [0.40, 0.00, 9.0, 0.0],  # latent 2 writes most, but its cosine is 0.09
            [0.00, 0.00, 0.0, 5.0],  # the wrong way
            [0.00, 0.00, 0.0, 0.0],  # silence
            [0.50, 0.00, 0.0, 0.0],  # a sample that has none of the direction
        ]
    )
    expected = [0, 1, -1, -1, -1, -1, -1]

    def found(acts, rows, direction, *rule):
        return carriers(x, csr_array(acts.numpy()), rows, direction[None], *rule)[0].tolist()

    assert found(acts, W_dec, u) == expected
    assert found(acts, W_dec, 7 * u) == expected
    scale = torch.tensor([2.0, 0.5, 4.0, 8.0])
    assert found(acts / scale, W_dec * scale[:, None], u) == expected
    assert found(acts, W_dec, 0 * u) == [-1] * 7
    assert found(acts, W_dec, u, CarrierRule(min_cosine=0.05)) == [0, 1, -1, 2, -1, -1, -1]
    assert found(acts, W_dec, u, CarrierRule(min_share=0.35)) == [0, 1, 0, -1, -1, -1, -1]
    assert found(acts, W_dec, u, CarrierRule(min_share=0.55)) == [-1, 1, -1, -1, -1, -1, -1]


# -- planted dictionaries ----------------------------------------------------------------------
#
# A sample that holds the concept is e_0 plus the mark e_{1+j} of the latent j that reads it; a sample that
# does not is its mark alone. Latent j writes (e_0 + e_{1+j}), so it carries the whole concept.

N_MARKS = 6


def marked(counts, n_without=40):
    """Activations of counts[j] samples of each mark that hold the concept, and some that do not."""
    marks = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    marks = torch.cat([marks, torch.full((n_without,), N_MARKS)])
    x = torch.eye(N_MARKS + 2)[1 + marks]
    holds = torch.arange(len(marks)) < sum(counts)
    x[:, 0] = holds.float()
    return x, holds[:, None]


def split_dictionary():
    eye = torch.eye(N_MARKS + 2)
    return Linear(eye[1:].T.clone(), eye[1:] + eye[0])


CONCEPT = torch.eye(N_MARKS + 2)[:1]


def measure(sae, x, labels, **settings):
    return measure_assignment(sae, x, labels, CONCEPT, **settings)


def test_a_split_concept_has_the_exact_score():
    x, labels = marked([12, 8])
    report = measure(split_dictionary(), x, labels, n_samples=20)
    row = report.concepts[0]
    assert row.consistency == pytest.approx((12 * 11 + 8 * 7) / (20 * 19))
    assert row.low < row.consistency < row.high
    assert row.exception_rate == pytest.approx(0.4) and row.no_carrier_share == 0
    assert row.modal_latent == 0 and row.n_holding == 20
    assert row.precision == 1 and row.recall == 0.6 and row.f1 == pytest.approx(0.75)
    assert row.prevalence == pytest.approx(1 / 3)
    # All 60 samples: 12 and 8 carried by a latent, 40 by none.
    assert row.shuffled_consistency == pytest.approx((12 * 11 + 8 * 7) / (60 * 59))
    assert report.version == VERSION and report.n_samples == 20 and report.n_evaluated == 1
    assert report.mean_consistency == row.consistency and report.live_latents == 3


def test_a_concept_split_in_known_shares_has_their_expected_score():
    x, labels = marked([300, 200, 100])
    truth = (300 * 299 + 200 * 199 + 100 * 99) / (600 * 599)
    scores = [
        measure(split_dictionary(), x, labels, n_samples=10, seed=seed).mean_consistency
        for seed in range(150)
    ]
    assert sum(scores) / 150 == pytest.approx(truth, abs=0.03)


def test_one_latent_for_the_concept_scores_one():
    x, labels = marked([30, 20, 10])
    clean = Linear(CONCEPT.T.clone(), CONCEPT)
    row = measure(clean, x, labels, n_samples=25).concepts[0]
    assert (row.consistency, row.low, row.high, row.effective_latents) == (1, 1, 1, 1)
    assert (row.precision, row.recall, row.f1, row.exception_rate) == (1, 1, 1, 0)
    assert row.shuffled_consistency == pytest.approx(60 * 59 / (100 * 99))  # it has to find labels


def test_an_always_on_latent_does_not_pass():
    x, labels = marked([30], n_without=270)
    x[:, 0] = 1  # the direction is in every sample, whatever its label
    row = measure(Linear(CONCEPT.T.clone(), CONCEPT), x, labels, n_samples=20).concepts[0]
    assert row.consistency == row.shuffled_consistency == row.recall == 1
    assert row.precision == row.prevalence == pytest.approx(0.1)


def test_a_dictionary_that_carries_nothing_scores_zero():
    x, labels = marked([30])
    for encoder in (torch.zeros(N_MARKS + 2, 1), CONCEPT.T.clone()):
        turned_away = torch.eye(N_MARKS + 2)[1:2]
        report = measure(Linear(encoder, turned_away), x, labels, n_samples=20)
        row = report.concepts[0]
        assert row.consistency == row.high == 0 and row.no_carrier_share == row.exception_rate == 1
        assert row.modal_latent is row.precision is row.f1 is row.effective_latents is None
        assert row.not_evaluable is None and report.mean_f1 is None


def test_a_permuted_and_rescaled_copy_scores_the_same():
    sae, (x, labels) = split_dictionary(), marked([20, 10, 5])
    order = torch.tensor([3, 1, 6, 0, 5, 4, 2])
    scale = torch.tensor([2.0, 0.25, 8, 1, 0.5, 4, 2])
    copy = Linear(sae.W_enc[:, order] / scale, sae.W_dec[order] * scale[:, None])
    one, other = (measure(each, x, labels, n_samples=20) for each in (sae, copy))
    assert order[other.concepts[0].modal_latent] == one.concepts[0].modal_latent
    unnumbered = [
        replace(each, concepts=(replace(each.concepts[0], modal_latent=None),))
        for each in (one, other)
    ]
    assert unnumbered[0] == unnumbered[1]


def test_same_seed_same_report_whatever_the_chunks_and_it_is_json(monkeypatch):
    sae, (x, labels) = split_dictionary(), marked([20, 10, 5])
    arguments = {"n_samples": 20, "seed": 3, "baseline": Linear(CONCEPT.T.clone(), CONCEPT)}
    report = measure(sae, x, labels, **arguments)
    monkeypatch.setattr("c2r_core.metrics.encoding.CHUNK", 7)
    assert measure(sae, x, labels, **arguments) == report
    others = {measure(sae, x, labels, n_samples=20, seed=s).mean_consistency for s in range(9)}
    assert len(others) > 1
    assert json.loads(json.dumps(asdict(report), allow_nan=False))["version"] == VERSION


def test_every_concept_has_as_many_samples_or_a_reason():
    x, labels = marked([30, 6])
    labels = torch.cat([labels, (x[:, 2:3] > 0) & labels, labels], dim=1)
    directions = torch.cat([CONCEPT, CONCEPT, 0 * CONCEPT])
    report = measure_assignment(
        split_dictionary(), x, labels, directions, names=("a", "b", "c"), n_samples=10
    )
    assert [row.concept for row in report.concepts] == ["a", "b", "c"]
    assert report.concepts[0].not_evaluable is None and report.n_evaluated == 1
    assert report.concepts[1].not_evaluable == "6 samples hold it; 10 are drawn of each concept"
    assert report.concepts[2].not_evaluable == "its direction is zero"
    assert report.concepts[1].consistency is report.concepts[2].f1 is None
    # A score of 10 samples has n (n − 1) = 90 as its denominator, and 36 hold the concept.
    pairs = 90 * report.concepts[0].consistency
    assert pairs == pytest.approx(round(pairs))


# -- the baseline dictionary -------------------------------------------------------------------


def test_exemplars_have_the_size_and_activity_asked_for():
    x = torch.randn(500, 8, generator=torch.Generator().manual_seed(0)) + 3
    sae = ExemplarDictionary(x, 40, l0=4)
    acts = sae.encode(x)
    assert sae.W_dec.shape == (40, 8) and (acts != 0).any(0).all() and (acts >= 0).all()
    assert float((acts != 0).sum(1).double().mean()) == pytest.approx(4, abs=0.05)
    assert sae.decode(acts).shape == x.shape
    assert torch.equal(ExemplarDictionary(x, 40, l0=4).W_dec, sae.W_dec)
    assert not torch.equal(ExemplarDictionary(x, 40, l0=4, seed=1).W_dec, sae.W_dec)


def test_the_baseline_is_another_sae_or_exemplars_or_has_a_reason():
    x, labels = marked([20, 10, 5])
    clean = Linear(CONCEPT.T.clone(), CONCEPT)
    report = measure(split_dictionary(), x, labels, baseline=clean)
    assert report.mean_baseline_consistency == 1 and report.baseline_live_latents == 1
    report = measure(split_dictionary(), x, labels)
    assert report.baseline_live_latents == report.live_latents == 4
    assert 0 <= report.mean_baseline_consistency <= 1
    wide = Linear(torch.ones(8, 100) / 8, torch.ones(100, 8))
    report = measure(wide, x, labels)
    assert report.baseline_live_latents is report.mean_baseline_consistency is None
    assert "100 latents were asked for and there are 75" in report.baseline_not_evaluable


# -- concepts at hand --------------------------------------------------------------------------


def test_true_features_and_planted_absorption():
    tree = FeatureTree(d_in=16, n_parents=2, children_per_parent=2, n_singles=2)
    sample = tree.sample(6000, torch.Generator().manual_seed(0))
    rows = tree.directions
    threshold = 0.1 * tree.norm_factor
    report = toy_assignment(Linear(rows.T.clone(), rows, threshold), tree, sample)
    assert report.n_evaluated == tree.n_features == report.live_latents
    assert [row.modal_latent for row in report.concepts] == list(range(tree.n_features))
    assert report.mean_consistency == report.mean_precision == report.mean_recall == 1
    for row in report.concepts:
        assert row.shuffled_consistency == pytest.approx(row.prevalence**2, rel=0.05)

    # A parent's latent is silent where a child is on; the child's latent writes the parent too.
    encoder, decoder = rows.T.clone(), rows.clone()
    for parent, children in enumerate(tree.children):
        encoder[:, parent] -= 2 * rows[children].sum(0)
        decoder[children] += rows[parent]
    absorbed = toy_assignment(
        Linear(encoder, decoder, threshold), tree, sample, n_samples=250
    ).concepts
    truth = 0.3**2 + 2 * 0.35**2
    for parent in absorbed[:2]:
        assert parent.consistency == pytest.approx(truth, abs=0.03)
        assert parent.effective_latents == pytest.approx(3, abs=0.1)
    assert all(row.consistency == 1 for row in absorbed[6:] if row.not_evaluable is None)


def test_features_of_a_forest_are_concepts_too():
    forest = GatedForest(n_features=24, d_in=24, n_roots=2, branching=2, depth=1)
    sample = forest.sample(2000, torch.Generator().manual_seed(0))
    rows = forest.directions
    report = toy_assignment(Linear(rows.T.clone(), rows, 1.0), forest, sample)
    assert len(report.concepts) == 24 and report.n_evaluated > 5


PER_LETTER, N_TEST = 30, 10


@pytest.fixture
def task():
    """Words of A and B: 10 · their letter's direction, and 10 · one of their own."""
    letters = torch.arange(2).repeat_interleave(PER_LETTER)
    eye = torch.eye(2 + 2 * PER_LETTER)
    return FirstLetterTask(
        words=tuple(f"{LETTERS[i].lower()}{n}" for n, i in enumerate(letters)),
        activations=10 * eye[letters] + 10 * eye[2:],
        letters=letters,
        is_test=(torch.arange(PER_LETTER) >= PER_LETTER - N_TEST).repeat(2),
        hook_name="blocks.1.hook_resid_post",
        prefix="",
        n_dropped=0,
    )


@pytest.fixture
def probes(task):
    weights, biases = torch.zeros(26, task.activations.shape[1]), torch.zeros(26)
    weights[:2], biases[:2] = 2 * torch.eye(task.activations.shape[1])[:2], -10.0
    return LetterProbes(
        weights=weights,
        biases=biases,
        f1=(1.0,) * 2 + (None,) * 24,
        not_evaluable=(None,) * 2 + ("no words",) * 24,
    )


def test_a_word_holds_its_first_letter_if_the_probe_recognises_it(task, probes):
    holds = probes.holds(task.activations, task.letters)
    for word, x in enumerate(task.activations):
        for letter in range(len(LETTERS)):
            recognised = float(x @ probes.weights[letter] + probes.biases[letter]) > 0
            assert holds[word, letter] == (recognised and task.letters[word] == letter)
    assert 0 < holds.sum() < holds.numel()


def test_absorbed_words_lower_a_letters_score(task, probes):
    eye = torch.eye(2 + 2 * PER_LETTER)
    absorbed = range(PER_LETTER - N_TEST, PER_LETTER - N_TEST + 4)  # the first 4 test words of A
    encoder, decoder = [eye[0].clone(), eye[1]], [eye[0], eye[1]]
    for word in absorbed:
        encoder[0] -= eye[2 + word]
        encoder.append(eye[2 + word])
        decoder.append(eye[0] + eye[2 + word])
    sae = Linear(torch.stack(encoder).T, torch.stack(decoder))
    report = letter_assignment(sae, task, probes, n_samples=N_TEST)
    a, b = report.concepts[:2]
    assert a.consistency == pytest.approx(6 * 5 / (10 * 9)) and b.consistency == 1
    assert a.exception_rate == pytest.approx(0.4) and a.recall == 0.6 and a.precision == 1
    assert [row.concept for row in report.concepts] == list(LETTERS)
    assert report.concepts[25].not_evaluable == "no words" and report.n_evaluated == 2
    assert report.live_latents == 6

    acts = csr_array(sae.encode(task.activations).numpy())
    assert letter_assignment(sae, task, probes, acts=acts, n_samples=N_TEST) == report

    none = letter_assignment(sae, task, probes, n_samples=N_TEST, rule=CarrierRule(min_share=1.2))
    assert none.version == f"{VERSION}, min_cosine 0.1, min_share 1.2"
    assert none.mean_consistency == 0 and none.mean_no_carrier_share == 1
    for wrong in (CarrierRule(min_cosine=2), CarrierRule(min_share=float("nan"))):
        with pytest.raises(
            ValueError, match=r"rule is CarrierRule\(.*expected a cosine from -1 to"
        ):
            letter_assignment(sae, task, probes, rule=wrong)

    unrecognised = replace(probes, biases=probes.biases - 100)
    a = letter_assignment(sae, task, unrecognised).concepts[0]
    assert a.not_evaluable == "0 samples hold it; 20 are drawn of each concept"


# -- errors ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.ones(8, 2).bool()}, "shapes do not fit"),
        ({"labels": torch.ones(9, 1).bool()}, "shapes do not fit"),
        ({"labels": torch.ones(8)}, r"labels \(8,\)"),
        ({"labels": torch.ones(8, 1)}, "expected bool"),
        ({"directions": torch.ones(1, 5)}, "shapes do not fit"),
        ({"directions": torch.full((1, 4), torch.nan)}, "directions hold NaN"),
        ({"activations": torch.ones(0, 4)}, "none of them empty"),
        ({"activations": torch.full((8, 4), torch.inf)}, "activations hold NaN"),
        ({"sae": Linear(torch.full((4, 4), torch.nan), torch.eye(4))}, "feature activations hold"),
        ({"sae": Linear(torch.eye(4), torch.full((4, 4), torch.nan))}, "W_dec hold NaN"),
        ({"n_samples": 3}, "n_samples is 3"),
        ({"names": ("a", "b")}, "2 names for 1 concepts"),
    ],
)
def test_what_cannot_be_measured_is_explained(change, message):
    arguments = {
        "sae": Linear(torch.eye(4), torch.eye(4)),
        "activations": torch.ones(8, 4),
        "labels": torch.ones(8, 1).bool(),
        "directions": torch.ones(1, 4),
        "n_samples": 4,
    }
    with pytest.raises(ValueError, match=message):
        measure_assignment(**(arguments | change))


def test_a_text_without_letters_to_measure_says_so(monkeypatch):
    few = SimpleNamespace(n_evaluated=0, concepts=[SimpleNamespace(not_evaluable="no words")] * 26)
    monkeypatch.setattr(assignment, "letter_splits", lambda inputs: [(None, None)])
    monkeypatch.setattr(assignment, "letter_acts", lambda inputs: None)
    monkeypatch.setattr(assignment, "letter_assignment", lambda *_, **__: few)
    with pytest.raises(NotEvaluable, match="None of the 26 letters could be .* example: no words"):
        assignment.measure_assignment_consistency(SimpleNamespace(sae=None, seed=0))

"""The experiments behind the notebooks, at smoke size: pairing, caching, and what they measure."""

from __future__ import annotations

import json

import pytest
import torch

from c2r_core.artefacts.profiles import FIRST_SEED, load_profile
from c2r_core.artefacts.results import plain
from c2r_core.data.language_models import load_language_model
from c2r_core.experiments import language_model as lm_runs
from c2r_core.experiments import synthetic as toy_runs
from c2r_core.experiments import tables as lm_tables
from c2r_core.experiments import toy as toy_tables
from c2r_core.experiments import tuning as tune_toys
from c2r_core.saes import ARCHITECTURES, ReLUSAE, fold_norm_factor
from conftest import PROJECT

SMOKE = load_profile("smoke")


@pytest.fixture(scope="module")
def toy():
    return SMOKE.toy


@pytest.fixture(scope="module")
def runs(toy):
    arms = toy_runs.standard_arms(toy, "relu")
    return toy_runs.train_toy_arms(toy, "relu", arms, [0, 1])


def forbid_training(monkeypatch, module):
    def train(*args, **kwargs):
        raise AssertionError("trained again instead of reading the cache")

    monkeypatch.setattr(module, "train", train)


def test_toy_arms_are_trained_once(toy, runs, monkeypatch):
    forbid_training(monkeypatch, toy_runs)
    again = toy_runs.train_toy_arms(toy, "relu", toy_runs.standard_arms(toy, "relu"), [0, 1])
    assert list(again) == [(arm, seed) for arm in ("baseline", "C²R", "OrtSAE") for seed in (0, 1)]
    for run, sae in runs.items():
        assert torch.equal(again[run].W_dec, sae.W_dec)
    with pytest.raises(AssertionError, match="trained again"):
        changed = toy.model_copy(update={"lr": 0.001})
        toy_runs.train_toy_arms(changed, "relu", toy_runs.standard_arms(toy, "relu"), [0, 1])


def test_toy_arms_differ_only_by_their_penalty(toy, runs):
    assert not torch.equal(runs["baseline", 0].W_dec, runs["C²R", 0].W_dec)
    none = {"one": None, "other": None}
    same = toy_runs.train_toy_arms(toy, "relu", none, [0])
    torch.testing.assert_close(same["one", 0].W_dec, same["other", 0].W_dec)
    torch.testing.assert_close(same["one", 0].W_dec, runs["baseline", 0].W_dec)


def test_toy_table_and_paired_difference(toy, runs):
    table = toy_tables.toy_table(toy, runs)
    assert list(table["arm"]) == ["baseline"] * 2 + ["C²R"] * 2 + ["OrtSAE"] * 2
    values = table["fvu"].tolist()
    assert toy_tables.values_by_seed(table.iloc[::-1], "C²R", "fvu") == values[2:4]
    difference = toy_tables.paired_difference(table, "fvu")
    assert difference.mean == pytest.approx((values[2] + values[3] - values[0] - values[1]) / 2)


def test_family_cosines_order_latents_by_what_they_carry(toy):
    tree = toy_runs.feature_tree(toy)
    sae = ReLUSAE(tree.d_in, tree.n_features, l1_weight=0.0)
    with torch.no_grad():
        sae.W_dec.copy_(tree.directions.flip(0))
    names, cosines = toy_tables.family_cosines(sae, tree, parent=1, n=5)
    torch.testing.assert_close(cosines, torch.eye(5), atol=1e-5, rtol=0)
    assert names[0] == f"latent {tree.n_features - 2}"


@pytest.fixture(scope="module")
def lm():
    return SMOKE.language_model


@pytest.fixture(scope="module")
def model(lm):
    return load_language_model(lm.model)


@pytest.fixture(scope="module")
def activations(lm, model):
    return lm_runs.harvest_activations(lm, model)


def test_training_and_held_out_documents_are_apart(lm, activations):
    train, held_out = activations.train.manifest, activations.held_out.manifest
    assert train.text_fingerprint != held_out.text_fingerprint
    assert (train.corpus_name, held_out.corpus_name) == ("sotu/train", "sotu/held-out")
    assert train.n_tokens <= lm.train_tokens and train.context_size == lm.context_size


def test_language_model_arm_is_trained_once_and_measured(lm, model, activations, monkeypatch):
    arms = lm_runs.standard_arms(lm)
    sae = lm_runs.train_arm(lm, arms["C²R"], activations.train, seed=0)
    assert sae.norm_factor == activations.train.norm_factor
    forbid_training(monkeypatch, lm_runs)
    again = lm_runs.train_arm(lm, arms["C²R"], activations.train, seed=0)
    assert torch.equal(again.W_dec, sae.W_dec)
    with pytest.raises(AssertionError, match="trained again"):
        lm_runs.train_arm(lm, arms["baseline"], activations.train, seed=0)

    task, probes = lm_runs.first_letter_task(lm, model)
    folded = fold_norm_factor(sae)
    result = lm_tables.measure(folded, activations, lm, model, task, probes)
    json.dumps(plain(result), allow_nan=False)
    assert 0 < result["fvu"] < 2 and result["l0"] > 0
    assert len(result["first_letter"]["letters"]) == 26
    table = lm_tables.summary_table({("C²R", 0): plain(result)})
    assert table.loc[0, "fvu"] == result["fvu"] and table.loc[0, "arm"] == "C²R"
    rows = {
        "letters": [
            {"letter": "A", "absorption_fraction": 0.25},
            {"letter": "Q", "absorption_fraction": None},
        ]
    }
    scored = {("C²R", seed): {"first_letter": rows} for seed in (0, 1)}
    assert lm_tables.letter_table(scored, seed=1).to_dict("records") == [
        {"arm": "C²R", "letter": "A", "value": 0.25}
    ]


def test_strongest_contexts_are_the_strongest(lm, model, activations):
    sae = lm_runs.train_arm(lm, lm_runs.LanguageModelArm(lm.d_sae), activations.train, seed=0)
    folded, store = fold_norm_factor(sae), activations.held_out
    acts = torch.cat([folded.encode(chunk) for chunk in store.chunks(1000)])
    latent = int(acts.max(0).values.argmax())
    texts = lm_tables.strongest_contexts(folded, store, model.tokenizer, latent, n=2)
    window = store.text_around(int(acts[:, latent].argmax()), model.tokenizer)
    assert f"«{window.tokens[window.position]}»" in texts[0] and len(texts) == 2


def test_precision_auto_is_resolved():
    assert lm_runs.resolve_precision("float32", "cuda") == "float32"
    assert lm_runs.resolve_precision("auto", "cuda:0") == "bfloat16"
    assert lm_runs.resolve_precision("auto", "mps") == "float32"
    assert lm_runs.resolve_precision("auto", "cpu") in ("float32", "bfloat16")


def test_settings_of_the_profile_are_the_ones_that_were_chosen():
    outcome = json.loads((PROJECT / "results" / "tuning" / "toy.json").read_text())
    assert max(outcome["seeds"]) < FIRST_SEED, "tuned and confirmed on the same seeds"
    default = load_profile("default").toy
    assert sorted(outcome["outcome"]) == sorted(ARCHITECTURES)
    for architecture, chosen in outcome["outcome"].items():
        assert chosen["architectures"] == default.architectures[architecture]
        assert chosen["c2r_strength"] == default.c2r_strength[architecture]
        assert chosen["orthogonality_weight"] == default.orthogonality_weight[architecture]
        tried = [row["weight"] for row in chosen["tried"]["c2r"]]
        assert tried == list(tune_toys.C2R_STRENGTHS)


def test_ablations_of_the_profile_are_the_ones_that_were_chosen():
    outcome = json.loads((PROJECT / "results" / "tuning" / "ablations.json").read_text())
    assert max(outcome["seeds"]) < FIRST_SEED
    assert load_profile("default").toy.ablation_weight == {
        name: {architecture: one["weight"] for architecture, one in by.items()}
        for name, by in outcome["outcome"].items()
    }


def test_tuning_table_marks_what_was_chosen():
    default = load_profile("default").toy
    c2r = toy_tables.tuning_table("toy", "c2r")
    chosen = c2r[c2r["chosen"]].set_index("architecture")["weight"].to_dict()
    assert chosen == default.c2r_strength
    assert len(c2r) == len(ARCHITECTURES) * len(tune_toys.C2R_STRENGTHS)
    ablations = toy_tables.tuning_table("ablations")
    assert sorted(set(ablations["penalty"])) == sorted(tune_toys.ABLATIONS)
    assert ablations.groupby(["penalty", "architecture"])["chosen"].sum().eq(1).all()


def test_architecture_table_names_the_architecture(toy, runs):
    table = toy_tables.architecture_table(toy, {"one": runs, "other": runs})
    assert table["architecture"].tolist() == ["one"] * 6 + ["other"] * 6
    half = table[table["architecture"] == "other"].drop(columns="architecture")
    assert half.reset_index(drop=True).equals(toy_tables.toy_table(toy, runs))


def test_a_corpus_with_too_few_tokens_is_an_error(lm, model):
    greedy = lm.model_copy(update={"train_tokens": 10**9, "held_out_share": 0.99})
    with pytest.raises(ValueError, match="the profile asks for 1,000,000,000"):
        lm_runs.harvest_activations(greedy, model)


def test_every_architecture_has_toy_settings(toy):
    for settings in (toy.architectures, toy.c2r_strength, toy.orthogonality_weight):
        assert sorted(settings) == sorted(ARCHITECTURES)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_trains_on_the_toy(toy, architecture):
    arms = toy_runs.standard_arms(toy, architecture)
    trained = toy_runs.train_toy_arms(toy, architecture, arms, [0, 1])
    table = toy_tables.toy_table(toy, trained)
    assert len(table) == 6 and table["fvu"].notna().all()

"""The studies at smoke size: cells are complete and distinct, arms paired, trained once, and measured."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import replace
from types import SimpleNamespace

import pandas as pd
import pytest
import torch

from c2r_core.artefacts.cells import compute, read_or_compute
from c2r_core.artefacts.fingerprints import fingerprints
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import FIRST_SEED, load_profile, profile_names
from c2r_core.artefacts.results import results_dir, runs_dir
from c2r_core.data.store import ActivationStore
from c2r_core.data.words import LETTERS, FirstLetterTask
from c2r_core.errors import NotEvaluable
from c2r_core.experiments import (
    STUDIES,
    __main__,
    ablations,
    absorption,
    agreement,
    architectures,
    benchmark,
    blocks,
    cells,
    confirm,
    examples,
    forms,
    front,
    language_model,
    parity,
    published,
    synthetic,
    toy,
    tuning,
    validation,
)
from c2r_core.metrics import use, use_task
from c2r_core.notebook.tables import paired_seeds
from c2r_core.saes import ARCHITECTURES, ReLUSAE, create_sae
from c2r_core.training import REGULARISERS, create_regulariser, train
from conftest import PROJECT

SMOKE = load_profile("smoke")
SHORT = SMOKE.model_copy(
    update={"toy": SMOKE.toy.model_copy(update={"steps": 4, "evaluation_samples": 500})}
)
LM = SMOKE.language_model


def forbid_training(monkeypatch, module):
    def train(*args, **kwargs):
        raise AssertionError("trained again instead of reading the cache")

    monkeypatch.setattr(module, "train", train)


def cell_of(study: str, name: str):
    return {cell.name: cell for cell in cells(study, SMOKE)}[name]


# -- every study --------------------------------------------------------------------------------


@pytest.mark.parametrize("profile", profile_names())
@pytest.mark.parametrize("study", STUDIES)
def test_cells_are_distinct_and_say_what_they_rest_on(study, profile):
    if profile == "paper" and study != "published":
        pytest.skip("its model and corpus are not here")
    made = cells(study, load_profile(profile))
    assert made and len({cell.name for cell in made}) == len(made)
    for cell in made[:: max(1, len(made) // 5)]:
        json.dumps(cell.about(), allow_nan=False)
        assert cell.study == study and cell.profile == profile
        assert fingerprints(cell.modules)


def test_an_unknown_study_is_named():
    with pytest.raises(ValueError, match="'toyy'; did you mean 'toy'"):
        cells("toyy", SMOKE)


def test_what_decides_a_trained_sae_is_not_its_metrics_or_tables():
    for entry in ("synthetic:trained", "language_model:trained"):
        reached = fingerprints([f"c2r_core.experiments.{entry}"])
        assert not [name for name in reached if ".metrics" in name or ".evaluate" in name]
        assert "c2r_core.training.trainer" in reached
        taken_by_name = ("saes.topk", "saes.relu", "saes.gated", "training.ablations")
        assert not reached.keys() & {f"c2r_core.{name}" for name in taken_by_name}
    measured = fingerprints(cell_of("language_model", "baseline-seed-10-decoder").modules)
    assert "c2r_core.metrics.decoder" in measured and "c2r_core.metrics.use" not in measured


@pytest.mark.parametrize("study", STUDIES)
def test_a_cell_rests_on_the_architecture_and_the_regulariser_that_it_names(study):
    classes = dict(ARCHITECTURES) | dict(REGULARISERS)
    for cell in cells(study, SMOKE):
        named = {classes[name].__module__ for name in names_in(cell.settings) & classes.keys()}
        assert named <= fingerprints(cell.modules).keys(), cell.name


def names_in(settings) -> set[str]:
    """What settings say is the architecture, the regulariser or the penalty of an arm."""
    if isinstance(settings, list | tuple):
        return set().union(*map(names_in, settings))
    if not isinstance(settings, Mapping):
        return set()
    found = set().union(*map(names_in, settings.values()))
    for key in ("architecture", "regulariser", "penalty"):
        value = settings.get(key)
        found |= {value["name"] if isinstance(value, Mapping) else value} - {None}
    return found


def test_cells_of_toys_rest_on_no_language_model_and_the_others_on_no_toy():
    toys, model = (
        fingerprints(cell_of(*named).modules)
        for named in (("toy", "relu-c2r"), ("language_model", "baseline-seed-10-decoder"))
    )
    of_text = ("store", "harvest", "forward", "language_models", "text", "batches:StoreBatches")
    assert not toys.keys() & {f"c2r_core.data.{name}" for name in of_text}
    assert "c2r_core.metrics.inputs" not in toys
    of_toys = ("toy", "forest", "batches:ToyBatches")
    assert not model.keys() & {f"c2r_core.data.{name}" for name in of_toys}


def test_a_seed_moves_every_study_but_those_whose_design_names_theirs():
    for study in STUDIES:
        seeds = [cell.settings["seeds"] for cell in cells(study, SMOKE, seed=5)[:1]]
        fixed = {"tuning": 0, "forms": 0, "front": 0, "shortlist": 1, "promises": 20}
        fixed |= {"widths": 0, "robustness": 0}
        fixed |= dict.fromkeys(("confirm", "confirm_lm"), confirm.SEEDS[0])
        assert seeds[0][0] == fixed.get(study, FIRST_SEED + 5)


# -- synthetic features -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs():
    arms = toy.standard_arms(SHORT.toy, "relu")
    return {
        name: synthetic.trained(toy.toy_arm(SHORT.toy, "relu", penalty), [0, 1])
        for name, penalty in arms.items()
    }


def test_arms_are_trained_once_and_differ_only_by_their_penalty(runs, monkeypatch):
    forbid_training(monkeypatch, synthetic)
    arm = toy.toy_arm(SHORT.toy, "relu", None)
    again = synthetic.trained(arm, [0, 1])
    assert list(again) == [0, 1]
    assert torch.equal(again[1].W_dec, runs["baseline"][1].W_dec)
    assert not torch.equal(runs["baseline"][0].W_dec, runs["C²R"][0].W_dec)
    with pytest.raises(AssertionError, match="trained again"):
        changed = SHORT.toy.model_copy(update={"lr": 0.001})
        synthetic.trained(toy.toy_arm(changed, "relu", None), [0, 1])


def test_a_stack_of_seeds_is_its_seeds(runs):
    alone = synthetic.trained(toy.toy_arm(SHORT.toy, "relu", None), [1])
    torch.testing.assert_close(alone[1].W_dec, runs["baseline"][1].W_dec)


@pytest.mark.parametrize("architecture", ["relu", "batch_topk"])
@pytest.mark.parametrize("penalty", ["c2r", "co_activation"])
def test_a_stack_of_weights_is_each_weight_alone(architecture, penalty, monkeypatch):
    baseline = toy.toy_arm(SHORT.toy, architecture, None)
    weights = [0.0, 0.02, 0.3]
    arms = {
        w: replace(baseline, regulariser=create_regulariser(penalty, weight=w)) for w in weights
    }
    monkeypatch.setattr(synthetic, "AT_ONCE", 4)  # two stacks: of two weights, of one
    together = synthetic.trained_at(arms[0.0], weights, [0, 1])
    assert list(together) == weights
    for weight, by_seed in together.items():
        alone = synthetic.trained(arms[weight] if weight else baseline, [0, 1])
        assert list(by_seed) == [0, 1]
        for seed, sae in by_seed.items():
            for name, tensor in alone[seed].state_dict().items():
                torch.testing.assert_close(sae.state_dict()[name], tensor, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(together[0.02][0].W_dec, together[0.3][0].W_dec, atol=1e-4)
    forbid_training(monkeypatch, synthetic)
    synthetic.trained_at(arms[0.3], weights, [0, 1])


def test_toy_cells_give_a_table_and_paired_differences():
    values = {cell.name: read_or_compute(cell) for cell in cells("toy", SHORT)}
    table = toy.toy_table(values, "relu", SHORT.toy)
    assert list(table["arm"]) == ["baseline"] * 2 + ["C²R"] * 2 + ["OrtSAE"] * 2
    numbers = table["fvu"].tolist()
    assert toy.values_by_seed(table.iloc[::-1], "C²R", "fvu") == numbers[2:4]
    difference = paired_seeds(table, "fvu")
    assert difference.n == "2 seeds"
    assert difference.interval.mean == pytest.approx((sum(numbers[2:4]) - sum(numbers[:2])) / 2)


def test_family_cosines_order_latents_by_what_they_carry():
    tree = toy.feature_tree(SMOKE.toy)
    sae = ReLUSAE(tree.d_in, tree.n_features, l1_weight=0.0)
    with torch.no_grad():
        sae.W_dec.copy_(tree.directions.flip(0))
    names, cosines = toy.family_cosines(sae, tree, parent=1, n=5)
    torch.testing.assert_close(cosines, torch.eye(5), atol=1e-5, rtol=0)
    assert names[0] == f"latent {tree.n_features - 2}"


def test_every_architecture_trains_on_the_toy_with_every_penalty():
    values = {cell.name: read_or_compute(cell) for cell in cells("architectures", SHORT)}
    table = architectures.architecture_table(values, SHORT.toy)
    assert list(table["architecture"].unique()) == list(architectures.TITLES.values())
    assert len(table) == 2 * 3 * len(architectures.TITLES) and table["fvu"].notna().all()
    values = {cell.name: read_or_compute(cell) for cell in cells("ablations", SHORT)}
    table = ablations.ablation_table(values, SHORT.toy)
    assert len(table) == 2 * 2 * (3 + len(ablations.TITLES))


def test_an_architecture_without_toy_settings_is_left_out():
    settings = {name: dict(SMOKE.toy.architectures) for name in ("architectures",)}
    del settings["architectures"]["gated"]
    fewer = SMOKE.model_copy(update={"toy": SMOKE.toy.model_copy(update=settings)})
    assert len(architectures.cells(fewer)) == 3 * (len(architectures.TITLES) - 1)
    assert not [cell for cell in tuning.cells(fewer) if cell.name.startswith("gated")]


def test_benchmark_cells_give_tables_of_runs_and_bands():
    values = {cell.name: read_or_compute(cell) for cell in cells("benchmark", SMOKE)}
    table, bands = benchmark.benchmark_table(values), benchmark.band_table(values)
    assert table[["arm", "seed"]].drop_duplicates().shape == (6, 2)
    assert set(bands.groupby(["arm", "seed"])["n_features"].sum()) == {SMOKE.benchmark.n_features}


def test_published_cells_give_tables_of_runs_and_of_lengths():
    values = {cell.name: read_or_compute(cell) for cell in cells("published", SMOKE)}
    table = published.published_table(values)
    assert list(table["arm"].unique()) == list(published.ARMS) and len(table) == 7
    lengths = published.by_samples(SMOKE.published, values)
    assert dict(zip(lengths["samples"], lengths["seed"], strict=True)) == {5 * 64: 10, 10 * 64: 10}
    del values["ortsae-seed-11"]
    with pytest.raises(KeyError, match="ortsae-seed-11"):
        published.published_table(values)


def test_a_published_sae_is_trained_once_and_is_the_one_that_a_stack_holds(monkeypatch):
    section = SMOKE.published
    arm = benchmark.arms_with_each_penalty(section, published.published_features(section))[1].arm
    alone, stacked = published.trained(arm, 3), synthetic.trained(arm, [3, 4])[3]
    for name, value in alone.state_dict().items():
        torch.testing.assert_close(value, stacked.state_dict()[name], atol=1e-4, rtol=1e-3)
    forbid_training(monkeypatch, published)
    assert torch.equal(published.trained(arm, 3).W_dec, alone.W_dec)


# -- tuning -------------------------------------------------------------------------------------


def tuned(monkeypatch, recovery):
    """`tune` with a made-up recovery for each weight."""
    monkeypatch.setattr(tuning, "trained", lambda *_: 0.0)
    monkeypatch.setattr(tuning, "trained_at", lambda _, weights, *__: {w: w for w in weights})
    monkeypatch.setattr(tuning, "means", lambda weight, *_: {"recovery": recovery(weight)})
    arm = toy.toy_arm(SMOKE.toy, "relu", None)
    return tuning.tune(arm, "orthogonality", "toy", "recovery", 10, [0], "cpu")


def test_every_penalty_has_the_same_grid_with_none_in_it(monkeypatch):
    found = tuned(monkeypatch, lambda weight: 1 - abs(weight - 1))
    weights = [row["weight"] for row in found["tried"]]
    assert len(weights) == 1 + tuning.POINTS and weights[0] == 0 and weights[4] == 1
    ratios = [b / a for a, b in zip(weights[1:], weights[2:], strict=False)]
    assert ratios == pytest.approx([tuning.RATIO] * len(ratios), rel=0.01)
    assert (found["chosen"], found["on_edge"], found["better_than_none"]) == (1, False, True)


def test_a_grid_goes_on_until_its_best_is_not_on_an_edge(monkeypatch):
    up = tuned(monkeypatch, lambda weight: 1 - abs(weight - 40) / 100)
    assert len(up["tried"]) == 1 + tuning.POINTS + 2 and not up["on_edge"]
    assert up["chosen"] == pytest.approx(tuning.RATIO**4, rel=0.01)
    down = tuned(monkeypatch, lambda weight: -abs(weight - 0.02))
    weights = [row["weight"] for row in down["tried"]]
    assert weights == sorted(weights) and not down["on_edge"] and weights[1] < down["chosen"]
    endless = tuned(monkeypatch, lambda weight: weight)
    assert endless["on_edge"]
    assert len(endless["tried"]) == 1 + tuning.POINTS + tuning.EXTENSIONS


def test_what_cannot_be_measured_is_never_chosen_and_a_bug_surfaces(monkeypatch):
    def measure(error):
        def raise_it(*_):
            raise error

        return raise_it

    tree = toy.feature_tree(SMOKE.toy)
    monkeypatch.setitem(tuning.REPORTS, "toy", measure(NotEvaluable("dead")))
    assert tuning.means({}, tree, "toy", 10)["recovery"] is None
    monkeypatch.setitem(tuning.REPORTS, "toy", measure(ValueError("a bug")))
    with pytest.raises(ValueError, match="a bug"):
        tuning.means({}, tree, "toy", 10)


def test_tuning_cells_run_and_give_a_table(monkeypatch):
    monkeypatch.setattr(tuning, "POINTS", 1)
    monkeypatch.setattr(tuning, "EXTENSIONS", 0)
    names = [slug(f"relu, {penalty}") for penalty in tuning.CENTRES] + ["relu-sparsity"]
    made = {cell.name: cell for cell in cells("tuning", SHORT)}
    values = {name: compute(made[name]) for name in names}
    table = tuning.tuning_table(values, ["relu"])
    assert table.groupby("penalty")["chosen"].sum().eq(1).all()
    assert set(table["penalty"]) == set(tuning.CENTRES)
    assert len(values["relu-sparsity"]["tried"]) == len(tuning.SPARSITIES["relu"])


@pytest.mark.parametrize(("recovery", "stays"), [(0.81, True), (0.79, False), (None, False)])
def test_a_setting_in_use_stays_unless_another_is_clearly_better(recovery, stays):
    tried = [{"weight": 0.3, "recovery": recovery}, {"weight": 0.75, "recovery": 0.82}]
    found = tuning._in_use_or_chosen({"tried": tried, "chosen": 0.75}, 0.3)
    assert found == (0.3 if stays else 0.75)


def test_a_setting_that_was_not_tried_does_not_stay():
    tried = [{"arguments": {"l1_weight": weight}, "detector_f1": 0.9} for weight in (0.1, 0.2)]
    of = {"tried": tried, "chosen": {"l1_weight": 0.1}}
    for in_use, chosen in ((0.2, 0.2), (0.4, 0.1)):
        found = tuning._in_use_or_chosen(of, {"l1_weight": in_use}, "detector_f1")
        assert found == {"l1_weight": chosen}


def test_settings_of_the_profile_are_the_ones_that_were_chosen(committed_of):
    default = load_profile("default")
    chosen = tuning.chosen(committed_of("tuning"), default)
    for name, value in chosen.pop("benchmark").items():
        assert value == getattr(default.benchmark, name)
    for name, value in chosen.items():
        assert value == getattr(default.toy, name), name


# -- forms of C²R -------------------------------------------------------------------------------


def test_every_form_has_the_same_strengths_and_c2r_is_itself(monkeypatch):
    monkeypatch.setattr(forms, "FORMS", {"C²R": {}, "OrtSAE": {"charge": "constant"}})
    monkeypatch.setattr(forms, "STRENGTHS", (0.1, 1.0))
    made = {cell.name: cell for cell in cells("forms", SHORT) if cell.name.startswith("tree-relu")}
    table = forms.forms_table({name: compute(cell) for name, cell in made.items()}, SHORT)
    assert table.groupby("form").size().to_dict() == {"none": 3, "C²R": 6, "OrtSAE": 6}
    assert table["recovery"].notna().all() and set(table["seed"]) == set(tuning.SEEDS)
    known = replace(toy.toy_arm(SHORT.toy, "relu", None), regulariser=toy.c2r_of(SHORT.toy, 1.0))
    (expected,) = toy.reports(
        {1: synthetic.trained(known, [1])[1]}, known.features, SHORT.toy.evaluation_samples
    )
    row = table[(table["form"] == "C²R") & (table["strength"] == 1.0) & (table["seed"] == 1)]
    assert row["fvu"].item() == pytest.approx(expected["fvu"], rel=1e-3)


def test_a_form_fades_in_shares_of_the_training():
    fading = forms.form("directed, fading", 0.5, steps=100)
    assert (fading.weight, fading.fade_start, fading.fade_steps) == (0.5, 60, 20)


def test_the_front_trains_c2r_and_ortsae_as_the_other_studies_do():
    known = language_model.standard_arms(LM.model_copy(update={"c2r_strength": 0.8839}))
    for title, weight in (("C²R", known["C²R"].penalties()[0].weight), ("OrtSAE", 0.25)):
        arm = front.Spec(title, front.STRENGTHS[1], LM.d_sae).arm(LM)
        (penalty,) = arm.penalties()
        assert penalty.weight == pytest.approx(weight) and penalty.every == LM.penalty_every
        assert "c2r_core.training.forms" in arm.code()
    plain = front.Spec("none", 0.0, LM.d_sae // 2).arm(LM)
    assert plain.penalties() == [] and plain.d_sae == LM.d_sae // 2
    margin = front.Spec("directed, margin", 0.3, LM.d_sae).arm(LM).form.margin
    assert margin == pytest.approx((2 * math.log(4096) / 576) ** 0.5, abs=0.005)


def test_the_front_is_a_row_an_sae():
    record = {"status": "evaluated", "values": {"fvu": 0.1, "l0": 10.0, "num_alive": 7}}
    values = {"directed-0.3-512-latents-seed-2": {"reconstruction": record}}
    lm = LM.model_copy(update={"d_sae": 512})
    (row,) = front.front_table(values, lm).to_dict("records")
    assert (row["form"], row["strength"], row["d_sae"], row["seed"]) == ("directed", 0.3, 512, 2)
    assert row["fvu"] == 0.1 and math.isnan(row["absorption"])


# -- the language model -------------------------------------------------------------------------


def test_a_language_model_arm_is_trained_once(monkeypatch):
    arm, store = (
        language_model.standard_arms(LM)["C²R"],
        language_model.training_store(LM),
    )
    assert store.manifest.corpus_name == "sotu/train"
    sae = language_model.trained(arm, store, seed=10)
    assert sae.norm_factor == store.norm_factor
    forbid_training(monkeypatch, language_model)
    assert torch.equal(language_model.trained(arm, store, seed=10).W_dec, sae.W_dec)
    for other, seed in ((arm, 97), (replace(arm, k=arm.k + 1), 10)):  # which no other test trains
        with pytest.raises(AssertionError, match="trained again"):
            language_model.trained(other, store, seed=seed)


def test_a_corpus_with_too_few_tokens_is_an_error():
    greedy = LM.model_copy(update={"train_tokens": 10**9, "held_out_share": 0.99})
    with pytest.raises(ValueError, match="the profile asks for 1,000,000,000"):
        language_model.training_store(greedy)


def test_where_the_profile_streams_an_sae_is_trained_without_a_store(monkeypatch):
    lm = LM.model_copy(update={"streamed": True})
    arm, stream = language_model.standard_arms(lm)["C²R"], language_model.training_data(lm)
    batches = stream.batches(arm.batch_size, 10)
    by_hand = create_sae(arm.architecture, d_in=64, d_sae=arm.d_sae, k=arm.k, seed=10)
    train(by_hand, batches, replace(arm.config, seed=10), arm.penalties(), progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(language_model, "stored", None)
        sae = language_model.trained(arm, stream, seed=10)
    for name, value in sae.state_dict().items():
        assert torch.equal(value, by_hand.state_dict()[name]), name
    assert sae.trained_on["text"] == "sotu/train" and sae.norm_factor == batches.norm_factor
    sample = language_model.training_store(lm)
    assert sample.manifest.n_tokens <= lm.held_out_tokens < LM.train_tokens
    assert isinstance(language_model.training_data(LM), ActivationStore)
    forbid_training(monkeypatch, language_model)
    sources = language_model.Sources(SMOKE).with_lm(streamed=True)
    found = language_model.measure(arm, ["reconstruction"], sources, [10], "cpu")
    assert found["reconstruction"].values.fvu_on_training_documents is not None


def test_metric_cells_are_records_of_evaluate_and_give_tables():
    values = {
        name: read_or_compute(cell_of("language_model", name))
        for name in ("baseline-seed-10-reconstruction", "baseline-seed-10-assignment_consistency")
    }
    record = values["baseline-seed-10-reconstruction"]["reconstruction"]
    assert record["status"] == "evaluated" and 0 < record["values"]["fvu"] < 2
    assert record["values"]["fvu_on_training_documents"] is not None
    columns = {"fvu": "reconstruction.fvu", "l0": "reconstruction.l0"}
    table = language_model.metric_table(values, columns, ["baseline", "small baseline"])
    assert table.to_dict("records") == [
        {"arm": "baseline", "seed": 10} | {name: record["values"][name] for name in ("fvu", "l0")}
    ]
    planted = {"baseline-seed-11-x": {"x": {"status": "evaluated", "values": {"rows": [{"a": 1}]}}}}
    rows = language_model.item_table(planted, "x", "rows", ["baseline"])
    assert rows.to_dict("records") == [{"arm": "baseline", "seed": 11, "a": 1}]
    not_evaluable = {"baseline-seed-11-x": {"x": {"status": "not evaluable", "reason": "few"}}}
    assert language_model.records(not_evaluable, "x", ["baseline"]) == {}


def test_the_words_of_the_use_examples_are_those_that_use_uses(monkeypatch):
    made, seeds = [], []
    task_of = use_task.letter_use_task

    def spy(*given, **settings):
        seeds.append(settings["seed"])
        made.append(task_of(*given, **settings))
        return made[-1]

    monkeypatch.setattr(use_task, "letter_use_task", spy)
    arm = language_model.standard_arms(LM)["baseline"]
    sae = language_model.trained(arm, language_model.training_store(LM), 10)
    inputs = language_model.inputs_of(sae, language_model.Sources(SMOKE))
    inputs.seed = 5
    shown = examples.used.__wrapped__(inputs)
    with contextlib.suppress(NotEvaluable):
        use.measure(inputs)
    assert seeds == [5, 5] and made[0].samples == made[1].samples
    assert torch.equal(made[0].for_picking, made[1].for_picking)
    using = [w for w, picks in zip(made[0].samples, made[0].for_picking, strict=True) if not picks]
    assert {row["sample"] for row in shown} <= set(using)


@pytest.mark.parametrize("kind", examples.KINDS)
def test_examples_are_small_and_run(kind):
    value = read_or_compute(cell_of("examples", f"c2r-{kind}"))
    assert len(json.dumps(value)) < 20_000
    if kind == "contexts":
        assert len(value) == examples.N_LATENTS and value[0]["top"]


def test_the_same_words_are_carried_in_both_arms():
    values = {
        name: read_or_compute(cell)
        for cell in cells("examples", SMOKE)
        if (name := cell.name).endswith("carried")
    }
    assert set(values) == {"baseline-carried", "c2r-carried"}
    assert all(len(json.dumps(rows)) < 20_000 for rows in values.values())
    for letter in LETTERS:
        plain, penalised = (list(w) for w in examples.carried_words(values, letter).values())
        assert plain == penalised


def test_carried_words_are_those_of_the_letter_alone():
    rows = [
        {"letter": "A", "words": [" ant", "axe"], "latents": [3, -1]},
        {"letter": "B", "words": [" bee"], "latents": [3]},
    ]
    values = {"baseline-carried": rows, "c2r-carried": rows[1:]}
    found = examples.carried_words(values, "A")
    assert found == {"baseline": {" ant": 3, "axe": -1}, "C²R": {}}
    for letter in ("a", "AB", ""):
        with pytest.raises(ValueError, match="unknown letter"):
            examples.carried_words(values, letter)


def test_pairs_of_runs_agree_as_far_as_they_do():
    values = {
        cell.name: read_or_compute(cell)
        for cell in cells("agreement", SHORT)
        if "seed" not in cell.name or "seed-10" in cell.name
    }
    toys = agreement.toy_table(values, "agreement")
    assert toys["pw_mcc"].between(0, 1).all() and len(toys) == 2 * 3
    assert len(agreement.toy_table(values, "consistency")) == 2 * 3 * 2
    pairs = agreement.pair_table(values, SHORT)
    assert list(pairs["pair"].unique()) == list(agreement.PAIRS)


def letter_task(n: int, d_in: int, n_letters: int) -> FirstLetterTask:
    """Words whose first letters are plain to see, if d_in allows it."""
    noise = torch.randn(n, d_in, generator=torch.Generator().manual_seed(0))
    letters = torch.arange(n) % n_letters
    return FirstLetterTask(
        words=tuple(f"word{i}" for i in range(n)),
        activations=noise + 8 * torch.nn.functional.one_hot(letters, d_in),
        letters=letters,
        is_test=torch.zeros(n, dtype=torch.bool),
        hook_name="here",
        prefix="",
        n_dropped=0,
    )


def test_protocols_of_absorption_run_and_give_tables(monkeypatch):
    arms, names = ("baseline", "C²R"), ("half of the words, 50 steps", absorption.METRIC)
    monkeypatch.setattr(absorption, "PROTOCOLS", {n: absorption.PROTOCOLS[n] for n in names})
    made = [cell_of("absorption", slug(f"{a}, {p}")) for a in arms for p in names]
    assert set(made[0].compute()[0]) == {"split", "not_evaluable"}, "a random model, few words"
    d_in = language_model.training_store(LM).d_in
    monkeypatch.setattr(absorption, "letters", lambda inputs: letter_task(240, d_in, 3))
    values = {cell.name: compute(cell) for cell in made}
    table = absorption.protocol_table(values, arms)
    assert list(table.index) == list(absorption.PROTOCOLS) and table["baseline"].between(0, 1).all()
    table = absorption.reliability_table(values, arms)
    assert absorption.sd([1.0, 2.0]) == pytest.approx(0.5**0.5)
    assert all(map(math.isnan, (absorption.sd([1.0]), absorption.sd([1.0, math.nan, 2.0]))))
    first, second = (values[slug(f"{arm}, {absorption.METRIC}")] for arm in arms)
    assert len(first) == SMOKE.evaluation.word_splits
    apart = [b["fraction"] - a["fraction"] for a, b in zip(first, second, strict=True)]
    assert table.loc["C²R", "difference"] == pytest.approx(sum(apart) / len(apart))
    assert table.loc["C²R", "resolves"] == pytest.approx(abs(apart[0] - apart[1]))


def test_protocols_split_the_words_as_they_say():
    n = 40
    task = letter_task(n, 26, 26)
    half = absorption.split(task, absorption.PROTOCOLS["half of the words, 50 steps"], 0)
    assert len(half.words) == n // 2 == len(set(half.words)) and half.is_test.sum() == n // 4
    for word, x, letter in zip(half.words, half.activations, half.letters, strict=True):
        number = int(word.removeprefix("word"))
        assert x.equal(task.activations[number]) and letter == task.letters[number]
    other = absorption.split(task, absorption.PROTOCOLS["half of the words, 50 steps"], 1)
    assert set(other.words) != set(half.words)
    everything = [absorption.split(task, absorption.Protocol(), i) for i in range(5)]
    assert torch.stack([one.is_test for one in everything]).sum(0).eq(1).all()
    for steps in (50, 100, 2000):
        size = absorption.batch_size(7196, steps)
        assert steps <= 50 * -(-7196 // size) <= 1.05 * steps


def test_validation_measures_an_sae_on_all_counts():
    spec = next(validation.specs(LM))
    values = {
        name: read_or_compute(cell_of("validation", name))
        for name in [slug(f"{spec.title}, seed 10")]
    }
    table = validation.validation_table(values, LM)
    assert len(table) == len(list(validation.specs(LM)))
    assert table["fvu"].notna().sum() == 1


def test_the_list_of_validation_pairs_both_penalties():
    specs = list(validation.specs(load_profile("default").language_model))
    assert len(specs) >= 33 and len(set(specs)) == len(specs)
    saes = pd.DataFrame([spec._asdict() for spec in specs])
    saes = saes.assign(**dict.fromkeys(validation.EFFECTS, 0.0))
    c2r = 0.2 * (saes["c2r_strength"] > 0) + 0.1 * (saes["orthogonality_weight"] > 0)
    saes["steps"] = saes["steps"].fillna(1000)
    saes["consistency"] += c2r * saes["d_sae"] / 1024
    changes = validation.pairs(saes)
    assert changes["common"].all() and len(changes) == 2 * 11
    effects = validation.paired_effects(changes).set_index(["penalty", "name"])
    assert set(effects["n_pairs"]) == {11}
    own = effects.loc[("C²R − OrtSAE", "assignment consistency")]
    assert own["low"] < own["mean"] < own["high"] and own["mean"] > 0
    narrow = validation.paired_effects(changes[changes["d_sae"] == 1024])
    assert narrow.set_index(["penalty", "name"]).loc[
        ("C²R − none", "assignment consistency"), "mean"
    ] == pytest.approx(0.2)


def test_correlations_name_the_rivals():
    n = 12
    saes = pd.DataFrame(
        {name: [float(i) for i in range(n)] for name in [*validation.PREDICTORS]}
        | {
            "erasing fails": [float(-i) for i in range(n)],
            "steering fails": [float(i % 5) for i in range(n)],
        }
        | {"k": [10] * 6 + [32] * 6}
    )
    table = validation.correlation_table(saes, 10).set_index(["saes", "failure", "predictor"])
    own = table.loc[("all", "erasing", "assignment consistency")]
    assert own["mean"] == pytest.approx(-1) and own["n"] == n
    assert table.loc[("all", "erasing", "exception rate"), "lead"] == pytest.approx(0)
    assert ("k = 10", "steering", "no-carrier share") in table.index


def test_blocks_measure_a_baseline_in_each_block():
    first = cells("blocks", SMOKE)[0]
    table = blocks.blocks_table({first.name: read_or_compute(first)}, SMOKE)
    assert list(table["block"]) == [0, 0, 1, 1] and table["fvu"].notna().sum() == 1


def test_our_half_of_parity_needs_no_saelens():
    values = {
        slug(f"topk, seed 10, {library}"): read_or_compute(cell_of("parity", "topk-seed-10-ours"))
        for library in parity.LIBRARIES
    }
    (row,) = parity.parity_table(values).to_dict("records")
    assert row["ratio"] == 1 and row["within"]


def test_both_halves_of_parity_have_equal_recipes():
    pytest.importorskip("sae_lens", reason="the extra saelens is not installed")
    arm = language_model.arm_of(LM, architecture="topk", steps=20)
    parity.check_learning_rates(arm.config, parity.saelens_recipe(arm))
    value = read_or_compute(cell_of("parity", "topk-seed-10-saelens"))
    assert 0 < value["fvu"] < 5


# -- the commands -------------------------------------------------------------------------------


def test_status_run_and_verify(capsys):
    assert __main__.main(["run", "toy", "--profile", "smoke", "--limit", "1"]) == 0
    assert "toy/relu-baseline" in capsys.readouterr().out
    assert __main__.main(["run", "toy", "--profile", "smoke"]) == 0
    assert "toy/relu-baseline" not in capsys.readouterr().out, "what is current is left alone"
    assert not results_dir("smoke").is_dir() and (runs_dir("smoke") / "toy").is_dir()
    __main__.main(["status", "toy", "--profile", "smoke", "--json"])
    found = json.loads(capsys.readouterr().out)["toy"]
    assert {one["kind"] for one in found.values()} == {"current"}
    assert __main__.main(["verify", "toy/relu-baseline", "--profile", "smoke"]) == 0
    file = runs_dir("smoke") / "toy" / "relu-c2r.json"
    content = json.loads(file.read_text())
    content["values"][0]["fvu"] = 0.9
    file.write_text(json.dumps(content))
    assert __main__.main(["verify", "toy", "--profile", "smoke"]) == 1
    assert "toy/relu-c2r: " in (out := capsys.readouterr().out) and "is not what was" in out
    file.unlink()
    assert __main__.main(["verify", "toy", "--profile", "smoke"]) == 1, "one is not committed"
    capsys.readouterr()
    assert __main__.main(["verify", "toy/relu-baseline", "--profile", "smoke"]) == 0, "one cell"
    with pytest.raises(SystemExit, match="unknown cell of toy 'relu-bseline'; did you mean"):
        __main__.main(["verify", "toy/relu-bseline", "--profile", "smoke"])
    capsys.readouterr()
    __main__.main(["status", "toy", "--profile", "smoke"])
    assert capsys.readouterr().out.splitlines()[1].split() == ["toy", "5", "0", "1", "0"]


def test_what_is_computed_anew_goes_beside_what_is_committed():
    cell = cell_of("toy", "relu-baseline")
    assert __main__.How("default").folder(replace(cell, profile="default")) == results_dir(
        "default"
    )
    anew = __main__.How("default", anew=True)
    assert anew.folder(replace(cell, profile="default")) == runs_dir("default")


def test_make_trains_every_arm_of_the_language_model_first():
    makefile = (PROJECT / "Makefile").read_text(encoding="utf-8")
    listed = re.search(r"^TRAINED .*?\n +(.*?)\)\)$", makefile, re.M | re.S)[1].split()
    made = {cell.name for cell in cells("language_model", load_profile("default"))}
    assert {f"{arm}-seed-10-reconstruction" for arm in listed} == {
        name for name in made if name.endswith("-reconstruction")
    }


def test_the_comparison_with_saelens_says_what_it_needs(monkeypatch):
    streamed = SimpleNamespace(lm=SimpleNamespace(streamed=True))
    with pytest.raises(NotEvaluable, match="SAELens's trainer reads a store"):
        parity.measure(None, "saelens", streamed, [0], "cpu")
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(ImportError, match=r"SAELens cannot be imported .*c2r-core\[saelens\]"):
        parity.trained_by_saelens(None, None, 0)


def test_a_number_of_workers_below_one_is_refused(capsys):
    with pytest.raises(SystemExit) as end:
        __main__.main(["run", "toy", "--profile", "smoke", "--workers", "0"])
    assert end.value.code == 2
    assert "--workers is 0; expected at least 1" in capsys.readouterr().err

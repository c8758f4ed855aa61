"""Reports as SAEBench's result files: by hand, and by its own classes where it is installed."""

from __future__ import annotations

import json

import pydantic
import pytest

from c2r_core.evaluate import Options, evaluate, write_report
from c2r_core.evaluate.report import Evaluated, NotEvaluated, checked_report
from c2r_core.evaluate.saebench import (
    EVALUATIONS,
    NOT_MEASURED,
    main,
    saebench_results,
    write_saebench,
)
from c2r_core.metrics import METRICS
from c2r_core.metrics.ablation import THRESHOLDS
from c2r_core.saes import BatchTopKSAE

CLASSES = {
    "core": ("core", "CoreEvalOutput"),
    "absorption": ("absorption", "AbsorptionEvalOutput"),
    "sparse_probing": ("sparse_probing", "SparseProbingEvalOutput"),
    "scr": ("scr_and_tpp", "ScrEvalOutput"),
    "tpp": ("scr_and_tpp", "TppEvalOutput"),
}
TPP = ("total_metric", "intended_diff_only", "unintended_diff_only")

LETTERS = [
    {
        "first_letter": "a",
        "mean_absorption_fraction": 0.25,
        "full_absorption_rate": 0.125,
        "num_full_absorption": 2.6,
        "num_probe_true_positives": 20.8,
        "num_split_features": 1.4,
        "num_splits": 5,
    },
    {"first_letter": "b", "not_evaluable": "too few words"},
]
VALUES = {
    "absorption": {
        "mean_absorption_fraction_score": 0.25,
        "mean_full_absorption_score": 0.125,
        "mean_num_split_features": 1.4,
        "std_dev_absorption_fraction_score": None,
        "std_dev_full_absorption_score": None,
        "std_dev_num_split_features": None,
        "split_sd_absorption_fraction_score": 0.1,
        "split_sd_full_absorption_score": 0.1,
        "absorption_fraction_interval": (0.1, 0.3),
        "full_absorption_interval": (0.1, 0.2),
        "num_letters": 1,
        "num_good_probes": 1.0,
        "num_words": 300,
        "letters": LETTERS,
        "splits": [],
    },
    "sparse_probing": {
        "llm_test_accuracy": 0.9,
        "sae_test_accuracy": 0.8,
        "sae_top_1_test_accuracy": 0.6,
        "sae_top_2_test_accuracy": 0.65,
        "sae_top_5_test_accuracy": 0.7,
        "num_tasks": 1,
        "tasks": [
            {"task": "war", "top_k": {"1": 0.6, "2": 0.65, "5": 0.7}, "sae": 0.8, "model": 0.9},
            {"task": "peace", "not_evaluable": "too few passages"},
        ],
    },
    "scr": {f"scr_metric_threshold_{n}": n / 100 for n in THRESHOLDS}
    | {"num_pairs": 1, "pairs": []},
    "tpp": {f"tpp_threshold_{n}_{what}": n / 100 for n in THRESHOLDS for what in TPP}
    | {"accuracy": {}, "classes_not_evaluable": {}},
}


@pytest.fixture(scope="module")
def report(random_model, few_documents):
    """Core as measured, the others by hand: a random model knows no letter and no topic."""
    sae = BatchTopKSAE(64, 96, k=8, seed=1)
    measured = evaluate(
        sae, model=random_model, corpus=few_documents, metrics="core", options=Options("smoke")
    )
    by_hand = {name: {"values": values, "status": "evaluated"} for name, values in VALUES.items()}
    content = {name: getattr(measured, name) for name in vars(measured)}
    return checked_report(content | {"metrics": measured.metrics | by_hand})


def test_numbers_of_the_same_formula_have_their_place(report):
    core = saebench_results(report, "mine")["core"]
    numbers = {k: v for part in core["eval_result_metrics"].values() for k, v in part.items()}
    fields = {
        "reconstruction": ("l0", "l2_ratio", "cossim", "frac_alive", "freq_over_1_percent"),
        "model_preservation": ("ce_loss_with_sae", "ce_loss_without_sae", "kl_div_with_sae"),
        "decoder": ("average_max_decoder_cosine_sim",),
    }
    for metric, names in fields.items():
        for name in names:
            assert numbers[name] == getattr(report[metric], name), name
    # Contexts of so many tokens went through the model; the first of each is predicted from nothing.
    size = report.settings.context_size
    n_contexts = report["model_preservation"].n_predicted_tokens / (size - 1)
    assert numbers["total_tokens_eval_reconstruction"] == n_contexts * size
    assert core["eval_config"]["dataset"] == "few"
    assert core["sae_cfg_dict"]["d_sae"] == 96
    assert core["sae_cfg_dict"]["architecture"] == "batch_topk"


def test_what_differs_or_is_missing_is_marked_and_listed(report):
    core = saebench_results(report, "mine")["core"]
    missing = core["eval_result_unstructured"]["not_measured"]
    for place in missing:
        category, name = place.split(".")
        assert core["eval_result_metrics"][category][name] == NOT_MEASURED
    assert "reconstruction_quality.explained_variance" in missing
    assert "misc_metrics.average_max_encoder_cosine_sim" in missing
    assert core["eval_result_unstructured"]["fvu"] == report["reconstruction"].fvu
    metrics = core["eval_result_metrics"]
    marked = sum(value == NOT_MEASURED for part in metrics.values() for value in part.values())
    assert marked == len(missing)


def test_letters_and_tasks_with_a_score_are_details(report):
    results = saebench_results(report, "mine")
    (letter,) = results["absorption"]["eval_result_details"]
    assert letter["first_letter"] == "a" and letter["mean_absorption_fraction"] == 0.25
    assert letter["num_full_absorption"] == 3 and letter["num_split_features"] == 1
    assert (
        "mean.std_dev_full_absorption_score"
        in (results["absorption"]["eval_result_unstructured"]["not_measured"])
    )
    (task,) = results["sparse_probing"]["eval_result_details"]
    assert task["dataset_name"] == "war" and task["sae_top_5_test_accuracy"] == 0.7
    assert (
        results["tpp"]["eval_result_metrics"]["tpp_metrics"]["tpp_threshold_20_total_metric"] == 0.2
    )


def test_an_evaluation_needs_all_of_its_metrics(report):
    fewer = {n: r for n, r in report.metrics.items() if n in ("reconstruction", "scr")}
    fewer["absorption"] = NotEvaluated("None of the 26 letters")
    part = checked_report({**vars(report), "metrics": fewer})
    assert saebench_results(part, "mine").keys() == {"scr"}
    nothing = checked_report({**vars(report), "metrics": {"absorption": fewer["absorption"]}})
    with pytest.raises(ValueError, match="holds absorption; SAEBench's evaluations need"):
        saebench_results(nothing, "mine")


def test_every_number_of_a_category_is_one_of_the_report_s(report):
    """No name of SAEBench is filled with a number of another name, but for the two counts of tokens."""
    counts = {"total_tokens_eval_reconstruction", "total_tokens_eval_sparsity_variance"}
    for folder, result in saebench_results(report, "mine").items():
        own = {}
        for metric in EVALUATIONS[folder][1]:
            assert isinstance(report.metrics[metric], Evaluated) and metric in METRICS
            own |= vars(report[metric])
        for numbers in result["eval_result_metrics"].values():
            for name, value in numbers.items():
                assert name in counts or value in (NOT_MEASURED, own.get(name)), name


@pytest.mark.parametrize("folder", EVALUATIONS)
def test_sae_bench_s_own_classes_take_it(report, folder, tmp_path):
    """`pip install --no-deps sae-bench`: its classes need pydantic alone; all of it needs an older numpy."""
    module, name = CLASSES[folder]
    module = f"sae_bench.evals.{module}.eval_output"
    output = pytest.importorskip(module, reason="sae-bench is not installed")
    write_saebench(report, tmp_path, "mine")
    content = (tmp_path / folder / "mine_custom_sae_eval_results.json").read_bytes()
    adapter = pydantic.TypeAdapter(getattr(output, name))
    read = adapter.validate_json(content, extra="forbid")
    written, again = json.loads(content), json.loads(adapter.dump_json(read))
    for category, numbers in written["eval_result_metrics"].items():
        assert again["eval_result_metrics"][category].items() >= numbers.items()
    wrong = written
    wrong["eval_result_metrics"].popitem()
    with pytest.raises(pydantic.ValidationError):
        adapter.validate_python(wrong)


def test_the_command_replaces_the_files_of_no_other_report(report, tmp_path, capsys):
    write_report(report, tmp_path / "mine.json")
    assert main([str(tmp_path / "mine.json"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out.split()
    assert {path.split("/")[-2] for path in said} == EVALUATIONS.keys()
    assert all(path.endswith("/mine_custom_sae_eval_results.json") for path in said)
    assert main([str(tmp_path / "mine.json"), "--out", str(tmp_path / "out")]) == 0
    other = checked_report({**vars(report), "settings": vars(report.settings) | {"seed": 9}})
    write_report(other, tmp_path / "mine.json")
    assert main([str(tmp_path / "mine.json"), "--out", str(tmp_path / "out")]) == 2
    assert "of another report; take another name" in capsys.readouterr().err
    assert main([str(tmp_path / "none.json"), "--out", str(tmp_path / "out")]) == 2
    assert main([str(tmp_path / "mine.json"), "--out", str(tmp_path), "--name", "a/b"]) == 2

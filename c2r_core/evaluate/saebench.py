"""Reports as result files of SAEBench 0.6.0: `c2r saebench REPORT.json --out FOLDER`.

Written are its evaluations core, absorption_first_letter, sparse_probing, scr and tpp. Each is a file of the
name and the schema that its own scripts write, so its tables and plots read them beside others.

A number goes under SAEBench's name only where its formula is the same. What SAEBench requires and is not
measured here by its formula is `NOT_MEASURED`, and is listed in `eval_result_unstructured.not_measured`.
Beside it, `differences` says what is done otherwise. A comparison with published numbers holds as far as
that, the model and the text allow. RAVEL and AutoInterp are left out: their protocols are other ones.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from c2r_core.artefacts.results import write_json
from c2r_core.evaluate.report import Evaluated, Report, read_report

CUSTOM = "custom_sae"
"""SAEBench's id of an SAE that is no release of SAELens."""
NOT_MEASURED = -1.0
"""What SAEBench itself writes into core results in the place of a NaN."""


def saebench_results(report: Report, name: str) -> dict[str, dict[str, Any]]:
    """One result for each of SAEBench's evaluations that the report covers, by its folder's name there.

    They hold JSON's own types. `datetime_epoch_millis` is the present, and `eval_id` follows from the report:
    the same report has the same.

    Parameters
    ----------
    report : Report
        As `evaluate` returns it or `read_report` reads it.
    name : str
        By which the SAE is known in tables and plots: the release of a custom SAE.

    Raises
    ------
    ValueError
        If the report holds none of the metrics that SAEBench has too.
    """
    measured = {
        name: asdict(record.values)
        for name, record in report.metrics.items()
        if isinstance(record, Evaluated) and not isinstance(record.values, Mapping)
    }
    results = {}
    for folder, (eval_type, needs, convert) in EVALUATIONS.items():
        if set(needs) <= measured.keys():
            parts = convert(report, *(measured[name] for name in needs))
            results[folder] = {"eval_type_id": eval_type} | parts | _about(report, name)
            _mark_what_is_not_measured(results[folder])
    if not results:
        expected = "; ".join(" and ".join(needs) for _, needs, _ in EVALUATIONS.values())
        raise ValueError(
            f"The report holds {', '.join(report.metrics) or 'no metrics'}; SAEBench's evaluations need "
            f"one of these, measured: {expected}."
        )
    return results


def write_saebench(report: Report, folder: str | Path, name: str) -> list[Path]:
    """Write the results where SAEBench looks for them: FOLDER/EVALUATION/NAME_custom_sae_eval_results.json.

    Parameters
    ----------
    report : Report
    folder : path
        SAEBench's `eval_results`, or one of its own.
    name : str
        As in `saebench_results`.

    Raises
    ------
    FileExistsError
        If there is a result of this name that is not of this report. Nothing is written then.
    ValueError
        As `saebench_results` does; or if the name is no file's.
    """
    if not name or "/" in name or "\\" in name:
        raise ValueError(f"The name is {name!r}; expected one without a slash, such as 'my_c2r'.")
    results = saebench_results(report, name)
    files = {e: Path(folder) / e / f"{name}_{CUSTOM}_eval_results.json" for e in results}
    for evaluation, file in files.items():
        if file.exists() and _id_in(file) != results[evaluation]["eval_id"]:
            raise FileExistsError(f"{file} is there already, of another report; take another name.")
    for evaluation, file in files.items():
        write_json(file, results[evaluation])
    return list(files.values())


# -- one evaluation each: its config, its metrics by category, its details, and what differs ---------------


def _core(
    report: Report, reconstruction: dict, preservation: dict, decoder: dict
) -> dict[str, Any]:
    context_size, n_predicted = report.settings.context_size, preservation["n_predicted_tokens"]
    frequencies = (
        "freq_over_1_percent",
        "freq_over_10_percent",
        "normalized_freq_over_1_percent",
        "normalized_freq_over_10_percent",
        "frac_alive",
    )
    categories = {
        "model_behavior_preservation": _take(
            preservation, "kl_div_score", "kl_div_with_ablation", "kl_div_with_sae"
        ),
        "model_performance_preservation": _take(
            preservation,
            "ce_loss_score",
            "ce_loss_with_ablation",
            "ce_loss_with_sae",
            "ce_loss_without_sae",
        ),
        "reconstruction_quality": _take(reconstruction, "cossim")
        | dict.fromkeys(("explained_variance", "explained_variance_legacy", "mse")),
        "shrinkage": _take(reconstruction, "l2_ratio", "relative_reconstruction_bias")
        | dict.fromkeys(("l2_norm_in", "l2_norm_out")),
        "sparsity": _take(reconstruction, "l0") | {"l1": None},
        "token_stats": {
            # A context of T tokens has T − 1 predictions; SAEBench counts its tokens.
            "total_tokens_eval_reconstruction": n_predicted // (context_size - 1) * context_size,
            "total_tokens_eval_sparsity_variance": reconstruction[
                "total_tokens_eval_reconstruction"
            ],
        },
        "misc_metrics": _take(reconstruction, *frequencies)
        | _take(decoder, "average_max_decoder_cosine_sim")
        | {"average_max_encoder_cosine_sim": None},
    }
    computed = ("kl", "ce_loss", "l2_norms", "sparsity_metrics", "variance_metrics")
    config = {"dataset": report.text.corpus, "context_size": context_size}
    config |= {f"compute_{name}": True for name in computed}
    return {
        "eval_config": config | _model(report),
        "eval_result_metrics": categories,
        "eval_result_unstructured": {
            "fvu": reconstruction["fvu"],
            "differences": [
                "The first token of each context, and tokens whose norm is over "
                f"{report.settings.drop_norm_ratio:g} medians, do not count in reconstruction and sparsity, "
                "and keep their activation where the model's loss is measured.",
                "explained_variance is left out: SAEBench 0.6.0 takes the variance about zero, so 1 − fvu is "
                "another number.",
                "relative_reconstruction_bias is the ratio of means over all tokens, not the mean of ratios "
                "over batches.",
            ],
        },
    }


def _absorption(report: Report, absorption: dict) -> dict[str, Any]:
    scores = ("absorption_fraction_score", "full_absorption_score", "num_split_features")
    names = [f"{kind}_{score}" for kind in ("mean", "std_dev") for score in scores]
    details = [
        _take(row, "first_letter", "mean_absorption_fraction", "full_absorption_rate")
        | {
            name: round(row[name])
            for name in ("num_full_absorption", "num_probe_true_positives", "num_split_features")
        }
        for row in absorption["letters"]
        if row["not_evaluable"] is None
    ]
    return {
        # 1: letters are scored however few have a good probe.
        "eval_config": {"random_seed": report.settings.seed, "min_feats_for_eval": 1}
        | _model(report),
        "eval_result_metrics": {"mean": _take(absorption, *names)},
        "eval_result_details": details,
        "eval_result_unstructured": _take(absorption, "num_good_probes", "num_words")
        | {
            "differences": [
                f"Scores are means over {len(absorption['splits'])} splits of the words into training and "
                "test words; SAEBench has one. Counts of a letter are means too, rounded.",
                "Probes and selector take at least 500 steps, however few the words.",
                "All words share one prompt of four examples; SAEBench draws ten anew for each word.",
                "Probes start at zero, and decoder rows are taken at norm 1.",
            ]
        },
    }


def _sparse_probing(report: Report, probing: dict) -> dict[str, Any]:
    top = [name for name in probing if name.startswith("sae_top_")]
    return {
        "eval_config": {"random_seed": report.settings.seed} | _model(report),
        "eval_result_metrics": {
            "llm": _take(probing, "llm_test_accuracy"),
            "sae": _take(probing, "sae_test_accuracy", *top),
        },
        "eval_result_details": [
            {
                "dataset_name": task["task"],
                "llm_test_accuracy": task["model"],
                "sae_test_accuracy": task["sae"],
                **{f"sae_top_{k}_test_accuracy": value for k, value in task["top_k"].items()},
            }
            for task in probing["tasks"]
            if task["not_evaluable"] is None
        ],
        "eval_result_unstructured": {
            "differences": [
                "The tasks are labels of passages of the held-out documents, not SAEBench's data sets.",
                "Inputs are standardised, and probes with many inputs choose their penalty.",
            ]
        },
    }


def _ablation(kind: str) -> Callable[[Report, dict], dict[str, Any]]:
    def convert(report: Report, found: dict) -> dict[str, Any]:
        scores = {name: value for name, value in found.items() if name.startswith(f"{kind}_")}
        return {
            "eval_config": {
                "random_seed": report.settings.seed,
                "perform_scr": kind == "scr",
            }
            | _model(report),
            "eval_result_metrics": {f"{kind}_metrics": scores},
            "eval_result_unstructured": {
                "differences": [
                    "The classes are labels of passages of the held-out documents, not SAEBench's data sets."
                ]
            },
        }

    return convert


EVALUATIONS = {
    "core": ("core", ("reconstruction", "model_preservation", "decoder"), _core),
    "absorption": ("absorption_first_letter", ("absorption",), _absorption),
    "sparse_probing": ("sparse_probing", ("sparse_probing",), _sparse_probing),
    "scr": ("scr", ("scr",), _ablation("scr")),
    "tpp": ("tpp", ("tpp",), _ablation("tpp")),
}
"""By folder: SAEBench's id of the evaluation, the metrics that it takes, and how."""


# -- common parts -----------------------------------------------------------------------------------------


def _take(values: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: values[name] for name in names}


def _model(report: Report) -> dict[str, str]:
    return {"model_name": report.model.name, "llm_dtype": report.settings.precision}


def _about(report: Report, name: str) -> dict[str, Any]:
    """What SAEBench says of every result, whatever was measured."""
    sae = report.sae
    content = json.dumps(asdict(report), sort_keys=True, default=str)
    return {
        "eval_id": str(uuid.uuid5(uuid.NAMESPACE_OID, content)),
        "datetime_epoch_millis": int(time.time() * 1000),
        "sae_bench_commit_hash": f"not SAEBench's code: c2r-core {report.provenance['package_version']}",
        "sae_lens_id": CUSTOM,
        "sae_lens_release_id": name,
        "sae_lens_version": None,
        "sae_cfg_dict": sae.stated
        | _take(vars(sae), "architecture", "d_in", "d_sae")
        | {"model_name": report.model.name, "hook_name": report.model.hook_name},
    }


def _mark_what_is_not_measured(result: dict[str, Any]) -> None:
    """None is no number for SAEBench."""
    missing = []
    for category, numbers in result["eval_result_metrics"].items():
        for name, value in numbers.items():
            if value is None:
                numbers[name] = NOT_MEASURED
                missing.append(f"{category}.{name}")
    result["eval_result_unstructured"]["not_measured"] = missing


def _id_in(file: Path) -> str | None:
    try:
        return json.loads(file.read_text(encoding="utf-8")).get("eval_id")
    except (ValueError, AttributeError):
        return None


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 2 if nothing was written."""
    parser = argparse.ArgumentParser(
        prog="c2r saebench",
        description="Write a report of `c2r evaluate` as result files of SAEBench 0.6.0.",
    )
    parser.add_argument("report", metavar="REPORT.json")
    parser.add_argument("--out", required=True, metavar="FOLDER", help="its eval_results")
    parser.add_argument("--name", help="the SAE's name there; default: that of the report's file")
    given = parser.parse_args(arguments)
    try:
        report = read_report(given.report)
        files = write_saebench(report, given.out, given.name or Path(given.report).stem)
    except (ValueError, OSError) as error:
        print(f"Nothing written: {error}", file=sys.stderr)
        return 2
    print("\n".join(map(str, files)))
    return 0


if __name__ == "__main__":
    sys.exit(main())

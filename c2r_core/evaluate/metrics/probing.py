"""What latents say of passages, and what taking them out takes away: sparse probing, SCR, TPP."""

from __future__ import annotations

from pydantic import create_model

from c2r_core.artefacts.results import plain
from c2r_core.evaluate.report import Section, section_of
from c2r_core.metrics.ablation import THRESHOLDS, SpuriousPair, measure_scr, measure_tpp
from c2r_core.metrics.inputs import Bench
from c2r_core.metrics.probing import KS, ProbedTask, probe_sparsely

WHEN_AND_WHO = ("century", "party", "spoken")
"""Labels of a whole document, which go with topics by chance: the spurious ones of SCR."""

SparseProbing = create_model(
    "SparseProbing",
    __base__=Section,
    __doc__="Test accuracy on labelled passages of held-out documents; chance is 0.5.",
    llm_test_accuracy=(float, ...),
    sae_test_accuracy=(float, ...),
    **{f"sae_top_{k}_test_accuracy": (float, ...) for k in KS},
    num_tasks=(int, ...),
    tasks=(list[section_of(ProbedTask)], ...),
)

SCR = create_model(
    "SCR",
    __base__=Section,
    __doc__="Spurious correlation removal with n latents taken out: 0 nothing, 1 all of the bias.",
    **{f"scr_metric_threshold_{n}": (float, ...) for n in THRESHOLDS},
    num_pairs=(int, ...),
    pairs=(list[section_of(SpuriousPair)], ...),
)

TPP = create_model(
    "TPP",
    __base__=Section,
    __doc__="Targeted probe perturbation over topics, with n latents of a topic taken out.",
    **{
        f"tpp_threshold_{n}_{part}": (float, ...)
        for n in THRESHOLDS
        for part in ("total_metric", "intended_diff_only", "unintended_diff_only")
    },
    classes=(list[str], ...),
    classes_not_evaluable=(dict[str, str], ...),
)


def measure_sparse_probing(bench: Bench) -> SparseProbing:
    """How much of each label one, two or five latents tell."""
    report = probe_sparsely(bench.pooled, bench.labels, seed=bench.seed)
    if report.n_evaluated == 0:
        raise ValueError(_none_of("labels", [task.not_evaluable for task in report.tasks]))
    return SparseProbing(
        llm_test_accuracy=report.mean_model,
        sae_test_accuracy=report.mean_sae,
        **{f"sae_top_{k}_test_accuracy": report.mean_top_k[str(k)] for k in KS},
        num_tasks=report.n_evaluated,
        tasks=plain(report.tasks),
    )


def measure_spurious_correlation_removal(bench: Bench) -> SCR:
    """Pairs of a topic and a label of the whole document, each in both roles."""
    topics = [name for name in bench.labels if name.startswith("topic")]
    pairs = [(t, d) for t in topics for d in WHEN_AND_WHO if d in bench.labels]
    if not pairs:
        raise ValueError(
            f"The documents of {bench.documents.corpus.name!r} have no label of who or when that could "
            "go with a topic by chance; those of the corpus sotu have."
        )
    report = measure_scr(bench.pooled, bench.labels, pairs, seed=bench.seed)
    if report.n_evaluated == 0:
        raise ValueError(_none_of("pairs", [pair.not_evaluable for pair in report.pairs]))
    return SCR(
        **{f"scr_metric_threshold_{n}": report.mean_scr[str(n)] for n in THRESHOLDS},
        num_pairs=report.n_evaluated,
        pairs=plain(report.pairs),
    )


def measure_targeted_perturbation(bench: Bench) -> TPP:
    """Topics, one probe each."""
    topics = {name: of for name, of in bench.labels.items() if name.startswith("topic")}
    report = measure_tpp(bench.pooled, topics, seed=bench.seed)
    values = {}
    for n in map(str, THRESHOLDS):
        values[f"tpp_threshold_{n}_total_metric"] = report.tpp[n]
        values[f"tpp_threshold_{n}_intended_diff_only"] = report.intended[n]
        values[f"tpp_threshold_{n}_unintended_diff_only"] = report.unintended[n]
    return TPP(**values, classes=report.classes, classes_not_evaluable=report.not_evaluable)


def _none_of(what: str, reasons: list[str]) -> str:
    return f"None of the {len(reasons)} {what} could be measured; for example: {reasons[0]}."

"""What is measured: a file for each group, one function and one line of METRICS for each metric.

A metric reads the bench and returns values, or raises a ValueError that says why this SAE, model or
corpus does not allow it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from c2r_core.artefacts.names import unknown_name
from c2r_core.evaluate.metrics import (
    absorption,
    consistency,
    core,
    interpretation,
    probing,
    ravel,
    use,
)
from c2r_core.evaluate.report import Section
from c2r_core.metrics.inputs import Bench


@dataclass(frozen=True)
class Metric:
    """A metric: the group it is asked for by, how it is measured, what that gives.

    What it `needs` is an argument of `evaluate` without which it is only measured where asked for.
    """

    group: str
    measure: Callable[[Bench], Section]
    values: type[Section]
    reads_model: bool = True
    needs: str | None = None


METRICS: dict[str, Metric] = {
    "reconstruction": Metric("core", core.measure_reconstruction, core.Reconstruction),
    "model_preservation": Metric("core", core.measure_model_preservation, core.ModelPreservation),
    "decoder": Metric("core", core.measure_decoder, core.Decoder, reads_model=False),
    "live_decoder": Metric("core", core.measure_live_decoder, core.Decoder),
    "absorption": Metric(
        "absorption", absorption.measure_absorption, absorption.AbsorptionFirstLetter
    ),
    "assignment_consistency": Metric(
        "consistency",
        consistency.measure_assignment_consistency,
        consistency.AssignmentConsistency,
    ),
    "agreement": Metric(
        "agreement", consistency.measure_agreement, consistency.Agreement, needs="against"
    ),
    "sparse_probing": Metric("probing", probing.measure_sparse_probing, probing.SparseProbing),
    "scr": Metric("scr", probing.measure_spurious_correlation_removal, probing.SCR),
    "tpp": Metric("tpp", probing.measure_targeted_perturbation, probing.TPP),
    "detection": Metric(
        "detection", interpretation.measure_detection_score, interpretation.Detection
    ),
    "autointerp": Metric(
        "autointerp",
        interpretation.measure_auto_interpretation,
        interpretation.AutoInterp,
        needs="endpoint",
    ),
    "meta_sae": Metric(
        "meta_sae", interpretation.measure_composition, interpretation.MetaSAE, reads_model=False
    ),
    "ravel": Metric("ravel", ravel.measure_attribute_swaps, ravel.Ravel),
    "use": Metric("use", use.measure_use_of_latents, use.Use),
}

GROUPS = tuple(dict.fromkeys(metric.group for metric in METRICS.values()))


def standard_metrics(given: Iterable[str] = ()) -> tuple[str, ...]:
    """All metrics whose needs are among the arguments given."""
    given = {None, *given}
    return tuple(name for name, metric in METRICS.items() if metric.needs in given)


def chosen_metrics(names: Iterable[str]) -> list[str]:
    """The metrics that names of groups or of single metrics stand for, in the order of METRICS.

    Raises
    ------
    ValueError
        If a name is unknown, or there is none.
    """
    names = list(names)
    known = list(dict.fromkeys([*GROUPS, *METRICS]))
    for name in names:
        if name not in known:
            raise ValueError(unknown_name("metric", name, known))
    if not names:
        raise ValueError(f"No metric was asked for; known are {', '.join(known)}.")
    return [name for name, metric in METRICS.items() if {name, metric.group} & set(names)]

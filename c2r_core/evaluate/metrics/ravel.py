"""RAVEL: one attribute of an entity swapped, the others kept."""

from __future__ import annotations

from c2r_core.artefacts.results import plain
from c2r_core.evaluate.report import Section, section_of
from c2r_core.metrics.inputs import Bench
from c2r_core.metrics.ravel import (
    AttributeSwap,
    entity_task,
    load_ravel,
    measure_ravel,
    offline_cities,
)


class Ravel(Section):
    """Means over attributes. Doing nothing has a cause of 0 and an isolation of 1, so a disentanglement
    of ½. Entities are not from the held-out documents; no SAE was trained on these prompts."""

    disentanglement_score: float
    cause_score: float
    isolation_score: float
    whole_activation_cause_score: float
    """With the whole activation swapped: how much there is to cause."""
    whole_activation_isolation_score: float
    attributes: list[section_of(AttributeSwap)]
    attributes_not_evaluable: dict[str, str]


def measure_attribute_swaps(bench: Bench) -> Ravel:
    """RAVEL's own data where a folder is given, cities with three attributes otherwise."""
    try:
        entities = offline_cities() if bench.ravel is None else load_ravel(bench.ravel)
    except OSError as error:
        raise ValueError(str(error)) from error  # concerns this metric alone
    task = entity_task(
        bench.language_model, entities, bench.lm.hook_name, precision=bench.precision
    )
    report = measure_ravel(bench.sae, task, seed=bench.seed)
    return Ravel(
        disentanglement_score=report.mean_disentanglement,
        cause_score=report.mean_cause,
        isolation_score=report.mean_isolation,
        whole_activation_cause_score=report.mean_whole_cause,
        whole_activation_isolation_score=report.mean_whole_isolation,
        attributes=plain(report.attributes),
        attributes_not_evaluable=report.not_evaluable,
    )

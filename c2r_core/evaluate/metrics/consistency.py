"""Consistency: between samples, inside one SAE, and between two SAEs."""

from __future__ import annotations

from c2r_core.artefacts.results import plain
from c2r_core.evaluate.report import section_of
from c2r_core.metrics.agreement import BetweenRunsReport, compare_runs
from c2r_core.metrics.assignment import AssignmentReport, letter_assignment
from c2r_core.metrics.inputs import CHUNK, Bench

AssignmentConsistency = section_of(AssignmentReport)
Agreement = section_of(BetweenRunsReport)
N_DRAWS = 2  # random dictionaries for each baseline of the agreement


def measure_assignment_consistency(bench: Bench) -> AssignmentConsistency:
    """Is a first letter carried by one latent? On words of the held-out documents, with its guards."""
    task, probes = bench.letters
    report = letter_assignment(bench.sae, task, probes, seed=bench.seed)
    if report.n_evaluated == 0:
        reasons = {row.not_evaluable for row in report.concepts}
        raise ValueError(
            f"None of the {len(report.concepts)} letters could be measured on {len(task.words)} words; "
            f"for example: {min(reasons)}."
        )
    return AssignmentConsistency(**plain(report))


def measure_agreement(bench: Bench) -> Agreement:
    """Latent by latent against another SAE, on held-out tokens: PW-MCC, shared share, correlations."""
    if bench.against is None:
        raise ValueError(
            "There is no other SAE to compare with: name its folder with --against, or give "
            "evaluate(..., against=...)."
        )
    chunks = bench.activations.chunks(CHUNK)
    report = compare_runs(bench.sae, bench.against, chunks, seed=bench.seed, n_draws=N_DRAWS)
    return Agreement(**plain(report))

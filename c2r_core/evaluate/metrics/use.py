"""Use: what a latent is worth to someone who steers or erases with it."""

from __future__ import annotations

from c2r_core.artefacts.results import plain
from c2r_core.evaluate.report import Section, section_of
from c2r_core.metrics.inputs import Bench
from c2r_core.metrics.use import (
    UseReport,
    letter_use_task,
    measure_use,
    measure_use_of_means,
)

OneHandle = section_of(UseReport)


class Use(Section):
    """First letters, erased and steered with one latent each; words of the held-out documents."""

    sae: OneHandle
    """Of the latent that was picked on the other half of the words."""
    difference_of_means: OneHandle
    """Of a direction without an SAE, on the same words: the reference."""


def measure_use_of_latents(bench: Bench) -> Use:
    """Pick each letter's latent on one half of the words, erase and steer with it on the other."""
    words, _ = bench.letters
    task = letter_use_task(bench.language_model, words, precision=bench.precision, seed=bench.seed)
    report = measure_use(bench.sae, task, seed=bench.seed)
    if report.n_evaluated == 0:
        reasons = {row.not_evaluable for row in report.concepts}
        raise ValueError(
            f"None of the {len(report.concepts)} letters could be used; for example: {min(reasons)}."
        )
    reference = measure_use_of_means(task, seed=bench.seed)
    return Use(sae=OneHandle(**plain(report)), difference_of_means=OneHandle(**plain(reference)))

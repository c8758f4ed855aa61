"""First-letter splitting and absorption."""

from __future__ import annotations

from c2r_core.evaluate.report import Section
from c2r_core.metrics.absorption import FirstLetterReport, LetterRow, evaluate_first_letter
from c2r_core.metrics.inputs import Bench


class Letter(Section):
    """One letter; null stands for what could not be measured."""

    first_letter: str
    mean_absorption_fraction: float | None
    full_absorption_rate: float | None
    num_full_absorption: int | None
    num_probe_true_positives: int | None
    """Test words of the letter that its probe recognises; the means are over them."""
    num_split_features: int | None
    split_features: list[int] | None
    """The letter's own latents, best first."""
    probe_f1: float | None
    """Of the probe on the model's activations, on test words."""
    not_evaluable: str | None
    """The reason, where there is no score."""


class AbsorptionFirstLetter(Section):
    """First-letter splitting and absorption, with SAEBench's constants.

    Means and standard deviations (n − 1) over the letters that could be measured. All words share one
    prompt of four examples; SAEBench draws ten anew for each word.
    """

    mean_absorption_fraction_score: float
    mean_full_absorption_score: float
    mean_num_split_features: float
    std_dev_absorption_fraction_score: float | None
    """Null with a single letter."""
    std_dev_full_absorption_score: float | None
    std_dev_num_split_features: float | None
    num_letters: int
    """Letters with a score."""
    num_good_probes: int
    """Letters that the model itself tells (probe F1 above 0.6); SAEBench reports nothing below 20."""
    num_words: int
    """The most frequent words of the held-out documents; the notebooks take those of all documents."""
    letters: list[Letter]


def measure_absorption(bench: Bench) -> AbsorptionFirstLetter:
    """Splitting and absorption of first letters, on words of the held-out documents."""
    task, probes = bench.letters
    report = evaluate_first_letter(bench.sae, task, probes, seed=bench.seed)
    if report.n_evaluated == 0:
        raise ValueError(_why_no_letter(report, len(task.words)))
    return AbsorptionFirstLetter(
        mean_absorption_fraction_score=report.mean_absorption_fraction,
        mean_full_absorption_score=report.mean_full_absorption,
        mean_num_split_features=report.mean_split_size,
        std_dev_absorption_fraction_score=report.sd_absorption_fraction,
        std_dev_full_absorption_score=report.sd_full_absorption,
        std_dev_num_split_features=report.sd_split_size,
        num_letters=report.n_evaluated,
        num_good_probes=report.n_good_probes,
        num_words=len(task.words),
        letters=[_letter(row) for row in report.letters],
    )


def _letter(row: LetterRow) -> Letter:
    measured = row.not_evaluable is None
    return Letter(
        first_letter=row.letter,
        mean_absorption_fraction=row.absorption_fraction,
        full_absorption_rate=row.full_absorption,
        num_full_absorption=round(row.full_absorption * row.n_true_positives) if measured else None,
        num_probe_true_positives=row.n_true_positives,
        num_split_features=row.split_size,
        split_features=row.split_latents,
        probe_f1=row.probe_f1,
        not_evaluable=row.not_evaluable,
    )


def _why_no_letter(report: FirstLetterReport, n_words: int) -> str:
    too_few = sum(row.probe_f1 is None for row in report.letters)
    unknown_to_sae = report.n_good_probes
    weak = len(report.letters) - too_few - unknown_to_sae
    return (
        f"None of the {len(report.letters)} letters could be measured on {n_words} words: {too_few} "
        f"begin too few of them, {weak} are not told by a probe on the model itself, and for "
        f"{unknown_to_sae} the SAE has no latent."
    )

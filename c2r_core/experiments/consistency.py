"""How consistent the trained SAEs are: between samples inside one, and between runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict
from statistics import fmean
from typing import TYPE_CHECKING

from c2r_core.artefacts.profiles import LanguageModelProfile, ToyProfile
from c2r_core.data.store import ActivationStore
from c2r_core.data.text import SPLIT_SEED, load_corpus, split_documents
from c2r_core.experiments.language_model import stored
from c2r_core.experiments.synthetic import ToyRuns, feature_tree
from c2r_core.experiments.toy import evaluation_sample
from c2r_core.metrics.agreement import BetweenRunsReport, compare_runs
from c2r_core.metrics.assignment import AssignmentReport, toy_assignment
from c2r_core.metrics.use import UseReport
from c2r_core.statistics import Interval, paired_interval

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge

CHUNK = 8192


def toy_consistency(toy: ToyProfile, runs: ToyRuns) -> pd.DataFrame:
    """One row per run: assignment consistency of the parents, with its guards, means over parents."""
    import pandas as pd

    tree, sample = feature_tree(toy), evaluation_sample(toy)
    rows = []
    for (arm, seed), sae in runs.items():
        parents = toy_assignment(sae, tree, sample).concepts[: toy.n_parents]
        rows.append(
            {"arm": arm, "seed": seed}
            | {
                name: _mean(getattr(row, name) for row in parents)
                for name in (
                    "consistency",
                    "exception_rate",
                    "precision",
                    "recall",
                    "f1",
                    "shuffled_consistency",
                    "baseline_consistency",
                )
            }
        )
    return pd.DataFrame(rows)


def toy_agreement(toy: ToyProfile, runs: ToyRuns) -> pd.DataFrame:
    """One row per arm and pair of seeds that follow each other: how far the two runs agree."""
    import pandas as pd

    x = evaluation_sample(toy).x * feature_tree(toy).norm_factor
    by_arm: dict[str, list[int]] = {}
    for arm, seed in runs:
        by_arm.setdefault(arm, []).append(seed)
    return pd.DataFrame(
        [
            {"arm": arm, "seed": first}
            | agreement_row(compare_runs(runs[arm, first], runs[arm, second], [x], n_draws=2))
            for arm, seeds in by_arm.items()
            for first, second in itertools.pairwise(seeds)
        ]
    )


def agreement_row(report: BetweenRunsReport) -> dict[str, float | None]:
    """The main numbers of live latents, flat."""
    live = report.live_latents
    return {
        "pw_mcc": live.pw_mcc if live else None,
        "random": live.random.mean if live else None,
        "random_of_same_covariance": live.random_of_same_covariance.mean if live else None,
        "shared_share": live.shared_share if live else None,
        "correlation": report.functional.mean_correlation,
    }


def paired_gain(table: pd.DataFrame, metric: str, arm: str = "C²R") -> Interval:
    """Interval of arm − baseline over the seeds; no ends with a single seed.

    Rows of `toy_agreement` that follow each other share a run, so their interval is only a guide.
    """
    wide = table.pivot(index="seed", columns="arm", values=metric)
    if len(wide) < 2:
        return Interval(float((wide[arm] - wide["baseline"]).mean()), float("nan"), float("nan"))
    return paired_interval(wide[arm], wide["baseline"])


def consistency_row(report: AssignmentReport) -> dict[str, float | int | None]:
    """The means of a report, flat."""
    return {k: v for k, v in asdict(report).items() if k.startswith("mean_")} | {
        "n_evaluated": report.n_evaluated,
        "live_latents": report.live_latents,
    }


def letter_rows(reports: Mapping[str, AssignmentReport]) -> pd.DataFrame:
    """Consistency of every evaluated letter: columns arm, letter, value, f1."""
    import pandas as pd

    rows = [
        {"arm": arm, "letter": row.concept, "value": row.consistency, "f1": row.f1}
        for arm, report in reports.items()
        for row in report.concepts
        if row.not_evaluable is None
    ]
    return pd.DataFrame(rows, columns=["arm", "letter", "value", "f1"])


def harvest_halves(
    lm: LanguageModelProfile, model: TransformerBridge, max_tokens: int, device: str = "cpu"
) -> tuple[ActivationStore, ActivationStore]:
    """Activations of two disjoint halves of the training documents, so many tokens of each."""
    training, _ = split_documents(load_corpus(lm.corpus), lm.held_out_share, seed=SPLIT_SEED)
    first, second = split_documents(training, 0.5, seed=SPLIT_SEED)
    return stored(lm, model, first, max_tokens, device), stored(
        lm, model, second, max_tokens, device
    )


def _mean(values) -> float | None:
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def use_rows(
    used: Mapping[str, UseReport], assigned: Mapping[str, AssignmentReport]
) -> pd.DataFrame:
    """Every letter that could be used: what its latent is worth, and its consistency where known."""
    import pandas as pd

    rows = []
    for arm, report in used.items():
        concepts = assigned[arm].concepts if arm in assigned else ()
        consistency = {row.concept: row.consistency for row in concepts}
        rows += [
            {
                "arm": arm,
                "letter": row.concept,
                "consistency": consistency.get(row.concept),
                **{name: getattr(row, name) for name in _USE_SCORES},
            }
            for row in report.concepts
            if row.not_evaluable is None
        ]
    columns = ["arm", "letter", "consistency", *_USE_SCORES]
    numbers = dict.fromkeys(("consistency", *_USE_SCORES), float)
    return pd.DataFrame(rows, columns=columns).astype(numbers)


_USE_SCORES = ("using_f1", "erased", "steered", "collateral")

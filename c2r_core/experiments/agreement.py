"""Study `agreement`, of notebook 12: do latents stay the same between samples, seeds and documents?

On the toys, assignment consistency of the parents and the agreement of seeds that follow each other; on the
language model, pairs of runs that share nothing with other pairs: two seeds on one half of the training
documents, and two seeds on disjoint halves.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.data.text import SPLIT_SEED, split_documents
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    arm_of,
    evaluated,
    stored,
    trained,
    training_corpus,
)
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm
from c2r_core.experiments.synthetic import trained as trained_on_toy
from c2r_core.experiments.toy import ARCHITECTURES, evaluation_sample
from c2r_core.experiments.toy import arms as toy_arms
from c2r_core.metrics.agreement import compare_saes
from c2r_core.metrics.assignment import toy_assignment
from c2r_core.metrics.rows import mean_of

PAIRS = ("seeds", "seeds and documents")
OTHER_SEED = 1000  # added to a pair's first seed; no other run has these
CONSISTENCY = ("consistency", "exception_rate", "precision", "recall", "f1")
CONSISTENCY += ("shuffled_consistency", "baseline_consistency")


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """Toy arms, then pairs of runs on the language model."""
    toy, sources = profile.toy, Sources(profile)
    study = Study("agreement", profile, training_seeds(toy.seeds, seed), device)
    made = study.cells(toy_arms(toy), measure_toy, samples=toy.evaluation_samples)
    for one in training_seeds(profile.language_model.seeds, seed):
        study = Study("agreement", profile, [one, one + OTHER_SEED], device)
        for title, arm in arms(profile, device).items():
            made += [
                study.cell(
                    f"{title}, seed {one}, {pair}",
                    measure_pair,
                    modules=["c2r_core.metrics.agreement"],
                    arm=arm,
                    pair=pair,
                    sources=sources,
                    tokens=profile.evaluation.agreement_tokens,
                )
                for pair in PAIRS
            ]
    return made


def arms(profile: Profile, device: str = "cpu") -> dict[str, LanguageModelArm]:
    """Small SAEs, trained shortly: with and without each penalty."""
    lm, steps = profile.language_model, profile.evaluation.agreement_steps
    small = {"steps": steps, "d_sae": lm.small_d_sae}
    return {
        "baseline": arm_of(lm, device, **small),
        "C²R": arm_of(lm, device, c2r_strength=lm.c2r_strength, **small),
        "OrtSAE": arm_of(lm, device, orthogonality_weight=lm.orthogonality_weight, **small),
    }


def measure_toy(
    arm: Arm, samples: int, seeds: Sequence[int], device: str
) -> dict[str, list[dict[str, Any]]]:
    """The parents' consistency by seed, and the agreement of each seed with the next."""
    tree, sample = arm.features, evaluation_sample(arm.features, samples)
    runs = trained_on_toy(arm, seeds, device)
    consistency = []
    for seed, sae in runs.items():
        parents = toy_assignment(sae, tree, sample).concepts[: tree.n_parents]
        means = {name: mean_of(parents, name) for name in CONSISTENCY}
        consistency.append({"seed": seed} | means)
    x = sample.x * tree.norm_factor
    agreement = [
        {"seed": first} | flat(asdict(compare_saes(runs[first], runs[second], [x], n_draws=2)))
        for first, second in itertools.pairwise(runs)
    ]
    return {"consistency": consistency, "agreement": agreement}


def measure_pair(
    arm: LanguageModelArm,
    pair: str,
    sources: Sources,
    tokens: int,
    seeds: Sequence[int],
    device: str,
) -> dict[str, Any]:
    """The record of the metric `agreement`, of two SAEs."""
    halves = split_documents(training_corpus(sources.lm), 0.5, seed=SPLIT_SEED)
    read = (halves[0], halves[0] if pair == PAIRS[0] else halves[1])
    sae, other = (
        trained(arm, stored(sources.lm, half, tokens, device), seed, device)
        for half, seed in zip(read, seeds, strict=True)
    )
    return evaluated(sae, ["agreement"], sources, device, against=other)["agreement"]


def flat(report: Mapping[str, Any]) -> dict[str, float | None]:
    """The main numbers of live latents in an agreement report."""
    live = report["live_latents"]
    return {
        "pw_mcc": live and live["pw_mcc"],
        "random": live and live["random"]["mean"],
        "random_of_same_covariance": live and live["random_of_same_covariance"]["mean"],
        "shared_share": live and live["shared_share"],
        "correlation": report["functional"]["mean_correlation"],
    }


def toy_table(values: Mapping[str, Any], what: str) -> pd.DataFrame:
    """Architecture, arm, seed and the numbers of "consistency" or "agreement"."""
    return pd.DataFrame(
        {"architecture": architecture, "arm": arm} | row
        for architecture in ARCHITECTURES.values()
        for arm in ("baseline", "C²R", "OrtSAE")
        for row in values[slug(f"{architecture}, {arm}")][what]
    )


def pair_table(values: Mapping[str, Any], profile: Profile, seed: int = 0) -> pd.DataFrame:
    """Arm, pair, seed and the main numbers of the language model's pairs."""
    rows = []
    for one in training_seeds(profile.language_model.seeds, seed):
        for title, pair in itertools.product(arms(profile), PAIRS):
            record = values[slug(f"{title}, seed {one}, {pair}")]
            if record["status"] == "evaluated":
                rows.append({"arm": title, "pair": pair, "seed": one} | flat(record["values"]))
    return pd.DataFrame(rows)

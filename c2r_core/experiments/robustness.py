"""Study `robustness`, of notebook 21: is assignment consistency an accident of its constants or its concepts?

The SAEs are those of study `widths`. Each is measured on first letters under other rules for what counts as a
carrier and with other numbers of samples, and under the standard rule on another family of concepts: the
endings of words. docs/design.md says what is claimed.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pandas as pd
import torch

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile
from c2r_core.experiments import front, widths
from c2r_core.experiments.language_model import Sources, of_trained
from c2r_core.experiments.replication import FEWEST, interval_text, over_seeds
from c2r_core.experiments.study import Study
from c2r_core.metrics.assignment import (
    N_SAMPLES,
    AssignmentConsistency,
    letter_assignment,
    measure_assignment,
)
from c2r_core.metrics.carriers import STANDARD_RULE, CarrierRule
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_latents import letter_acts
from c2r_core.metrics.letter_probes import GOOD_PROBE_F1, f1, fit_probes, letter_splits

RULES = tuple(
    CarrierRule(min_cosine, min_share)
    for min_cosine, min_share in itertools.product((0.0, 0.1, 0.2), (0.2, 0.4, 0.6))
)
"""The middle one is the standard."""
NUMBERS = (10, N_SAMPLES, 40)
"""Words drawn of each letter."""
ENDINGS = tuple("s ed ing ly er al ion ent nce ty ive ble ous ment".split())
"""Letters at the end of a word, whatever they stand for: "congress" ends in -s."""
MIN_STEM = 3
"""Letters that a word has in front of its ending."""


# -- what is measured ---------------------------------------------------------------------------


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE of study `widths`, under the same name."""
    del seed
    sources, made = Sources(profile), []
    for one, spec in itertools.product(widths.SEEDS, widths.specs(sources.lm)):
        study = Study("robustness", profile, [one], device)
        arm = spec.arm(sources.lm, device)
        made.append(study.cell(f"{spec.title}, seed {one}", measure, arm=arm, sources=sources))
    return made


@of_trained
def measure(inputs: Inputs) -> dict[str, Any]:
    """`rules`, of `rule_rows`; `endings` and `probe_f1`, of `ending_assignment`."""
    report, probe_f1 = ending_assignment(inputs)
    return {"rules": rule_rows(inputs), "endings": asdict(report), "probe_f1": probe_f1}


def rule_rows(inputs: Inputs) -> list[dict[str, float | None]]:
    """Mean assignment consistency of letters under each of RULES, and with each of NUMBERS.

    The keys: min_cosine, min_share, n_samples, consistency, no_carrier_share, n_evaluated.
    """
    asked = [(rule, N_SAMPLES) for rule in RULES]
    asked += [(STANDARD_RULE, n) for n in NUMBERS if n != N_SAMPLES]
    split, acts = letter_splits(inputs)[0], letter_acts(inputs)
    rows = []
    for rule, n in asked:
        # The baseline is not read, and the SAE itself is the cheapest.
        how = {
            "acts": acts,
            "seed": inputs.seed,
            "n_samples": n,
            "rule": rule,
            "baseline": inputs.sae,
        }
        report = letter_assignment(inputs.sae, *split, **how)
        found = {"consistency": report.mean_consistency}
        found |= {"no_carrier_share": report.mean_no_carrier_share}
        found |= {"n_evaluated": report.n_evaluated}
        rows.append(rule._asdict() | {"n_samples": n} | found)
    return rows


def ending_assignment(inputs: Inputs) -> tuple[AssignmentConsistency, dict[str, float]]:
    """Assignment consistency of "ends with these letters", on the test words of the first letters' task.

    A word holds an ending if it has MIN_STEM letters in front of it and the ending's probe recognises it.
    Probes are fitted as those of first letters are. Beside the report is the F1 of each on test words; one
    that is not above GOOD_PROBE_F1 gives no direction.
    """
    task = letter_splits(inputs)[0].task
    labels = word_endings(task.words)
    x, test = task.activations.numpy(), task.is_test.numpy()
    weights, biases = fit_probes(x[~test], labels[~test], weight_decay=1e-4, l1=0, seed=inputs.seed)
    recognised = x[test] @ weights + biases > 0
    scores = [f1(*of_one) for of_one in zip(recognised.T, labels[test].T, strict=True)]
    weights[:, np.array(scores) <= GOOD_PROBE_F1] = 0
    names = [f"-{ending}" for ending in ENDINGS]
    report = measure_assignment(
        inputs.sae,
        task.activations[task.is_test],
        torch.from_numpy(recognised & labels[test]),
        torch.from_numpy(weights.T.copy()),
        names=names,
        baseline=task.activations,
        seed=inputs.seed,
    )
    rows = [
        row
        if score > GOOD_PROBE_F1
        else replace(
            row, not_evaluable=f"its probe's F1, {score:.2f}, is not above {GOOD_PROBE_F1}"
        )
        for row, score in zip(report.concepts, scores, strict=True)
    ]
    return replace(report, concepts=tuple(rows)), dict(zip(names, scores, strict=True))


def word_endings(words: tuple[str, ...]) -> np.ndarray:
    """Which words have which of ENDINGS behind a stem of MIN_STEM letters: bool, (n_words, n_endings)."""
    plain = [word.strip().lower() for word in words]
    return np.array(
        [
            [word.endswith(end) and len(word) >= MIN_STEM + len(end) for end in ENDINGS]
            for word in plain
        ]
    )


# -- tables -------------------------------------------------------------------------------------

SETTING = [*STANDARD_RULE._fields, "n_samples"]
"""Columns that say how letters were measured."""
STANDARD = (*STANDARD_RULE, N_SAMPLES)
_GUARDS = ["precision", "recall", "f1", "shuffled_consistency", "baseline_consistency"]


def robustness_table(
    values: Mapping[str, Any], measured: Mapping[str, Any], profile: Profile
) -> pd.DataFrame:
    """One row an SAE and a way to measure it.

    Columns: form, d_sae, seed, fvu; `fails`, the share of letters that are not erased; `concepts`, "letters"
    or "endings"; SETTING; `consistency`, `no_carrier_share` and `n_evaluated`, of the concepts.

    Parameters
    ----------
    values : Mapping
        Of the study's cells.
    measured : Mapping
        Of the cells of `widths`, which have the same names.
    """
    saes = front.spec_table(measured, widths.specs(profile.language_model))
    rows = []
    for sae in saes.itertuples():
        name = slug(f"{front.Spec(sae.form, sae.strength, sae.d_sae).title}, seed {sae.seed}")
        about = {"form": sae.form, "d_sae": sae.d_sae, "seed": sae.seed, "fvu": sae.fvu}
        about |= {"fails": 1 - sae.erased}
        if name in values:
            ways = [{"concepts": "letters"} | row for row in values[name]["rules"]]
            rows += [about | way for way in [*ways, _of_endings(values[name]["endings"])]]
    columns = ["form", "d_sae", "seed", "fvu", "fails", "concepts", *SETTING]
    return pd.DataFrame(rows, columns=[*columns, "consistency", "no_carrier_share", "n_evaluated"])


def _of_endings(report: Mapping[str, Any]) -> dict[str, Any]:
    means = {name: report[f"mean_{name}"] for name in ("consistency", "no_carrier_share")}
    setting = dict(zip(SETTING, STANDARD, strict=True))
    return {"concepts": "endings"} | setting | means | {"n_evaluated": report["n_evaluated"]}


def ways_table(table: pd.DataFrame, d_sae: int) -> pd.DataFrame:
    """What each way to measure says of the SAEs of `robustness_table`; the standard one first.

    One row of concepts and SETTING: `n_evaluated`, the fewest concepts of an SAE; mean `consistency` and
    `no_carrier`; and four means over `seeds` seeds, each with `_low` and `_high` (95 %, Student's t). Two are
    rank correlations among one seed's SAEs: `standard`, with the standard's consistency, and `erasing`, with
    failure of erasing letters (NaN for other concepts). Two are of C²R at `d_sae` latents: `gain`, less no
    penalty at equal width, and `excess`, less what fewer latents give at equal FVU.
    """
    key = ["form", "d_sae", "seed"]
    by_way = {way: rows.set_index(key) for way, rows in table.groupby(["concepts", *SETTING])}
    first = ("letters", *STANDARD)
    found = []
    for way in sorted(by_way, key=_order):
        rows = by_way[way].assign(standard=by_way[first]["consistency"])
        row = dict(zip(["concepts", *SETTING], way, strict=True))
        row |= {"seeds": rows.index.unique("seed").size, "n_evaluated": rows["n_evaluated"].min()}
        row |= {"consistency": rows["consistency"].mean()}
        row |= {"no_carrier": rows["no_carrier_share"].mean()}
        row |= over_seeds("standard", _ranks_together(rows, "standard"))
        is_of_letters = way[0] == "letters"  # as erasing is
        fails = _ranks_together(rows, "fails") if is_of_letters else pd.Series(dtype=float)
        row |= over_seeds("erasing", fails)
        pair = rows["consistency"].unstack("form").xs(d_sae, level="d_sae").dropna()
        row |= over_seeds("gain", pair["C²R"] - pair["none"])
        plain = rows.reset_index()
        excess = plain["consistency"] - front.of_size(plain, "consistency")
        row |= over_seeds("excess", excess[(plain["form"] == "C²R") & (plain["d_sae"] == d_sae)])
        found.append(row)
    return pd.DataFrame(found)


def weakest(ways: pd.DataFrame, concepts: str, name: str, at: str) -> pd.Series | None:
    """Of the rows of `ways_table` with these concepts and the standard number of words, the worst interval.

    That is the one of the mean `name` with the lowest low end (`at` is "low") or the highest high end
    ("high"). None without rows.
    """
    if not len(ways):
        return None
    rows = ways[(ways["concepts"] == concepts) & (ways["n_samples"] == N_SAMPLES)]
    end = rows[f"{name}_{at}"]
    worst = end.idxmin() if at == "low" else end.idxmax()
    return rows.loc[worst, [name, f"{name}_low", f"{name}_high"]]


def _order(way: tuple) -> tuple:
    """The standard, other rules, other numbers of words, other concepts."""
    concepts, *setting = way
    return concepts != "letters", setting[-1] != N_SAMPLES, tuple(setting) != STANDARD, setting


def _ranks_together(rows: pd.DataFrame, column: str) -> pd.Series:
    """The rank correlation of consistency with a column in each seed that has enough SAEs."""
    ranks = [
        of[["consistency", column]].rank() for _, of in rows.groupby("seed") if len(of) >= FEWEST
    ]
    return pd.Series([of["consistency"].corr(of[column]) for of in ranks], dtype=float)


def endings_table(values: Mapping[str, Any], profile: Profile, d_sae: int) -> pd.DataFrame:
    """Consistency of each ending at `d_sae` latents, with the guards that belong to it.

    One row an ending that could be measured: `probe_f1`; means over seeds with "none" and with "C²R", their
    paired difference `gain`, `gain_low`, `gain_high` (95 %, Student's t), and the `lowest` of an SAE; and, of
    all these SAEs, mean `precision`, `recall` and `f1` of the modal latent, and consistency with `shuffled`
    labels and of the `baseline`.
    """
    rows = []
    which = [spec for spec in widths.specs(profile.language_model) if spec.d_sae == d_sae]
    for seed, spec in itertools.product(widths.SEEDS, which):
        found = values.get(slug(f"{spec.title}, seed {seed}"))
        for one in found["endings"]["concepts"] if found else []:
            about = {"form": spec.form, "seed": seed, "probe_f1": found["probe_f1"][one["concept"]]}
            rows.append(about | one)
    found, columns = [], ["form", "seed", "probe_f1", "concept", "consistency", *_GUARDS]
    table = pd.DataFrame(rows, columns=columns).dropna(subset="consistency")
    for ending, of in table.groupby("concept", sort=False):
        pair = of.pivot(index="seed", columns="form", values="consistency").dropna()
        row = {"ending": ending, "probe_f1": of["probe_f1"].mean()}
        row |= {"none": pair["none"].mean(), "C²R": pair["C²R"].mean()}
        row |= over_seeds("gain", pair["C²R"] - pair["none"])
        row |= {"lowest": of["consistency"].min()}
        means = of[_GUARDS].astype(float).mean()
        found.append(row | means.rename(lambda name: name.removesuffix("_consistency")).to_dict())
    return pd.DataFrame(found)


def way_name(way: Mapping[str, Any]) -> str:
    """A row of `ways_table` in a few words, for a figure."""
    if way["concepts"] != "letters":
        return str(way["concepts"])
    if way["n_samples"] != N_SAMPLES:
        return f"{way['n_samples']} words"
    return f"cosine {way['min_cosine']:g}, share {way['min_share']:g}"


def ways_text(ways: pd.DataFrame) -> pd.DataFrame:
    """`ways_table` to be printed: short names, and intervals as text."""
    names = {"min_cosine": "cosine", "min_share": "share", "n_samples": "n"}
    plain = ["concepts", *names, "n_evaluated", "consistency", "no_carrier"]
    text = {
        name: interval_text(ways, name, f"{name}_low", f"{name}_high")
        for name in ("standard", "erasing", "gain", "excess")
    }
    return ways[plain].rename(columns=names).round(3).assign(**text)

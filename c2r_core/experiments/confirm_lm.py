"""Study `confirm_lm`: the form of C²R that was chosen on a language model, on seeds that chose nothing.

docs/design.md says how strengths and form are chosen, which outcomes count, and as what. A cell is an SAE of
one seed, or the agreement of two SAEs that differ in their seed.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile
from c2r_core.experiments.agreement import flat
from c2r_core.experiments.confirm import RIVALS, SEEDS, holm
from c2r_core.experiments.front import Spec, of_size, plain_specs, spec_cells, spec_table
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    evaluated,
    trained,
    training_data,
)
from c2r_core.experiments.shortlist import PRIMARY
from c2r_core.experiments.study import Study
from c2r_core.experiments.validation import EFFECTS
from c2r_core.statistics import Interval, mean_interval, paired_interval

CHOSEN = "silent partner, directed"
STRENGTHS = {"C²R": 0.3, "OrtSAE": 0.3, CHOSEN: 0.3}
"""By form: what `shortlist.choice` gives for the committed cells; a test holds them so."""
PAIRS = tuple(itertools.combinations(SEEDS, 2))
"""Of seeds whose SAEs are compared: all."""

OUTCOMES = {
    name: EFFECTS[name] for name in (PRIMARY, "consistency", "exception rate", "no carrier")
}
OUTCOMES |= {"erased": "answers erased (share)", "steered": "answers steered (share)"}
"""Columns of `spec_table` and their titles; the first is the primary outcome."""
LESS_AGREEMENT = 0.03
"""By less than so much may PW-MCC be lower than without a penalty."""
RESULTS = ("contrary", "not reached", "reached")
"""From the worst; contrary is an interval that lies wholly on the wrong side of its bound."""


# -- what is trained and measured ---------------------------------------------------------------


def specs(lm: LanguageModelProfile) -> list[Spec]:
    """No penalty at three widths, C²R, OrtSAE and the chosen form at their strengths."""
    penalties = [Spec(title, strength, lm.d_sae) for title, strength in STRENGTHS.items()]
    return plain_specs(lm) + penalties


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell an SAE, seed by seed, then one a pair of SAEs; the seeds are always SEEDS."""
    del seed
    which = specs(profile.language_model)
    made = [cell for one in SEEDS for cell in spec_cells("confirm_lm", profile, one, which, device)]
    return made + pair_cells("confirm_lm", profile, which, device)


def pair_cells(
    study: str, profile: Profile, which: Iterable[Spec], device: str = "cpu"
) -> list[Cell]:
    """One cell a pair of SAEs that differ in their seed: the record of the metric `agreement`."""
    sources = Sources(profile)
    return [
        Study(study, profile, pair, device).cell(
            title,
            measure_pair,
            modules=["c2r_core.metrics.agreement"],
            arm=spec.arm(sources.lm, device),
            sources=sources,
        )
        for title, pair, spec in _pairs_of(which)
    ]


def _pairs_of(which: Iterable[Spec]) -> list[tuple[str, tuple[int, int], Spec]]:
    """The cells of agreement: title, seeds, and what is trained."""
    return [
        (f"{spec.title}, seeds {pair[0]} and {pair[1]}", pair, spec)
        for spec, pair in itertools.product(which, PAIRS)
    ]


def measure_pair(
    arm: LanguageModelArm, sources: Sources, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """The record of the metric `agreement`, of the arm's SAEs of two seeds."""
    data = training_data(sources.lm, device)
    sae, other = (trained(arm, data, seed, device) for seed in seeds)
    return evaluated(sae, ["agreement"], sources, device, against=other)["agreement"]


def confirm_table(values: Mapping[str, Any], lm: LanguageModelProfile) -> pd.DataFrame:
    """`spec_table` of the study's own list."""
    return spec_table(values, specs(lm))


def agreement_table(values: Mapping[str, Any], lm: LanguageModelProfile) -> pd.DataFrame:
    """`pair_table` of the study's own list."""
    return pair_table(values, specs(lm))


def pair_table(values: Mapping[str, Any], which: Iterable[Spec]) -> pd.DataFrame:
    """One row a pair of SAEs: form, d_sae, seed, other, and the main numbers of their agreement."""
    return pd.DataFrame(
        {"form": spec.form, "d_sae": spec.d_sae, "seed": pair[0], "other": pair[1]}
        | flat(values[slug(title)]["values"])
        for title, pair, spec in _pairs_of(which)
        if values.get(slug(title), {}).get("status") == "evaluated"
    )


# -- confirming ---------------------------------------------------------------------------------


def matched(table: pd.DataFrame, outcomes: Iterable[str] = tuple(OUTCOMES)) -> pd.DataFrame:
    """Each penalty's outcomes beside what fewer latents give at its FVU, seed by seed.

    From `confirm_table`, or another with form, seed, fvu and the outcomes. Where the penalty's FVU lies
    `outside` that of the SAEs without one, `of_size` takes the nearest. Columns: form, seed, outcome, own, of
    size, outside.
    """
    plain = table[table["form"] == "none"].groupby("seed")["fvu"]
    ends = table["seed"].map(plain.min()), table["seed"].map(plain.max())
    own = table[["form", "seed"]].assign(outside=~table["fvu"].between(*ends))
    parts = [
        own.assign(outcome=outcome, own=table[outcome], **{"of size": of_size(table, outcome)})
        for outcome in outcomes
    ]
    return pd.concat(parts, ignore_index=True).query("form != 'none'").dropna()


def excess_table(table: pd.DataFrame, level: float = 0.95) -> pd.DataFrame:
    """By how much each penalty's outcomes exceed what fewer latents give at its FVU, paired by seed.

    One row an outcome and form: `mean`, `low`, `high` (Student's t over `seeds`; of PRIMARY corrected by
    `holm` over the penalties), and on how many seeds the FVU was `outside`.
    """
    found = matched(table)
    pairs = {
        (outcome, form): (rows["own"].tolist(), rows["of size"].tolist())
        for outcome in OUTCOMES
        for form, rows in found[found["outcome"] == outcome].groupby("form", sort=False)
    }
    intervals = {key: paired_interval(*pair, level=level) for key, pair in pairs.items()}
    intervals |= holm({key: pair for key, pair in pairs.items() if key[0] == PRIMARY}, level)
    outside = found.groupby(["outcome", "form"])["outside"].sum()
    return pd.DataFrame(
        {"outcome": key[0], "form": key[1], "seeds": len(pairs[key][0]), "outside": outside[key]}
        | interval._asdict()
        for key, interval in intervals.items()
    )


def difference(
    table: pd.DataFrame, rival: str, form: str = CHOSEN, level: float = 0.95
) -> Interval:
    """Excess in PRIMARY of a form minus a rival's, paired by seed: Student's t."""
    found = matched(table).query("outcome == @PRIMARY")
    found = found.assign(excess=found["own"] - found["of size"])
    wide = found.pivot(index="seed", columns="form", values="excess")[[form, rival]].dropna()
    return paired_interval(wide[form], wide[rival], level=level)


def jackknife_interval(by_pair: Mapping[tuple[int, int], float], level: float = 0.95) -> Interval:
    """Interval of a mean over pairs of seeds, where a seed is in several pairs.

    Such pairs are not independent, so the interval is over the seeds: each is left out in turn, with its
    pairs, and Student's t is of the pseudo-values that this gives (Tukey's jackknife).
    """
    seeds = sorted({seed for pair in by_pair for seed in pair})
    mean = np.mean(list(by_pair.values()))
    without = [
        np.mean([value for pair, value in by_pair.items() if seed not in pair]) for seed in seeds
    ]
    return mean_interval(len(seeds) * mean - (len(seeds) - 1) * np.array(without), level=level)


def agreement_difference(
    agreement: pd.DataFrame, form: str = CHOSEN, level: float = 0.95
) -> Interval:
    """PW-MCC of a form minus that without a penalty at the largest width: `jackknife_interval`."""
    widest = agreement[agreement["d_sae"] == agreement["d_sae"].max()]
    wide = widest.pivot(index=["seed", "other"], columns="form", values="pw_mcc")
    return jackknife_interval((wide[form] - wide["none"]).dropna().to_dict(), level)


def verdicts(
    table: pd.DataFrame,
    agreement: pd.DataFrame,
    form: str = CHOSEN,
    rivals: Sequence[str] = RIVALS,
    family: Collection[str] = tuple(STRENGTHS),
    level: float = 0.95,
) -> pd.DataFrame:
    """The verdicts of docs/design.md on a form: one row an interval that a verdict rests on.

    `family` has the penalties for which Holm corrects. Columns: verdict, measured, mean, low, high; the
    interval should lie `wanted` ("below" or "above") the `bound`. `result`, one of RESULTS, is the
    verdict's: the worst of its rows.
    """
    excesses = excess_table(table[table["form"].isin(["none", *family])], level)
    by = excesses.set_index(["outcome", "form"])[["mean", "low", "high"]]
    excess = {outcome: Interval(*by.loc[(outcome, form)]) for outcome in OUTCOMES}
    corrected = f"absorption, excess of {form}" + " (Holm)" * (len(family) > 1)
    rows = [_row("better than size", corrected, excess[PRIMARY], "below")]
    for rival in rivals:
        about = f"better than {rival}", f"absorption, excess, {form} − {rival}"
        rows.append(_row(*about, difference(table, rival, form, level), "below"))
    agreeing = agreement_difference(agreement, form, level)
    about = "costs no agreement", f"PW-MCC, {form} − none"
    rows.append(_row(*about, agreeing, "above", bound=-LESS_AGREEMENT))
    for outcome in ("erased", "steered"):
        about = "better used", f"{outcome}, excess of {form}"
        rows.append(_row(*about, excess[outcome], "above"))
    judged = pd.DataFrame(rows)
    judged["result"] = judged.groupby("verdict")["result"].transform(worst)
    return judged


def _row(
    verdict: str, measured: str, interval: Interval, wanted: str, *, bound: float = 0.0
) -> dict[str, Any]:
    about = {"verdict": verdict, "measured": measured} | interval._asdict()
    found = result(interval, wanted, bound)
    return about | {"wanted": wanted, "bound": bound, "result": found}


def result(interval: Interval, wanted: str, bound: float = 0.0) -> str:
    """Which of RESULTS it is that an interval should lie "below" or "above" a bound."""
    below, above = interval.high < bound, interval.low > bound
    reached, contrary = (below, above) if wanted == "below" else (above, below)
    return "reached" if reached else "contrary" if contrary else "not reached"


def worst(results: Iterable[str]) -> str:
    """The worst of some RESULTS."""
    return min(results, key=RESULTS.index)

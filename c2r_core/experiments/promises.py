"""Study `promises`: what became of each promise of the paper's abstract, on toys and on a language model.

docs/design.md says what is asked of each ("The promises, one by one"). The study's cells are of toy SAEs on
fresh seeds, with and without a penalty, and of the language model's with C²R, and with the form that is tried
second, at the paper's strength. The other SAEs of the language model are those of study `confirm_lm`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, NamedTuple

import pandas as pd

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile, ToyProfile
from c2r_core.experiments import confirm, confirm_lm, forms, front
from c2r_core.experiments.agreement import flat
from c2r_core.experiments.front import Spec
from c2r_core.experiments.study import Study
from c2r_core.experiments.synthetic import Arm, trained
from c2r_core.experiments.toy import ARCHITECTURES, evaluation_sample, toy_arm
from c2r_core.metrics.agreement import compare_saes
from c2r_core.metrics.assignment import toy_assignment
from c2r_core.metrics.rows import mean_of
from c2r_core.statistics import Interval, paired_interval

SEEDS = (20, 21, 22, 23, 24)
SIZES = (1.0, 0.75, 0.5)
"""Widths without a penalty, as shares of the profile's."""
FORMS = (*confirm.RIVALS, confirm_lm.CHOSEN, confirm.CHOSEN)
STRENGTHS: dict[str, dict[str, float]] = {
    "relu": dict(zip(FORMS, (0.3, 0.3, 1.0, 0.3), strict=True)),
    "batch_topk": dict(zip(FORMS, (0.3, 1.0, 3.0, 3.0), strict=True)),
}
"""By architecture and form: what `strengths` gives for the committed `forms`; a test holds them so."""

PAPERS, SECOND = "C²R, 0.88", "directed, 0.88"
"""On the language model, the titles of C²R and of the form that is tried second, at the paper's strength. A
title without a number has the strength that was chosen."""

WANTED = {
    "less splitting": ("below", ("splitting",)),
    "less absorption": ("below", ("absorption",)),
    "consistent between samples": ("above", ("consistency",)),
    "consistent between seeds": ("above", ("pw_mcc",)),
    "better use": ("above", ("detector_f1", "erased", "steered")),
    "preserved reconstruction": ("below", ("fvu",)),
}
"""By promise: on which side of 0 its outcomes should lie, and their columns, those that a place has."""
TITLES = {
    "splitting": "split latents",
    "absorption": "absorption",
    "consistency": "assignment consistency",
    "pw_mcc": "PW-MCC between seeds",
    "detector_f1": "F1 of the detector",
    "erased": "answers erased",
    "steered": "answers steered",
    "fvu": "FVU − 1.1 · that of no penalty",
}
"""Of the outcomes; all but that of FVU are excesses."""
MORE_FVU = 1.1
"""Reconstruction is preserved if FVU is below so many times that of no penalty."""
WORDS = dict(zip(confirm_lm.RESULTS, ("contrary", "not shown", "kept"), strict=True))


# -- what is trained and measured ---------------------------------------------------------------


class ToySpec(NamedTuple):
    """One way to train on the tree: a form's title ("none" without), its strength, and the width."""

    architecture: str
    form: str
    strength: float
    d_sae: int

    @property
    def title(self) -> str:
        """The title of the cell."""
        return f"{self.architecture}, {self.form}, {self.d_sae} latents"

    def arm(self, toy: ToyProfile) -> Arm:
        """How it is trained; the weight is that of the strength at this width."""
        plain = replace(toy_arm(toy, self.architecture, None), d_sae=self.d_sae)
        if self.form == "none":
            return plain
        penalty = forms.form(self.form, 0.0, plain.config.steps)
        sizes = {"batch_size": plain.batch_size, "d_sae": plain.d_sae}
        weight = forms.weight_of(penalty, self.strength, **sizes)
        return replace(plain, regulariser=replace(penalty, weight=weight))


def toy_specs(toy: ToyProfile) -> Iterator[ToySpec]:
    """For each architecture no penalty at three widths, then FORMS at the full one."""
    for architecture, of_forms in STRENGTHS.items():
        for share in SIZES:
            yield ToySpec(architecture, "none", 0.0, round(share * toy.d_sae))
        for title, strength in of_forms.items():
            yield ToySpec(architecture, title, strength, toy.d_sae)


def stronger(lm: LanguageModelProfile) -> dict[str, Spec]:
    """On the language model, by title: PAPERS and SECOND."""
    return {
        title: Spec(form, front.STRENGTHS[1], lm.d_sae)
        for title, form in {PAPERS: "C²R", SECOND: "directed"}.items()
    }


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell a `ToySpec`; then of `stronger` one an SAE and one a pair. The seeds are always the same."""
    del seed
    study, toy = Study("promises", profile, SEEDS, device), profile.toy
    how = {"samples": toy.evaluation_samples}
    made = [
        study.cell(spec.title, measure, arm=spec.arm(toy), strength=spec.strength, **how)
        for spec in toy_specs(toy)
    ]
    which = list(stronger(profile.language_model).values())
    for one in confirm_lm.SEEDS:
        made += front.spec_cells("promises", profile, one, which, device)
    return made + confirm_lm.pair_cells("promises", profile, which, device)


def measure(
    arm: Arm, strength: float, samples: int, seeds: Sequence[int], device: str
) -> dict[str, list[dict[str, Any]]]:
    """`saes`: a row a seed, what `forms` shows and the parents' consistency; `pairs`: of two, agreement."""
    if arm.regulariser:
        rows = forms.measure_form(arm, [strength], samples, seeds, device)
    else:
        rows = forms.measure(arm, samples, seeds, device)
    runs, tree = trained(arm, seeds, device), arm.features
    sample = evaluation_sample(tree, samples)
    for row in rows:
        parents = toy_assignment(runs[row["seed"]], tree, sample).concepts[: tree.n_parents]
        row["consistency"] = mean_of(parents, "consistency")
    x = sample.x * tree.norm_factor
    pairs = [
        {"seed": one, "other": other}
        | flat(asdict(compare_saes(runs[one], runs[other], [x], n_draws=2)))
        for one, other in itertools.combinations(runs, 2)
    ]
    return {"saes": rows, "pairs": pairs}


def strengths(explored: pd.DataFrame) -> dict[str, dict[str, float]]:
    """By architecture, each form's strength of highest mean recovery on the tree, the lowest of equals.

    From `forms_table` of the exploring seeds.
    """
    on_tree = explored[(explored["world"] == forms.TREE) & explored["form"].isin(FORMS)]
    means = on_tree.groupby(["architecture", "form", "strength"])["recovery"].mean().fillna(-1.0)
    return {
        architecture: {title: means[architecture, title].idxmax() for title in FORMS}
        for architecture in STRENGTHS
    }


def toy_table(values: Mapping[str, Any], toy: ToyProfile, what: str) -> pd.DataFrame:
    """Architecture, form, d_sae and the rows of "saes" or "pairs"; `splitting` is latents per parent."""
    about = ("architecture", "form", "d_sae")
    table = pd.DataFrame(
        {name: getattr(spec, name) for name in about} | row
        for spec in toy_specs(toy)
        for row in values[slug(spec.title)][what]
    )
    return table.rename(columns={"latents_per_parent": "splitting"})


# -- what became of the promises ----------------------------------------------------------------


def everywhere(
    own: Mapping[str, Any], confirmed: Mapping[str, Any], profile: Profile
) -> pd.DataFrame:
    """`kept` on each architecture of the toys and on the language model, which the column `place` names.

    From the values of the study's cells and of `confirm_lm`'s; empty if those of one are not there.
    """
    if not own or not confirmed:
        return pd.DataFrame()
    places = {}
    saes, pairs = (toy_table(own, profile.toy, what) for what in ("saes", "pairs"))
    for name, title in ARCHITECTURES.items():
        of_name = (table[table["architecture"] == name] for table in (saes, pairs))
        places[f"toy, {title}"] = kept(*of_name)
    places["language model"] = kept(*language_model_tables(own, confirmed, profile))
    return pd.concat([table.assign(place=place) for place, table in places.items()])


def language_model_tables(
    own: Mapping[str, Any], confirmed: Mapping[str, Any], profile: Profile
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """SAEs and pairs of the language model, as `kept` takes them."""
    lm = profile.language_model
    saes, pairs = (
        [confirm_lm.confirm_table(confirmed, lm)],
        [confirm_lm.agreement_table(confirmed, lm)],
    )
    for title, spec in stronger(lm).items():
        saes.append(front.spec_table(own, [spec]).assign(form=title))
        pairs.append(confirm_lm.pair_table(own, [spec]).assign(form=title))
    return pd.concat(saes, ignore_index=True), pd.concat(pairs, ignore_index=True)


def second_verdicts(saes: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """`confirm_lm.verdicts` on SECOND, from `language_model_tables`, with the level of a second try."""
    how = {"rivals": [PAPERS], "family": [SECOND], "level": 1 - 0.05 / 2}
    return confirm_lm.verdicts(saes, pairs, SECOND, **how)


def kept(saes: pd.DataFrame, pairs: pd.DataFrame) -> pd.DataFrame:
    """What became of each promise in one place: one row a form, promise and outcome.

    Parameters
    ----------
    saes : DataFrame
        form ("none" without a penalty), d_sae, seed, fvu and outcomes of WANTED, as of
        `confirm_lm.confirm_table` or one architecture of `toy_table`.
    pairs : DataFrame
        form, d_sae, seed, other, pw_mcc, as of `confirm_lm.agreement_table` or of `toy_table`.

    Columns: form, promise, outcome; `mean`, `low`, `high` of its excess over what fewer latents give at the
    same FVU, or of FVU − MORE_FVU · that of no penalty (95 %: Student's t; over pairs a jackknife);
    of how many seeds or pairs the FVU is `outside` of theirs; `wanted`, the side of 0; `result`: "kept", "not
    shown" or "contrary", of the promise, so the worst of its outcomes.
    """
    rows = []
    for form in [title for title in saes["form"].unique() if title != "none"]:
        for promise, (wanted, outcomes) in WANTED.items():
            for outcome in outcomes:
                if outcome == "fvu":
                    found, outside = _more_fvu(saes, form), 0
                elif outcome in pairs:
                    found, outside = excess_of_pairs(saes, pairs, form, outcome)
                elif outcome in saes:
                    found, outside = _excess(saes, form, outcome)
                else:
                    continue
                about = {"form": form, "promise": promise, "outcome": outcome, "outside": outside}
                result = confirm_lm.result(found, wanted)
                rows.append(about | found._asdict() | {"wanted": wanted, "result": result})
    judged = pd.DataFrame(rows)
    worst = judged.groupby(["form", "promise"])["result"].transform(confirm_lm.worst)
    return judged.assign(result=worst.map(WORDS))


def _more_fvu(saes: pd.DataFrame, form: str) -> Interval:
    plain = saes[(saes["form"] == "none") & (saes["d_sae"] == saes["d_sae"].max())]
    both = saes[saes["form"] == form].merge(plain, on="seed", suffixes=("", " of none"))
    return paired_interval(both["fvu"], both["fvu of none"], scale=MORE_FVU)


def _excess(saes: pd.DataFrame, form: str, outcome: str) -> tuple[Interval, int]:
    found = confirm_lm.matched(saes, [outcome]).query("form == @form")
    return paired_interval(found["own"], found["of size"]), int(found["outside"].sum())


def excess_of_pairs(
    saes: pd.DataFrame, pairs: pd.DataFrame, form: str, outcome: str
) -> tuple[Interval, int]:
    """A form's excess in a column of `pairs`, and of how many of its pairs the FVU is outside of size's."""
    number = pairs.groupby(["seed", "other"]).ngroup()
    named = dict(zip(number, zip(pairs["seed"], pairs["other"], strict=True), strict=True))
    table = with_fvu(pairs, saes).assign(seed=number)
    found = confirm_lm.matched(table, [outcome]).query("form == @form")
    excess = (found["own"] - found["of size"]).set_axis(found["seed"].map(named))
    return confirm_lm.jackknife_interval(dict(excess.items())), int(found["outside"].sum())


def with_fvu(pairs: pd.DataFrame, saes: pd.DataFrame) -> pd.DataFrame:
    """Pairs, as `kept` takes them, with a column `fvu`: the mean of the two SAEs'."""
    which = ["form", "d_sae", "seed", "other"]
    fvu = saes.set_index(which[:3])["fvu"]
    of_two = [
        (fvu[form, d_sae, seed] + fvu[form, d_sae, other]) / 2
        for form, d_sae, seed, other in pairs[which].itertuples(index=False)
    ]
    return pairs.assign(fvu=of_two)

"""The promises of the paper's abstract: fresh seeds, the rule's strengths, excess at equal FVU, results."""

from __future__ import annotations

import itertools

import pandas as pd
import pytest

from c2r_core.artefacts.cells import compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, confirm, confirm_lm, forms, promises, tuning

SMOKE = load_profile("smoke")
NOISE = (0.0, 0.01, -0.01, 0.02, -0.02)
SIZES = {120: 0.10, 90: 0.12, 60: 0.15}
"""FVU without a penalty, by width."""


# -- cells --------------------------------------------------------------------------------------


def split(made):
    """The cells of toys, and those of the language model."""
    toys = [cell for cell in made if "features" in cell.settings["arm"]]
    return toys, [cell for cell in made if cell not in toys]


def test_the_toys_have_fresh_seeds_three_widths_and_every_form():
    toys, others = split(cells("promises", SMOKE))
    assert len(toys) == 2 * (3 + 4)
    assert {tuple(cell.settings["seeds"]) for cell in toys} == {promises.SEEDS}
    assert not {*promises.SEEDS} & {*confirm.SEEDS, *tuning.SEEDS}
    plain = [cell for cell in toys if cell.name.startswith("relu-none")]
    full = SMOKE.toy.d_sae
    assert [cell.settings["arm"]["d_sae"] for cell in plain] == [full, 3 * full // 4, full // 2]
    confirming = {f"seed-{seed}" for seed in confirm_lm.SEEDS}
    confirming |= {f"seeds-{one}-and-{other}" for one, other in confirm_lm.PAIRS}
    names = [f"{form}-0.8839-{SMOKE.language_model.d_sae}-latents" for form in ("c2r", "directed")]
    wanted = {f"{name}-{seeds}" for name in names for seeds in confirming}
    assert {cell.name for cell in others} == wanted and len(others) == len(wanted)


def test_the_strengths_are_those_that_the_rule_gives(committed_of):
    table = forms.forms_table(committed_of("forms"), load_profile("default"))
    assert promises.strengths(table) == promises.STRENGTHS


def test_a_penalty_is_trained_at_its_strength_and_every_pair_of_seeds_is_compared():
    made = {cell.name: cell for cell in cells("promises", SMOKE)}
    name = f"relu-c2r-{SMOKE.toy.d_sae}-latents"
    found, plain = (compute(made[one]) for one in (name, name.replace("c2r", "none")))
    assert made[name].settings["arm"]["regulariser"]["weight"] > 0
    assert [row["seed"] for row in found["saes"]] == list(promises.SEEDS)
    assert {row["strength"] for row in found["saes"]} == {promises.STRENGTHS["relu"]["C²R"]}
    assert all(0 <= row["consistency"] <= 1 for row in found["saes"])
    assert [(row["seed"], row["other"]) for row in found["pairs"]] == list(
        itertools.combinations(promises.SEEDS, 2)
    )
    assert plain["saes"][0]["fvu"] != found["saes"][0]["fvu"]


# -- what became of the promises ----------------------------------------------------------------


def measured(fvu=0.13, **changed):
    """SAEs and pairs: outcomes are 5 · FVU without a penalty, and with one 0.1 less if not changed."""
    outcomes = ("splitting", "absorption", "consistency", "erased", "steered")
    saes, pairs = [], []
    for seed, noise in zip(promises.SEEDS, NOISE, strict=True):
        for d_sae, of_size in SIZES.items():
            about = {"form": "none", "d_sae": d_sae, "seed": seed, "fvu": of_size}
            saes.append(about | dict.fromkeys(outcomes, 5 * of_size))
        own = {"form": "C²R", "d_sae": 120, "seed": seed, "fvu": fvu + noise / 100}
        own |= {name: 5 * own["fvu"] + changed.get(name, -0.1) + noise for name in outcomes}
        saes.append(own)
    for seed, other in itertools.combinations(promises.SEEDS, 2):
        of_pair = {"seed": seed, "other": other}
        for d_sae, of_size in SIZES.items():
            pairs.append({"form": "none", "d_sae": d_sae, "pw_mcc": 5 * of_size} | of_pair)
        mean = fvu + sum(NOISE[promises.SEEDS.index(one)] for one in (seed, other)) / 200
        change = changed.get("pw_mcc", -0.1)
        pairs.append({"form": "C²R", "d_sae": 120, "pw_mcc": 5 * mean + change} | of_pair)
    return pd.DataFrame(saes), pd.DataFrame(pairs)


def test_an_excess_is_over_what_size_gives_at_the_same_fvu_of_pairs_at_the_mean_of_two():
    found = promises.kept(*measured()).set_index("outcome")
    assert list(found.index) == [
        *("splitting", "absorption", "consistency", "pw_mcc", "erased", "steered", "fvu")
    ]
    excesses = found.drop(index="fvu")
    assert excesses["mean"].tolist() == pytest.approx([-0.1] * 6)
    assert found.loc["pw_mcc", ["low", "high"]].tolist() == pytest.approx([-0.1, -0.1])
    assert found.loc["fvu", "mean"] == pytest.approx(0.13 - 1.1 * 0.10)
    assert found["result"].to_dict() == {
        "splitting": "kept",
        "absorption": "kept",
        "consistency": "contrary",
        "pw_mcc": "contrary",
        "erased": "contrary",
        "steered": "contrary",
        "fvu": "contrary",
    }
    assert found["outside"].tolist() == [0] * 7


def test_a_promise_has_the_worse_result_of_its_two_outcomes():
    found = promises.kept(*measured(erased=0.5, steered=0.0)).set_index("outcome")
    assert found.loc["erased", "low"] > 0
    assert found.loc[["erased", "steered"], "result"].tolist() == ["not shown"] * 2
    found = promises.kept(*measured(erased=0.5, steered=0.5)).set_index("outcome")
    assert found.loc["steered", "result"] == "kept"


def test_outside_of_the_sizes_the_nearest_counts_and_is_counted():
    found = promises.kept(*measured(fvu=0.05)).set_index("outcome")
    assert found.loc["absorption", "mean"] == pytest.approx(5 * 0.05 - 0.1 - 0.5)
    assert found.loc[["absorption", "pw_mcc", "fvu"], "outside"].tolist() == [5, 10, 0]
    assert found.loc["fvu", "result"] == "kept"


def test_only_outcomes_that_were_measured_are_judged():
    saes, pairs = measured()
    found = promises.kept(saes.drop(columns=["erased", "steered"]), pairs)
    assert "better use" not in set(found["promise"]) and len(found) == 5
    assert set(found["result"]) <= set(promises.WORDS.values())
    assert list(promises.WORDS) == list(confirm_lm.RESULTS)


def test_every_place_is_judged_by_the_committed_cells_and_none_without_them(committed_of):
    default = load_profile("default")
    own, confirmed = (committed_of(study) for study in ("promises", "confirm_lm"))
    assert promises.everywhere({}, confirmed, default).empty
    assert promises.everywhere(own, {}, default).empty
    found = promises.everywhere(own, confirmed, default)
    forms_of = found.groupby("place", sort=False)["form"].unique().map(list).to_dict()
    toy = list(promises.FORMS)
    assert forms_of == {
        "toy, ReLU": toy,
        "toy, BatchTopK": toy,
        "language model": [*toy[:3], promises.PAPERS, promises.SECOND],
    }
    by_place = found.groupby(["place", "form"])["promise"].unique()
    assert all(list(of) == list(promises.WANTED) for of in by_place)
    saes, pairs = promises.language_model_tables(own, confirmed, default)
    assert saes.groupby("form").size().drop("none").eq(5).all()
    assert pairs.groupby(["form", "d_sae"]).size().eq(10).all()

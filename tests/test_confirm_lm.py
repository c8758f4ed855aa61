"""The confirming study on the language model: matched FVU, agreement of pairs, verdicts."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from c2r_core.artefacts.cells import compute
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, confirm, confirm_lm, front, promises
from c2r_core.experiments.confirm_lm import CHOSEN, OUTCOMES, PAIRS, PRIMARY, SEEDS
from c2r_core.statistics import Interval, mean_interval, paired_interval

SMOKE = load_profile("smoke")
LM = SMOKE.language_model
FORM = slug(front.Spec(CHOSEN, confirm_lm.STRENGTHS[CHOSEN], LM.d_sae).title)
"""What the names of the chosen form's cells begin with."""
SIZES = {4096: 0.10, 2048: 0.12, 1024: 0.15}
"""FVU without a penalty, by width."""


# -- cells --------------------------------------------------------------------------------------


def test_what_is_confirmed_has_fresh_seeds_and_every_pair_of_them_is_compared():
    made = {cell.name: cell for cell in cells("confirm_lm", SMOKE)}
    assert len(made) == 6 * 5 + 6 * 10
    assert {seed for cell in made.values() for seed in cell.settings["seeds"]} == {*SEEDS}
    assert not {*SEEDS} & {*front.EXPLORING}
    of_form = [name for name in made if name.startswith(FORM)]
    assert f"{FORM}-seed-14" in of_form and len(of_form) == 5 + 10
    assert made[f"{FORM}-seeds-10-and-14"].settings["seeds"] == [10, 14]
    assert "none-32-latents-seed-10" in made and "none-32-latents-seeds-10-and-11" in made


def test_a_confirming_sae_and_a_pair_are_measured_and_give_tables():
    made = {cell.name: cell for cell in cells("confirm_lm", SMOKE)}
    names = (f"{FORM}-seed-10", f"{FORM}-seeds-10-and-11")
    values = {name: compute(made[name]) for name in names}
    (row,) = confirm_lm.confirm_table(values, LM).to_dict("records")
    assert (row["form"], row["seed"], row["d_sae"]) == (CHOSEN, 10, 128)
    assert 0 < row["fvu"] < 5 and 0 < row["live share"] <= 1
    (row,) = confirm_lm.agreement_table(values, LM).to_dict("records")
    assert (row["form"], row["seed"], row["other"]) == (CHOSEN, 10, 11)
    assert row["random"] < row["pw_mcc"] < 1


# -- confirming ---------------------------------------------------------------------------------

NOISE = dict(zip(SEEDS, (0.0, 0.01, -0.01, 0.02, -0.02), strict=True))


def confirmed(fvu=None, **changed):
    """A `confirm_table`: without a penalty every outcome is 5 · FVU, with one 0.1 less, if not changed.

    `fvu` and changes of outcomes, by name, are {form: …}; noise by seed is on the penalties' outcomes.
    """
    rows = []
    for seed in SEEDS:
        for d_sae, of_size in SIZES.items():
            about = {"form": "none", "d_sae": d_sae, "seed": seed, "fvu": of_size}
            rows.append(about | dict.fromkeys(OUTCOMES, 5 * of_size))
        for i, form in enumerate(confirm_lm.STRENGTHS):
            own = (fvu or {}).get(form, 0.13)
            row = {"form": form, "d_sae": 4096, "seed": seed, "fvu": own}
            for outcome in OUTCOMES:
                change = changed.get(outcome, {}).get(form, -0.1)
                row[outcome] = 5 * own + change + NOISE[seed] * (1 + i / 4)
            rows.append(row)
    return pd.DataFrame(rows)


def agreed(change):
    """An `agreement_table` in which the form agrees by `change` more than no penalty."""
    return pd.DataFrame(
        {
            "form": form,
            "d_sae": 4096,
            "seed": pair[0],
            "other": pair[1],
            "pw_mcc": 0.5 + of_form + 0.001 * i,
        }
        for i, pair in enumerate(PAIRS)
        for form, of_form in (("none", 0.0), (CHOSEN, change + 0.001 * (i % 2)))
    )


def test_matched_is_linear_between_sizes_and_outside_the_nearest():
    found = confirm_lm.matched(confirmed(fvu={"C²R": 0.13, "OrtSAE": 0.3, CHOSEN: 0.05}))
    found = found[(found["seed"] == 10) & (found["outcome"] == PRIMARY)].set_index("form")
    assert found["of size"].tolist() == pytest.approx([0.65, 0.75, 0.5])
    assert found["outside"].tolist() == [False, True, True]
    bent = confirmed()
    bent.loc[(bent["form"] == "none") & (bent["d_sae"] == 1024), PRIMARY] = 0.9
    found = confirm_lm.matched(bent).set_index(["form", "seed", "outcome"])["of size"]
    assert found["C²R", 12, PRIMARY] == pytest.approx(0.6 + (0.13 - 0.12) / 0.03 * 0.3)


def test_of_the_primary_outcome_alone_intervals_are_corrected():
    changes = {"C²R": -0.4, "OrtSAE": -0.2, CHOSEN: 0.0}
    table = confirmed(fvu={"OrtSAE": 0.16}, **{PRIMARY: changes, "erased": changes})
    found = confirm_lm.excess_table(table).set_index(["outcome", "form"])
    assert len(found) == 3 * len(OUTCOMES) and set(found["seeds"]) == {5}
    assert (found["outside"] == 5).tolist() == [form == "OrtSAE" for _, form in found.index]
    pairs = {
        form: (rows["own"].tolist(), rows["of size"].tolist())
        for form, rows in confirm_lm.matched(table).query("outcome == 'erased'").groupby("form")
    }
    plain = {form: paired_interval(*pair) for form, pair in pairs.items()}
    corrected = confirm.holm(pairs)
    ends = ["mean", "low", "high"]
    for form in confirm_lm.STRENGTHS:
        assert found.loc[("erased", form), ends].tolist() == pytest.approx(plain[form])
        assert found.loc[(PRIMARY, form), ends].tolist() == pytest.approx(corrected[form])
    assert corrected["C²R"].high > plain["C²R"].high and corrected[CHOSEN] == plain[CHOSEN]


def test_what_was_not_evaluable_leaves_its_pair_out():
    table = confirmed()
    table.loc[(table["form"] == "C²R") & (table["seed"] == 11), PRIMARY] = math.nan
    found = confirm_lm.excess_table(table).set_index(["outcome", "form"])
    assert found.loc[(PRIMARY, "C²R"), "seeds"] == 4 and found.loc[(PRIMARY, CHOSEN), "seeds"] == 5
    shorter = confirm_lm.difference(table, "C²R")
    assert all(map(math.isfinite, shorter))
    assert shorter != confirm_lm.difference(confirmed(), "C²R")


def test_the_interval_over_pairs_of_seeds_holds_the_mean_as_often_as_it_says():
    """Where a seed moves all its pairs, Student's t over the pairs, as if independent, does not."""
    rng = np.random.default_rng(0)
    held, held_by_t = 0, 0
    for _ in range(1000):
        of_seed = dict(zip(SEEDS, rng.normal(size=5), strict=True))
        by_pair = {pair: of_seed[pair[0]] + of_seed[pair[1]] for pair in PAIRS}
        found, plain = confirm_lm.jackknife_interval(by_pair), mean_interval([*by_pair.values()])
        assert found.mean == pytest.approx(plain.mean)
        held += found.low <= 0 <= found.high
        held_by_t += plain.low <= 0 <= plain.high
    assert 935 <= held <= 965 and held_by_t < 850


@pytest.mark.parametrize(
    ("ends", "wanted", "bound", "expected"),
    [
        ((-2, -1), "below", 0.0, "reached"),
        ((-1, 0), "below", 0.0, "not reached"),
        ((0.5, 1), "below", 0.0, "contrary"),
        ((-0.02, 0.1), "above", -0.03, "reached"),
        ((-0.04, 0.1), "above", -0.03, "not reached"),
        ((-0.5, -0.04), "above", -0.03, "contrary"),
    ],
)
def test_a_result_is_where_the_interval_lies(ends, wanted, bound, expected):
    interval = Interval(sum(ends) / 2, *ends)
    assert confirm_lm.result(interval, wanted, bound) == expected


def results(table, agreement):
    judged = confirm_lm.verdicts(table, agreement)
    assert judged.groupby("verdict")["result"].nunique().eq(1).all() and len(judged) == 6
    return judged.groupby("verdict")["result"].first().to_dict()


def test_the_verdicts_are_those_of_the_design():
    primary = {"C²R": 0.0, "OrtSAE": -0.6, CHOSEN: -0.3}
    used = {CHOSEN: 0.2}
    table = confirmed(**{PRIMARY: primary, "erased": used, "steered": used})
    assert results(table, agreed(-0.01)) == {
        "better than size": "reached",
        "better than C²R": "reached",
        "better than OrtSAE": "contrary",
        "costs no agreement": "reached",
        "better used": "reached",
    }
    table = confirmed(**{PRIMARY: {CHOSEN: 0.005}, "erased": used, "steered": {CHOSEN: 0.0}})
    found = results(table, agreed(-0.1))
    assert found["better than size"] == found["better used"] == "not reached"
    assert found["costs no agreement"] == "contrary"
    assert results(confirmed(**{"erased": used}), agreed(0))["better used"] == "contrary"


def test_a_form_is_compared_with_its_rival_at_equal_fvu():
    """Absorption is 5 · FVU for every size: at a lower FVU it is lower, and is no better for it."""
    table = confirmed(fvu={CHOSEN: 0.11, "C²R": 0.14})
    found = confirm_lm.difference(table, "C²R")
    assert found.mean == pytest.approx(0, abs=1e-9) and found.low < 0 < found.high
    table = confirmed(fvu={CHOSEN: 0.14, "C²R": 0.11}, **{PRIMARY: {CHOSEN: -0.2}})
    assert confirm_lm.difference(table, "C²R").mean == pytest.approx(-0.1)


def test_a_second_try_has_wider_intervals_and_is_corrected_for_no_other_penalty():
    titles = {CHOSEN: promises.SECOND, "C²R": promises.PAPERS}
    table, agreement = (one.replace({"form": titles}) for one in (confirmed(), agreed(-0.01)))
    found = promises.second_verdicts(table, agreement).set_index("measured")
    own = confirm_lm.matched(table).query("form == @promises.SECOND and outcome == @PRIMARY")
    expected = paired_interval(own["own"], own["of size"], level=0.975)
    size = found.loc[f"absorption, excess of {promises.SECOND}"]
    assert tuple(size[["mean", "low", "high"]]) == pytest.approx(expected)
    assert found["verdict"].tolist()[1] == f"better than {promises.PAPERS}" and len(found) == 5
    first = confirm_lm.verdicts(confirmed(), agreed(-0.01)).set_index("verdict")
    by_pairs = found.loc[f"PW-MCC, {promises.SECOND} − none"]
    assert by_pairs["low"] < first.loc["costs no agreement", "low"]

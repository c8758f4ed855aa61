"""The rules that keep and choose forms on a language model, and the study of what is kept."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, confirm_lm, front, shortlist
from c2r_core.experiments.shortlist import PRIMARY

LM = load_profile("smoke").language_model
SIZES = {4096: 0.10, 2048: 0.12, 1024: 0.15}
"""FVU without a penalty, by width."""


def explored(points, seeds=front.EXPLORING, few=()):
    """An `explored_table` from {form: {strength: (fvu, live share, absorption)}}; `few` have seed 0 alone."""
    rows = [
        ("none", 0.0, d_sae, seed, fvu, 0.9, 0.5) for d_sae, fvu in SIZES.items() for seed in seeds
    ]
    for form, by_strength in points.items():
        for strength, measured in by_strength.items():
            own = seeds[:1] if form in few or (form, strength) in few else seeds
            rows += [(form, strength, 4096, seed, *measured) for seed in own]
    columns = ["form", "strength", "d_sae", "seed", "fvu", "live share", PRIMARY]
    return pd.DataFrame(rows, columns=columns)


KNOWN = {
    "C²R": {0.3: (0.11, 0.8, 0.4), 0.8839: (0.119, 0.75, 0.3), 2.6: (0.2, 0.9, 0.1)},
    "OrtSAE": {0.3: (0.11, 0.8, 0.4), 0.8839: (0.11, 0.8, 0.4), 2.6: (0.11, 0.69, 0.2)},
}


def ranked(table):
    return shortlist.strength_table(table).set_index(["form", "strength"])


def test_a_strength_must_be_cheap_and_alive_and_the_weakest_of_equals_is_first():
    table = ranked(explored(KNOWN))
    assert list(table.index[:3]) == [("C²R", 0.3), ("C²R", 0.8839), ("C²R", 2.6)]
    assert table["rank"].tolist() == [2, 1, 3, 1, 2, 3]
    assert not table.loc[[("C²R", 2.6), ("OrtSAE", 2.6)], "allowed"].any()
    assert table.loc[("C²R", 0.8839), "fvu ratio"] == pytest.approx(1.19)
    assert set(table["seeds"]) == {3}


def test_where_no_strength_is_allowed_the_weakest_is_first_and_is_said_not_to_be():
    points = KNOWN | {"directed": {2.6: (0.3, 0.9, 0.1), 0.3: (0.2, 0.9, 0.5)}}
    table = ranked(explored(points)).loc["directed"]
    assert table["rank"].to_dict() == {0.3: 1, 2.6: 2} and not table["allowed"].any()


def test_kept_are_the_rivals_and_three_forms_at_two_strengths_each():
    one = {0.3: (0.11, 0.8, 0.35), 0.8839: (0.115, 0.8, 0.3), 2.6: (0.118, 0.8, 0.33)}
    points = KNOWN | {
        "held norms": one,
        "directed": {0.3: (0.3, 0.8, 0.1)},  # too dear
        "directed, margin": {s: (fvu, live, a - 0.05) for s, (fvu, live, a) in one.items()},
        "directed OrtSAE": {0.3: (0.1195, 0.8, 0.2)},
        "silent partner, directed": {0.3: (0.1195, 0.8, 0.4)},
    }
    assert shortlist.kept(explored(points, seeds=(0,))) == {
        "C²R": (0.3, 0.8839),
        "OrtSAE": (0.3, 0.8839),
        "directed OrtSAE": (0.3,),
        "directed, margin": (0.8839, 2.6),
        "held norms": (0.8839, 2.6),
    }


def test_the_form_has_the_lowest_excess_over_size_whatever_its_absorption():
    points = KNOWN | {
        "held norms": {0.3: (0.11, 0.8, 0.35)},
        "directed": {0.3: (0.3, 0.8, 0.1)},  # no strength is allowed
        "directed OrtSAE": {0.3: (0.11, 0.8, 0.35), 0.8839: (0.5, 0.8, 0.1)},
    }
    table = explored(points)
    found = shortlist.choice(table)
    assert found.form == "directed OrtSAE", "of equals the first in the list"
    assert found.strengths == {"C²R": 0.8839, "OrtSAE": 0.3, "directed OrtSAE": 0.3}
    # With fewer latents absorption falls from 0.5 at an FVU of 0.10 to 0.2 at 0.12.
    table.loc[(table["form"] == "none") & (table["d_sae"] == 2048), PRIMARY] = 0.2
    held, c2r = ranked(table).loc[[("held norms", 0.3), ("C²R", 0.8839)], "excess"]
    assert (held, c2r) == pytest.approx((0.35 - 0.35, 0.3 - (0.5 - 0.3 * 0.019 / 0.02)))
    table.loc[table["form"] == "held norms", ["fvu", PRIMARY]] = 0.102, 0.4
    assert shortlist.choice(table).form == "held norms", "0.4 − 0.47 is less than 0.35 − 0.35"


def test_what_was_not_kept_is_not_chosen():
    points = KNOWN | {
        "directed": {0.3: (0.11, 0.8, 0.1)},
        "held norms": {0.3: (0.11, 0.8, 0.35), 0.8839: (0.11, 0.8, 0.05)},
    }
    table = explored(points, few=["directed", ("held norms", 0.8839)])
    first = (table["form"] == "none") & (table["seed"] == 0)
    table.loc[first, "fvu"] = 0.09  # the ratio is to the same seeds
    row = ranked(table).loc[("directed", 0.3)]
    assert (row["seeds"], row["allowed"]) == (1, False)
    assert row["fvu ratio"] == pytest.approx(0.11 / 0.09)
    found = shortlist.choice(table)
    assert (found.form, found.strengths["held norms"]) == ("held norms", 0.3)


def test_an_sae_whose_absorption_was_not_evaluable_counts_as_not_there():
    points = KNOWN | {"directed": {0.3: (0.11, 0.8, 0.1)}, "held norms": {0.3: (0.11, 0.8, 0.35)}}
    table = explored(points)
    table.loc[(table["form"] == "directed") & (table["seed"] == 2), PRIMARY] = math.nan
    assert shortlist.choice(table).form == "held norms"


def test_what_is_kept_has_the_seeds_that_the_front_has_not(monkeypatch):
    monkeypatch.setattr(shortlist, "KEPT", {"C²R": (0.3, 2.6)})
    names = [cell.name for cell in cells("shortlist", load_profile("smoke"))]
    assert len(names) == len({*names}) == 2 * (3 + 2)
    assert {name.rpartition("-")[2] for name in names} == {"1", "2"}
    of_front = {cell.name for cell in cells("front", load_profile("smoke"))}
    assert {name[:-1] + "0" for name in names} <= of_front


def test_kept_is_what_the_rule_kept(committed_of):
    lm = load_profile("default").language_model
    assert shortlist.kept(front.front_table(committed_of("front"), lm)) == shortlist.KEPT


def test_the_form_that_is_confirmed_is_the_one_that_the_rule_chose(committed_of):
    lm = load_profile("default").language_model
    table = shortlist.explored_table(committed_of("front"), committed_of("shortlist"), lm)
    assert shortlist.choice(table) == (confirm_lm.CHOSEN, confirm_lm.STRENGTHS)

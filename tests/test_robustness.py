"""Assignment consistency under other constants and on other concepts: what is measured, and the tables."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from c2r_core.artefacts.cells import compute
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, robustness, widths
from c2r_core.metrics.assignment import N_SAMPLES
from c2r_core.metrics.carriers import STANDARD_RULE

PROFILE = load_profile("default")


def test_the_saes_are_those_of_study_widths():
    own, trained = (
        {cell.name: cell.settings["arm"] for cell in cells(study, PROFILE)}
        for study in ("robustness", "widths")
    )
    assert own == trained


def test_an_ending_needs_a_stem_and_words_may_have_several():
    words = (" Elections", "thing", "king", " walking", "agents", " ED")
    found = robustness.word_endings(words)
    names = np.array(robustness.ENDINGS)
    held = {word: set(names[of]) for word, of in zip(words, found, strict=True)}
    assert held == {
        " Elections": {"s"},
        "thing": set(),
        "king": set(),
        " walking": {"ing"},
        "agents": {"s"},
        " ED": set(),
    }


def ways(consistency):
    """One SAE: as it is by the standard rule, upside down by the strictest, and with few words."""
    rows = [
        rule._asdict()
        | {"n_samples": n, "consistency": value, "no_carrier_share": 0.2, "n_evaluated": 20}
        for rule, n, value in (
            (STANDARD_RULE, N_SAMPLES, consistency),
            (robustness.RULES[-1], N_SAMPLES, 1 - consistency),
            (STANDARD_RULE, 10, consistency / 2),
        )
    ]
    concept = {
        "concept": "-s",
        "consistency": consistency,
        "precision": 0.5,
        "recall": 1.0,
        "f1": 0.7,
    }
    concept |= {"shuffled_consistency": 0.01, "baseline_consistency": 0.1}
    endings = {
        "concepts": [concept, {"concept": "-ty", "consistency": None}],
        "mean_consistency": consistency + 0.1,
        "mean_no_carrier_share": 0.3,
        "n_evaluated": 9,
    }
    return {"rules": rows, "endings": endings, "probe_f1": {"-s": 0.9, "-ty": 0.4}}


FVU = (0.10, 0.15, 0.20, 0.125, 0.175)
"""Of a seed's SAEs: no penalty at 2048, 1024 and 512 latents, then C²R at 2048 and 1024."""


@pytest.fixture(scope="module")
def values() -> dict[str, dict]:
    """Two whole seeds and one with a single SAE; in each, consistency rises by 0.05 from SAE to SAE."""
    names = [cell.name for cell in cells("robustness", PROFILE)[:11]]
    return {name: ways(0.1 + 0.05 * (number % 5)) for number, name in enumerate(names)}


@pytest.fixture(scope="module")
def table(values) -> pd.DataFrame:
    """The more consistent, the easier to erase."""
    measured = {}
    for number, name in enumerate(values):
        fvu, erased = FVU[number % 5], values[name]["rules"][0]["consistency"]
        of = {
            "reconstruction": {"fvu": fvu, "l0": 10, "num_alive": 9},
            "use": {"sae": {"mean_erased": erased, "mean_steered": 0.5}},
        }
        measured[name] = {
            metric: {"status": "evaluated", "values": of_metric} for metric, of_metric in of.items()
        }
    return robustness.robustness_table(values, measured, PROFILE)


def test_every_sae_has_a_row_for_every_way(table):
    assert len(table) == 11 * 4
    assert table["concepts"].value_counts().to_dict() == {"letters": 33, "endings": 11}
    assert set(table["seed"]) == set(widths.SEEDS[:3])


def test_ways_are_compared_within_seeds(table):
    found = robustness.ways_table(table, 2048)
    assert list(found["concepts"]) == ["letters"] * 3 + ["endings"]
    standard, strictest, few, endings = found.to_dict("records")
    assert (standard["min_cosine"], standard["min_share"]) == tuple(STANDARD_RULE)
    assert few["n_samples"] == 10 and strictest["min_share"] == 0.6
    for way in (standard, few):
        assert (way["standard"], way["erasing"]) == pytest.approx((1, -1))
    assert (strictest["standard"], strictest["erasing"]) == pytest.approx((-1, 1))
    assert endings["standard"] == pytest.approx(1) and np.isnan(endings["erasing"])
    # C²R at 2048 latents is three steps above no penalty at 2048. Its FVU is half-way from there to 1024
    # latents, so what size alone gives is half a step above.
    gains, excesses = (
        [way[name] for way in (standard, few, strictest, endings)] for name in ("gain", "excess")
    )
    assert gains == pytest.approx([0.15, 0.075, -0.15, 0.15])
    assert excesses == pytest.approx([0.125, 0.0625, -0.125, 0.125])
    assert (standard["no_carrier"], endings["no_carrier"]) == pytest.approx((0.2, 0.3))
    names = [robustness.way_name(way) for way in found.to_dict("records")]
    assert names == ["cosine 0.1, share 0.4", "cosine 0.2, share 0.6", "10 words", "endings"]
    shown = robustness.ways_text(found)
    assert shown.loc[0, "erasing"].startswith("-1.00 [") and list(shown["n"]) == [20, 20, 10, 20]
    assert standard["n_evaluated"] == 20 and endings["n_evaluated"] == 9


def test_the_weakest_of_several_rules_decides(table):
    ways = robustness.ways_table(table, 2048)
    lowest = robustness.weakest(ways, "letters", "gain", "low")
    highest = robustness.weakest(ways, "letters", "erasing", "high")
    assert (lowest["gain"], highest["erasing"]) == pytest.approx((-0.15, 1)), "the strictest rule"
    assert robustness.weakest(ways, "endings", "gain", "low")["gain"] == pytest.approx(0.15)
    assert robustness.weakest(pd.DataFrame(), "letters", "gain", "low") is None


def test_each_ending_has_its_gain_and_its_guards(values):
    (row,) = robustness.endings_table(values, PROFILE, 2048).to_dict("records")
    assert row["ending"] == "-s", "what was not evaluable has no row"
    assert (row["none"], row["C²R"], row["gain"]) == pytest.approx((0.1, 0.25, 0.15))
    assert (row["probe_f1"], row["lowest"]) == pytest.approx((0.9, 0.1))
    guards = [row[name] for name in ("precision", "recall", "f1", "shuffled", "baseline")]
    assert guards == pytest.approx([0.5, 1, 0.7, 0.01, 0.1])


def test_without_cells_there_are_no_rows():
    assert robustness.robustness_table({}, {}, PROFILE).empty
    assert robustness.endings_table({}, PROFILE, 2048).empty


# -- what is measured ---------------------------------------------------------------------------

N_WORDS = 200


def planted(monkeypatch, sae) -> SimpleNamespace:
    """Words in -ing, whose activations lie along the first axis, and in -ly, which are like all others.

    The first half are for training.
    """
    stems = [
        "".join(letters)
        for letters in itertools.islice(itertools.product("bcdf", repeat=4), N_WORDS)
    ]
    words = tuple(stem + ("ing", "ly", "o", "o")[i % 4] for i, stem in enumerate(stems))
    activations = 0.1 * torch.randn(N_WORDS, 4, generator=torch.Generator().manual_seed(0))
    activations[::4, 0] += 5
    task = SimpleNamespace(
        words=words, activations=activations, is_test=torch.arange(N_WORDS) >= N_WORDS // 2
    )
    monkeypatch.setattr(robustness, "letter_splits", lambda inputs: [SimpleNamespace(task=task)])
    return SimpleNamespace(sae=sae, seed=0)


class Axes:
    """One latent for each axis."""

    W_dec = torch.eye(4)

    def encode(self, x):
        return x.relu()

    def decode(self, acts):
        return acts @ self.W_dec


def test_an_ending_that_a_probe_tells_is_measured_on_test_words(monkeypatch):
    report, probe_f1 = robustness.ending_assignment(planted(monkeypatch, Axes()))
    by_name = {row.concept: row for row in report.concepts}
    ing, ly, ous = (by_name[name] for name in ("-ing", "-ly", "-ous"))
    assert probe_f1["-ing"] == 1 and ing.n_holding == N_WORDS // 8
    assert (ing.consistency, ing.modal_latent, ing.recall) == (1, 0, 1)
    assert ly.not_evaluable == f"its probe's F1, {probe_f1['-ly']:.2f}, is not above 0.6"
    assert ous.not_evaluable == "its probe's F1, 0.00, is not above 0.6"
    assert report.n_evaluated == 1


def test_every_row_says_by_which_rule_it_was_measured(monkeypatch):
    asked = []

    def letters(sae, *split, **how):
        asked.append(how)
        return SimpleNamespace(
            mean_consistency=how["rule"].min_share,
            mean_no_carrier_share=0.1,
            n_evaluated=how["n_samples"],
        )

    monkeypatch.setattr(robustness, "letter_splits", lambda inputs: [("task", "probes")])
    monkeypatch.setattr(robustness, "letter_acts", lambda inputs: "acts")
    monkeypatch.setattr(robustness, "letter_assignment", letters)
    rows = robustness.rule_rows(SimpleNamespace(sae="sae", seed=3))
    assert {(how["acts"], how["seed"], how["baseline"]) for how in asked} == {("acts", 3, "sae")}
    for row, how in zip(rows, asked, strict=True):
        assert (row["min_cosine"], row["min_share"]) == tuple(how["rule"])
        assert row["consistency"] == row["min_share"] and row["n_evaluated"] == row["n_samples"]


def test_a_cell_at_smoke_size_has_every_rule_and_ending():
    found = compute(cells("robustness", load_profile("smoke"))[0])
    settings = [tuple(row[name] for name in robustness.SETTING) for row in found["rules"]]
    assert len(set(settings)) == len(settings) == len(robustness.RULES) + 2
    names = [concept["concept"] for concept in found["endings"]["concepts"]]
    assert names == [f"-{ending}" for ending in robustness.ENDINGS]

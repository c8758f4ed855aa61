"""What a profile needs is said before anything is computed, and how to get it."""

from __future__ import annotations

import re

import pytest

from c2r_core.__main__ import main
from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import plan as module
from c2r_core.experiments.plan import plan


def by_what(profile, **changes):
    given = load_profile(profile)
    lm = given.language_model.model_copy(update=changes)
    lines = plan(given.model_copy(update={"language_model": lm}))
    return {line.what.partition(" ")[0]: line for line in lines}


def test_smoke_needs_nothing_that_is_not_here(capsys):
    assert main(["plan", "--profile", "smoke"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5 and all(line.startswith("[ok") for line in lines)


def test_the_paper_s_setting_says_what_is_missing_and_costs(capsys, monkeypatch):
    monkeypatch.setattr(module, "product_rate", lambda device: 1e11)
    assert main(["plan", "--profile", "paper"]) == 1
    lines = by_what("paper")
    assert not lines["language"].ok and "hf download google/gemma-2-2b" in str(lines["language"])
    assert not lines["text"].ok and "one document a .txt file" in str(lines["text"])
    assert not lines["time"].ok and "--device cuda" in str(lines["time"])
    # The encoders' products, of three arms of 65 536 latents and one of 16 384, and half the model for each.
    tokens = 244140 * 2048
    operations = 2 * 2304 * (3 * 65536 + 16384) * tokens + 4 * 13 * 24 * 2304**2 * tokens
    hours = float(lines["time"].found.split()[0].replace(",", ""))
    assert hours == pytest.approx(operations / (0.5 * 1e11) / 3600, rel=0.02)


def test_costs_follow_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(module, "product_rate", lambda device: 1e9)
    small, wide = by_what("smoke"), by_what("smoke", d_sae=2**24)
    assert small["memory"].ok and not wide["memory"].ok and not wide["time"].ok
    (tmp_path / "a.txt").write_text("four" * 100)
    own = by_what("smoke", corpus=str(tmp_path), streamed=True)
    assert own["text"].ok and "about 100 tokens" in str(own["text"])
    assert "several times" in str(own["text"])


@pytest.mark.parametrize("model", ["someone/unknown"])
def test_a_model_of_unknown_size_stops_the_plan(model):
    *_, last = plan_lines = list(by_what("smoke", model=model).values())
    assert len(plan_lines) == 3 and not last.ok and "Fetch the model first" in str(last)


def test_activations_can_be_stored_before_what_trains_on_them(capsys):
    for _ in range(2):  # the second time they are in the cache
        assert main(["harvest", "--profile", "smoke"]) == 0
        assert re.fullmatch(
            r"activations of [\d,]+ tokens are in the cache\n", capsys.readouterr().out
        )

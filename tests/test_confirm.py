"""What is confirmed: chosen by the rule of docs/design.md, on fresh seeds, with corrected intervals."""

from __future__ import annotations

import pandas as pd
import pytest

from c2r_core.artefacts.profiles import load_profile
from c2r_core.experiments import cells, confirm, forms, tuning
from c2r_core.statistics import paired_interval


def explored(recovery):
    """A `forms_table` of one seed from {(world, form): {strength: recovery}}, for both architectures."""
    return pd.DataFrame(
        {"world": world, "architecture": architecture, "form": title, "strength": strength}
        | {"seed": 0, "recovery": value}
        for (world, title), by_strength in recovery.items()
        for strength, value in by_strength.items()
        for architecture in forms.ARCHITECTURES
    )


def test_of_forms_that_are_equal_on_the_tree_the_least_harmful_is_chosen():
    on_tree = {"C²R": (0.5, 0.9), "OrtSAE": (0.6, 0.6), "best": (1.0, 0.2), "equal": (0.1, 0.985)}
    on_tree |= {"worse": (0.97, 0.97), "dead": (None, None)}
    alike = {"best": 0.3, "equal": 0.4, "worse": 0.9, "C²R": 0.2, "OrtSAE": 0.2, "dead": 0.9}
    found = confirm.choice(
        explored(
            {
                (forms.TREE, title): dict(zip((0.1, 1.0), of, strict=True))
                for title, of in on_tree.items()
            }
            | {(forms.ALIKE, title): dict.fromkeys((0.1, 1.0), of) for title, of in alike.items()}
            | {(forms.TREE, "none"): {0.0: 1.0}}
        )
    )
    assert found.form == "equal"
    assert found.strengths["relu"] == {"C²R": 1.0, "OrtSAE": 0.1, "equal": 1.0}


def test_the_form_that_is_confirmed_is_the_one_that_the_rule_chose(committed_of):
    table = forms.forms_table(committed_of("forms"), load_profile("default"))
    assert confirm.choice(table) == (confirm.CHOSEN, confirm.STRENGTHS)


def test_what_is_confirmed_has_fresh_seeds_and_one_strength_a_penalty():
    profile = load_profile("smoke")
    made = cells("confirm", profile)
    assert len(made) == 2 * len(forms.toy_worlds(profile)) * 4
    for cell in made:
        assert cell.settings["seeds"] == list(confirm.SEEDS)
        assert len(cell.settings.get("strengths", [0])) == 1
    assert not {*confirm.SEEDS} & {*tuning.SEEDS}


def test_holm_widens_the_intervals_less_and_less_until_one_holds_zero():
    rows = []
    gaps = {("relu", "C²R"): 0.4, ("relu", "OrtSAE"): 0.2, ("batch_topk", "C²R"): 0.001}
    for architecture in forms.ARCHITECTURES:
        for seed, noise in enumerate((0.0, 0.01, -0.01, 0.02, -0.02)):
            about = {"world": forms.TREE, "architecture": architecture, "seed": seed}
            rows.append(about | {"form": confirm.CHOSEN, "recovery": 0.9})
            for other in ("none", *confirm.RIVALS):
                gap = gaps.get((architecture, other), 0.0005)
                rows.append(about | {"form": other, "recovery": 0.9 - gap + noise})
    table = pd.DataFrame(rows)
    plain, corrected = (
        f(table, "recovery") for f in (confirm.differences, confirm.holm_differences)
    )
    assert len(plain) == 6 and len(corrected) == 4
    one, other = [0.9] * 5, [0.9 - 0.4 + noise for noise in (0.0, 0.01, -0.01, 0.02, -0.02)]
    assert plain[forms.TREE, "relu", "C²R"] == paired_interval(one, other)

    def factor(architecture, rival):
        key = (forms.TREE, architecture, rival)
        return (corrected[key].high - corrected[key].mean) / (plain[key].high - plain[key].mean)

    widths = [factor(*key) for key in gaps] + [factor("batch_topk", "OrtSAE")]
    assert widths[0] > widths[1] > widths[2] == pytest.approx(widths[3]) and widths[3] > 1

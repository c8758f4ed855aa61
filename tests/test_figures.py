"""Figures show the data they were given, with labels and units; they are judged on data, not pixels."""

from __future__ import annotations

import matplotlib.colors
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection

from c2r_core.notebook import figures
from c2r_core.statistics import mean_interval


@pytest.fixture(autouse=True)
def close_figures():
    figures.use_style()
    yield
    plt.close("all")


def test_plot_arms_marks_every_seed_and_the_mean():
    table = pd.DataFrame({"arm": ["a", "a", "b", "b"], "fvu": [0.1, 0.3, 0.5, 0.7]})
    ax = figures.plot_arms(table, "fvu", label="FVU (share of variance)")
    marks = [points.get_offsets()[:, 1].tolist() for points in ax.collections[::2]]
    assert marks == [[0.1, 0.3], [0.5, 0.7]]
    bars = [bar.get_segments()[0][0][1] for bar in ax.collections[1::2]]
    assert bars == pytest.approx([0.2, 0.6])
    assert [t.get_text() for t in ax.get_xticklabels()] == ["a", "b"]
    assert ax.get_ylabel() == "FVU (share of variance)"
    assert ax.get_ylim()[0] == 0 and ax.get_ylim()[1] > 0.7 * 1.04, "no mark is cut at the top"
    shapes = [points.get_paths()[0].vertices.shape for points in ax.collections[::2]]
    assert shapes[0] != shapes[1], "arms must differ in grey too"


def test_plot_grouped_marks_every_seed_beside_its_group():
    table = pd.DataFrame(
        {
            "family": ["p", "p", "q", "q", "q"],
            "arm": ["a", "b", "a", "b", "b"],
            "fvu": [0.1, 0.2, 0.3, 0.4, 0.6],
        }
    )
    ax = figures.plot_grouped(table, "family", "fvu", label="FVU (share)")
    bars = [item for item in ax.collections if isinstance(item, LineCollection)]
    marks = [item.get_offsets() for item in ax.collections if item not in bars]
    np.testing.assert_allclose(np.concatenate(marks[2:]), [[0.11, 0.2], [1.11, 0.4], [1.11, 0.6]])
    heights = [bar.get_segments()[0][0][1] for bar in bars]
    assert heights == pytest.approx([0.1, 0.3, 0.2, 0.5])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["a", "b"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["p", "q"]


def test_an_arm_looks_the_same_in_every_figure():
    table = pd.DataFrame({"arm": ["OrtSAE", "C²R"], "fvu": [0.1, 0.2], "v": [1.0, 2.0]})
    bars = figures.plot_arms(table, "fvu", label="FVU")
    points = figures.plot_points(table.iloc[::-1], "fvu", "v", labels=("FVU", "V"))
    colours = [
        [matplotlib.colors.to_hex(marks.get_facecolor()[0]) for marks in ax.collections[::step]]
        for ax, step in ((bars, 2), (points, 1))
    ]
    assert colours[0] == colours[1][::-1]
    assert colours[0] == [figures.ARMS["OrtSAE"].colour, figures.ARMS["C²R"].colour]


def test_other_names_get_looks_that_no_arm_beside_them_has():
    looks = figures.styles(["baseline", "λ ∝ 1/B", "same λ", "baseline"])
    assert list(looks) == ["baseline", "λ ∝ 1/B", "same λ"]
    assert len({look.colour for look in looks.values()}) == 3
    shown_together = [
        figures.ARMS[name] for name in ("baseline", "C²R", "OrtSAE", "small baseline")
    ]
    assert len({(arm.colour, arm.marker, arm.line) for arm in shown_together}) == 4


def test_lines_that_are_no_arms_have_no_arms_colours():
    looks = figures.styles(["α = 1", "α = 0.5", *range(6)]).values()
    assert len({(look.colour, look.marker) for look in looks}) == 8
    assert {look.colour for look in looks}.isdisjoint(arm.colour for arm in figures.ARMS.values())


def test_plot_lines_joins_points_in_order_of_a_logarithmic_axis():
    table = pd.DataFrame({"arm": ["a", "a", "b"], "w": [1.0, 0.1, 1.0], "v": [5.0, 4.0, 3.0]})
    ax = figures.plot_lines(table, "w", "v", labels=("weight", "V (share)"))
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0.1, 4.0], [1.0, 5.0]])
    assert ax.get_xscale() == "log" and len(ax.lines) == 2
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "1"]
    assert not len(ax.xaxis.get_minorticklocs())


def test_plot_lines_gives_a_mean_over_seeds_its_interval():
    table = pd.DataFrame({"arm": "a", "w": [1, 1, 1, 2], "v": [0.1, 0.2, 0.6, 0.4]})
    ax = figures.plot_lines(table, "w", "v", labels=("weight", "V"), intervals=True)
    (bars,) = ax.containers[0].lines[2]
    ends = [segment[:, 1].tolist() for segment in bars.get_segments()]
    np.testing.assert_allclose(ends, [mean_interval([0.1, 0.2, 0.6])[1:], [0.4, 0.4]])


def test_ticks_of_a_logarithmic_axis_are_the_values_unless_they_are_many():
    few, many = figures.panels(2)
    figures.logarithmic(few, [100, 0.0001221, 100])
    assert [t.get_text() for t in few.get_xticklabels()] == ["0.000122", "100"]
    figures.logarithmic(many, range(1, 8))
    assert many.get_xscale() == "log" and len(many.get_xticks()) != 7


def test_plot_front_has_a_mark_for_every_point_and_joins_one_arm():
    table = pd.DataFrame(
        {
            "arm": ["none", "none", "C²R", "C²R"],
            "size": [2, 1, 2, 2],
            "u": [0.1, 0.2, 0.3, 0.5],
            "v": [0.5, 0.4, 0.1, 0.3],
        }
    )
    ax = figures.plot_front(table, "u", "v", labels=("U (share)", "V (share)"), points=["size"])
    line, _, (bars,) = ax.containers[0]
    np.testing.assert_allclose(line.get_xydata(), [[0.2, 0.4], [0.1, 0.5]])
    assert line.get_linestyle() == "-" and not np.ptp(bars.get_segments(), axis=1).any()
    mark, _, (bars,) = ax.containers[1]
    np.testing.assert_allclose(mark.get_xydata(), [[0.4, 0.2]])
    low, high = mean_interval([0.1, 0.3])[1:]
    np.testing.assert_allclose(bars.get_segments()[0], [[0.4, low], [0.4, high]])
    assert mark.get_linestyle() == "None"


def test_plot_points_has_a_mark_for_every_row():
    table = pd.DataFrame({"k": [10, 5, 10], "u": [0.1, 0.2, 0.4], "v": [1.0, 0.5, 0.7]})
    ax = figures.plot_points(table, "u", "v", "k", labels=("U (share)", "V (share)"))
    assert [points.get_offsets().tolist() for points in ax.collections] == [
        [[0.2, 0.5]],
        [[0.1, 1.0], [0.4, 0.7]],
    ]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["k = 5", "k = 10"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("U (share)", "V (share)")


def test_plot_effects_shows_values_and_ends_from_the_top():
    table = pd.DataFrame({"name": ["a", "b"], "mean": [0.1, 2], "low": [-1, 1], "high": [0.5, 4]})
    ax = figures.plot_effects(table, label="effect (share)")
    bars = ax.containers[0]
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[0.1, 0], [2, 1]])
    ends = [segment[:, 0].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [[-1, 0.5], [1, 4]]
    assert ax.get_ylim()[0] > 1 and ax.get_ylim()[1] < 0, "no row is cut in half"
    assert ax.yaxis_inverted() and [t.get_text() for t in ax.get_yticklabels()] == ["a", "b"]


@pytest.mark.parametrize(("names", "aside"), [("xy", 0), ("xx", 0.11)])
def test_plot_effects_moves_only_arms_of_one_name_apart(names, aside):
    table = pd.DataFrame({"name": list(names), "arm": ["C²R", "OrtSAE"], "mean": [1.0, 2.0]})
    ax = figures.plot_effects(table.assign(low=0, high=3), label="effect")
    places = [bars.lines[0].get_ydata()[0] for bars in ax.containers]
    assert places == pytest.approx([-aside, list(dict.fromkeys(names)).index(names[1]) + aside])
    assert (ax.get_legend() is None) == (aside == 0)
    colours = [bars.lines[0].get_color() for bars in ax.containers]
    assert colours == [figures.ARMS[arm].colour for arm in ("C²R", "OrtSAE")]


def test_plot_matrix_writes_the_numbers():
    ax = figures.plot_matrix(
        torch.tensor([[0.25, 1.0]]), rows=["r"], columns=["c", "d"], label="cosine"
    )
    assert [t.get_text() for t in ax.texts] == ["0.25", "1.00"]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["c", "d"]


def test_plot_firing_has_a_bar_for_every_group():
    ax = figures.plot_firing({"one": [0.2, 0.4], "two": [1.0, 0.0]}, ["alone", "child 1"])
    assert [bar.get_height() for bar in ax.patches] == [0.2, 0.4, 1.0, 0.0]
    assert len({bar.get_hatch() for bar in ax.patches}) == 2
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "two"]


def test_pair_penalties_and_forces_are_the_formulas():
    left, right = figures.plot_pair_penalties()
    values, forces = (
        {line.get_label(): line.get_ydata() for line in ax.lines} for ax in (left, right)
    )
    middle = {name: float(y[50]) for name, y in values.items()}
    ends = {name: float(y[0]) for name, y in values.items()}
    assert middle["sum n₁ + n₂ (C²R)"] == pytest.approx(2**0.5)
    assert ends["sum n₁ + n₂ (C²R)"] == 1
    assert middle["product n₁ · n₂"] == pytest.approx(0.5) and ends["product n₁ · n₂"] == 0
    assert middle["minimum of n₁, n₂"] == pytest.approx(0.5**0.5)
    assert ends["constant (OrtSAE, ½ + ½)"] == middle["constant (OrtSAE, ½ + ½)"] == 1
    assert set(forces["sum n₁ + n₂ (C²R)"]) == {1.0}
    assert forces["product n₁ · n₂"][75] == pytest.approx(0.5), "the other latent's norm"
    assert (forces["minimum of n₁, n₂"][25], forces["minimum of n₁, n₂"][75]) == (1, 0)
    assert set(forces["constant (OrtSAE, ½ + ½)"]) == {0.0}


def test_the_mean_leaves_out_what_was_not_evaluable():
    table = pd.DataFrame({"arm": ["baseline"] * 3, "fvu": [0.1, None, 0.3]})
    ax = figures.plot_arms(table, "fvu", label="FVU")
    marks, bar = ax.collections
    assert len(marks.get_offsets()) == 2
    assert bar.get_segments()[0][0][1] == pytest.approx(0.2)


def test_plot_pairs_sorts_rows_by_the_difference_of_two_arms():
    table = pd.DataFrame(
        {
            "arm": ["a", "a", "b", "b"],
            "letter": ["A", "C", "A", "C"],
            "value": [0.1, 0.5, 0.4, 0.2],
        }
    )
    ends = table.assign(low=table["value"] - 0.1, high=table["value"] + 0.2)
    ax = figures.plot_pairs(ends, by="letter", label="absorbed fraction")
    bars = ax.collections[0]
    np.testing.assert_allclose([bar[:, 1] for bar in bars.get_segments()], [[0.4, 0.7], [0.0, 0.3]])
    ax = figures.plot_pairs(table, by="letter", label="absorbed fraction")
    assert [t.get_text() for t in ax.get_xticklabels()] == ["C", "A"]
    joins, *points = ax.collections
    assert points[0].get_offsets()[0, 0] < 0 < points[1].get_offsets()[0, 0], "none hides another"
    assert [p.get_offsets()[:, 1].tolist() for p in points] == [[0.5, 0.1], [0.2, 0.4]]
    assert [bar[:, 1].tolist() for bar in joins.get_segments()] == [[0.2, 0.5], [0.1, 0.4]]


def test_plot_norms_counts_every_token():
    norms = {"first": np.array([50.0, 60.0]), "others": np.array([1.0, 2.0, 3.0])}
    ax = figures.plot_norms(norms, limit=12.0)
    counted = []
    for outline in ax.patches:  # a step outline visits every bin's height at its two edges
        corners = outline.get_xy()
        flat = np.diff(corners[:, 1]) == 0
        counted.append(corners[:-1][flat & (np.diff(corners[:, 0]) > 0), 1].sum())
    assert counted == [2, 3]
    assert ax.lines[0].get_xdata()[0] == 12.0
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert ax.get_xlabel() == "norm of the activation"


def test_plot_cumulative_is_the_distribution():
    ax = figures.plot_cumulative({"a": torch.tensor([0.3, 0.1, 0.2, 0.4])}, label="cosine")
    assert ax.lines[0].get_xdata().tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert ax.lines[0].get_ydata().tolist() == [0.25, 0.5, 0.75, 1.0]
    assert ax.get_xlabel() == "cosine"


def test_plot_lines_joins_means_in_order_of_the_strength():
    table = pd.DataFrame(
        {
            "front": ["T = 1"] * 4 + ["T = 5"],
            "strength": [0.3, 0.3, 0.0, 0.1, 0.0],
            "fvu": [0.4, 0.6, 0.1, 0.2, 0.1],
            "absorption": [0.0, 0.2, 0.5, 0.3, 0.5],
        }
    )
    ax = figures.plot_lines(
        table,
        "fvu",
        "absorption",
        by="front",
        order="strength",
        labels=("FVU (share)", "absorption"),
    )
    np.testing.assert_allclose(ax.lines[0].get_xydata(), [[0.1, 0.5], [0.2, 0.3], [0.5, 0.1]])
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["T = 1", "T = 5"]
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 2
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("FVU (share)", "absorption")


def test_plot_intervals_shows_means_and_ends():
    table = pd.DataFrame(
        {"world": ["a", "a"], "share": [0.1, 1.0], "mean": [1, 2], "low": [0, 1], "high": [3, 2.5]}
    )
    ax = figures.plot_intervals(table, x="share", by="world", labels=("weight", "MCC"))
    bars = ax.containers[0]
    np.testing.assert_allclose(bars.lines[0].get_xydata(), [[0.1, 1], [1, 2]])
    ends = [segment[:, 1].tolist() for segment in bars.lines[2][0].get_segments()]
    assert ends == [[0, 3], [1, 2.5]]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.1", "1"]

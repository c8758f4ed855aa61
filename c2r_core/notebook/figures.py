"""Every figure of the notebooks: functions that take data and return Axes, all in one look.

`label` and `labels` are what the axes say, units included; `ax` is a new figure's if not given.
"""

from __future__ import annotations

import itertools
import textwrap
from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor

from c2r_core.notebook.looks import ARMS, COLOURS, GREY, Style, styles
from c2r_core.statistics import mean_interval


def use_style() -> None:
    """Set the look of all figures of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(COLOURS),
        rc={
            "figure.figsize": (7.0, 3.4),
            "figure.dpi": 110,
            "figure.constrained_layout.use": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.titlesize": "medium",
            "legend.frameon": False,
            "savefig.bbox": "tight",
        },
    )


def panels(n: int, *, width: float = 3.4, height: float = 3.2) -> list[Axes]:
    """A row of n Axes in one new figure."""
    _, axes = plt.subplots(1, n, figsize=(width * n, height), squeeze=False)
    return list(axes[0])


def plot_arms(table: pd.DataFrame, metric: str, *, label: str, ax: Axes | None = None) -> Axes:
    """One metric of every arm: a mark for each run, a bar across at their mean.

    The table has the columns `arm` and `metric`, one row per run.
    """
    ax = ax or panels(1)[0]
    looks = styles(table["arm"])
    for position, (arm, look) in enumerate(looks.items()):
        _marks_and_mean(ax, table.loc[table["arm"] == arm, metric], position, 0.3, look, 0.15)
    _name_places(ax, looks, rotation=20, ha="right")
    bottom, top = ax.get_ylim()
    if bottom > 0:
        ax.set_ylim(0, 1.05 * top)  # or marks at the top would be cut
    ax.set(ylabel=label, xlim=(-0.6, len(looks) - 0.4))
    return ax


def plot_grouped(
    table: pd.DataFrame, group: str, metric: str, *, label: str, ax: Axes | None = None
) -> Axes:
    """One metric of every group and arm: a mark for each run, arms side by side within a group.

    The table has the columns `group`, `arm` and `metric`, one row per run; groups are in order of appearance.
    """
    ax = ax or panels(1, width=9)[0]
    groups, looks = list(dict.fromkeys(table[group])), styles(table["arm"])
    width = 0.66 / max(3, len(looks))
    for aside, (arm, look) in zip(_side_by_side(len(looks)), looks.items(), strict=True):
        for place, name in enumerate(groups):
            values = table.loc[(table["arm"] == arm) & (table[group] == name), metric]
            look = look if place == 0 else look._replace(label=None)  # once in the legend
            _marks_and_mean(ax, values, place + aside * width, width * 0.4, look)
    for edge in range(1, len(groups)):
        ax.axvline(edge - 0.5, color="0.9", linewidth=1)
    _name_places(ax, groups)
    ax.set(ylabel=label, xlim=(-0.5, len(groups) - 0.5))
    return _legend_beside(ax)


def _marks_and_mean(
    ax: Axes, values: pd.Series, place: float, half: float, look: Style, spread: float = 0
) -> None:
    values = values.dropna().to_numpy(dtype=float)  # NaN: not evaluable
    places = place + (np.linspace(-spread, spread, len(values)) if len(values) > 1 else 0 * values)
    ax.scatter(places, values, s=32, label=look.label, zorder=3, **look.mark)
    if len(values):
        ax.hlines(values.mean(), place - half, place + half, color=look.colour, linewidth=2)


def plot_lines(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    labels: tuple[str, str],
    by: str = "arm",
    order: str | None = None,
    intervals: bool = False,
    ax: Axes | None = None,
) -> Axes:
    """One line of y against x for every value of `by`: means over rows of equal `order`.

    Points are joined along `order`, a column; along x itself, on a logarithmic scale, if it is not given.
    With `intervals` a point has the 95 % interval of its mean, if it rests on several rows, one a seed.
    """
    ax = ax or panels(1, width=5)[0]
    for name, look in styles(table[by]).items():
        rows = table[table[by] == name].groupby(order or x)
        points = rows[x].mean(), rows[y].mean()
        ax.plot(*points, look.line, markersize=6, label=look.label, **look.mark)
        if intervals:
            reach = [_half_widths(rows[column]) for column in ([y, x] if order else [y])]
            bars = {"ecolor": look.colour, "elinewidth": 1, "capsize": 2, "alpha": 0.7}
            ax.errorbar(*points, *reach, fmt="none", **bars)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    if order:
        ax.locator_params(axis="x", nbins=4)
    else:
        logarithmic(ax, table[x])
    return _legend_beside(ax)


def logarithmic(ax: Axes, values: Iterable[float]) -> None:
    """Make the x axis logarithmic, with ticks at the values if they are few: other labels would overlap."""
    ax.set_xscale("log")
    values = sorted(set(values))
    if len(values) <= 6:
        ax.set_xticks(values, [f"{value:.{3 if value < 100 else 6}g}" for value in values])
        ax.minorticks_off()


def plot_front(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    labels: tuple[str, str],
    points: Sequence[str],
    line: str = "none",
    ax: Axes | None = None,
) -> Axes:
    """An outcome against its cost: a mark for every arm and point, with the 95 % interval of y over its rows.

    The table has the columns `arm`, `x`, `y`, and `points`, whose values tell an arm's points apart, such as
    a strength; one row per run. A single run has no interval. The points of the arm `line` are joined.
    """
    ax = ax or panels(1)[0]
    for name, look in styles(table["arm"]).items():
        marks = table[table["arm"] == name].dropna(subset=[x, y]).groupby(list(points))
        means = marks[x].mean(), marks[y].mean()
        line_of = {"linestyle": look.line if name == line else "", "label": look.label}
        bars = {"yerr": _half_widths(marks[y]), "elinewidth": 0.8, "ecolor": (look.colour, 0.5)}
        ax.errorbar(*means, markersize=5, **bars, **line_of, **look.mark)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    return _legend_beside(ax)


def plot_points(
    table: pd.DataFrame,
    x: str,
    y: str,
    by: str = "arm",
    *,
    labels: tuple[str, str],
    ax: Axes | None = None,
) -> Axes:
    """One column against another, a mark for every row, told apart by a third, `by`."""
    ax = ax or panels(1)[0]
    numbers = pd.api.types.is_numeric_dtype(table[by])
    for name, look in styles(sorted(table[by]) if numbers else table[by]).items():
        rows = table[table[by] == name]
        label = f"{by} = {name}" if numbers else look.label
        ax.scatter(rows[x], rows[y], s=40, label=label, zorder=3, **look.mark)
    ax.margins(0.12)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    return _legend_beside(ax) if len(table) else ax


def plot_effects(table: pd.DataFrame, *, label: str, ax: Axes | None = None) -> Axes:
    """Values with 95 % intervals, one below the other, the first at the top.

    The table has the columns `name`, `mean`, `low` and `high`, and perhaps `arm`; several arms of one
    name stand beside each other.
    """
    ax = ax or panels(1)[0]
    names = list(dict.fromkeys(table["name"]))
    looks = styles(table["arm"] if "arm" in table else [None])
    beside = len(looks) > 1 and len(names) < len(table)
    for aside, (arm, look) in zip(_side_by_side(len(looks)), looks.items(), strict=True):
        rows = table if arm is None else table[table["arm"] == arm]
        places = rows["name"].map(names.index) + aside * 0.22 * beside
        line = {"linestyle": "", "label": look.label, **look.mark}
        ax.errorbar(rows["mean"], places, xerr=_reach(rows), capsize=3, **line)
    ax.axvline(0, **GREY)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel=label, ylim=(len(names) - 0.4, -0.6))
    ax.grid(axis="y", visible=False)
    return _legend_beside(ax) if beside else ax


def plot_intervals(
    table: pd.DataFrame, *, x: str, by: str, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Means with 95 % intervals against a weight on a logarithmic axis, a line for every group.

    The table has the columns `by`, `x`, `mean`, `low` and `high`.
    """
    ax = ax or panels(1)[0]
    looks = styles(table[by])
    for aside, (name, look) in zip(_side_by_side(len(looks)), looks.items(), strict=True):
        rows = table[table[by] == name]
        places = rows[x] * 1.06**aside  # or bars would hide each other
        line = {"linestyle": look.line, "label": look.label, **look.mark}
        ax.errorbar(places, rows["mean"], yerr=_reach(rows), capsize=2, **line)
    ax.axhline(0, **GREY)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    logarithmic(ax, table[x])
    return _legend_beside(ax)


def plot_pairs(table: pd.DataFrame, *, by: str, label: str, ax: Axes | None = None) -> Axes:
    """A value for every row and arm, the arms of a row joined, rows sorted by their difference.

    The table has the columns `arm`, `by` (such as "letter") and `value`, one row for each pair of the
    former, and perhaps its interval's `low` and `high`, drawn in place of what joins the arms. Rows are
    sorted by the second arm minus the first.
    """
    ax = ax or panels(1, width=9)[0]
    looks = styles(table["arm"])
    wide = table.pivot(index=by, columns="arm", values="value")[list(looks)]
    if len(looks) > 1:
        wide = wide.loc[(wide.iloc[:, 1] - wide.iloc[:, 0]).sort_values().index]
    if "low" not in table:
        ax.vlines(range(len(wide)), wide.min(axis=1), wide.max(axis=1), color="0.75", linewidth=2)
    for aside, (arm, look) in zip(_side_by_side(len(looks)), looks.items(), strict=True):
        rows = table[table["arm"] == arm].set_index(by).reindex(wide.index)
        places = np.arange(len(wide)) + aside * 0.16  # or marks would hide each other
        if "low" in table:
            ax.vlines(places, rows["low"], rows["high"], color=look.colour, linewidth=1)
        ax.scatter(places, rows["value"], label=look.label, zorder=3, **look.mark)
    ax.set_xticks(range(len(wide)), wide.index)
    ax.set(xlabel=by, ylabel=label)
    return _legend_beside(ax)


def plot_matrix(
    values: Tensor | np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    decimals: int = 2,
    ax: Axes | None = None,
) -> Axes:
    """A small matrix of cosines with its numbers written into the cells, colours centred at 0."""
    ax = ax or panels(1)[0]
    colours = {"vmin": -1, "vmax": 1, "cmap": "RdBu_r", "cbar_kws": {"label": label}}
    numbers = {"annot": True, "fmt": f".{decimals}f", "annot_kws": {"size": 8}}
    names = {"xticklabels": list(columns), "yticklabels": list(rows)}
    sns.heatmap(np.asarray(values), ax=ax, linewidths=0.5, **colours, **numbers, **names)
    ax.tick_params(axis="y", rotation=0)
    ax.set_xticks(ax.get_xticks(), list(columns), rotation=30, ha="right")
    return ax


RESULTS = {"contrary": "#d1603d", "not shown": "#eeeeee", "kept": "#5ba3a0"}
"""Colours of the words in `plot_results`."""


def plot_results(words: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """A table whose entries are words of RESULTS, each written on its colour; NaN stays empty."""
    ax = ax or panels(1, width=1.2 * len(words.columns) + 2, height=0.3 * len(words) + 1)[0]
    codes = words.apply(lambda column: column.map(list(RESULTS).index, na_action="ignore"))
    how = {"cmap": list(RESULTS.values()), "vmin": 0, "vmax": len(RESULTS) - 1, "cbar": False}
    notes = {"annot": words.fillna(""), "fmt": "", "annot_kws": {"size": 8, "color": "black"}}
    names = {"xticklabels": [textwrap.fill(str(name), 16) for name in words.columns]}
    sns.heatmap(codes.astype(float), ax=ax, linewidths=1.5, **how, **notes, **names)
    ax.set(xlabel="", ylabel="")
    ax.xaxis.tick_top()
    ax.tick_params(axis="both", length=0, labelsize=9)
    ax.tick_params(axis="y", rotation=0)
    return ax


def plot_firing(shares: Mapping[str, Sequence[float]], groups: Sequence[str], ax=None) -> Axes:
    """How often a parent's latent fires while its parent is on, by which child is on with it."""
    ax = ax or panels(1, width=7)[0]
    looks, width = styles(shares), 0.8 / len(shares)
    hatches = itertools.cycle(("", "//", ".."))
    for aside, (name, values), hatch in zip(
        _side_by_side(len(shares)), shares.items(), hatches, strict=False
    ):
        places = np.arange(len(groups)) + aside * width
        bars = {"color": looks[name].colour, "hatch": hatch, "edgecolor": "white", "label": name}
        ax.bar(places, values, width * 0.92, **bars)
    _name_places(ax, groups)
    ax.set(ylabel="share of samples in which\nthe parent's latent fires", ylim=(0, 1.05))
    return _legend_beside(ax)


PAIR_PENALTIES: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "C²R": ("sum n₁ + n₂ (C²R)", lambda a, b: a + b),
    "product": ("product n₁ · n₂", lambda a, b: a * b),
    "minimum": ("minimum of n₁, n₂", torch.minimum),
    "OrtSAE": ("constant (OrtSAE, ½ + ½)", lambda a, b: torch.ones_like(a)),
}


def plot_pair_penalties(axes: Sequence[Axes] | None = None) -> list[Axes]:
    """Penalty of a pair, and its derivative by the first latent's norm, by how its energy is shared."""
    left, right = axes or panels(2, width=4.6)
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    for arm, (label, penalty) in PAIR_PENALTIES.items():
        first, second = share.sqrt().requires_grad_(), (1 - share).sqrt()
        values = penalty(first, second)
        force = torch.zeros_like(share)
        if values.requires_grad:
            (force,) = torch.autograd.grad(values.sum(), first)
        look = {"color": ARMS[arm].colour, "linestyle": ARMS[arm].line, "linewidth": 2}
        left.plot(share, values.detach(), label=label, **look)
        right.plot(share, force, label=label, **look)
    x = "share of the concept's energy\nin the first latent"
    left.set(xlabel=x, ylabel="penalty, per unit of s", ylim=(0, 1.6))
    right.set(xlabel=x, ylabel="force on the first latent,\nper unit of s", ylim=(-0.05, 1.6))
    return [left, _legend_beside(right)]


def plot_norms(norms: Mapping[str, np.ndarray], limit: float, ax: Axes | None = None) -> Axes:
    """Histogram of activation norms by kind of token, with the limit above which they are dropped."""
    ax = ax or panels(1, width=7)[0]
    every = np.concatenate([np.ravel(values) for values in norms.values()])
    edges = np.geomspace(every.min(), every.max() * 1.001, 60)
    for (name, values), look in zip(norms.items(), styles(norms).values(), strict=True):
        line = {"linestyle": look.line, "color": look.colour, "linewidth": 2}
        ax.hist(values, edges, histtype="step", label=name, **line)
    ax.axvline(limit, label="dropped above", **GREY)
    ax.set(xscale="log", yscale="log", xlabel="norm of the activation", ylabel="number of tokens")
    return _legend_beside(ax)


def plot_cumulative(
    values: Mapping[str, Tensor | np.ndarray], *, label: str, ax: Axes | None = None
) -> Axes:
    """Cumulative distribution of a value over latents, one curve an arm."""
    ax = ax or panels(1, width=7)[0]
    for (name, one), look in zip(values.items(), styles(values).values(), strict=True):
        height = np.arange(1, len(one) + 1) / len(one)
        ax.plot(
            np.sort(np.asarray(one)), height, look.line, color=look.colour, label=name, linewidth=2
        )
    ax.set(xlabel=label, ylabel="share of latents at or below", ylim=(0, 1))
    return _legend_beside(ax)


def _side_by_side(n: int) -> np.ndarray:
    """Offsets of n things about 0, one apart."""
    return np.arange(n) - (n - 1) / 2


def _half_widths(groups: Iterable[tuple[Hashable, pd.Series]]) -> list[float]:
    """Of the 95 % intervals of the groups' means; 0 for a group of less than two values."""
    values = [group.dropna() for _, group in groups]
    return [mean_interval(one).high - one.mean() if len(one) > 1 else 0.0 for one in values]


def _reach(rows: pd.DataFrame) -> list[pd.Series]:
    return [rows["mean"] - rows["low"], rows["high"] - rows["mean"]]


def _name_places(ax: Axes, names: Collection[Hashable], **text: Any) -> None:
    ax.set_xticks(range(len(names)), list(names), **text)
    ax.grid(axis="x", visible=False)


def _legend_beside(ax: Axes) -> Axes:
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax

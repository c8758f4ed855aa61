"""Every figure of the notebooks: functions that take data and return Axes, all in one look.

Arms differ by marker and by lightness as well as by colour, so that figures read in grey.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
import torch
from matplotlib.axes import Axes
from torch import Tensor

# Dark, middle and light, in an order that also separates the hues.
COLOURS = ("#1b3a57", "#d1603d", "#5ba3a0", "#c9b458", "#8a6fa8", "#9a9a9a", "#5f7f2e", "#e39aa8")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<")


def use_style() -> None:
    """Set the look of all figures of a notebook."""
    sns.set_theme(
        context="notebook",
        style="whitegrid",
        palette=list(COLOURS),
        rc={
            "figure.figsize": (7.0, 3.4),
            "figure.dpi": 80,
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
    """One metric of every arm: a mark for each seed, a bar across at their mean.

    Parameters
    ----------
    table : DataFrame with the columns `arm` and `metric`, one row per run
    label : str
        What the axis says, unit included.
    """
    ax = ax or panels(1)[0]
    for position, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        values = rows[metric].to_numpy(dtype=float)
        offsets = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        style = {"color": COLOURS[position % 8], "marker": MARKERS[position % 8]}
        ax.scatter(position + offsets, values, s=36, label=arm, zorder=3, **style)
        ax.hlines(values.mean(), position - 0.3, position + 0.3, color=style["color"], linewidth=2)
    arms = list(dict.fromkeys(table["arm"]))
    ax.set_xticks(range(len(arms)), arms, rotation=20, ha="right")
    ax.set(ylabel=label, ylim=(min(0.0, ax.get_ylim()[0]), None), xlim=(-0.6, len(arms) - 0.4))
    ax.grid(axis="x", visible=False)
    return ax


def plot_grouped(
    table: pd.DataFrame, group: str, metric: str, *, label: str, ax: Axes | None = None
) -> Axes:
    """One metric of every group and arm: a mark for each seed, arms side by side within a group.

    Parameters
    ----------
    table : DataFrame with the columns `group`, `arm` and `metric`, one row per run
    group : str
        Column whose values become the places along the axis, in order of appearance.
    label : str
        What the axis says, unit included.
    """
    ax = ax or panels(1, width=9)[0]
    groups, arms = list(dict.fromkeys(table[group])), list(dict.fromkeys(table["arm"]))
    for position, arm in enumerate(arms):
        style = {"color": COLOURS[position % 8], "marker": MARKERS[position % 8]}
        rows = table[table["arm"] == arm]
        places = rows[group].map(groups.index) + (position - (len(arms) - 1) / 2) * 0.22
        ax.scatter(places, rows[metric], s=30, label=arm, zorder=3, **style)
        means = rows.groupby(group, sort=False)[metric].mean()
        for name, mean in means.items():
            place = groups.index(name) + (position - (len(arms) - 1) / 2) * 0.22
            ax.hlines(mean, place - 0.09, place + 0.09, color=style["color"], linewidth=2)
    for edge in range(1, len(groups)):
        ax.axvline(edge - 0.5, color="0.9", linewidth=1)
    ax.set_xticks(range(len(groups)), groups)
    ax.set(ylabel=label, xlim=(-0.5, len(groups) - 0.5))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_curves(
    table: pd.DataFrame, x: str, y: str, *, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """One curve an arm of y against x, x on a logarithmic scale.

    Parameters
    ----------
    table : DataFrame with the columns `arm`, `x` and `y`, one row per point
    labels : what the two axes say, units included
    """
    ax = ax or panels(1, width=5)[0]
    for position, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        style = {"color": COLOURS[position % 8], "marker": MARKERS[position % 8]}
        ordered = rows.sort_values(x)
        ax.plot(ordered[x], ordered[y], label=arm, markersize=6, **style)
    ax.set(xscale="log", xlabel=labels[0], ylabel=labels[1])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_trade(
    table: pd.DataFrame, x: str, y: str, *, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """One metric against another, a mark for every run, with a line from the first arm's mean.

    Parameters
    ----------
    table : DataFrame with the columns `arm`, `x` and `y`, one row per run; the first arm is the
        baseline
    labels : what the two axes say, units included
    """
    ax = ax or panels(1)[0]
    means = table.groupby("arm", sort=False)[[x, y]].mean()
    origin = means.iloc[0] if len(means) else None
    for position, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        style = {"color": COLOURS[position % 8], "marker": MARKERS[position % 8]}
        ax.scatter(rows[x], rows[y], s=60, label=arm, zorder=3, **style)
        ends = [(origin[axis], means.loc[arm, axis]) for axis in (x, y)]
        ax.plot(*ends, color=style["color"], linewidth=1, linestyle=":")
    ax.margins(0.15)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    if len(means):
        ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_points(
    table: pd.DataFrame, x: str, y: str, by: str, *, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """One column against another, a mark for every row, told apart by a third.

    Parameters
    ----------
    table : DataFrame with the columns `x`, `y` and `by`
    labels : what the two axes say, units included
    """
    ax = ax or panels(1)[0]
    for position, (group, rows) in enumerate(table.groupby(by)):
        style = {"color": COLOURS[position % 8], "marker": MARKERS[position % 8]}
        ax.scatter(rows[x], rows[y], s=36, label=f"{by} = {group}", zorder=3, **style)
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_effects(table: pd.DataFrame, *, label: str, ax: Axes | None = None) -> Axes:
    """Values with 95 % intervals, one below the other, the first at the top.

    Parameters
    ----------
    table : DataFrame with the columns `name`, `mean`, `low` and `high`
    label : str
        What the axis says, unit included.
    """
    ax = ax or panels(1)[0]
    places = range(len(table))
    reach = [table["mean"] - table["low"], table["high"] - table["mean"]]
    ax.errorbar(table["mean"], places, xerr=reach, fmt="o", color=COLOURS[0], capsize=3)
    ax.axvline(0, color="0.4", linewidth=1, zorder=1)
    ax.set_yticks(places, table["name"])
    ax.invert_yaxis()
    ax.set(xlabel=label)
    ax.grid(axis="y", visible=False)
    return ax


def plot_matrix(
    values: Tensor | np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    label: str,
    low: float = 0.0,
    high: float = 1.0,
    decimals: int = 2,
    ax: Axes | None = None,
) -> Axes:
    """A small matrix with its numbers written into the cells."""
    ax = ax or panels(1)[0]
    sns.heatmap(
        np.asarray(values),
        ax=ax,
        vmin=low,
        vmax=high,
        cmap="rocket_r",
        annot=True,
        fmt=f".{decimals}f",
        annot_kws={"size": 8},
        linewidths=0.5,
        xticklabels=list(columns),
        yticklabels=list(rows),
        cbar_kws={"label": label},
    )
    ax.tick_params(axis="y", rotation=0)
    ax.set_xticks(ax.get_xticks(), list(columns), rotation=30, ha="right")
    return ax


def plot_firing(shares: Mapping[str, Sequence[float]], groups: Sequence[str], ax=None) -> Axes:
    """How often a parent's latent fires while its parent is on, by which child is on with it.

    Parameters
    ----------
    shares : mapping from the name of an SAE to one share for each group
    groups : names of the groups, such as "alone", "child 1"
    """
    ax = ax or panels(1, width=7)[0]
    width = 0.8 / len(shares)
    for position, (name, values) in enumerate(shares.items()):
        places = np.arange(len(groups)) + (position - (len(shares) - 1) / 2) * width
        ax.bar(
            places,
            values,
            width * 0.92,
            label=name,
            color=COLOURS[position % 8],
            hatch=("", "//", "..")[position % 3],
            edgecolor="white",
        )
    ax.set_xticks(range(len(groups)), groups)
    ax.set(ylabel="share of samples in which\nthe parent's latent fires", ylim=(0, 1.05))
    ax.grid(axis="x", visible=False)
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_pair_penalties(ax: Axes | None = None) -> Axes:
    """Penalty of a pair against how its energy is shared, for four ways to join the two norms."""
    ax = ax or panels(1, width=7)[0]
    share = torch.linspace(0, 1, 101, dtype=torch.float64)
    first, second = share.sqrt(), (1 - share).sqrt()
    curves = {
        "sum n₁ + n₂ (C²R)": first + second,
        "product n₁ · n₂": first * second,
        "minimum of n₁, n₂": torch.minimum(first, second),
        "constant (OrtSAE, ½ + ½)": torch.ones_like(share),
    }
    for (name, values), style in zip(curves.items(), ("-", "--", ":", "-."), strict=True):
        ax.plot(share, values, style, label=name, linewidth=2)
    ax.set(
        xlabel="share of the concept's energy in the first latent",
        ylabel="penalty, per unit of s",
        ylim=(0, 1.6),
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_norms(norms: Mapping[str, np.ndarray], limit: float, ax: Axes | None = None) -> Axes:
    """Histogram of activation norms by kind of token, with the limit above which they are dropped."""
    ax = ax or panels(1, width=7)[0]
    highest = max(float(np.max(values)) for values in norms.values() if len(values))
    lowest = min(float(np.min(values)) for values in norms.values() if len(values))
    edges = np.geomspace(lowest, highest * 1.001, 60)
    for (name, values), style in zip(norms.items(), ("-", "--", ":"), strict=False):
        ax.hist(values, edges, histtype="step", linewidth=2, linestyle=style, label=name)
    ax.axvline(limit, color="0.4", linewidth=1)
    ax.annotate("dropped above", (limit, 0.96), xycoords=("data", "axes fraction"), fontsize=9)
    ax.set(xscale="log", yscale="log", xlabel="norm of the activation", ylabel="number of tokens")
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_cumulative(
    values: Mapping[str, Tensor | np.ndarray], *, label: str, ax: Axes | None = None
) -> Axes:
    """Cumulative distribution of a value over latents, one curve an arm."""
    ax = ax or panels(1, width=7)[0]
    styles = ("-", "--", ":", "-.")
    for position, (name, one) in enumerate(values.items()):
        ordered = np.sort(np.asarray(one))
        height = np.arange(1, len(ordered) + 1) / len(ordered)
        ax.plot(
            ordered,
            height,
            styles[position % 4],
            color=COLOURS[position % 8],
            label=name,
            linewidth=2,
        )
    ax.set(xlabel=label, ylabel="share of latents at or below", ylim=(0, 1))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_letters(table: pd.DataFrame, *, label: str, ax: Axes | None = None) -> Axes:
    """A value for every letter and arm.

    Parameters
    ----------
    table : DataFrame with the columns `arm`, `letter`, `value`
    """
    ax = ax or panels(1, width=9)[0]
    letters = sorted(table["letter"].unique())
    for position, (arm, rows) in enumerate(table.groupby("arm", sort=False)):
        places = [letters.index(letter) for letter in rows["letter"]]
        ax.scatter(
            places,
            rows["value"],
            color=COLOURS[position % 8],
            marker=MARKERS[position % 8],
            label=arm,
        )
    ax.set_xticks(range(len(letters)), letters)
    ax.set(xlabel="first letter", ylabel=label, ylim=(-0.02, 1.02))
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_fronts(
    table: pd.DataFrame,
    x: str,
    y: str,
    *,
    labels: tuple[str, str],
    by: str = "front",
    order: str = "strength",
    ax: Axes | None = None,
) -> Axes:
    """One metric against another, a line for every front: means over seeds, joined along `order`.

    Parameters
    ----------
    table : DataFrame with the columns `by`, `order`, `x` and `y`, one row per run
    labels : what the two axes say, units included
    """
    ax = ax or panels(1)[0]
    styles = ("-", "--", ":", "-.")
    for position, (front, rows) in enumerate(table.groupby(by, sort=False)):
        points = rows.groupby(order)[[x, y]].mean().sort_index()
        ax.plot(
            points[x],
            points[y],
            styles[position % 4],
            color=COLOURS[position % 8],
            marker=MARKERS[position % 8],
            markersize=6,
            linewidth=1.5,
            label=front,
        )
    ax.set(xlabel=labels[0], ylabel=labels[1])
    ax.locator_params(axis="x", nbins=4)
    ax.legend(fontsize="small")
    return ax


def plot_intervals(
    table: pd.DataFrame, *, x: str, by: str, labels: tuple[str, str], ax: Axes | None = None
) -> Axes:
    """Means with 95 % intervals against a weight on a logarithmic axis, a line for every group.

    Parameters
    ----------
    table : DataFrame with the columns `by`, `x`, `mean`, `low` and `high`
    labels : what the two axes say, units included
    """
    ax = ax or panels(1)[0]
    styles = ("-", "--", ":", "-.")
    groups = list(table.groupby(by, sort=False))
    for position, (group, rows) in enumerate(groups):
        aside = 1.06 ** (position - (len(groups) - 1) / 2)  # or bars would hide each other
        ax.errorbar(
            rows[x] * aside,
            rows["mean"],
            yerr=[rows["mean"] - rows["low"], rows["high"] - rows["mean"]],
            linestyle=styles[position % 4],
            color=COLOURS[position % 8],
            marker=MARKERS[position % 8],
            capsize=2,
            linewidth=1.5,
            label=group,
        )
    ax.axhline(0, color="0.4", linewidth=1, zorder=1)
    ax.set(xlabel=labels[0], ylabel=labels[1], xscale="log")
    values = sorted(table[x].unique())
    ax.set_xticks(values, [f"{value:g}" for value in values])
    ax.minorticks_off()
    ax.legend(loc="upper left", bbox_to_anchor=(1, 1))
    return ax


def plot_batch_norms(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Norm over a batch against the firings expected in it, a curve a group, with both limits.

    Parameters
    ----------
    table : DataFrame with the columns `arm`, `firings` and `norm`, the norm in units of the root
        mean square of the latent's activations
    """
    ax = plot_curves(
        table,
        "firings",
        "norm",
        labels=(
            "firings expected in a batch, B·p",
            "mean norm over a batch\n(typical activations)",
        ),
        ax=ax,
    )
    ends = np.array([table["firings"].min(), table["firings"].max()])
    ax.plot(ends, ends**0.5, color="0.4", linewidth=1, linestyle="--", label="√(B·p)")
    few = np.array([ends[0], min(4.0, ends[1])])
    ax.plot(few, few, color="0.4", linewidth=1, linestyle=":", label="B·p")
    ax.set(yscale="log")
    ax.legend(fontsize="small", title="latents by firing rate", loc="lower right")
    return ax


def plot_slopes(table: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Slope of log norm on log batch size by firing rate: medians, with bars to the quartiles.

    Parameters
    ----------
    table : DataFrame with the columns `rate`, `slope`, `slope_low` and `slope_high`
    """
    ax = ax or panels(1)[0]
    points = table.drop_duplicates("rate")
    ax.errorbar(
        points["rate"],
        points["slope"],
        yerr=[points["slope"] - points["slope_low"], points["slope_high"] - points["slope"]],
        color=COLOURS[0],
        marker=MARKERS[0],
        capsize=3,
    )
    for limit in (0.5, 1.0):
        ax.axhline(limit, color="0.4", linewidth=1, linestyle="--", zorder=1)
    ax.set(xscale="log", xlabel="firing rate p", ylabel="slope in log B", ylim=(0.4, 1.1))
    ax.xaxis.set_minor_formatter("")
    return ax

"""The figure that opens the README and the site, drawn from committed results: `make figure`.

What it shows is written into the picture, as the PNG's text `shown`, so that a test can tell whether the
results are still these.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import matplotlib.pyplot as plt
import pandas as pd
from matplotlib.axes import Axes

from c2r_core.artefacts.profiles import Profile, load_profile
from c2r_core.experiments.evidence import gather
from c2r_core.experiments.language_model import item_table
from c2r_core.experiments.toy import toy_table, values_by_seed
from c2r_core.notebook.figures import ARMS, plot_effects, use_style
from c2r_core.notebook.tables import paired_items

PICTURE = Path(__file__).with_suffix(".png")
ON_TOYS = {"baseline": "no penalty", "C²R": "C²R", "OrtSAE": "OrtSAE"}
ON_TEXT = {"C²R": "C²R", "OrtSAE": "OrtSAE", "small baseline": "no penalty, ¼ size"}
OUTCOMES = {
    "absorption\n(lower is better)": (
        "absorption",
        "letters",
        "first_letter",
        "mean_absorption_fraction",
    ),
    "consistency\n(higher is better)": (
        "assignment_consistency",
        "concepts",
        "concept",
        "consistency",
    ),
}
"""By what the figure calls it: the metric, its list of items, their name and their value."""


def shown(profile: Profile) -> dict[str, Any]:
    """Every number of the figure, as JSON.

    `split` and `silent` have by arm a list, a value for each seed. `split`: latents for each parent feature
    (ReLU). `silent`: share of samples with a parent and a child in which the parent's latent is silent
    (BatchTopK). `text` has the differences to no penalty on the language model, each a mean over letters
    with a 95 % interval.

    Raises
    ------
    FileNotFoundError
        If a result is missing; it says which command computes it.
    """
    toys, toy = committed("toy", profile), profile.toy
    split, silent = (toy_table(toys, name, toy) for name in ("relu", "batch_topk"))
    found = {
        "split": {arm: values_by_seed(split, arm, "latents_per_parent") for arm in ON_TOYS},
        "silent": {arm: values_by_seed(silent, arm, "silent_with_child") for arm in ON_TOYS},
        "text": effects(committed("language_model", profile)),
    }
    return json.loads(json.dumps(found), parse_float=lambda digits: round(float(digits), 4))


def committed(study: str, profile: Profile) -> Mapping[str, Any]:
    """The values of a study's cells by name, as they were committed."""
    evidence = gather(profile, [study])
    values = evidence.values[study]
    if missing := [name for name in evidence.states[study] if name not in values]:
        command = f"c2r run {study} --profile {profile.name}"
        raise FileNotFoundError(f"{missing[0]} of {study} is missing; compute it with `{command}`.")
    return values


def effects(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each arm's difference to no penalty, over letters: a row for each outcome and arm."""
    rows = []
    for name, (metric, items, item, value) in OUTCOMES.items():
        table = item_table(values, metric, items, ["baseline", *ON_TEXT])
        for arm in ON_TEXT:
            interval, _ = paired_items(table, item, value, arm=arm)
            rows.append({"name": name, "arm": arm, **interval._asdict()})
    return rows


def draw(data: Mapping[str, Any], path: Path) -> None:
    """Write the figure, on white, so that it can be read in a dark page too."""
    use_style()
    figure, (split, silent, text) = plt.subplots(
        1, 3, figsize=(11.5, 3.2), width_ratios=(1.1, 0.9, 1.3)
    )
    bars(data["split"], split)
    for edge in range(1, int(split.get_xlim()[1]) + 1):  # cut the bars into latents
        split.axvline(edge, color="white", linewidth=3, zorder=2)
    split.set(title="Toys: one concept, split", xlabel="latents that carry one concept")
    bars(data["silent"], silent)
    silent.set(title="Toys: one concept, with exceptions")
    silent.set(
        xlabel="share of samples with a special case\nin which the concept's latent is silent"
    )
    plot_effects(pd.DataFrame(data["text"]), label="difference to no penalty", ax=text)
    handles, arms = text.get_legend_handles_labels()
    labels = [ON_TEXT[arm] for arm in arms]
    text.legend(handles, labels, loc="upper right", fontsize="small", borderpad=0)
    text.set(title="A small language model")
    figure.savefig(
        path, dpi=160, facecolor="white", pad_inches=0.2, metadata={"shown": json.dumps(data)}
    )
    plt.close(figure)


def bars(by_arm: Mapping[str, Sequence[float]], ax: Axes) -> None:
    """A bar for each arm's mean, the first on top, and below it a mark for each seed."""
    for place, (arm, values) in enumerate(by_arm.items()):
        style = ARMS[arm]
        ax.barh(place, fmean(values), height=0.5, color=style.colour, zorder=1.5)
        ax.scatter(values, [place + 0.36] * len(values), s=14, zorder=3, alpha=0.8, **style.mark)
    ax.set_yticks(range(len(by_arm)), [ON_TOYS[arm] for arm in by_arm])
    ax.set(xlim=(0, None), ylim=(len(by_arm) - 0.45, -0.5))
    ax.grid(axis="y", visible=False)


if __name__ == "__main__":
    draw(shown(load_profile("default")), PICTURE)

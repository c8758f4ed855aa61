"""Write the playground's page from its study's cells: data, sliders and a table in one file."""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from statistics import fmean
from typing import Any

from c2r_core.artefacts.cells import State, look
from c2r_core.artefacts.files import whole_file
from c2r_core.artefacts.profiles import PlaygroundProfile, Profile, training_seeds
from c2r_core.experiments import steering
from c2r_core.experiments.playground import cells, feature_names, worlds

METRICS = {
    "mcc": ("MCC", "higher", "mean cosine of latents with true features, matched one to one"),
    "recovery": (
        "Recovery",
        "higher",
        "share of true features with a latent at a cosine above 0.9",
    ),
    "absorption": (
        "Absorption",
        "lower",
        "how much more often a parent's latent is silent when a child is on too",
    ),
    "latents_per_feature": (
        "Latents per feature",
        "near 1",
        "latents at a cosine above 0.6 with a feature, mean over features",
    ),
    "fvu": ("FVU", "lower", "share of the variance that is left unexplained"),
    "live_share": ("Live latents", "none", "share of latents that fire at all"),
}
"""By field of `ToyReport`: what the page calls it, which way is better, and what it is."""
IN_TABLE = ("mcc", "recovery", "absorption", "fvu")
"""Of these, what the table shows that needs no JavaScript."""
STALE = "Some of these SAEs were trained by an earlier version of the code."


def write_page(path: str | Path, profile: Profile, *, home: str | None = None) -> Path:
    """Write the page from cells that were computed before; nothing is trained here.

    Parameters
    ----------
    path : str or Path
        The file to write; one that is there is replaced.
    profile : Profile
        Whose grid is shown.
    home : str, optional
        Where the page's link home leads; by default it has none.

    Returns
    -------
    Path
        The file.

    Raises
    ------
    FileNotFoundError
        If a cell of the study has not been computed; it says which command does.
    """
    data = page_data(profile)
    parts = {
        "css": _static("playground.css"),
        "home": f'<a href="{html.escape(home)}">Home</a>' if home else "",
        "table": table(data),
        "texts": steering_table(data["steering"]) if data["steering"] else "",
        "hidden": "" if data["steering"] else " hidden",
        "about": html.escape(data["about"]),
        "data": _json(data),
        "js": _static("playground.js"),
    }
    text = _static("playground.html")
    for name, part in parts.items():
        text = text.replace(f"<!-- {name} -->", part)
    with whole_file(path) as part:
        part.write_text(text, encoding="utf-8")
    return Path(path)


def page_data(profile: Profile) -> dict[str, Any]:
    """All that the page shows, as JSON: sliders, metrics, the points of every world, and steered texts.

    `steering` is null where the study of that name, which trains on a language model, has not been computed.
    """
    own, found, stale = profile.playground, [], False
    of_cell = {cell.name: look(cell) for cell in cells(profile)}
    missing = [name for name, (state, _) in of_cell.items() if not _fits(state)]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(of_cell)} results are missing, or of another grid, such as "
            f"{missing[0]}. Compute them with `c2r run playground --profile {profile.name}`."
        )
    for name, (arm, about) in worlds(profile).items():
        state, points = of_cell[name]
        stale = stale or state.kind == "stale"
        found.append(about | {"points": points, "features": feature_names(arm.features)})
    return {
        "sliders": sliders(own),
        "metrics": [
            {"field": field, "title": title, "better": better, "what": what}
            for field, (title, better, what) in METRICS.items()
        ],
        "worlds": found,
        "steering": _steering(profile),
        "about": _about(profile) + (f" {STALE}" if stale else ""),
    }


def _fits(state: State) -> bool:
    """Whether a cell is there and of these settings; that of earlier code will do."""
    return state.kind != "missing" and "setting " not in state.why


def _steering(profile: Profile) -> dict[str, Any] | None:
    try:
        made = steering.cells(profile)
    except (
        FileNotFoundError
    ):  # the language model is not here, so nobody knows whose texts these are
        return None
    of_cell = {title: look(cell) for title, cell in zip(steering.TITLES, made, strict=True)}
    if not all(_fits(state) for state, _ in of_cell.values()):
        return None
    return {
        "prompt": steering.PROMPT,
        "factors": steering.FACTORS,
        "hook_name": profile.language_model.hook_name,
        "model": profile.language_model.model,
        "saes": {title: latents for title, (_, latents) in of_cell.items()},
    }


def sliders(own: PlaygroundProfile) -> list[dict[str, Any]]:
    """What can be moved: name, title, places, where it starts, and what it means."""
    moved = {
        "strength": (
            "Strength of C²R",
            [0.0, *own.strengths],
            "The weight λ in a form that does not depend on the sizes; 0 is an SAE without the penalty.",
        ),
        "alpha": ("Exponent α", own.alphas, "The paper takes 1. It means nothing at strength 0."),
        "child": (
            "Hierarchy: P(child | parent)",
            own.child_probabilities,
            "How often a parent feature comes with one of its children; the children share this.",
        ),
        "cosine": (
            "Cosine of two single features",
            own.cosines,
            "How alike the directions of singles with the same number are, such as 1x and 1y.",
        ),
    }
    starts = {"alpha": _nearest(own.alphas, 1.0), "strength": 0}
    return [
        {
            "name": name,
            "title": title,
            "values": values,
            "start": starts.get(name, len(values) // 2),
            "what": what,
        }
        for name, (title, values, what) in moved.items()
    ]


def table(data: Mapping[str, Any]) -> str:
    """Some points as an HTML table: every world without the penalty, and at α nearest 1 and each strength."""
    alphas = next(one["values"] for one in data["sliders"] if one["name"] == "alpha")
    alpha = alphas[_nearest(alphas, 1.0)]
    head = ["P(child | parent)", "Cosine", "Strength", *(METRICS[name][0] for name in IN_TABLE)]
    rows = [
        [world["child"], world["cosine"], point["strength"], *(_mean(point, n) for n in IN_TABLE)]
        for world in data["worlds"]
        for point in world["points"]
        if point["alpha"] in (None, alpha)
    ]
    shown = [_row("th", head), *(_row("td", [_number(value) for value in row]) for row in rows)]
    return f"<table>\n<caption>α = {alpha:g}; means over seeds</caption>\n{''.join(shown)}</table>"


def steering_table(found: Mapping[str, Any]) -> str:
    """The texts of each SAE's first latent, as HTML that needs no JavaScript."""
    rows = [
        [title, str(latents[0]["latent"]), _number(factor), text]
        for title, latents in found["saes"].items()
        for factor, text in zip(found["factors"], latents[0]["texts"], strict=True)
    ]
    head = _row("th", ["SAE", "Latent", "Strength", f"What follows “{found['prompt']}”"])
    return f"<table>{head}{''.join(_row('td', row) for row in rows)}</table>"


def _row(tag: str, values: Iterable[str]) -> str:
    inner = "".join(f"<{tag}>{html.escape(value)}</{tag}>" for value in values)
    return f"<tr>{inner}</tr>\n"


def _mean(point: Mapping[str, Any], field: str) -> float | None:
    known = [value for value in point[field] if value is not None]
    return fmean(known) if known else None


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.3g}"


def _about(profile: Profile) -> str:
    own, toy = profile.playground, profile.toy
    n_seeds = len(training_seeds(own.seeds))
    return (
        f"{own.architecture} SAEs with {own.d_sae} latents in {own.d_in} dimensions, {own.steps} steps of "
        f"{toy.batch_size} samples; measured on {toy.evaluation_samples} new samples. Numbers are means over "
        f"{n_seeds} seeds, with the smallest and the largest; the pictures are of the first seed. "
        "The weights were not tuned on these features."
    )


def _nearest(values: list[float], wanted: float) -> int:
    return min(range(len(values)), key=lambda i: abs(values[i] - wanted))


def _json(data: Mapping[str, Any]) -> str:
    """JSON that can stand inside a script element, whatever its texts hold."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")


def _static(name: str) -> str:
    return (files("c2r_core.playground") / "static" / name).read_text(encoding="utf-8")

"""The browser's folder: static pages, and data in pieces that a page loads when it needs them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

from c2r_core.artefacts.files import whole_folder
from c2r_core.browser.concepts import letter_concepts
from c2r_core.browser.latents import Reader
from c2r_core.metrics.inputs import Inputs
from c2r_core.saes.interface import AnySAE

PIECE = 100
"""Latents of one file of data."""
STATIC = ("index.html", "browser.css", "browser.js")


def browse(inputs: Inputs, saes: Mapping[str, AnySAE], folder: str | Path) -> Path:
    """Write the pages of one or several SAEs that read the same activations; returns the page to open.

    Parameters
    ----------
    inputs : Inputs
        The language model and the held-out documents that are shown, as `evaluate` reads them.
    saes : mapping of str to AnySAE
        By the names that the pages show; each takes raw activations.
    folder : str or Path
        Appears when it is complete.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    ValueError
        If there is no SAE.
    NotEvaluable
        If an SAE is made for another width.
    """
    if not saes:
        raise ValueError("saes is empty; give at least one SAE, by the name that the pages show.")
    store, folder = inputs.activations, Path(folder)
    with whole_folder(folder, replace=False) as part:
        for name in STATIC:
            source = files("c2r_core.browser") / "static" / name
            (part / name).write_text(source.read_text(encoding="utf-8"), encoding="utf-8")
        (part / "data").mkdir()
        described = []
        for number, (name, sae) in enumerate(saes.items()):
            reader = Reader(sae, store, inputs.language_model, seed=inputs.seed)
            described.append({"name": name, "latents": _columns(reader.summaries())})
            for piece, latents in enumerate(_pieces(reader.latents(), PIECE)):
                _write(part / f"data/{number}-{piece:05d}.js", "piece", number, piece, latents)
        about = {
            "model": inputs.lm.model,
            "hook_name": inputs.lm.hook_name,
            "text": store.manifest.corpus_name,
            "tokens": len(store),
            "piece": PIECE,
            "saes": described,
            "concepts": letter_concepts(inputs, dict(saes)),
        }
        _write(part / "data/index.js", "index", about)
    return folder / "index.html"


def _pieces(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    waiting = iter(items)
    while piece := list(islice(waiting, size)):
        yield piece


def _columns(rows: list[dict[str, Any]]) -> dict[str, list[Any]]:
    return {name: [row[name] for row in rows] for name in rows[0]}


def _write(path: Path, function: str, *arguments: Any) -> None:
    """A script that hands its data to the page: what a page opened from a file may load."""
    given = ",".join(json.dumps(one, allow_nan=False, separators=(",", ":")) for one in arguments)
    path.write_text(f"C2R.{function}({given});\n", encoding="ascii")

"""Study `examples`, of notebooks 05, 12, 14 and 15: what latents of the first seed's SAEs look like, as text.

One cell for each arm and kind of example; short texts and curves, nothing that a claim rests on. Two arms
have the kind `carried` too, with the same letters and words, so that they can stand side by side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug, unknown_name
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.data.words import LETTERS
from c2r_core.errors import NotEvaluable
from c2r_core.experiments.language_model import Sources, of_trained, standard_arms
from c2r_core.experiments.study import Study
from c2r_core.losses import nearest_neighbours
from c2r_core.metrics.absorption import evaluate_first_letter
from c2r_core.metrics.detection import measure_detection
from c2r_core.metrics.firings import Firings, firings_of
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_carriers import letter_carriers
from c2r_core.metrics.letter_latents import absorption_by_word
from c2r_core.metrics.letter_probes import letter_splits
from c2r_core.metrics.reconstruction import streamed
from c2r_core.metrics.use import use_examples
from c2r_core.metrics.use_task import letters_to_use

TYPICAL_DENSITY = 0.003
N_LATENTS, N_DETECTED, N_CONTEXTS, N_WORDS = 3, 5, 3, 30
QUANTILES = 101
BESIDE = ("baseline", "C²R")
"""The arms that stand side by side."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell for each arm and kind."""
    sources = Sources(profile)
    study = Study("examples", profile, training_seeds(1, seed), device)
    arms = standard_arms(sources.lm, device)
    return [
        study.cell(f"{title}, {kind}", measure, arm=arm, sources=sources)
        for title, arm in arms.items()
        for kind, measure in (KINDS | {"carried": carried} if title in BESIDE else KINDS).items()
    ]


def examples(values: Mapping[str, Any], kind: str, titles: Sequence[str]) -> dict[str, Any]:
    """{arm: its example} of one kind."""
    return {title: values[slug(f"{title}, {kind}")] for title in titles}


def carried_words(values: Mapping[str, Any], letter: str) -> dict[str, dict[str, int]]:
    """{arm: {word: the latent that carries its letter}}, the same words in both arms, most frequent first.

    −1 where no latent carries it. No words where the letter could not be measured. ValueError if `letter` is
    none of A to Z.
    """
    if letter not in tuple(LETTERS):
        raise ValueError(unknown_name("letter", letter, LETTERS))
    return {
        title: {
            word: latent
            for row in rows
            if row["letter"] == letter
            for word, latent in zip(row["words"], row["latents"], strict=True)
        }
        for title, rows in examples(values, "carried", BESIDE).items()
    }


@of_trained
def decoder_curves(inputs: Inputs) -> dict[str, list[float]]:
    """Quantiles, from 0 to 1 in hundredths: cosine with the nearest live neighbour, and density."""
    _, density = streamed(inputs)
    live = density > 0
    cosine = nearest_neighbours(inputs.sae.W_dec[live.to(inputs.sae.W_dec.device)]).cosine.cpu()
    at = np.linspace(0, 1, QUANTILES)
    return {
        "nearest_cosine": np.quantile(cosine.numpy(), at).round(4).tolist(),
        "density": np.quantile(density[live].numpy(), at).round(6).tolist(),
    }


@of_trained
def contexts(inputs: Inputs) -> list[dict[str, Any]]:
    """Latents of typical density: where they fire, and where they are silent though one may expect it."""
    _, density = streamed(inputs)
    typical = (density - TYPICAL_DENSITY).abs().argsort()[:N_LATENTS].tolist()
    return [_latent(firings_of(inputs), latent, inputs) for latent in typical]


def _latent(firings: Firings, latent: int, inputs: Inputs) -> dict[str, Any]:
    found = firings.examples(latent, inputs.language_model.tokenizer, n=N_CONTEXTS)
    kinds = {kind: getattr(found, kind) for kind in ("top", "middle", "near_misses")}
    about = {"latent": latent, "n_firings": found.n_firings, "density": found.density}
    return about | {kind: [str(context) for context in of] for kind, of in kinds.items()}


@of_trained
def detected(inputs: Inputs) -> list[dict[str, Any]]:
    """Latents from the most to the least predictable: score, the judge's words, contexts."""
    firings, decode = firings_of(inputs), inputs.language_model.tokenizer.decode
    try:
        report = measure_detection(firings, n_latents=inputs.sizes.detection_latents)
    except NotEvaluable:
        return []
    ranked = sorted((r for r in report.latents if r.score is not None), key=lambda r: -r.score)
    rows = ranked[:: max(1, (len(ranked) - 1) // (N_DETECTED - 1))][:N_DETECTED]
    return [
        {"score": row.score}
        | {"words": [decode([i]) if i >= 0 else "…" + decode([-1 - i]) for i in row.tokens]}
        | _latent(firings, row.latent, inputs)
        for row in rows
    ]


@of_trained
def absorbed_words(inputs: Inputs) -> dict[str, Any]:
    """Words of the letter that is absorbed about half: which latent carries the letter, and how much."""
    split = letter_splits(inputs)[0]
    try:
        letters = evaluate_first_letter(inputs.sae, [split]).letters
    except NotEvaluable as error:
        return {"not_evaluable": str(error), "words": []}
    scored = [row for row in letters if row.mean_absorption_fraction is not None]
    row = min(scored, key=lambda row: abs(row.mean_absorption_fraction - 0.5))
    words, scores = absorption_by_word(inputs.sae, *split, row.first_letter, row.split_features)
    columns = zip(words, scores.strongest_latent.tolist(), scores.fraction.tolist(), strict=True)
    every = [{"word": w, "latent": i, "absorbed": a} for w, i, a in columns]
    return {
        "letter": row.first_letter,
        "own_latents": list(row.split_features),
        "words": every[:: max(1, len(every) // N_WORDS)][:N_WORDS],
    }


@of_trained
def carried(inputs: Inputs) -> list[dict[str, Any]]:
    """Each letter's most frequent test words, and the latent that carries the letter in each of them."""
    found = letter_carriers(inputs, inputs.sae, n_words=N_WORDS)
    return [
        {"letter": letter, "words": list(words), "latents": list(words.values())}
        for letter, words in found.items()
    ]


@of_trained
def used(inputs: Inputs) -> list[dict[str, Any]]:
    """Answers of the model before, after erasing a letter's latent, and after steering to another."""
    shown = use_examples(inputs.sae, letters_to_use(inputs), N_LATENTS, seed=inputs.seed)
    return [vars(one) | {"line": str(one)} for one in shown]


KINDS = {
    "decoder": decoder_curves,
    "contexts": contexts,
    "detected": detected,
    "absorbed": absorbed_words,
    "used": used,
}

"""Study `steering`, for the playground: what the language model writes when a latent's direction is added.

One cell for each of two SAEs, without C²R and with it. Short texts, nothing that a claim rests on.
"""

from __future__ import annotations

from typing import Any

import torch

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.data.generation import continuations
from c2r_core.experiments.language_model import Sources, of_trained, standard_arms
from c2r_core.experiments.study import Study
from c2r_core.metrics.firings import drawn_latents, firings_of
from c2r_core.metrics.inputs import Inputs

TITLES = ("baseline", "C²R")
PROMPT = "The most important thing about"
FACTORS = (0.0, 0.5, 1.0, 2.0, 4.0)
"""How far activations are moved along the latent's direction, in its largest activations on held-out text."""
N_LATENTS, N_CONTEXTS, N_TOKENS = 6, 3, 24
MIN_FIRINGS = 10
"""Latents that fire on fewer of the held-out tokens are not drawn."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """One cell for each SAE."""
    sources = Sources(profile)
    study = Study("steering", profile, training_seeds(1, seed), device)
    arms = standard_arms(sources.lm, device)
    about = {"prompt": PROMPT, "factors": FACTORS, "n_tokens": N_TOKENS}
    return [
        study.cell(title, measure, arm=arms[title], sources=sources, **about) for title in TITLES
    ]


@of_trained
def measure(
    inputs: Inputs, prompt: str, factors: tuple[float, ...], n_tokens: int
) -> list[dict[str, Any]]:
    """Latents drawn at random: where they fire, and the text that the model writes at each factor."""
    firings, sae = firings_of(inputs), inputs.sae
    found = []
    for latent in drawn_latents(firings, N_LATENTS, MIN_FIRINGS, inputs.seed).tolist():
        most = float(firings.acts[:, [latent]].max())
        shifts = torch.tensor(factors)[:, None] * most * sae.W_dec[latent].detach().cpu()
        examples = firings.examples(latent, inputs.language_model.tokenizer, n=N_CONTEXTS)
        about = {"latent": latent, "density": examples.density, "largest": most}
        texts = continuations(inputs.language_model, prompt, inputs.lm.hook_name, shifts, n_tokens)
        found.append(about | {"top": list(map(str, examples.top)), "texts": texts})
    return found

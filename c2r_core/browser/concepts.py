"""The same concept in each SAE: which latent carries a first letter, word by word, and where it fails to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from c2r_core.metrics.carriers import NO_CARRIER, assignment_consistency, modal_latent
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_carriers import letter_carriers
from c2r_core.saes.interface import AnySAE

N_WORDS = 60


def letter_concepts(inputs: Inputs, saes: Mapping[str, AnySAE]) -> list[dict[str, Any]]:
    """A concept for each letter of `letter_carriers`, which says which words are taken.

    Each has its words, and for each SAE, by name, the carrier of every word (`NO_CARRIER` where none is),
    the modal latent and the assignment consistency over the words shown. The empty list where the model
    allows no letters.
    """
    by_sae = {name: letter_carriers(inputs, sae, n_words=N_WORDS) for name, sae in saes.items()}
    of_first = next(iter(by_sae.values()))
    return [
        {
            "name": letter,
            "words": list(words),
            "saes": {name: _assigned(found[letter].values()) for name, found in by_sae.items()},
        }
        for letter, words in of_first.items()
    ]


def _assigned(carriers: Iterable[int]) -> dict[str, Any]:
    carried_by = torch.tensor(list(carriers))
    modal = modal_latent(carried_by)
    return {
        "carriers": carried_by.tolist(),
        "modal": NO_CARRIER if modal is None else modal,
        "consistency": round(assignment_consistency(carried_by), 3),
    }

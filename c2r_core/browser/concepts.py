"""The same concept in each SAE: which latent carries a first letter, word by word, and where it fails to."""

from __future__ import annotations

from typing import Any

from c2r_core.data.words import LETTERS
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.carriers import NO_CARRIER, assignment_consistency, carriers, modal_latent
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_probes import letter_splits
from c2r_core.saes.interface import AnySAE

N_WORDS = 60


def letter_concepts(inputs: Inputs, saes: dict[str, AnySAE]) -> list[dict[str, Any]]:
    """A concept for each letter that has a good probe and at least two test words that hold it.

    Each has its words, and for each SAE, by name, the carrier of every word (`NO_CARRIER` where none is),
    the modal latent and the assignment consistency over the words shown. The empty list where the model
    allows no letters.
    """
    try:
        task, probes = letter_splits(inputs)[0]
    except NotEvaluable:
        return []
    x, letters = task.activations[task.is_test], task.letters[task.is_test]
    words = [
        word for word, is_test in zip(task.words, task.is_test.tolist(), strict=True) if is_test
    ]
    holds = probes.holds(x, letters)
    carried = {
        name: carriers(x, encode_sparse(sae, x), sae.W_dec, probes.weights)
        for name, sae in saes.items()
    }
    found = []
    for i, letter in enumerate(LETTERS):
        shown = holds[:, i].nonzero()[:N_WORDS, 0]
        if probes.not_evaluable[i] is None and len(shown) >= 2:
            concept = {"name": letter, "words": [words[n] for n in shown.tolist()], "saes": {}}
            for name, of_letter in carried.items():
                own = of_letter[i, shown]
                modal = modal_latent(own)
                concept["saes"][name] = {
                    "carriers": own.tolist(),
                    "modal": NO_CARRIER if modal is None else modal,
                    "consistency": round(assignment_consistency(own), 3),
                }
            found.append(concept)
    return found

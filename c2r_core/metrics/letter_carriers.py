"""The latent that carries the first letter of each word: the same words for every SAE, to compare SAEs."""

from __future__ import annotations

from c2r_core.data.words import LETTERS
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.carriers import carriers
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.metrics.inputs import Inputs
from c2r_core.metrics.letter_probes import letter_splits
from c2r_core.saes.interface import AnySAE

MIN_WORDS = 2
"""Of a letter; fewer have no consistency."""


def letter_carriers(inputs: Inputs, sae: AnySAE, *, n_words: int) -> dict[str, dict[str, int]]:
    """{letter: {word: its carrier}} for each letter that has a good probe and at least two words.

    The words are the test words of the first split in which the probe finds their letter, the most frequent
    first, at most `n_words` of a letter. Which they are depends on `inputs` alone, not on the SAE, which
    takes raw activations. The carrier is `NO_CARRIER` (−1) where no latent carries the letter. The
    directions are the probes; see `c2r_core.metrics.carriers`. Empty where the model allows no letters.
    """
    try:
        task, probes = letter_splits(inputs)[0]
    except NotEvaluable:
        return {}
    x, letters = task.activations[task.is_test], task.letters[task.is_test]
    tested = zip(task.words, task.is_test.tolist(), strict=True)
    words = [word for word, is_test in tested if is_test]
    carried_by = carriers(x, encode_sparse(sae, x), sae.W_dec, probes.weights)
    holds, found = probes.holds(x, letters), {}
    for i, letter in enumerate(LETTERS):
        shown = holds[:, i].nonzero()[:n_words, 0].tolist()
        if probes.not_evaluable[i] is None and len(shown) >= MIN_WORDS:
            found[letter] = {words[n]: int(carried_by[i, n]) for n in shown}
    return found

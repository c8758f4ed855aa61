"""Where latents fire in held-out text: activation examples, what a reader or a judge looks at.

firings = find_firings(sae, store)  # a store of held-out activations
print(firings.examples(123, model.tokenizer))
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from c2r_core.data.store import ActivationStore
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.encoding import chunk_size, encode_sparse
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csc_array
    from transformers import PreTrainedTokenizerBase

    from c2r_core.metrics.inputs import Inputs

TOKENS_AROUND = 10


@dataclass(frozen=True)
class Context:
    """A piece of text, with what one latent does on each of its tokens."""

    tokens: tuple[str, ...]
    acts: tuple[float, ...]
    """The latent's activation on each token."""
    position: int
    """The token for which this context was chosen."""

    def __str__(self) -> str:
        """The text on one line: tokens on which the latent fires in «», the chosen one in [] if silent."""
        marked = [
            f"«{token}»" if act > 0 else f"[{token}]" if i == self.position else token
            for i, (token, act) in enumerate(zip(self.tokens, self.acts, strict=True))
        ]
        return repr("".join(marked))[1:-1]


@dataclass(frozen=True)
class LatentExamples:
    """Activation examples of one latent; contexts do not overlap."""

    latent: int
    n_firings: int
    """Tokens on which it fires."""
    density: float
    """Share of all tokens."""
    top: tuple[Context, ...]
    """Where it fires hardest (top activations)."""
    middle: tuple[Context, ...]
    """Where it fires about as hard as its median."""
    near_misses: tuple[Context, ...]
    """Where it is silent on a token on which it otherwise often fires: what it may have left to another."""

    def __str__(self) -> str:
        lines = [f"latent {self.latent} fires on {self.n_firings} tokens ({self.density:.2%})"]
        for name in ("top", "middle", "near_misses"):
            lines += [f"{name.replace('_', ' ')}:", *(f"  {c}" for c in getattr(self, name))]
        return "\n".join(lines)


@dataclass(frozen=True, eq=False)
class Firings:
    """What every latent does on every token of a store: all its activation examples."""

    acts: csc_array
    """Feature activations at the store's rows, (n, d_sae)."""
    contexts: np.ndarray
    """Token ids, (n_contexts, context_size)."""
    place: np.ndarray
    """Of each row in `contexts.ravel()`, rising, (n,)."""

    @property
    def context_of(self) -> np.ndarray:
        """The context of each row, (n,)."""
        return self.place // self.contexts.shape[1]

    def n_firings(self) -> np.ndarray:
        """Rows on which each latent fires, (d_sae,)."""
        return np.diff(self.acts.indptr)

    def identity(self, latent: int, seed: int) -> int:
        """A number that depends on where a latent fires and on the seed, not on the latent's number."""
        start, stop = self.acts.indptr[latent : latent + 2]
        rows = np.sort(self.acts.indices[start:stop]).astype("int64")
        return zlib.crc32(rows.tobytes(), seed)

    def of(self, latent: int) -> np.ndarray:
        """A latent's activations at all tokens of the contexts, dropped ones included as 0, flat."""
        everywhere = np.zeros(self.contexts.size, dtype="float32")
        everywhere[self.place] = self.acts[:, [latent]].toarray()[:, 0]
        return everywhere

    def windows(
        self, places: Iterable[int], n: int, taken: np.ndarray, around: int = TOKENS_AROUND
    ) -> list[tuple[int, slice]]:
        """The first n of these places (tokens of `contexts.ravel()`) whose surroundings are not `taken`.

        Each comes with the slice of up to `around` tokens on either side, inside its context, which is marked
        as taken.
        """
        found: list[tuple[int, slice]] = []
        for place in map(int, places):
            if len(found) == n:
                break
            start = place - place % self.contexts.shape[1]
            stop = min(start + self.contexts.shape[1], place + around + 1)
            window = slice(max(start, place - around), stop)
            if not taken[window].any():
                taken[window] = True
                found.append((place, window))
        return found

    def examples(
        self, latent: int, tokenizer: PreTrainedTokenizerBase, *, n: int = 5
    ) -> LatentExamples:
        """Top, middle and near-miss contexts of a latent: look at it before you believe a score.

        At most n of each kind, with up to ten tokens on either side. The tokenizer is that of the language
        model.
        """
        acts, tokens = self.of(latent), self.contexts.ravel()
        firing = np.flatnonzero(acts > 0)
        hardest = firing[np.argsort(-acts[firing], kind="stable")]
        half = len(hardest) // 2
        from_middle = hardest[np.argsort(np.abs(np.arange(len(hardest)) - half), kind="stable")]
        # Silent tokens, those first on whose kind the latent fires most often.
        silent = self.place[acts[self.place] == 0]
        often = np.bincount(tokens[firing], minlength=int(tokens.max(initial=0)) + 1)
        silent = silent[often[tokens[silent]] > 0]
        missed = silent[np.argsort(-often[tokens[silent]], kind="stable")]
        taken = np.zeros(tokens.size, dtype=bool)

        def contexts(places: np.ndarray) -> tuple[Context, ...]:
            return tuple(
                Context(
                    tuple(tokenizer.decode([int(token)]) for token in tokens[window]),
                    tuple(float(act) for act in acts[window]),
                    place - window.start,
                )
                for place, window in self.windows(places, n, taken)
            )

        return LatentExamples(
            latent=latent,
            n_firings=len(firing),
            density=len(firing) / len(self.place),
            top=contexts(hardest),
            middle=contexts(from_middle),
            near_misses=contexts(missed),
        )


def find_firings(sae: AnySAE, store: ActivationStore) -> Firings:
    """Encode a store of raw activations in blocks (see `chunk_size`), keeping what is not zero: 8 bytes each.

    Raises NotEvaluable if the SAE gives NaN or infinite activations, or is made for another width.
    """
    acts = encode_sparse(sae, store.chunks(chunk_size(sae))).tocsc()
    return Firings(acts, store.contexts, store.kept_positions)


def firings_of(inputs: Inputs) -> Firings:
    """Where every latent fires on the held-out tokens."""
    return inputs.once("firings", lambda: find_firings(inputs.sae, inputs.activations))


def drawn_latents(firings: Firings, n: int, min_firings: int, seed: int) -> np.ndarray:
    """At most n of the latents that fire often enough, drawn with the seed.

    The draw and its order depend on where the latents fire, so that another numbering changes nothing.
    Raises NotEvaluable if no latent does.
    """
    counts = firings.n_firings()
    often = np.flatnonzero(counts >= min_firings)
    if not len(often):
        raise NotEvaluable(
            f"No latent fires on {min_firings} of the {len(firings.place)} tokens; the busiest does on "
            f"{counts.max(initial=0)}. Read more tokens, or check the SAE."
        )
    keys = np.array([firings.identity(int(latent), seed) for latent in often])
    return often[np.argsort(keys, kind="stable")][:n]

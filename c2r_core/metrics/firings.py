"""Where latents fire in held-out text: the contexts that a reader, or a judge, looks at."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from c2r_core.data.store import ActivationStore
from c2r_core.saes.interface import AnySAE, finite_feature_acts

if TYPE_CHECKING:
    from scipy.sparse import csc_array


@dataclass(frozen=True, eq=False)
class Firings:
    """What every latent does on every token of a store.

    Attributes
    ----------
    acts : scipy.sparse.csc_array, shape (n, d_sae)
        Feature activations at the store's rows.
    contexts : int array, shape (n_contexts, context_size)
        Token ids.
    place : int array, shape (n,)
        Of each row in `contexts.ravel()`, rising.
    """

    acts: csc_array
    contexts: np.ndarray
    place: np.ndarray

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


@torch.no_grad()
def find_firings(sae: AnySAE, store: ActivationStore, *, chunk_size: int = 2048) -> Firings:
    """Encode a store, keeping what is not zero: 8 bytes each.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations.
    store : ActivationStore
    chunk_size : int
        Tokens encoded at a time.

    Raises
    ------
    ValueError
        If the SAE gives NaN or infinite activations.
    """
    from scipy.sparse import csr_array, vstack

    chunks = []
    for x in store.chunks(chunk_size):
        chunks.append(csr_array(finite_feature_acts(sae, x).numpy()))
    acts = vstack(chunks, format="csc")
    acts.eliminate_zeros()
    return Firings(acts, store.contexts, np.flatnonzero(store.kept))


def drawn_latents(firings: Firings, n: int, min_firings: int, seed: int) -> np.ndarray:
    """At most n of the latents that fire often enough, drawn with the seed.

    The draw and its order depend on where the latents fire, so that another numbering changes nothing.

    Raises
    ------
    ValueError
        If no latent does.
    """
    counts = firings.n_firings()
    often = np.flatnonzero(counts >= min_firings)
    if not len(often):
        raise ValueError(
            f"No latent fires on {min_firings} of the {len(firings.place)} tokens; the busiest does on "
            f"{counts.max(initial=0)}. Read more tokens, or check the SAE."
        )
    keys = np.array([firings.identity(int(latent), seed) for latent in often])
    return often[np.argsort(keys, kind="stable")][:n]

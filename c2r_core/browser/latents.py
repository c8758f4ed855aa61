"""What the pages say of each latent: where it fires or nearly does, what it writes, who is near."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.store import ActivationStore
from c2r_core.metrics.encoding import chunk_size, encode
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csc_array
    from transformer_lens.model_bridge import TransformerBridge

N_TOP, N_MIDDLE, N_NEAR_MISSES = 8, 4, 4
N_TOKENS, N_NEIGHBOURS = 8, 5
BEFORE, AFTER = 14, 6
BINS = 20
_ROWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Firings:
    """How the latents of an SAE fire on a store's tokens.

    Attributes
    ----------
    acts : csc_array, shape (n_tokens, d_sae)
        Feature activations of the kept tokens.
    near_misses : Tensor of int, shape (d_sae, N_NEAR_MISSES)
        The tokens on which a latent is silent although x − mean points along its decoder row most; −1 where
        there are fewer.
    """

    acts: csc_array
    near_misses: Tensor


def firings(sae: AnySAE, store: ActivationStore) -> Firings:
    """Encode a store's tokens; takes one pass over them, and one for the mean."""
    from scipy.sparse import csr_array, vstack

    rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
    size = chunk_size(sae)
    mean = sum(x.sum(0) for x in store.chunks(size)) / len(store)
    best = torch.full((len(rows), N_NEAR_MISSES), -torch.inf)
    which = torch.full_like(best, -1, dtype=torch.long)
    parts, start = [], 0
    for x in store.chunks(size):
        acts = encode(sae, x)
        along = ((x - mean) @ rows.T).masked_fill_(acts > 0, -torch.inf).T
        found = along.topk(min(N_NEAR_MISSES, len(x)), dim=1)
        values = torch.cat([best, found.values], dim=1)
        numbers = torch.cat([which, found.indices + start], dim=1)
        best, order = values.topk(N_NEAR_MISSES, dim=1)
        which = numbers.gather(1, order)
        parts.append(csr_array(acts.numpy()))
        start += len(x)
    which[best <= 0] = -1
    return Firings(vstack(parts, format="csc"), which)


class Reader:
    """Writes what is to be said of one latent at a time.

    Parameters
    ----------
    sae : AnySAE
        Takes raw activations.
    store : ActivationStore
        Of the text that is shown.
    model : TransformerBridge
        That the store was harvested from.
    seed : int
        Of the contexts from the middle of the range.
    """

    def __init__(
        self, sae: AnySAE, store: ActivationStore, model: TransformerBridge, *, seed: int = 0
    ) -> None:
        self.store, self.firings, self.seed = store, firings(sae, store), seed
        self.rows = torch.nn.functional.normalize(sae.W_dec.detach().float().cpu(), dim=1)
        self.unembedding = _unembedding(model)
        self._positions = store.kept_positions
        self._decode = functools.cache(lambda token: model.tokenizer.decode([token]))

    def summaries(self) -> list[dict[str, Any]]:
        """For the list of all latents: share of tokens, largest activation, the token under it."""
        acts = self.firings.acts
        found = []
        for latent in range(acts.shape[1]):
            where, values = self._column(latent)
            top = int(values.argmax()) if len(values) else None
            found.append(
                {
                    "density": _short(len(values) / acts.shape[0]),
                    "max": _short(values[top]) if top is not None else 0,
                    "token": self._token(where[top]) if top is not None else "",
                }
            )
        return found

    def latents(self) -> Iterator[dict[str, Any]]:
        """Each latent's page, from 0 on."""
        for start in range(0, len(self.rows), _ROWS_AT_ONCE):
            rows = self.rows[start : start + _ROWS_AT_ONCE]
            cosines = rows @ self.rows.T
            cosines[torch.arange(len(rows)), torch.arange(start, start + len(rows))] = -torch.inf
            near = cosines.topk(min(N_NEIGHBOURS, len(self.rows) - 1), dim=1)
            written = None if self.unembedding is None else rows @ self.unembedding.T
            for i in range(len(rows)):
                pairs = zip(near.indices[i].tolist(), near.values[i].tolist(), strict=True)
                yield self._latent(start + i) | {
                    "neighbours": [[latent, _short(cosine)] for latent, cosine in pairs],
                    "promotes": [] if written is None else self._tokens(written[i]),
                    "suppresses": [] if written is None else self._tokens(-written[i], sign=-1),
                }

    def _latent(self, latent: int) -> dict[str, Any]:
        where, values = self._column(latent)
        order = np.argsort(-values, kind="stable")
        top = self._one_a_context(where[order], N_TOP)
        lower, upper = len(order) // 4, 3 * len(order) // 4
        middle = np.random.default_rng([self.seed, latent]).permutation(order[lower:upper])
        shown = {int(row) for row in top}
        middle = [row for row in self._one_a_context(where[middle], N_TOP) if int(row) not in shown]
        missed = self.firings.near_misses[latent]
        counts, _ = np.histogram(values, BINS, (0, values.max() if len(values) else 1))
        acts = dict(zip(where.tolist(), values.tolist(), strict=True))
        return {
            "mean": _short(values.mean()) if len(values) else 0,
            "histogram": counts.tolist(),
            "top": [self._context(row, acts) for row in top],
            "middle": [self._context(row, acts) for row in middle[:N_MIDDLE]],
            "near_misses": [self._context(row, acts) for row in missed[missed >= 0].tolist()],
        }

    def _column(self, latent: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens on which a latent fires, and its activations there."""
        acts = self.firings.acts
        part = slice(acts.indptr[latent], acts.indptr[latent + 1])
        return acts.indices[part], acts.data[part]

    def _one_a_context(self, rows: np.ndarray, n: int) -> np.ndarray:
        contexts = self._positions[rows] // self.store.manifest.context_size
        _, first = np.unique(contexts, return_index=True)
        return rows[np.sort(first)[:n]]

    def _context(self, row: int, acts: dict[int, float]) -> dict[str, Any]:
        """The text around a token: strings, activations (0 where silent), and where the token stands."""
        size = self.store.manifest.context_size
        context, position = divmod(int(self._positions[row]), size)
        first, last = max(0, position - BEFORE), min(size, position + AFTER + 1)
        flat = np.arange(context * size + first, context * size + last)
        rows = np.searchsorted(self._positions, flat).tolist()
        ids = self.store.contexts[context, first:last].tolist()
        return {
            "tokens": [self._decode(i) for i in ids],
            "acts": [
                _short(acts.get(r, 0))
                if r < len(self._positions) and self._positions[r] == p
                else 0
                for r, p in zip(rows, flat.tolist(), strict=True)
            ],
            "at": position - first,
        }

    def _token(self, row: int) -> str:
        context, position = divmod(int(self._positions[row]), self.store.manifest.context_size)
        return self._decode(int(self.store.contexts[context, position]))

    def _tokens(self, logits: Tensor, sign: int = 1) -> list[list[Any]]:
        found = logits.topk(N_TOKENS)
        pairs = zip(found.indices.tolist(), found.values.tolist(), strict=True)
        return [[self._decode(token), _short(sign * value)] for token, value in pairs]


def _unembedding(model: TransformerBridge) -> Tensor | None:
    """(vocabulary, d_model), behind the final norm's scale, less its mean; None where the model has none."""
    head = model.original_model.get_output_embeddings()
    if head is None:
        return None
    weight = head.weight.detach().float().cpu()
    norm = getattr(getattr(model.original_model, "model", None), "norm", None)
    if norm is not None:
        scale = norm.weight.detach().float().cpu()
        weight = weight * (1 + scale if "Gemma" in type(norm).__name__ else scale)
    return weight - weight.mean(0)


def _short(value: float) -> float:
    """Four significant digits: what a page shows."""
    return float(f"{float(value):.4g}")

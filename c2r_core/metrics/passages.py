"""An SAE's view of passages, averaged over each passage, and which passages a probing task uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.passages import UNKNOWN, Passages
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array


@dataclass(frozen=True, eq=False)
class PooledActs:
    """An SAE's view of passages, averaged over each passage's tokens; what probes read.

    Attributes
    ----------
    documents : tuple of str, n of them
    x : array of float32, shape (n, d_in)
        Mean activation.
    feature_acts : scipy.sparse.csr_array, shape (n, d_sae)
        Mean feature activations times the norms of their decoder rows.
    directions : array of float32, shape (d_sae, d_in)
        Decoder rows at norm 1.
    """

    documents: tuple[str, ...]
    x: np.ndarray
    feature_acts: csr_array
    directions: np.ndarray


@torch.no_grad()
def pool(sae: AnySAE, passages: Passages, *, chunk_size: int = 2048) -> PooledActs:
    """Averages over each passage's tokens, of the activations and of an SAE's feature activations.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations; rows of W_dec may have any norm.
    passages : Passages
    chunk_size : int
        Tokens encoded at a time.

    Raises
    ------
    ValueError
        If the SAE is made for another width, or gives NaN or infinite activations.
    """
    from scipy.sparse import csr_array, vstack

    d_in = passages.activations.shape[1]
    if sae.W_dec.ndim != 2 or sae.W_dec.shape[1] != d_in:
        raise ValueError(
            f"The SAE's W_dec has shape {tuple(sae.W_dec.shape)}; expected (d_sae, {d_in}), the width of "
            "the passages' activations."
        )
    rows = sae.W_dec.detach().float()
    norms = rows.norm(dim=1)
    chunks = []
    for x in passages.activations.split(chunk_size):
        acts = sae.encode(x.float().to(rows.device)) * norms
        if not acts.isfinite().all():
            raise ValueError("The SAE's feature activations hold NaN or infinite values.")
        chunks.append(csr_array(acts.float().cpu().numpy()))
    n, n_tokens = len(passages.texts), len(passages.passage)
    which = passages.passage.numpy()
    share = 1 / np.bincount(which, minlength=n)[which]
    mean = csr_array((share, (which, np.arange(n_tokens))), shape=(n, n_tokens))
    return PooledActs(
        documents=passages.documents,
        x=(mean @ passages.activations.double().numpy()).astype("float32"),
        feature_acts=csr_array(mean @ vstack(chunks, format="csr")),
        directions=torch.nn.functional.normalize(rows, dim=1).cpu().numpy(),
    )


# -- which passages a task uses ----------------------------------------------------------------


def split_by_document(documents: Sequence[str], labels: Tensor, seed: int) -> Tensor:
    """Which passages are for testing: half of each class's documents, so that no document is on both sides.

    A document with passages of both classes counts for the rarer one. Returns a mask (n,).
    """
    generator = torch.Generator().manual_seed(seed)
    known = labels != UNKNOWN
    share = float((labels[known] == 1).double().mean()) if known.any() else 0.0
    rare = int(share < 0.5)
    by_class: dict[int, list[str]] = {0: [], 1: []}
    for document in sorted(set(documents)):
        here = labels[[d == document for d in documents]]
        if (here != UNKNOWN).any():
            holds_rare = bool((here == rare).any())
            by_class[rare if holds_rare else 1 - rare].append(document)
    for_test: set[str] = set()
    for members in by_class.values():
        order = torch.randperm(len(members), generator=generator).tolist()
        for_test |= {members[i] for i in order[: len(members) // 2]}
    return torch.tensor([document in for_test for document in documents])


def balanced(groups: Mapping[object, Tensor], seed: int, least: int, what: str) -> Tensor:
    """As many rows of each group as the smallest has, drawn with the seed, as one list of row numbers.

    Raises
    ------
    ValueError
        If a group has fewer than `least` rows.
    """
    smallest = min(int(mask.sum()) for mask in groups.values())
    if smallest < least:
        found = ", ".join(f"{name}: {int(mask.sum())}" for name, mask in groups.items())
        raise ValueError(f"{what} has too few passages ({found}); {least} are needed of each")
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for mask in groups.values():
        members = mask.nonzero()[:, 0]
        rows.append(members[torch.randperm(len(members), generator=generator)[:smallest]])
    return torch.cat(rows)

"""An SAE's view of labelled passages, averaged over each passage: what probes read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.passages import UNKNOWN, Passages, corpus_labels, harvest_passages
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.encoding import encode_sparse
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array

    from c2r_core.metrics.inputs import Inputs


@dataclass(frozen=True, eq=False)
class PooledActs:
    """Averages over each passage's tokens.

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


def pool(sae: AnySAE, passages: Passages, *, chunk_size: int = 2048) -> PooledActs:
    """Averages over each passage's tokens, of the activations and of an SAE's feature activations.

    Parameters
    ----------
    sae : any object with encode, decode and W_dec
        Takes raw activations; rows of W_dec may have any norm.
    chunk_size : int
        About so many tokens are in memory at a time; a wide SAE encodes fewer (see `encode_sparse`).

    Raises NotEvaluable if the SAE is made for another width, or gives NaN or infinite activations.
    """
    from scipy.sparse import csr_array, vstack

    n = len(passages.texts)
    first_token = np.searchsorted(passages.passage.numpy(), np.arange(n + 1))
    at_once = max(1, chunk_size // int(np.diff(first_token).max()))
    means, feature_acts = [], []
    for start in range(0, n, at_once):
        bounds = first_token[start : start + at_once + 1]
        x = passages.activations[bounds[0] : bounds[-1]].float()
        counts = np.diff(bounds)
        weights = (1 / np.repeat(counts, counts), np.arange(len(x)), bounds - bounds[0])
        mean = csr_array(weights, shape=(len(counts), len(x)))
        means.append((mean @ x.double().numpy()).astype("float32"))
        feature_acts.append(mean @ encode_sparse(sae, x))
    rows = sae.W_dec.detach().float().cpu()
    acts = csr_array(vstack(feature_acts, format="csr"))
    acts.data *= rows.norm(dim=1).numpy()[acts.indices]
    directions = torch.nn.functional.normalize(rows, dim=1).numpy()
    return PooledActs(passages.documents, np.concatenate(means), acts, directions)


def pooled_passages(inputs: Inputs) -> tuple[PooledActs, dict[str, Tensor]]:
    """Passages of the held-out documents as the SAE sees them, and what is known of each, by task."""

    model, corpus, hook = inputs.language_model, inputs.documents.corpus, inputs.lm.hook_name

    def make() -> tuple[PooledActs, dict[str, Tensor]]:
        limits = {
            "n_passages": inputs.sizes.passages,
            "n_tokens": inputs.sizes.passage_tokens,
            "max_norm": inputs.lm.drop_norm_ratio * inputs.activations.manifest.median_norm,
        }

        def build(folder: Path) -> None:
            harvest_passages(model, corpus, hook, precision=inputs.precision, **limits).save(folder)

        code = [harvest_passages.__module__]
        passages = Passages.load(inputs.kept("passages", limits, build, code=code))
        labels = corpus_labels(passages.documents, passages.texts)
        return pool(inputs.sae, passages, chunk_size=inputs.chunk), labels

    return inputs.once("pooled", make)


# -- which passages a task uses ----------------------------------------------------------------


def task_rows(
    documents: Sequence[str], labels: Tensor, task: str, seed: int, least: int
) -> tuple[np.ndarray, np.ndarray]:
    """Row numbers of balanced training and test passages, from different documents.

    Raises NotEvaluable if a class has fewer than `least` passages on a side.
    """
    is_test = split_by_document(documents, labels, seed)
    groups = {c: labels == c for c in (0, 1)}
    train, test = (
        balanced(groups, side, seed, least, f"the {name} side of {task!r}")
        for side, name in ((~is_test, "training"), (is_test, "test"))
    )
    return train, test


def split_by_document(documents: Sequence[str], labels: Tensor, seed: int) -> Tensor:
    """Which passages are for testing: half of each class's documents, so that no document is on both sides.

    A document with passages of both classes counts for the rarer one. Returns a mask (n,).
    """
    generator = torch.Generator().manual_seed(seed)
    rare = int((labels == 1).sum() < (labels == 0).sum())
    held: dict[str, set[int]] = {document: set() for document in sorted(set(documents))}
    for document, label in zip(documents, labels.tolist(), strict=True):
        held[document].add(label)
    holds_rare = [document for document, found in held.items() if rare in found]
    others = [d for d, found in held.items() if rare not in found and found - {UNKNOWN}]
    for_test: set[str] = set()
    for members in (others, holds_rare) if rare else (holds_rare, others):
        order = torch.randperm(len(members), generator=generator).tolist()
        for_test |= {members[i] for i in order[: len(members) // 2]}
    return torch.tensor([document in for_test for document in documents])


def balanced(
    groups: Mapping[object, Tensor], among: Tensor, seed: int, least: int, what: str
) -> np.ndarray:
    """As many rows of each group (a mask) as the smallest has among these, drawn with the seed.

    Raises NotEvaluable if a group has fewer than `least` rows.
    """
    members = {name: (mask & among).nonzero()[:, 0] for name, mask in groups.items()}
    smallest = min(map(len, members.values()))
    if smallest < least:
        found = ", ".join(f"{name}: {len(rows)}" for name, rows in members.items())
        raise NotEvaluable(f"{what} has too few passages ({found}); {least} are needed of each")
    generator = torch.Generator().manual_seed(seed)
    drawn = [
        rows[torch.randperm(len(rows), generator=generator)[:smallest]] for rows in members.values()
    ]
    return torch.cat(drawn).numpy()

"""Passages of text with labels, and a model's activations in them.

What a passage is about, who spoke it and when are concepts with known answers, which the embedded corpus
gives offline: `corpus_labels`.

    passages = harvest_passages(model, corpus, hook_name, n_passages=3000, n_tokens=64, max_norm=600)
    labels = corpus_labels(passages.documents, passages.texts)
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.forward import Precision, activations
from c2r_core.data.store import to_storage
from c2r_core.data.text import Corpus
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Passages:
    """Passages of equal length, with a model's activations at the tokens that are kept.

    Attributes
    ----------
    texts : tuple of str, n of them
    documents : tuple of str
        The name of each passage's document.
    activations : Tensor of float16, shape (n_tokens, d_in)
    passage : Tensor of int, shape (n_tokens,)
        The passage of each token, rising.
    """

    texts: tuple[str, ...]
    documents: tuple[str, ...]
    activations: Tensor
    passage: Tensor

    def save(self, folder: Path) -> None:
        """Write `passages.safetensors` and `passages.json` into a folder that is there."""
        from safetensors.torch import save_file

        tensors = {"activations": self.activations, "passage": self.passage}
        save_file(tensors, folder / "passages.safetensors")
        text = json.dumps({"texts": self.texts, "documents": self.documents})
        (folder / "passages.json").write_text(text, encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Passages:
        """Read what `save` wrote."""
        from safetensors.torch import load_file

        texts = json.loads((folder / "passages.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "passages.safetensors")
        return cls(**{name: tuple(some) for name, some in texts.items()}, **tensors)


def harvest_passages(
    model: TransformerBridge,
    corpus: Corpus,
    hook_name: str,
    *,
    n_passages: int,
    n_tokens: int,
    max_norm: float,
    precision: Precision = "float32",
    batch_size: int = 32,
) -> Passages:
    """Passages of a corpus, about as many of each document and evenly spread in it.

    Parameters
    ----------
    model : TransformerBridge
    corpus : Corpus
    hook_name : str
    n_passages : int
        In all, at most.
    n_tokens : int
        Of each passage; it is a context of its own.
    max_norm : float
        The first token of a passage is left out, and tokens of a larger norm, as in training.
    precision : "float32" or "bfloat16"
        Of the model's matrix products.
    batch_size : int
        Passages per forward pass.

    Raises
    ------
    ValueError
        If `activations` refuses the hook or the precision.
    NotEvaluable
        If no document is as long as a passage, or an activation does not fit into half precision.
    """
    texts, names, rows = [], [], []
    per_document = -(-n_passages // len(corpus))
    for document in corpus.documents:
        ids = model.tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        available = len(ids) // n_tokens
        for i in np.linspace(0, available - 1, min(per_document, available)).astype(int):
            rows.append(ids[i * n_tokens : (i + 1) * n_tokens])
            texts.append(model.tokenizer.decode(rows[-1]))
            names.append(document.name)
    if not rows:
        raise NotEvaluable(
            f"No document of corpus {corpus.name!r} has {n_tokens} tokens, the length of a passage."
        )
    # As many as asked for, spread over all: the quota of a document is rounded up.
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(n_passages, len(rows))).astype(int))
    tokens = torch.tensor(np.array(rows)[chosen], dtype=torch.long)
    found, passage, kept_so_far = [], [], 0
    for batch in tokens.split(batch_size):
        x = activations(model, batch, hook_name, precision=precision).cpu()
        kept = x.norm(dim=-1) <= max_norm
        kept[:, 0] = False
        kept[~kept.any(1), -1] = True  # a passage without any would have no mean
        found.append(to_storage(x[kept], "float16", "Take a lower max_norm."))
        passage.append(kept.nonzero()[:, 0] + kept_so_far)
        kept_so_far += len(batch)
    return Passages(
        texts=tuple(texts[i] for i in chosen),
        documents=tuple(names[i] for i in chosen),
        activations=torch.cat(found),
        passage=torch.cat(passage),
    )


# -- labels ------------------------------------------------------------------------------------

TOPICS = {
    "war": r"war|wars|army|troops|military|enemy",
    "taxes": r"tax|taxes|taxation|revenue|revenues|tariff|duties",
    "native nations": r"Indian|Indians|tribe|tribes",
    "money": r"gold|silver|currency|coinage|bank|banks",
    "trade": r"commerce|trade|import|imports|export|exports",
    "diplomacy": r"treaty|treaties|minister|ministers|negotiation|negotiations",
    "work": r"labor|wage|wages|worker|workers|job|jobs|employment",
    "schools": r"school|schools|education|college|colleges|teacher|teachers",
    "transport": r"railroad|railroads|railway|railways|canal|canals|road|roads|highway|highways",
    "farms": r"farm|farms|farmer|farmers|farming|agriculture|agricultural|crop|crops",
    "law": r"court|courts|judge|judges|crime|crimes|justice",
}
"""Words of each topic; a passage holds the topic if one of them is in it."""

DEMOCRATS = (
    "Jackson VanBuren Polk Pierce Buchanan Cleveland Wilson Truman Kennedy Carter Clinton Obama Biden"
).split()
REPUBLICANS = (
    "Lincoln Grant Hayes Arthur McKinley Taft Harding Coolidge Hoover Eisenhower Nixon Ford Reagan Bush "
    "Trump"
).split()
"""Presidents whose family name says their party. Roosevelt, Johnson and Harrison go by the year."""


def corpus_labels(documents: Sequence[str], texts: Sequence[str]) -> dict[str, Tensor]:
    """Labels of passages: topics from their words; of State of the Union addresses also who and when.

    Parameters
    ----------
    documents : sequence of str
        Names like `1862-Lincoln-1` give party, century and the president; others give none of these.
    texts : sequence of str

    Returns
    -------
    dict from a task's name to a Tensor of int, shape (n,): 1, 0, or UNKNOWN (−1)
        "century" is 1 from 1901 on; "party" is 1 for Democrats and 0 for Republicans; "spoken" is 1
        for addresses that were delivered in person (1790–1800; from 1913 on, without 1919, 1920,
        1924–1932, 1945, 1946, 1953, 1956, 1961 and 1981, which were written; 1972–1980 are unknown,
        since several were both).
    """
    labels = {}
    for topic, words in TOPICS.items():
        pattern = re.compile(rf"\b(?:{words})\b")
        labels[f"topic: {topic}"] = torch.tensor([int(bool(pattern.search(t))) for t in texts])
    parsed = [re.fullmatch(r"(\d{4})-([A-Za-z]+)-\d+", name) for name in documents]
    if not any(parsed):
        return labels
    years = [int(match[1]) if match else None for match in parsed]
    names = [match[2] if match else None for match in parsed]
    labels["century"] = torch.tensor([UNKNOWN if y is None else int(y > 1900) for y in years])
    pairs = list(zip(names, years, strict=True))
    labels["party"] = torch.tensor([_party(name, year) for name, year in pairs])
    labels["spoken"] = torch.tensor([_spoken(year) for year in years])
    by_president: dict[str, set[str]] = {}
    for president, document in zip(names, documents, strict=True):
        if president is not None:
            by_president.setdefault(president, set()).add(document)
    for president, addresses in sorted(by_president.items()):
        if len(addresses) > 1:
            labels[f"president: {president}"] = torch.tensor(
                [UNKNOWN if name is None else int(name == president) for name in names]
            )
    return labels


def _party(name: str | None, year: int | None) -> int:
    if name == "Roosevelt":
        return int(year > 1930)
    if name == "Harrison":
        return 0 if year > 1880 else UNKNOWN
    if name == "Johnson":
        return 1 if year > 1960 else UNKNOWN
    if name in DEMOCRATS:
        return 1
    return 0 if name in REPUBLICANS else UNKNOWN


_WRITTEN = {1919, 1920, *range(1924, 1933), 1945, 1946, 1953, 1956, 1961, 1981}


def _spoken(year: int | None) -> int:
    if year is None or 1972 <= year <= 1980:
        return UNKNOWN
    return int((year <= 1800 or year >= 1913) and year not in _WRITTEN)

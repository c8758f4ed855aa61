"""Passages of text with labels, and a model's activations in them.

What a passage is about, who spoke it and when are concepts with known answers, which the embedded corpus
gives offline: `corpus_labels`.

    passages = harvest_passages(model, corpus, hook_name, n_passages=3000, n_tokens=64, max_norm=600)
    labels = corpus_labels(passages.documents, passages.texts)
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import torch
from torch import Tensor

from c2r_core.artefacts.records import Record
from c2r_core.data.forward import Precision, activations
from c2r_core.data.store import to_storage
from c2r_core.data.text import Corpus
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

UNKNOWN = -1


@dataclass(frozen=True, eq=False)
class Passages(Record):
    """Passages of equal length, with a model's activations at the tokens that are kept."""

    FILES: ClassVar[str] = "passages"

    texts: tuple[str, ...]
    documents: tuple[str, ...]
    """The name of each passage's document."""
    activations: Tensor
    """Float16, (n_tokens, d_in)."""
    passage: Tensor
    """Int, (n_tokens,): the passage of each token, rising."""


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

    A passage has n_tokens tokens and is a context of its own. Its first token is left out, and tokens of a
    norm above max_norm, as in training. `n_passages` is how many in all, at most; a batch is so many of them.
    `precision` is that of `forward.activations`. ValueError if that refuses the hook or the precision;
    NotEvaluable if no document is as long as a passage, or an activation does not fit into half precision.
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

    Names of documents like `1862-Lincoln-1` give party, century and the president; others give none of
    these. Every label is an int Tensor, (n,), by its name: 1, 0, or UNKNOWN (−1). "century" is 1 from 1901
    on. "party" is 1 for Democrats and 0 for Republicans. "spoken" is 1 for addresses that were delivered in
    person: 1790–1800, and from 1913 on without those in _WRITTEN; 1972–1980 are unknown, since several
    were both.
    """
    labels: dict[str, list[int]] = {}
    for topic, words in TOPICS.items():
        pattern = re.compile(rf"\b(?:{words})\b")
        labels[f"topic: {topic}"] = [int(bool(pattern.search(text))) for text in texts]
    parsed = [re.fullmatch(r"(\d{4})-([A-Za-z]+)-\d+", name) for name in documents]
    if any(parsed):

        def add(name: str, of: Callable[[str, int], int]) -> None:
            labels[name] = [of(m[2], int(m[1])) if m else UNKNOWN for m in parsed]

        add("century", lambda president, year: int(year > 1900))
        add("party", _party)
        add("spoken", _spoken)
        addresses = Counter(president for _, president in {(m[0], m[2]) for m in parsed if m})
        for president in sorted(name for name, number in addresses.items() if number > 1):
            add(f"president: {president}", lambda name, year, one=president: int(name == one))
    return {name: torch.tensor(values) for name, values in labels.items()}


def _party(president: str, year: int) -> int:
    if president == "Roosevelt":
        return int(year > 1930)
    if president == "Harrison":
        return 0 if year > 1880 else UNKNOWN
    if president == "Johnson":
        return 1 if year > 1960 else UNKNOWN
    if president in DEMOCRATS:
        return 1
    return 0 if president in REPUBLICANS else UNKNOWN


_WRITTEN = {1919, 1920, *range(1924, 1933), 1945, 1946, 1953, 1956, 1961, 1981}


def _spoken(president: str, year: int) -> int:
    if 1972 <= year <= 1980:
        return UNKNOWN
    return int((year <= 1800 or year >= 1913) and year not in _WRITTEN)

"""Passages of text with labels, and a model's activations in them.

What a passage is about, who spoke it and when are concepts with known answers, which the embedded corpus
gives offline: `corpus_labels`. Other texts come with labels of their own: `labelled_corpus`, `hub_texts`.

    passages = harvest_passages(model, corpus, hook_name, n_passages=3000, n_tokens=64, max_norm=600)
    pooled = pool(sae, passages)  # what probes read
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.language_models import Precision, run_to_hook
from c2r_core.data.text import Corpus, Document
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from scipy.sparse import csr_array
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
        If no document is as long as a passage, or `run_to_hook` refuses the hook or the precision.
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
        raise ValueError(
            f"No document of corpus {corpus.name!r} has {n_tokens} tokens, the length of a passage."
        )
    # As many as asked for, spread over all: the quota of a document is rounded up.
    chosen = np.unique(np.linspace(0, len(rows) - 1, min(n_passages, len(rows))).astype(int))
    tokens = torch.tensor(np.array(rows)[chosen], dtype=torch.long)
    activations, passage, kept_so_far = [], [], 0
    for batch in tokens.split(batch_size):
        x = run_to_hook(model, batch, hook_name, precision).float().cpu()
        kept = x.norm(dim=-1) <= max_norm
        kept[:, 0] = False
        kept[~kept.any(1), -1] = True  # a passage without any would have no mean
        activations.append(x[kept].half())
        passage.append(kept.nonzero()[:, 0] + kept_so_far)
        kept_so_far += len(batch)
    return Passages(
        texts=tuple(texts[i] for i in chosen),
        documents=tuple(names[i] for i in chosen),
        activations=torch.cat(activations),
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


# -- texts from elsewhere ----------------------------------------------------------------------


def labelled_corpus(name: str, texts: Sequence[str], labels: Sequence[str]) -> Corpus:
    """A corpus of texts whose documents are named `label-number`, for `class_labels`.

    Raises
    ------
    ValueError
        If there are not as many labels as texts.
    """
    if len(texts) != len(labels):
        raise ValueError(
            f"There are {len(texts)} texts and {len(labels)} labels; expected as many."
        )
    documents = (
        Document(f"{label}-{i}", text)
        for i, (text, label) in enumerate(zip(texts, labels, strict=True))
    )
    return Corpus(name, tuple(documents))


def class_labels(documents: Sequence[str]) -> dict[str, Tensor]:
    """One task for each class of a `labelled_corpus`: this class against all others."""
    classes = [name.rpartition("-")[0] for name in documents]
    return {
        label: torch.tensor([int(own == label) for own in classes])
        for label in sorted(set(classes))
    }


def hub_texts(
    name: str, *, text: str, label: str, split: str = "test", limit: int = 2000
) -> Corpus:
    """A labelled data set of the Hugging Face hub, or of a local folder, as a `labelled_corpus`.

    SAEBench probes, among others, `fancyzhx/ag_news` (text="text", label="label").

    Parameters
    ----------
    name : str
        As `datasets.load_dataset` takes it.
    text, label : str
        Names of the columns.
    split : str
    limit : int
        Read only so many rows, the first.

    Raises
    ------
    ValueError
        If the data set cannot be read (there is no network, for example), or a column is missing.
    """
    from datasets import load_dataset

    try:
        rows = load_dataset(name, split=f"{split}[:{limit}]")
    except Exception as error:  # the library raises many kinds, by reason
        raise ValueError(
            f"The data set {name!r} cannot be read ({type(error).__name__}: {error}). It needs the "
            "network (HF_HUB_OFFLINE=0), or give the path of a local copy."
        ) from error
    missing = {text, label} - set(rows.column_names)
    if missing:
        raise ValueError(
            f"The data set {name!r} has no column {sorted(missing)}; it has {rows.column_names}."
        )
    return labelled_corpus(name, rows[text], [str(value) for value in rows[label]])

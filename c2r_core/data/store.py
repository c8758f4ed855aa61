"""A store of language-model activations on disk; `c2r_core.data.harvest` makes one.

A store is a folder: `manifest.json` (what it holds and how it was made), `shard-00000.npy`, ...
(activations of every token, memory-mapped), `tokens.npy` (token ids, one row a context) and
`kept.npy` (which tokens count).

Dropped are the first token of every context, which models use as an attention sink, and the rare
tokens of huge norm; either would dominate a squared error. They stay in the shards, so that a
measurement can include them. Numbered rows, `len()` and `norm_factor` mean kept tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.forward import Precision
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 2
MANIFEST, TOKENS, KEPT = "manifest.json", "tokens.npy", "kept.npy"


@dataclass(frozen=True, kw_only=True)
class HarvestConfig:
    """What decides the content of a store, beside the model and the text.

    Raises
    ------
    ValueError
        If a setting is out of range.
    """

    hook_name: str
    """Such as `blocks.4.hook_resid_post`; see `c2r_core.data.language_models`."""
    context_size: int = 128
    """Tokens per context, BOS included."""
    max_tokens: int | None = None
    """Upper bound on the stored tokens, dropped ones included; the contexts taken are evenly spaced
    over the corpus. None takes everything."""
    drop_norm_ratio: float = 6.0
    """Tokens whose norm is over this many times the median are dropped (10 in the paper)."""
    precision: Precision = "float32"
    """Of the model's matrix products; see `c2r_core.data.forward.activations`."""
    dtype: Literal["float16", "float32"] = "float16"
    """Of the stored values."""

    def __post_init__(self) -> None:
        if self.context_size < 2:
            raise ValueError(f"context_size is {self.context_size}; expected at least 2.")
        if self.max_tokens is not None and self.max_tokens < self.context_size:
            raise ValueError(
                f"max_tokens is {self.max_tokens}; expected at least one context of "
                f"{self.context_size} tokens."
            )
        if not 1 <= self.drop_norm_ratio < float("inf"):
            raise ValueError(
                f"drop_norm_ratio is {self.drop_norm_ratio}; expected a number of at least 1."
            )
        for name, known in (
            ("precision", ("float32", "bfloat16")),
            ("dtype", ("float16", "float32")),
        ):
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {given!r}; expected {' or '.join(map(repr, known))}.")


@dataclass(frozen=True)
class Shard:
    """One file of activations."""

    name: str
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True, kw_only=True)
class Manifest(HarvestConfig):
    """The settings of a harvest and what came of it; written as `manifest.json`.

    `n_short_documents` of the corpus' `n_documents` were too short for one context and gave no
    token. `median_norm` is over all tokens but the first of each context. `norm_factor` is the c
    for which the mean of ||c x||^2 over the kept tokens, as stored, is 1.
    """

    format_version: int = FORMAT_VERSION
    model_name: str
    model_fingerprint: str
    corpus_name: str
    text_fingerprint: str
    n_documents: int
    n_short_documents: int
    d_in: int
    n_tokens: int
    n_kept: int
    median_norm: float
    norm_factor: float
    shards: tuple[Shard, ...]
    library_versions: dict[str, str]

    def write(self, folder: Path) -> None:
        """Write it into the folder of its store."""
        (folder / MANIFEST).write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")


class TextWindow(NamedTuple):
    """Tokens as strings; the one asked for is `tokens[position]`."""

    tokens: tuple[str, ...]
    position: int


class ActivationStore:
    """Activations on disk, read through memory maps. Make one with `harvest`, or `open` a folder.

    Attributes
    ----------
    manifest : Manifest
    contexts : int array, shape (n_contexts, context_size)
        Token ids, dropped tokens included.
    kept : bool array, shape (n_tokens,)
        Which tokens of `contexts.ravel()` count.
    kept_positions : int array, shape (len(store),)
        Where in `contexts.ravel()` each row is, rising: the tokens of a context that an SAE sees.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self.contexts = np.load(folder / TOKENS)
        self.kept = np.load(folder / KEPT)
        self.kept_positions = np.flatnonzero(self.kept)
        self._shards = [np.load(folder / shard.name, mmap_mode="r") for shard in manifest.shards]
        self._shard_starts = np.cumsum([0] + [shard.n_tokens for shard in manifest.shards])

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open the store in a folder.

        Raises
        ------
        FileNotFoundError
            If the folder holds no store, or one of its files is missing.
        ValueError
            If a shard has not the size that the manifest gives, or the format is another.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST}: make a store with harvest().")
        manifest = _read_manifest(folder / MANIFEST)
        remedy = f"Delete {folder} and harvest again."
        for name in (TOKENS, KEPT, *(shard.name for shard in manifest.shards)):
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing from the store in {folder}. {remedy}")
        for shard in manifest.shards:
            n_bytes = (folder / shard.name).stat().st_size
            if n_bytes != shard.n_bytes:
                raise ValueError(
                    f"{shard.name} in {folder} has {n_bytes:,} bytes, the manifest says "
                    f"{shard.n_bytes:,}: it is truncated or not of this store. {remedy}"
                )
        return cls(folder, manifest)

    def __len__(self) -> int:
        return self.manifest.n_kept

    @property
    def d_in(self) -> int:
        """Width of one activation."""
        return self.manifest.d_in

    @property
    def norm_factor(self) -> float:
        """The c for which the mean of ||c x||^2 over all rows is 1."""
        return self.manifest.norm_factor

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Tensor:
        """Raw activations of the given rows, in the given order.

        Parameters
        ----------
        indices : int, shape (n,)
            Rows, 0 <= index < len(store).

        Returns
        -------
        Tensor of float32, shape (n, d_in)

        Raises
        ------
        IndexError
            If an index is outside of the store.
        """
        rows = np.asarray(indices, dtype=np.int64)
        if rows.size and not (0 <= rows.min() and rows.max() < len(self)):
            raise IndexError(
                f"Row indices run from {rows.min()} to {rows.max()}; the store has rows 0 to "
                f"{len(self) - 1}."
            )
        positions = self.kept_positions[rows]
        # Ascending reads touch each page of the memory maps once.
        order = np.argsort(positions)
        positions = positions[order]
        bounds = np.searchsorted(positions, self._shard_starts)
        batch = np.empty((len(rows), self.d_in), dtype=self.manifest.dtype)
        for shard, start, first, last in zip(
            self._shards, self._shard_starts, bounds, bounds[1:], strict=False
        ):
            batch[order[first:last]] = shard[positions[first:last] - start]
        return torch.from_numpy(batch).float()

    def chunks(self, size: int, dropped: bool = False) -> Iterator[Tensor]:
        """Raw activations in order, as float32 tensors of shape (size, d_in).

        Parameters
        ----------
        size : int
            Tokens at a time; the last chunk may have fewer.
        dropped : bool
            Include the dropped tokens; then the order is that of `contexts.ravel()`.
        """
        if size < 1:
            raise ValueError(f"size is {size}; expected a positive number of tokens.")
        if not dropped:
            for start in range(0, len(self), size):
                yield self.batch(np.arange(start, min(start + size, len(self))))
            return
        for start in range(0, self.manifest.n_tokens, size):
            pieces = [
                shard[max(start - first, 0) : max(start + size - first, 0)]
                for shard, first in zip(self._shards, self._shard_starts, strict=False)
            ]
            yield torch.from_numpy(np.concatenate(pieces)).float()

    def text_around(
        self, row: int, tokenizer: PreTrainedTokenizerBase, before: int = 8, after: int = 2
    ) -> TextWindow:
        """The text around a row, within its context.

        Parameters
        ----------
        row : int, 0 <= row < len(store)
        tokenizer : PreTrainedTokenizerBase
            The one of the language model: `model.tokenizer`.
        before, after : int
            Tokens to show on either side.
        """
        if not 0 <= row < len(self):
            raise IndexError(f"Row is {row}; the store has rows 0 to {len(self) - 1}.")
        context, position = divmod(int(self.kept_positions[row]), self.manifest.context_size)
        first = max(0, position - before)
        ids = self.contexts[context, first : position + after + 1]
        return TextWindow(tuple(tokenizer.decode([int(i)]) for i in ids), position - first)


def to_storage(x: Tensor, dtype: str, remedy: str) -> Tensor:
    """Finite values in another type.

    Raises
    ------
    NotEvaluable
        If a value does not fit; it says so, and the remedy.
    """
    stored = x.to(getattr(torch, dtype))
    if not stored.isfinite().all():
        raise NotEvaluable(
            f"An activation of {x.abs().max():.6g} does not fit into {dtype} (largest "
            f"{torch.finfo(stored.dtype).max:.0f}). {remedy}"
        )
    return stored


def _read_manifest(path: Path) -> Manifest:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content.get('format_version')}; this code reads "
            f"{FORMAT_VERSION}. Delete {path.parent} and harvest again."
        )
    shards = tuple(Shard(**shard) for shard in content.pop("shards"))
    return Manifest(**content, shards=shards)

"""A store of language-model activations on disk; `c2r_core.data.harvest` makes one.

A store is a folder: `manifest.json` (what it holds and how it was made), `shard-00000.npy`, ...
(activations of every token, memory-mapped), `tokens.npy` (token ids, one row a context) and
`kept.npy` (which tokens count). The manifest holds the SHA-256 of every other file and of itself. What is
small is compared when a store is opened, and a shard when something is first read of it.

Dropped are the first token of every context, which models use as an attention sink, and the rare
tokens of huge norm; either would dominate a squared error. They stay in the shards, so that a
measurement can include them. Numbered rows, `len()` and `norm_factor` mean kept tokens only.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from c2r_core.artefacts.checksums import compare, of_file, of_values
from c2r_core.artefacts.fields import from_values
from c2r_core.data.arrays import mapped
from c2r_core.data.forward import Precision
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 3
"""Version 2 had no checksums."""
MANIFEST, TOKENS, KEPT = "manifest.json", "tokens.npy", "kept.npy"
OF_MANIFEST = "manifest_sha256"
"""Entry of the manifest: the checksum of its other values."""
_LONGEST_HEADER = 4096
"""Bytes in front of the values of an .npy file, at most."""


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
        of_names = {"precision": ("float32", "bfloat16"), "dtype": ("float16", "float32")}
        for name, known in of_names.items():
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name} is {given!r}; expected {' or '.join(map(repr, known))}.")


@dataclass(frozen=True)
class Shard:
    """One file of activations."""

    name: str
    n_tokens: int
    n_bytes: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Manifest(HarvestConfig):
    """The settings of a harvest and what came of it; written as `manifest.json`.

    `n_short_documents` of the corpus' `n_documents` were too short for one context and gave no
    token. `median_norm` is over all tokens but the first of each context. `norm_factor` is the c
    for which the mean of ||c x||^2 over the kept tokens, as stored, is 1.

    Raises
    ------
    ValueError
        If a number is out of range, or the shards do not add up or are not named in order.
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
    tokens_sha256: str
    kept_sha256: str
    library_versions: dict[str, str]

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("d_in", "n_tokens", "n_kept", "median_norm", "norm_factor"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number")
        n, of_shards = self.n_tokens, sum(shard.n_tokens for shard in self.shards)
        if n % self.context_size or n < self.n_kept or n != of_shards:
            raise ValueError(
                f"n_tokens is {n}, n_kept {self.n_kept}, and the shards have {of_shards}; expected "
                f"contexts of {self.context_size} tokens, at most all of them kept, and all in shards"
            )
        for i, shard in enumerate(self.shards):
            if shard.name != shard_name(i):
                raise ValueError(f"shard {i} is named {shard.name!r}; expected {shard_name(i)}")
            n_bytes = shard.n_tokens * self.d_in * np.dtype(self.dtype).itemsize
            if shard.n_tokens < 1 or not n_bytes < shard.n_bytes <= n_bytes + _LONGEST_HEADER:
                raise ValueError(
                    f"{shard.name} has {shard.n_tokens} tokens and {shard.n_bytes} bytes; expected "
                    f"{self.d_in} values of {self.dtype} a token"
                )

    def as_bytes(self) -> bytes:
        """The content of `manifest.json`."""
        return _as_bytes(asdict(self))

    @classmethod
    def read(cls, content: bytes, file: Path | str, remedy: str) -> Manifest:
        """The inverse of `as_bytes`.

        Parameters
        ----------
        content : bytes
        file, remedy : Path or str
            Where it is from, and what to do about a bad one: for messages.

        Raises
        ------
        ValueError
            If it is not what was written, or of another format.
        """
        try:
            values = json.loads(content)
        except (ValueError, RecursionError) as error:  # no UTF-8, or no JSON
            raise ValueError(f"{file} is damaged ({error}). {remedy}") from error
        if not isinstance(values, dict):
            raise ValueError(f"{file} is no JSON object; expected a store's manifest. {remedy}")
        if values.get("format_version") != FORMAT_VERSION:
            raise ValueError(
                f"{file} has format version {values.get('format_version')!r}; this code reads "
                f"{FORMAT_VERSION}. {remedy}"
            )
        compare(file, values.pop(OF_MANIFEST, None), of_values(values), remedy)
        if content != _as_bytes(values):
            raise ValueError(f"{file} is not spelled as it was saved: it is damaged. {remedy}")
        try:
            return from_values(cls, values)
        except ValueError as error:
            raise ValueError(f"{file} is no manifest of a store: {error}. {remedy}") from error

    def checksums(self) -> dict[str, str]:
        """SHA-256 of every file of the store but the manifest, by name."""
        small = {TOKENS: self.tokens_sha256, KEPT: self.kept_sha256}
        return small | {shard.name: shard.sha256 for shard in self.shards}


def shard_name(index: int) -> str:
    """Name of the file of a shard."""
    return f"shard-{index:05d}.npy"


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
        n_tokens, size, remedy = manifest.n_tokens, manifest.context_size, _remedy(folder)
        in_contexts = (n_tokens // size, size)
        tokens = mapped(folder / TOKENS, manifest.tokens_sha256, in_contexts, "int32", remedy)
        kept = mapped(folder / KEPT, manifest.kept_sha256, (n_tokens,), "bool", remedy)
        self.contexts, self.kept = np.array(tokens), np.array(kept)
        self.kept_positions = np.flatnonzero(self.kept)
        if len(self.kept_positions) != manifest.n_kept:
            raise ValueError(
                f"{folder / KEPT} keeps {len(self.kept_positions):,} tokens, the manifest says "
                f"{manifest.n_kept:,}. {remedy}"
            )
        self._shards: dict[int, np.ndarray] = {}
        self._shard_starts = np.cumsum([0] + [shard.n_tokens for shard in manifest.shards])

    @classmethod
    def open(cls, folder: str | Path) -> ActivationStore:
        """Open the store in a folder. No shard is read; the first reading of each compares its checksum.

        Raises
        ------
        FileNotFoundError
            If the folder holds no store, or one of its files is missing.
        ValueError
            If a file is not what was written, as far as is compared here: the manifest, the tokens, and the
            sizes of the shards. If the format is another.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} holds no {MANIFEST}: make a store with harvest().")
        remedy = _remedy(folder)
        manifest = Manifest.read((folder / MANIFEST).read_bytes(), folder / MANIFEST, remedy)
        for name in manifest.checksums():
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{name} is missing from the store in {folder}. {remedy}")
        for shard in manifest.shards:
            n_bytes = (folder / shard.name).stat().st_size
            if n_bytes != shard.n_bytes:
                raise ValueError(
                    f"{folder / shard.name} has {n_bytes:,} bytes, the manifest says "
                    f"{shard.n_bytes:,}: it is truncated or not of this store. {remedy}"
                )
        return cls(folder, manifest)

    def check(self) -> None:
        """Compare every file with its checksum now: all is read once, about 0.9 s for a GB.

        Raises
        ------
        ValueError
            If a file is not what was written; the message names it.
        """
        for name, checksum in self.manifest.checksums().items():
            compare(self.folder / name, checksum, of_file(self.folder / name), _remedy(self.folder))

    def _shard(self, index: int) -> np.ndarray:
        """Activations of a shard, (n_tokens, d_in)."""
        if index not in self._shards:
            shard, kind = self.manifest.shards[index], self.manifest.dtype
            file, shape = self.folder / shard.name, (shard.n_tokens, self.d_in)
            self._shards[index] = mapped(file, shard.sha256, shape, kind, _remedy(self.folder))
        return self._shards[index]

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
        for i, start in enumerate(self._shard_starts[:-1]):
            first, last = bounds[i : i + 2]
            if first < last:
                batch[order[first:last]] = self._shard(i)[positions[first:last] - start]
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
        bounds = list(enumerate(zip(self._shard_starts, self._shard_starts[1:], strict=False)))
        for start in range(0, self.manifest.n_tokens, size):
            pieces = [
                self._shard(i)[max(start - first, 0) : start + size - first]
                for i, (first, end) in bounds
                if first < start + size and start < end
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


def _as_bytes(values: Mapping[str, Any]) -> bytes:
    """A manifest as it is written, its own checksum last."""
    text = json.dumps({**values, OF_MANIFEST: of_values(values)}, indent=1)
    return f"{text}\n".encode()


def _remedy(folder: Path) -> str:
    return f"Delete {folder} and harvest again, or restore it from a copy."

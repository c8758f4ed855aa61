"""A store of language-model activations on disk, and the batches that an SAE is trained on.

A store is a folder: `manifest.json` (what it holds and how it was made), `shard-00000.npy`, ...
(activations of every token, memory-mapped), `tokens.npy` (token ids, one row a context) and
`kept.npy` (which tokens count).

Dropped are the first token of every context, which models use as an attention sink, and the rare
tokens of huge norm; either would dominate a squared error. They stay in the shards, so that a
measurement can include them. Numbered rows, `len()` and `norm_factor` mean kept tokens only.
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from c2r_core.data.language_models import Precision, check_hook_name, run_to_hook
from c2r_core.data.text import Corpus

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
_MANIFEST = "manifest.json"
_TOKENS = "tokens.npy"
_KEPT = "kept.npy"
# A token id (int32) and a mark in kept.npy.
_OTHER_BYTES_A_TOKEN = 5
_DOCUMENTS_TOKENISED_AT_ONCE = 64
_LIBRARIES = ("torch", "transformers", "transformer_lens", "numpy")


class Shard(NamedTuple):
    """One file of activations."""

    name: str
    n_tokens: int
    n_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a store holds and how it was made; written as `manifest.json`.

    `n_short_documents` of the corpus' `n_documents` were too short for one context and gave no
    token. `median_norm` is over all tokens but the first of each context. `norm_factor` is the c
    for which the mean of ||c x||^2 over the kept tokens, as stored, is 1.
    """

    format_version: int
    model_name: str
    hook_name: str
    corpus_name: str
    text_fingerprint: str
    n_documents: int
    n_short_documents: int
    context_size: int
    precision: str
    dtype: str
    d_in: int
    n_tokens: int
    n_kept: int
    drop_norm_ratio: float
    median_norm: float
    norm_factor: float
    shards: tuple[Shard, ...]
    library_versions: dict[str, str]


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
    token_ids : int array, shape (len(store),)
        Token id of each row.
    """

    def __init__(self, folder: Path, manifest: Manifest):
        self.folder = folder
        self.manifest = manifest
        self.contexts = np.load(folder / _TOKENS)
        self.kept = np.load(folder / _KEPT)
        self.token_ids = self.contexts.ravel()[self.kept]
        self._kept_positions = np.flatnonzero(self.kept)
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
        if not (folder / _MANIFEST).is_file():
            raise FileNotFoundError(f"{folder} holds no {_MANIFEST}: make a store with harvest().")
        manifest = _read_manifest(folder / _MANIFEST)
        remedy = f"Delete {folder} and harvest again."
        for name in (_TOKENS, _KEPT, *(shard.name for shard in manifest.shards)):
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
        positions = self._kept_positions[rows]
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
        context, position = divmod(int(self._kept_positions[row]), self.manifest.context_size)
        first = max(0, position - before)
        ids = self.contexts[context, first : position + after + 1]
        return TextWindow(tuple(tokenizer.decode([int(i)]) for i in ids), position - first)


class StoreBatches:
    """Batches for training: `batches(step)`, normalised, a pure function of `(seed, step)`.

    Every epoch is a permutation of the store's rows drawn from `(seed, epoch)`; the rows left over
    at the end of an epoch are dropped from it. So a run that resumes at any step sees what an
    uninterrupted one does.

    Parameters
    ----------
    store : ActivationStore
    batch_size : int
        At most `len(store)`.
    seed : int
    """

    def __init__(self, store: ActivationStore, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(store):
            raise ValueError(
                f"batch_size is {batch_size}; expected 1 to {len(store)}, the store's kept tokens. "
                "Harvest more tokens or take smaller batches."
            )
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = len(store) // batch_size
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    @property
    def d_in(self) -> int:
        """Width of one activation."""
        return self.store.d_in

    def __call__(self, step: int) -> Tensor:
        """Activations times `norm_factor`: float32, shape (batch_size, d_in)."""
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more.")
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(len(self.store))
        rows = self._permutation[index * self.batch_size : (index + 1) * self.batch_size]
        return self.store.batch(rows) * self.store.norm_factor


def harvest(
    model: TransformerBridge,
    corpus: Corpus,
    hook_name: str,
    folder: str | Path,
    *,
    context_size: int = 128,
    max_tokens: int | None = None,
    drop_norm_ratio: float = 6.0,
    precision: Precision = "float32",
    dtype: Literal["float16", "float32"] = "float16",
    contexts_per_pass: int = 32,
    shard_tokens: int = 2**18,
    progress: bool = False,
) -> ActivationStore:
    """Run a corpus through a language model and store the activations at one hook.

    Documents are cut into contexts of `context_size` tokens, each starting with the tokenizer's BOS
    token (`<|im_start|>` for SmolLM2; left out where a tokenizer has none) and never crossing
    documents. What is left of a document after its last full context is not used.

    Parameters
    ----------
    model : TransformerBridge
    corpus : Corpus
    hook_name : str
        Such as `blocks.4.hook_resid_post`; see `c2r_core.data.language_models`.
    folder : str or Path
        Where the store goes; appears only when the store is complete.
    context_size : int
        Tokens per context, BOS included.
    max_tokens : int, optional
        Upper bound on the stored tokens, dropped ones included. The contexts taken are evenly
        spaced over the corpus. None takes everything.
    drop_norm_ratio : float
        Tokens whose norm is over this many times the median are dropped (10 in the paper).
    precision : "float32" or "bfloat16"
        Of the model's matrix products; see `run_to_hook`.
    dtype : "float16" or "float32"
        Of the stored values.
    contexts_per_pass : int
        Contexts that go through the model at a time.
    shard_tokens : int
        Tokens per shard file, rounded down to whole contexts.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty.
    ValueError
        If a setting is out of range, no document fills a context, the hook does not exist, or an
        activation is NaN, infinite, or too large for `dtype`.
    OSError
        If the disk has too little room: found after one context, or, if the disk fills up
        meanwhile, after removing what was written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists. Read it with ActivationStore.open(), or delete it to harvest again."
        )
    _check_settings(
        model, context_size, max_tokens, drop_norm_ratio, dtype, contexts_per_pass, shard_tokens
    )
    check_hook_name(model, hook_name)
    contexts, n_short_documents = _cut_contexts(model.tokenizer, corpus, context_size, max_tokens)

    def activations(batch: np.ndarray) -> Tensor:
        return run_to_hook(model, torch.from_numpy(batch), hook_name, precision).flatten(0, 1)

    # One context tells the width, and whether the hook works at all.
    d_in = activations(contexts[:1]).shape[1]
    part = folder.with_name(folder.name + ".part")
    if part.exists():
        shutil.rmtree(part)
    part.mkdir(parents=True)
    try:
        _check_room(part, contexts.size * (d_in * np.dtype(dtype).itemsize + _OTHER_BYTES_A_TOKEN))
        with (
            _full_disk_explained(folder),
            tqdm(total=contexts.size, unit="token", disable=not progress) as bar,
        ):
            shards, norms = [], []
            for block in _slices(contexts, max(1, shard_tokens // context_size)):
                path = part / f"shard-{len(shards):05d}.npy"
                batches = (activations(batch) for batch in _slices(block, contexts_per_pass))
                norms += _write_shard(path, batches, (block.size, d_in), dtype, bar)
                shards.append(Shard(path.name, block.size, path.stat().st_size))
            kept, median_norm, norm_factor = _statistics(
                np.concatenate(norms), context_size, drop_norm_ratio
            )
            np.save(part / _TOKENS, contexts)
            np.save(part / _KEPT, kept)
            manifest = Manifest(
                format_version=FORMAT_VERSION,
                model_name=model.cfg.model_name,
                hook_name=hook_name,
                corpus_name=corpus.name,
                text_fingerprint=corpus.fingerprint,
                n_documents=len(corpus),
                n_short_documents=n_short_documents,
                context_size=context_size,
                precision=precision,
                dtype=dtype,
                d_in=d_in,
                n_tokens=contexts.size,
                n_kept=int(kept.sum()),
                drop_norm_ratio=float(drop_norm_ratio),
                median_norm=median_norm,
                norm_factor=norm_factor,
                shards=tuple(shards),
                library_versions={library: version(library) for library in _LIBRARIES},
            )
            _write_manifest(part / _MANIFEST, manifest)
        part.rename(folder)
    except BaseException:
        shutil.rmtree(part)
        raise
    return ActivationStore.open(folder)


def _check_settings(
    model: TransformerBridge,
    context_size: int,
    max_tokens: int | None,
    drop_norm_ratio: float,
    dtype: str,
    contexts_per_pass: int,
    shard_tokens: int,
) -> None:
    if not 2 <= context_size <= model.cfg.n_ctx:
        raise ValueError(
            f"context_size is {context_size}; expected 2 to {model.cfg.n_ctx}, the longest context "
            f"of {model.cfg.model_name!r}."
        )
    if max_tokens is not None and max_tokens < context_size:
        raise ValueError(
            f"max_tokens is {max_tokens}; expected at least one context of {context_size} tokens."
        )
    if not (np.isfinite(drop_norm_ratio) and drop_norm_ratio >= 1):
        raise ValueError(f"drop_norm_ratio is {drop_norm_ratio}; expected a number of at least 1.")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype is {dtype!r}; expected 'float16' or 'float32'.")
    for name, value in [("contexts_per_pass", contexts_per_pass), ("shard_tokens", shard_tokens)]:
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1.")


def _cut_contexts(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, context_size: int, max_tokens: int | None
) -> tuple[np.ndarray, int]:
    """Token ids, shape (n_contexts, context_size), and how many documents gave no context."""
    bos = tokenizer.bos_token_id
    n_text = context_size if bos is None else context_size - 1
    pieces = []
    n_longest = 0
    for start in range(0, len(corpus), _DOCUMENTS_TOKENISED_AT_ONCE):
        documents = corpus.documents[start : start + _DOCUMENTS_TOKENISED_AT_ONCE]
        texts = [document.text for document in documents]
        for ids in tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]:
            n_longest = max(n_longest, len(ids))
            full = np.array(ids[: len(ids) // n_text * n_text], dtype=np.int32)
            pieces.append(full.reshape(-1, n_text))
    contexts = np.concatenate(pieces)
    if len(contexts) == 0:
        raise ValueError(
            f"No document of corpus {corpus.name!r} fills a context: the longest has {n_longest} "
            f"tokens, a context needs {n_text}. Take longer texts or a smaller context_size."
        )
    if max_tokens is not None and max_tokens < len(contexts) * context_size:
        n_contexts = max_tokens // context_size
        contexts = contexts[np.arange(n_contexts) * len(contexts) // n_contexts]
    if bos is not None:
        contexts = np.insert(contexts, 0, bos, axis=1)
    return contexts, sum(len(piece) == 0 for piece in pieces)


def _slices(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


def _write_shard(
    path: Path, batches: Iterable[Tensor], shape: tuple[int, int], dtype: str, bar: tqdm
) -> list[np.ndarray]:
    """Write a .npy file batch by batch; returns the norms of the stored values (float64)."""
    norms = []
    # Plain writes: on a full disk they raise an OSError, where a memory map would kill the process.
    with path.open("wb") as file:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for batch in batches:
            stored = _to_storage(batch.cpu().numpy(), dtype)
            file.write(stored.data)
            norms.append(np.sqrt(np.einsum("nd,nd->n", stored, stored, dtype=np.float64)))
            bar.update(len(stored))
    return norms


def _to_storage(activations: np.ndarray, dtype: str) -> np.ndarray:
    with np.errstate(over="ignore"):
        stored = activations.astype(dtype)
    if np.isfinite(stored).all():
        return stored
    if not np.isfinite(activations).all():
        raise ValueError(
            "The language model gave a NaN or infinite activation. Try precision='float32', and "
            "check that the model's weights are sound."
        )
    raise ValueError(
        f"An activation of {np.abs(activations).max():.6g} does not fit into {dtype} (largest "
        f"{np.finfo(dtype).max}). Harvest with dtype='float32'."
    )


def _statistics(
    norms: np.ndarray, context_size: int, drop_norm_ratio: float
) -> tuple[np.ndarray, float, float]:
    """Which tokens are kept, the median norm, and the norm factor."""
    is_first = np.arange(len(norms)) % context_size == 0
    median_norm = float(np.median(norms[~is_first]))
    if median_norm == 0:
        raise ValueError("Most activations at this hook are zero; choose another hook.")
    kept = ~is_first & (norms <= drop_norm_ratio * median_norm)
    return kept, median_norm, float(1 / np.sqrt(np.mean(norms[kept] ** 2)))


def _check_room(folder: Path, needed: int) -> None:
    available = shutil.disk_usage(folder).free
    if available < needed:
        raise OSError(
            errno.ENOSPC,
            f"The activations need {needed:,} bytes, {available:,} are available. Free some space, "
            "lower max_tokens, or take a folder on another disk",
            str(folder),
        )


@contextlib.contextmanager
def _full_disk_explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            # numpy reports a short write without an error number.
            error.errno or errno.ENOSPC,
            f"Writing activations failed ({error}); what was written has been removed. If the disk "
            "is full, free some space, lower max_tokens, or take a folder on another disk",
            str(folder),
        ) from error


def _write_manifest(path: Path, manifest: Manifest) -> None:
    content = asdict(manifest) | {"shards": [shard._asdict() for shard in manifest.shards]}
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(path: Path) -> Manifest:
    content = json.loads(path.read_text(encoding="utf-8"))
    if content.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {content.get('format_version')}; this code reads "
            f"{FORMAT_VERSION}. Delete {path.parent} and harvest again."
        )
    shards = tuple(Shard(**shard) for shard in content.pop("shards"))
    return Manifest(**content, shards=shards)

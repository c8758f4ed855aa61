"""From text to a store of activations.

How contexts are cut, what of them is stored, and which tokens are kept is one rule for stores and for streams
(`c2r_core.data.streaming`).
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from c2r_core.artefacts.checksums import of_file
from c2r_core.artefacts.files import check_room, whole_folder
from c2r_core.data.forward import activations, check_hook_name
from c2r_core.data.language_models import model_fingerprint
from c2r_core.data.precision import resolve_precision
from c2r_core.data.store import (
    KEPT,
    MANIFEST,
    TOKENS,
    ActivationStore,
    HarvestConfig,
    Manifest,
    Shard,
    shard_name,
    to_storage,
)
from c2r_core.data.text import Corpus
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

    from c2r_core.artefacts.profiles import LanguageModelProfile

# A token id (int32) and a mark in kept.npy.
_OTHER_BYTES_A_TOKEN = 5
_TEXTS_TOKENISED_AT_ONCE = 64
_ROWS_AT_ONCE = 256
_LIBRARIES = ("torch", "transformers", "transformer_lens", "numpy")

Norms = TypeVar("Norms", np.ndarray, Tensor)


def harvest_config(lm: LanguageModelProfile, max_tokens: int | None, device: str) -> HarvestConfig:
    """How a profile's activations are made: so many tokens of a store, None for a stream."""
    return HarvestConfig(
        hook_name=lm.hook_name,
        context_size=lm.context_size,
        max_tokens=max_tokens,
        drop_norm_ratio=lm.drop_norm_ratio,
        precision=resolve_precision(lm.precision, device),
    )


def harvest(
    model: TransformerBridge,
    corpus: Corpus,
    config: HarvestConfig,
    folder: str | Path,
    *,
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
        What an SAE may be trained on: the first side of `split_documents`.
    config : HarvestConfig
    folder : str or Path
        Where the store goes; appears only when the store is complete.
    contexts_per_pass : int
        Contexts that go through the model at a time.
    shard_tokens : int
        Tokens per shard file, rounded down to whole contexts.
    progress : bool
        Show a progress bar on stderr.

    Raises
    ------
    FileExistsError
        If the folder exists and is not empty, be it filled by another process meanwhile.
    TypeError
        If `corpus` or `config` is something else, such as a path or a hook name.
    ValueError
        If a setting is out of range or the hook does not exist.
    NotEvaluable
        If no document fills a context, or an activation is NaN, infinite, or too large for the type.
    DiskFullError
        If the disk has too little room: found after one context, or, if the disk fills up
        meanwhile, after removing what was written.
    """
    folder = Path(folder)
    _check_arguments(model, corpus, config, folder)
    if contexts_per_pass < 1 or shard_tokens < 1:
        raise ValueError(
            f"contexts_per_pass is {contexts_per_pass} and shard_tokens is {shard_tokens}; expected at "
            "least 1 of each."
        )
    contexts, n_short_documents = _contexts_of(model.tokenizer, corpus, config)
    # One context tells the width, and whether the hook works at all.
    first = stored_activations(model, contexts[:1], config)
    d_in = first.shape[1]
    n_bytes = contexts.size * (d_in * first.element_size() + _OTHER_BYTES_A_TOKEN)
    with (
        whole_folder(folder, replace=False) as part,
        tqdm(total=contexts.size, unit="token", disable=not progress) as bar,
    ):
        check_room(part, n_bytes)
        shards, norms = [], []
        for block in _slices(contexts, max(1, shard_tokens // config.context_size)):
            path = part / shard_name(len(shards))
            passes = _slices(block, contexts_per_pass)
            batches = (stored_activations(model, batch, config) for batch in passes)
            of_shard, checksum = _write_shard(path, batches, (block.size, d_in), config.dtype, bar)
            norms += of_shard
            shards.append(Shard(path.name, block.size, path.stat().st_size, checksum))
        kept, median, factor = _statistics(np.concatenate(norms), config)
        np.save(part / TOKENS, contexts)
        np.save(part / KEPT, kept)
        manifest = Manifest(
            **asdict(config),
            model_name=model.cfg.model_name,
            model_fingerprint=model_fingerprint(model.cfg.model_name),
            corpus_name=corpus.name,
            text_fingerprint=corpus.fingerprint,
            n_documents=len(corpus),
            n_short_documents=n_short_documents,
            d_in=d_in,
            n_tokens=contexts.size,
            n_kept=int(kept.sum()),
            median_norm=median,
            norm_factor=factor,
            shards=tuple(shards),
            tokens_sha256=of_file(part / TOKENS),
            kept_sha256=of_file(part / KEPT),
            library_versions={library: version(library) for library in _LIBRARIES},
        )
        (part / MANIFEST).write_bytes(manifest.as_bytes())
    return ActivationStore.open(folder)


def _check_arguments(
    model: TransformerBridge, corpus: Corpus, config: HarvestConfig, folder: Path
) -> None:
    if not isinstance(corpus, Corpus):
        raise TypeError(
            f"corpus is {corpus!r}; expected a Corpus: load_corpus() reads one from a folder of .txt files, "
            "split_documents() sets apart what an evaluation reads."
        )
    if not isinstance(config, HarvestConfig):
        raise TypeError(f"config is {config!r}; expected HarvestConfig(hook_name=...).")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(
            f"{folder} exists. Read it with ActivationStore.open(), or delete it to harvest again."
        )
    if config.context_size > model.cfg.n_ctx:
        raise ValueError(
            f"context_size is {config.context_size}; expected 2 to {model.cfg.n_ctx}, the longest context "
            f"of {model.cfg.model_name!r}."
        )
    check_hook_name(model, config.hook_name)


def _contexts_of(
    tokenizer: PreTrainedTokenizerBase, corpus: Corpus, config: HarvestConfig
) -> tuple[np.ndarray, int]:
    """Token ids, shape (n_contexts, context_size), and how many documents gave no context."""
    context_size, max_tokens = config.context_size, config.max_tokens
    texts = (document.text for document in corpus.documents)
    by_document = list(cut_contexts(tokenizer, texts, context_size))
    contexts = np.concatenate(by_document)
    if len(contexts) == 0:
        n_text = context_size - (tokenizer.bos_token_id is not None)
        texts = (document.text for document in corpus.documents)
        n_longest = max(map(len, _token_ids(tokenizer, texts)))
        raise NotEvaluable(
            f"No document of corpus {corpus.name!r} fills a context: the longest has {n_longest} "
            f"tokens, a context needs {n_text}. Take longer texts or a smaller context_size."
        )
    if max_tokens is not None and max_tokens < contexts.size:
        n_contexts = max_tokens // context_size
        contexts = contexts[np.arange(n_contexts) * len(contexts) // n_contexts]
    return contexts, sum(len(one) == 0 for one in by_document)


def _slices(array: np.ndarray, size: int) -> Iterator[np.ndarray]:
    for start in range(0, len(array), size):
        yield array[start : start + size]


def _write_shard(
    path: Path, batches: Iterator[Tensor], shape: tuple[int, int], dtype: str, bar: tqdm
) -> tuple[list[np.ndarray], str]:
    """Write a .npy file batch by batch; returns the norms of the stored values, and the file's SHA-256."""
    norms, header = [], io.BytesIO()
    described = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(header, described)
    digest = hashlib.sha256(header.getvalue())
    # Plain writes: on a full disk they raise an OSError, where a memory map would kill the process.
    with path.open("wb") as file:
        file.write(header.getvalue())
        for stored in batches:
            file.write(stored.numpy().data)
            digest.update(stored.numpy().data)
            norms.append(row_norms(stored))
            bar.update(len(stored))
    return norms, digest.hexdigest()


def _statistics(norms: np.ndarray, config: HarvestConfig) -> tuple[np.ndarray, float, float]:
    """Which tokens are kept, the median norm, and the norm factor."""
    median = median_norm(norms, config.context_size)
    positions = kept_positions(norms, config.context_size, config.drop_norm_ratio * median)
    kept = np.zeros(len(norms), dtype=bool)
    kept[positions] = True
    return kept, median, norm_factor(norms[positions])


# -- the rules that stores and streams share ----------------------------------------------------


def cut_contexts(
    tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], context_size: int
) -> Iterator[np.ndarray]:
    """The contexts of each text in turn: token ids, int32, (n_contexts, context_size); n_contexts may be 0.

    Each context starts with the BOS token, where the tokenizer has one. What is left of a text after its last
    full context is not used. Texts are read a few at a time.
    """
    bos = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    n_text = context_size - len(bos)
    for ids in _token_ids(tokenizer, texts):
        n_contexts = len(ids) // n_text
        contexts = np.empty((n_contexts, context_size), dtype=np.int32)
        contexts[:, : len(bos)] = bos
        contexts[:, len(bos) :] = np.reshape(ids[: n_contexts * n_text], (n_contexts, n_text))
        yield contexts


def _token_ids(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> Iterator[list[int]]:
    remaining = iter(texts)
    while batch := list(islice(remaining, _TEXTS_TOKENISED_AT_ONCE)):
        yield from tokenizer(batch, add_special_tokens=False, verbose=False)["input_ids"]


def stored_activations(
    model: TransformerBridge, contexts: np.ndarray, config: HarvestConfig
) -> Tensor:
    """What is stored of contexts (n, context_size): (n · context_size, d_in), in `config.dtype`, on the CPU.

    Raises NotEvaluable if an activation is NaN, infinite, or too large for the type.
    """
    tokens = torch.from_numpy(contexts)
    x = activations(model, tokens, config.hook_name, precision=config.precision)
    return to_storage(x.flatten(0, 1), config.dtype, "Take dtype='float32'.").cpu()


def row_norms(stored: Tensor) -> np.ndarray:
    """Norms of stored activations (n, d_in) on the CPU: float64, (n,)."""
    parts = stored.split(_ROWS_AT_ONCE)
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=-1) for part in parts]).numpy()


def median_norm(norms: np.ndarray, context_size: int) -> float:
    """Median of the norms of whole contexts' tokens (n,), without the first of each context.

    Raises NotEvaluable if it is zero.
    """
    median = float(np.median(norms.reshape(-1, context_size)[:, 1:]))
    if median == 0:
        raise NotEvaluable("Most activations at this hook are zero; choose another hook.")
    return median


def kept_positions(norms: np.ndarray, context_size: int, largest_norm: float) -> np.ndarray:
    """Which tokens of whole contexts count, by their norms (n,): places, int64, rising; see `is_kept`."""
    return np.flatnonzero(is_kept(norms.reshape(-1, context_size), largest_norm))


def is_kept(norms: Norms, largest_norm: float) -> Norms:
    """Which tokens count, by their norms (n_contexts, context_size): bool, of the same shape.

    The first token of each context is left out, and tokens of a norm over `largest_norm`.
    """
    kept = norms <= largest_norm
    kept[:, 0] = False
    return kept


def norm_factor(norms: np.ndarray) -> float:
    """The c for which the mean of ||c x||^2 is 1, from the norms of all x."""
    return float(1 / np.sqrt(np.mean(norms**2)))

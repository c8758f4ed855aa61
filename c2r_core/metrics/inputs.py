"""One SAE on the bench, with all that metrics read: made when the first metric asks for it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import EvaluationProfile, LanguageModelProfile
from c2r_core.data.harvest import ActivationStore, harvest
from c2r_core.data.language_models import load_language_model
from c2r_core.data.text import Corpus, load_corpus, split_documents
from c2r_core.data.words import FirstLetterTask, harvest_words, letter_words
from c2r_core.experiments.language_model import SPLIT_SEED, resolve_precision
from c2r_core.metrics.absorption import LetterProbes, train_letter_probes
from c2r_core.metrics.endpoint import Endpoint
from c2r_core.metrics.firings import Firings, find_firings
from c2r_core.metrics.passages import (
    Passages,
    PooledActs,
    corpus_labels,
    harvest_passages,
    pool,
)
from c2r_core.metrics.reconstruction import ReconstructionReport, evaluate_reconstruction
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor
    from transformer_lens.model_bridge import TransformerBridge

# A metric reads so many tokens at a time, fewer where a wide SAE would need over 128 MB for their
# activations.
CHUNK = 8192
CHUNK_ENTRIES = 2**25


class Bench:
    """An SAE, a language model, and held-out documents.

    Every property is made when it is first read. One that cannot be made raises a ValueError, which
    concerns the metrics that need it and no others. Use it in a `with` block: what a language model
    without a lasting name computes is kept in a temporary folder.

    Parameters
    ----------
    sae : AnySAE
        Takes raw activations.
    lm : LanguageModelProfile
        Model, hook, corpus and sizes.
    sizes : EvaluationProfile
        How much the other metrics read.
    seed : int
        Of the words' split, the probes and the selector.
    device : str
        Of the language model.
    language_model : TransformerBridge, optional
        In place of the one that `lm` names; what it computes is not cached.
    corpus : Corpus, optional
        In place of the one that `lm` names.
    against : AnySAE, optional
        Another SAE to compare with.
    endpoint : Endpoint, optional
        A language model to ask.
    ravel : str or Path, optional
        Folder of RAVEL's data, in place of the cities that come with the package.
    """

    def __init__(
        self,
        sae: AnySAE,
        lm: LanguageModelProfile,
        sizes: EvaluationProfile,
        *,
        seed: int = 0,
        device: str = "cpu",
        language_model: TransformerBridge | None = None,
        corpus: Corpus | None = None,
        against: AnySAE | None = None,
        endpoint: Endpoint | None = None,
        ravel: str | Path | None = None,
    ) -> None:
        self.sae = sae
        self.against = against
        self.endpoint = endpoint
        self.ravel = ravel
        self.lm = lm
        self.sizes = sizes
        self.seed = seed
        self.device = device
        self.precision = resolve_precision(lm.precision, device)
        self._language_model = language_model
        self._corpus = corpus
        self._closing = ExitStack()

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *error: object) -> None:
        self._closing.close()

    @cached_property
    def language_model(self) -> TransformerBridge:
        """The model with its tokenizer."""
        if self._language_model is not None:
            return self._language_model
        return load_language_model(self.lm.model, device=self.device)

    @cached_property
    def documents(self) -> HeldOut:
        """The held-out documents, the only text that an evaluation reads."""
        corpus = load_corpus(self.lm.corpus) if self._corpus is None else self._corpus
        return held_out_documents(corpus, self.lm.held_out_share)

    @cached_property
    def activations(self) -> ActivationStore:
        """Raw activations of the held-out documents.

        Raises
        ------
        ValueError
            If the documents fill no context, or the SAE is made for another width.
        """
        settings = {
            "context_size": self.lm.context_size,
            "max_tokens": self.lm.held_out_tokens,
            "drop_norm_ratio": self.lm.drop_norm_ratio,
            "precision": self.precision,
        }
        corpus = self.documents.corpus

        def build(folder: Path) -> None:
            harvest(self.language_model, corpus, self.lm.hook_name, folder, **settings)

        # The key of language_model_runs.harvest_activations, so that one harvest serves both.
        store = ActivationStore.open(self._kept("activations", settings, build))
        d_in = self.sae.W_dec.shape[1]
        if d_in != store.d_in:
            raise ValueError(
                f"The SAE takes activations of width {d_in}; those at {self.lm.hook_name!r} of "
                f"{store.manifest.model_name!r} have {store.d_in}. Was it trained for this hook?"
            )
        return store

    @property
    def _chunk(self) -> int:
        """Tokens to encode at a time."""
        return max(1, min(CHUNK, CHUNK_ENTRIES // len(self.sae.W_dec)))

    @cached_property
    def reconstruction(self) -> ReconstructionReport:
        """How the SAE reconstructs the held-out activations."""
        return evaluate_reconstruction(self.sae, self.activations.chunks(self._chunk))

    @cached_property
    def letters(self) -> tuple[FirstLetterTask, LetterProbes]:
        """Words of the held-out documents with their activations, and the letters' probes.

        Raises
        ------
        ValueError
            If there are no words, or the tokenizer does not keep one whole in the prompt.
        """
        settings = {
            "words": self.lm.first_letter_words,
            "precision": self.precision,
            "seed": self.seed,
        }
        model, corpus = self.language_model, self.documents.corpus

        def build(folder: Path) -> None:
            words = letter_words(
                model.tokenizer, corpus, limit=self.lm.first_letter_words, seed=self.seed
            )
            task = harvest_words(model, words, self.lm.hook_name, precision=self.precision)
            task.save(folder)

        task = FirstLetterTask.load(self._kept("words", settings, build))
        return task, train_letter_probes(task, seed=self.seed)

    @cached_property
    def firings(self) -> Firings:
        """Where every latent fires on the held-out tokens."""
        return find_firings(self.sae, self.activations, chunk_size=self._chunk)

    @cached_property
    def passages(self) -> Passages:
        """Passages of the held-out documents with their activations; not cached on disk.

        Raises
        ------
        ValueError
            If no document is as long as a passage.
        """
        return harvest_passages(
            self.language_model,
            self.documents.corpus,
            self.lm.hook_name,
            n_passages=self.sizes.passages,
            n_tokens=self.sizes.passage_tokens,
            max_norm=self.lm.drop_norm_ratio * self.activations.manifest.median_norm,
            precision=self.precision,
        )

    @cached_property
    def labels(self) -> dict[str, Tensor]:
        """What is known of each passage, by task."""
        return corpus_labels(self.passages.documents, self.passages.texts)

    @cached_property
    def pooled(self) -> PooledActs:
        """The SAE's feature activations, averaged over each passage."""
        return pool(self.sae, self.passages)

    def _kept(
        self, kind: str, settings: Mapping[str, Any], build: Callable[[Path], object]
    ) -> Path:
        """A folder that `build` filled: cached, if a name says all about the model."""
        if self._language_model is None and not Path(self.lm.model).expanduser().is_dir():
            key = {**settings, "model": self.lm.model, "hook": self.lm.hook_name}
            return cached(kind, key | {"text": self.documents.corpus.fingerprint}, build)
        room = Path(self._closing.enter_context(tempfile.TemporaryDirectory()))
        build(room)
        return room


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
    ValueError
        If the corpus cannot be split, or training documents repeat all that is held out.
    """
    training, held_out = split_documents(corpus, share, seed=SPLIT_SEED)
    trained_on = {document.text for document in training.documents}
    fresh = tuple(d for d in held_out.documents if d.text not in trained_on)
    if not fresh:
        raise ValueError(
            f"Each of the {len(held_out)} held-out documents of {corpus.name!r} is repeated among "
            "those for training, so nothing is left to evaluate on. Remove the copies."
        )
    return HeldOut(Corpus(held_out.name, fresh), training.fingerprint, len(held_out) - len(fresh))

"""One SAE with all that metrics read: made when the first metric asks for it, shared by the others."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import EvaluationProfile, LanguageModelProfile, Profile
from c2r_core.data.harvest import harvest, harvest_config
from c2r_core.data.language_models import load_language_model, model_fingerprint
from c2r_core.data.precision import resolve_precision
from c2r_core.data.store import ActivationStore
from c2r_core.data.text import Corpus, HeldOut, held_out_documents, load_corpus
from c2r_core.errors import NotEvaluable
from c2r_core.metrics.encoding import chunk_size
from c2r_core.saes.interface import AnySAE

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from c2r_core.metrics.endpoint import Endpoint

Made = TypeVar("Made")


@dataclass(frozen=True)
class Options:
    """What an evaluation may be told beside what it measures."""

    profile: str | Profile = "default"
    """A profile of profiles.yml: how many contexts, tokens and words."""
    seed: int = 0
    """Of the words' split, the probes and the selector."""
    device: str = "cpu"
    """Of the language model, and of an SAE read from a folder."""
    against: AnySAE | str | Path | None = None
    """Another SAE, or its folder, to be compared with latent by latent."""
    endpoint: Endpoint | None = None
    """A language model that explains latents and judges the explanations."""
    ravel: str | Path | None = None
    """Folder of RAVEL's public data (see `load_ravel`); otherwise cities that come with the package."""
    train_store: ActivationStore | None = None
    """Activations that the SAE was trained on, to reconstruct as many of them as of those held out."""
    keep: str | Path | None = None
    """File that takes each finished metric; an evaluation of the same SAE, text and settings that finds it
    there goes on from it.
    """


class Inputs:
    """An SAE that takes raw activations, a language model, and held-out documents.

    Every property is made when it is first read. One that cannot be made raises NotEvaluable, which
    concerns the metrics that need it and no others.

    `lm` says model, hook, corpus and sizes, unless `language_model` or `corpus` is given in place of what it
    names; `sizes` say how much the other metrics read. In `options`, `against` is opened.
    """

    def __init__(
        self,
        sae: AnySAE,
        lm: LanguageModelProfile,
        sizes: EvaluationProfile,
        options: Options = Options(),  # noqa: B008
        *,
        language_model: TransformerBridge | None = None,
        corpus: Corpus | None = None,
    ) -> None:
        self.sae, self.lm, self.sizes, self.options = sae, lm, sizes, options
        self.against = options.against
        self.endpoint = options.endpoint
        self.ravel = options.ravel
        self.seed = options.seed
        self.device = options.device
        self.precision = resolve_precision(lm.precision, options.device)
        self._language_model = language_model
        self._corpus = corpus
        self._made: dict[str, Any] = {}

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` returned when it was first called under this name: shared by metrics.

        That something cannot be made is remembered, too.
        """
        if name not in self._made:
            try:
                self._made[name] = make()
            except NotEvaluable as error:
                self._made[name] = error
        if isinstance(self._made[name], NotEvaluable):
            raise self._made[name]
        return self._made[name]

    def kept(
        self,
        kind: str,
        settings: Mapping[str, Any],
        build: Callable[[Path], object],
        *,
        code: Sequence[str] = (),
    ) -> Path:
        """A cached folder that `build` filled from the language model and the held-out documents.

        Its key is their content, the hook, the precision, and the `settings` given; `code` is as in `cached`.
        """
        key = {
            "model": self.model_content,
            "hook_name": self.lm.hook_name,
            "precision": self.precision,
            "text": self.documents.corpus.fingerprint,
        }
        return cached(kind, {**settings, **key}, build, code=code)

    @cached_property
    def language_model(self) -> TransformerBridge:
        """The model with its tokenizer."""
        if self._language_model is not None:
            return self._language_model
        return load_language_model(self.lm.model, device=self.device)

    @cached_property
    def model_content(self) -> str:
        """What tells the language model from every other: of its weights, not of its name."""
        if self._language_model is None:
            return model_fingerprint(self.lm.model)
        return loaded_fingerprint(self.language_model)

    @cached_property
    def documents(self) -> HeldOut:
        """The held-out documents, the only text that an evaluation reads."""
        corpus = load_corpus(self.lm.corpus) if self._corpus is None else self._corpus
        return held_out_documents(corpus, self.lm.held_out_share)

    @cached_property
    def chunk(self) -> int:
        """Tokens to encode at a time."""
        return chunk_size(self.sae)

    @property
    def activations(self) -> ActivationStore:
        """Raw activations of the held-out documents.

        Raises NotEvaluable if the documents fill no context, or the SAE is made for another width.
        """
        return self.once("activations", self._activations)

    def _activations(self) -> ActivationStore:
        config = harvest_config(self.lm, self.lm.held_out_tokens, self.device)

        def build(folder: Path) -> None:
            harvest(self.language_model, self.documents.corpus, config, folder)

        store = ActivationStore.open(self.kept("activations", asdict(config), build))
        d_sae, d_in = self.sae.W_dec.shape
        if d_in != store.d_in:
            turned = " W_dec seems transposed." if d_sae == store.d_in else ""
            raise NotEvaluable(
                f"The SAE takes activations of width {d_in}; those at {self.lm.hook_name!r} of "
                f"{store.manifest.model_name!r} have {store.d_in}. Was it trained for this hook? "
                f"W_dec has shape ({d_sae}, {d_in}), expected (d_sae, d_in).{turned}"
            )
        return store


_fingerprints: weakref.WeakKeyDictionary[object, str] = weakref.WeakKeyDictionary()


def loaded_fingerprint(model: TransformerBridge) -> str:
    """SHA-256 of a loaded model's weights and of its tokenizer, as they were when first asked for."""
    if model not in _fingerprints:
        digest = hashlib.sha256()
        for name, tensor in sorted(model.original_model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).numpy().data)
        digest.update(model.tokenizer.backend_tokenizer.to_str().encode())
        _fingerprints[model] = digest.hexdigest()
    return _fingerprints[model]

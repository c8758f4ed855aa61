"""The language-model experiments: activations harvested once, SAEs trained once per arm and seed."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import LanguageModelProfile
from c2r_core.data.batches import StoreBatches
from c2r_core.data.forward import resolve_precision
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import model_fingerprint
from c2r_core.data.store import ActivationStore, HarvestConfig
from c2r_core.data.text import SPLIT_SEED, Corpus, load_corpus, split_documents
from c2r_core.data.words import FirstLetterTask, harvest_words, letter_words
from c2r_core.metrics.absorption import (
    LetterProbes,
    train_letter_probes,
)
from c2r_core.saes import SAE, BatchTopKSAE, load_sae, save_sae
from c2r_core.training import C2R, Orthogonality, TrainConfig, train, weight_from_strength

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Activations:
    """Stores of training and of held-out documents, harvested from one model at one hook."""

    train: ActivationStore
    held_out: ActivationStore


@dataclass(frozen=True)
class LanguageModelArm:
    """One way to train an SAE on the language model."""

    d_sae: int
    c2r_strength: float = 0.0
    orthogonality_weight: float = 0.0


def standard_arms(lm: LanguageModelProfile) -> dict[str, LanguageModelArm]:
    """Baseline, C²R, OrtSAE, and a smaller baseline: what size alone would buy."""
    return {
        "baseline": LanguageModelArm(lm.d_sae),
        "C²R": LanguageModelArm(lm.d_sae, c2r_strength=lm.c2r_strength),
        "OrtSAE": LanguageModelArm(lm.d_sae, orthogonality_weight=lm.orthogonality_weight),
        "small baseline": LanguageModelArm(lm.small_d_sae),
    }


def stored(
    lm: LanguageModelProfile,
    model: TransformerBridge,
    corpus: Corpus,
    max_tokens: int,
    device: str = "cpu",
) -> ActivationStore:
    """Activations of a corpus at the profile's hook, at most so many; from the cache where they are there."""
    config = HarvestConfig(
        hook_name=lm.hook_name,
        context_size=lm.context_size,
        max_tokens=max_tokens,
        drop_norm_ratio=lm.drop_norm_ratio,
        precision=resolve_precision(lm.precision, device),
    )
    key = asdict(config) | {"model": model_fingerprint(lm.model), "text": corpus.fingerprint}
    return ActivationStore.open(
        cached("activations", key, lambda part: harvest(model, corpus, config, part))
    )


def harvest_activations(
    lm: LanguageModelProfile, model: TransformerBridge, device: str = "cpu"
) -> Activations:
    """Activations of the profile's corpus, split by document; from the cache where they are there."""
    corpora = split_documents(load_corpus(lm.corpus), lm.held_out_share, seed=SPLIT_SEED)
    stores = []
    for corpus, max_tokens in zip(corpora, (lm.train_tokens, lm.held_out_tokens), strict=True):
        store = stored(lm, model, corpus, max_tokens, device)
        if store.manifest.n_tokens <= max_tokens - lm.context_size:
            raise ValueError(
                f"The corpus {corpus.name!r} gives {store.manifest.n_tokens:,} tokens in contexts of "
                f"{lm.context_size}; the profile asks for {max_tokens:,}. Lower it in the profile, or "
                "name a folder with more text as its corpus."
            )
        stores.append(store)
    return Activations(*stores)


def train_arm(
    lm: LanguageModelProfile,
    arm: LanguageModelArm,
    store: ActivationStore,
    seed: int,
    device: str = "cpu",
    progress: bool = False,
) -> SAE:
    """The arm's BatchTopK SAE, trained on normalised activations, from the cache where it is there."""
    precision = resolve_precision(lm.precision, device)
    config = TrainConfig(
        steps=lm.steps,
        lr=lm.lr,
        clip_norm=lm.clip_norm,
        aux_k_coefficient=lm.aux_k_coefficient,
        precision=precision,
        seed=seed,
    )
    regularisers = []
    if arm.c2r_strength > 0:
        weight = weight_from_strength(arm.c2r_strength, batch_size=lm.batch_size, d_sae=arm.d_sae)
        regularisers.append(C2R(weight, every=lm.penalty_every, chunk_size=lm.chunk_size))
    if arm.orthogonality_weight > 0:
        regularisers.append(
            Orthogonality(
                arm.orthogonality_weight, every=lm.penalty_every, chunk_size=lm.chunk_size
            )
        )
    key = {
        "arm": asdict(arm),
        "k": lm.k,
        "seed": seed,
        "batch_size": lm.batch_size,
        "config": asdict(config),
        "regularisers": [{"name": r.name} | asdict(r) for r in regularisers],
        "data": asdict(store.manifest),
        "device": device.partition(":")[0],
    }

    def build(folder: Path) -> None:
        sae = BatchTopKSAE(store.d_in, arm.d_sae, lm.k, seed=seed).to(device)
        sae.norm_factor = store.norm_factor
        batches = StoreBatches(store, lm.batch_size, seed)
        checkpoint = folder / "checkpoint.safetensors"
        train(sae, batches, config, regularisers, checkpoint=checkpoint, progress=progress)
        save_sae(sae, folder / "sae")
        checkpoint.unlink(missing_ok=True)

    return load_sae(cached("sae", key, build, resumable=True) / "sae", device)


def first_letter_task(
    lm: LanguageModelProfile, model: TransformerBridge, device: str = "cpu"
) -> tuple[FirstLetterTask, LetterProbes]:
    """Words of the corpus with their activations, and the letters' probes on them, both cached."""
    precision = resolve_precision(lm.precision, device)
    corpus = load_corpus(lm.corpus)
    key = {
        "model": model_fingerprint(lm.model),
        "hook": lm.hook_name,
        "text": corpus.fingerprint,
        "words": lm.first_letter_words,
        "precision": precision,
    }

    def build(folder: Path) -> None:
        words = letter_words(model.tokenizer, corpus, limit=lm.first_letter_words)
        harvest_words(model, words, lm.hook_name, precision=precision).save(folder)

    task = FirstLetterTask.load(cached("words", key, build))
    return task, train_letter_probes(task)

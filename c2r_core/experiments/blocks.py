"""Where can first-letter absorption be measured? `make blocks`: blocks of the embedded model, and k.

Two things are needed: the model must tell letters there (SAEBench wants 20 letters whose probe has a
test F1 above 0.6), and a baseline must absorb, or there is nothing to mend. One JSON a block in
results/blocks/; a rerun fills only what is missing. The SAEs are baselines of half the default profile's
tokens and steps: their absorption is for comparing blocks and k, not for quoting.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from c2r_core import fold_norm_factor
from c2r_core.artefacts.profiles import LanguageModelProfile, load_profile
from c2r_core.artefacts.results import provenance, write_json
from c2r_core.data.language_models import load_language_model
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    first_letter_task,
    harvest_activations,
    train_arm,
)
from c2r_core.metrics.absorption import evaluate_first_letter
from c2r_core.metrics.reconstruction import evaluate_reconstruction

RESULTS = Path(__file__).resolve().parents[2] / "results" / "blocks"
BLOCKS = (2, 4, 8, 12, 16, 20, 24)
KS = (10, 32)
SEED = 10


def measure_block(lm: LanguageModelProfile, model: Any) -> dict[str, Any]:
    """Letters that probes tell at the profile's hook, and what its baselines absorb, by k."""
    task, probes = first_letter_task(lm, model)
    good = [letter for letter, reason in enumerate(probes.not_evaluable) if reason is None]
    values = {
        "n_good_letters": len(good),
        "mean_probe_f1": sum(probes.f1[letter] for letter in good) / max(1, len(good)),
        "baselines": {},
    }
    stores = harvest_activations(lm, model)
    for k in KS:
        with_k = lm.model_copy(update={"k": k})
        arm = LanguageModelArm(lm.d_sae)
        sae = fold_norm_factor(train_arm(with_k, arm, stores.train, SEED))
        reconstruction = evaluate_reconstruction(sae, stores.held_out.chunks(8192))
        letters = evaluate_first_letter(sae, task, probes)
        values["baselines"][k] = {
            "fvu": reconstruction.fvu,
            "l0": reconstruction.l0,
            "absorption": letters.mean_absorption_fraction,
            "full_absorption": letters.mean_full_absorption,
            "split_size": letters.mean_split_size,
            "n_letters": letters.n_evaluated,
        }
    return values


def main(arguments: list[str] | None = None) -> int:
    """Measure the blocks that are missing; print one line each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    given = parser.parse_args(arguments)
    standard = load_profile("default").language_model
    model = load_language_model(standard.model)
    for block in given.blocks:
        file = RESULTS / f"block{block:02d}.json"
        if file.is_file():
            continue
        started = time.monotonic()
        lm = standard.model_copy(
            update={
                "hook_name": f"blocks.{block}.hook_resid_post",
                "train_tokens": standard.train_tokens // 2,
                "steps": standard.steps // 2,
            }
        )
        values = measure_block(lm, model)
        seconds = time.monotonic() - started
        made = provenance(profile="default", seed=SEED, device="cpu", seconds=seconds)
        write_json(file, {"block": block, "values": values, "provenance": made})
        print(f"block {block}: {values['n_good_letters']} letters, {seconds:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

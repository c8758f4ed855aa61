"""Does assignment consistency foretell what a latent is worth to its user? `make validate` asks many SAEs.

Every SAE of a stated list (architectures, widths, k, penalties, trainings cut short) is measured on two
disjoint halves of the words. On one, with probes fitted there: assignment consistency with its guards, and
first-letter absorption; reconstruction on held-out text. On the other: how often erasing and steering fail
with the latents that were picked on the first. One JSON an SAE in results/validation/, so that a rerun
fills only what is missing; `summary.json` has the rank correlations over SAEs.

The SAEs share their training data and their seed, and they differ in k more than in anything else: so the
correlations are also given among those of k = 10 alone.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from c2r_core import (
    C2R,
    Orthogonality,
    TrainConfig,
    create_sae,
    fold_norm_factor,
    load_sae,
    save_sae,
    train,
    weight_from_strength,
)
from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.profiles import LanguageModelProfile, load_profile
from c2r_core.artefacts.results import plain, provenance, read_json, write_json
from c2r_core.data.batches import StoreBatches
from c2r_core.data.forward import resolve_precision
from c2r_core.data.language_models import load_language_model
from c2r_core.data.store import ActivationStore
from c2r_core.data.words import FirstLetterTask
from c2r_core.experiments.language_model import (
    first_letter_task,
    harvest_activations,
)
from c2r_core.metrics.absorption import LetterProbes, evaluate_first_letter, train_letter_probes
from c2r_core.metrics.assignment import letter_assignment
from c2r_core.metrics.reconstruction import evaluate_reconstruction
from c2r_core.metrics.use import (
    UseTask,
    letter_use_task,
    measure_use,
    measure_use_of_means,
    random_half,
)
from c2r_core.saes import SAE
from c2r_core.saes.interface import AnySAE
from c2r_core.statistics import rank_correlation, rank_correlation_lead

RESULTS = Path(__file__).resolve().parents[2] / "results" / "validation"
SEED = 10


@dataclass(frozen=True)
class Spec:
    """One SAE of the list."""

    architecture: str
    d_sae: int
    k: int
    c2r_strength: float = 0.0
    orthogonality_weight: float = 0.0
    steps: int = 1000
    seed: int = SEED

    @property
    def name(self) -> str:
        parts = [self.architecture, f"{self.d_sae}", f"k{self.k}"]
        if self.c2r_strength:
            parts.append(f"c2r{self.c2r_strength:g}")
        if self.orthogonality_weight:
            parts.append(f"ort{self.orthogonality_weight:g}")
        if self.steps != Spec.steps:
            parts.append(f"{self.steps}steps")
        return "-".join([*parts, f"seed{self.seed}"])


def specs(lm: LanguageModelProfile) -> Iterator[Spec]:
    """The list."""
    c2r, ort = lm.c2r_strength, lm.orthogonality_weight
    penalties = [{}, {"c2r_strength": c2r}, {"orthogonality_weight": ort}]
    for d_sae in (1024, 2048):
        for k in (5, 10, 32):
            for penalty in penalties:
                yield Spec("batch_topk", d_sae, k, **penalty)
        yield Spec("batch_topk", d_sae, 10, c2r_strength=0.3)
        for architecture in ("topk", "matryoshka_batch_topk"):
            for penalty in penalties[:2]:
                yield Spec(architecture, d_sae, 10, **penalty)
        yield Spec("batch_topk", d_sae, 10, steps=200)
    for penalty in penalties:
        yield Spec("batch_topk", 4096, 10, **penalty)


def trained(spec: Spec, lm: LanguageModelProfile, store: ActivationStore) -> SAE:
    """The SAE, from the cache where it is there."""
    config = TrainConfig(
        steps=spec.steps,
        lr=lm.lr,
        clip_norm=lm.clip_norm,
        aux_k_coefficient=lm.aux_k_coefficient,
        precision=resolve_precision(lm.precision, "cpu"),
        seed=spec.seed,
    )
    regularisers = []
    if spec.c2r_strength:
        weight = weight_from_strength(spec.c2r_strength, batch_size=lm.batch_size, d_sae=spec.d_sae)
        regularisers.append(C2R(weight, every=lm.penalty_every))
    if spec.orthogonality_weight:
        regularisers.append(Orthogonality(spec.orthogonality_weight, every=lm.penalty_every))
    key = {
        "spec": asdict(spec),
        "batch_size": lm.batch_size,
        "config": asdict(config),
        "every": lm.penalty_every,
        "data": asdict(store.manifest),
    }

    def build(folder: Path) -> None:
        sae = create_sae(
            spec.architecture, d_in=store.d_in, d_sae=spec.d_sae, k=spec.k, seed=spec.seed
        )
        sae.norm_factor = store.norm_factor
        batches = StoreBatches(store, lm.batch_size, spec.seed)
        checkpoint = folder / "checkpoint.safetensors"
        train(sae, batches, config, regularisers, checkpoint=checkpoint)
        save_sae(sae, folder / "sae")
        checkpoint.unlink(missing_ok=True)

    return load_sae(cached("validation", key, build, resumable=True) / "sae")


@dataclass(frozen=True)
class Halves:
    """One half of the words to judge an SAE on, the other to use it on."""

    words: FirstLetterTask
    probes: LetterProbes
    use: UseTask

    @classmethod
    def of(cls, task: FirstLetterTask, model: Any, precision: str) -> Halves:
        first = random_half(len(task.words), SEED)
        chosen = first.nonzero()[:, 0].tolist()
        words = replace(
            task,
            words=tuple(task.words[i] for i in chosen),
            activations=task.activations[first],
            letters=task.letters[first],
            # As many to fit probes on as to test on: 20 samples of a letter are needed.
            is_test=random_half(len(chosen), SEED + 1),
        )
        use = letter_use_task(model, task, precision=precision, for_picking=first)
        return cls(words, train_letter_probes(words), use)


def measure(sae: AnySAE, halves: Halves, held_out: ActivationStore) -> dict[str, Any]:
    """All that the analysis needs of one SAE, JSON-ready."""
    reconstruction = evaluate_reconstruction(sae, held_out.chunks(8192))
    letters = evaluate_first_letter(sae, halves.words, halves.probes)
    assignment = letter_assignment(sae, halves.words, halves.probes)
    use = measure_use(sae, halves.use)
    by_letter = {
        row.concept: {
            "consistency": row.consistency,
            "f1": row.f1,
            "latent": row.modal_latent,
            "absorption": letter.absorption_fraction,
            "used_latent": used.latent,
            "erased": used.erased,
            "steered": used.steered,
        }
        for row, letter, used in zip(
            assignment.concepts, letters.letters, use.concepts, strict=True
        )
    }
    return {
        "fvu": reconstruction.fvu,
        "l0": reconstruction.l0,
        "live_latents": round(reconstruction.live_share * len(sae.W_dec)),
        "absorption": letters.mean_absorption_fraction,
        "full_absorption": letters.mean_full_absorption,
        "split_size": letters.mean_split_size,
        "n_letters": letters.n_evaluated,
        "assignment": {k: v for k, v in asdict(assignment).items() if k != "concepts"},
        "use": {k: v for k, v in asdict(use).items() if k != "concepts"},
        "by_letter": by_letter,
    }


CANDIDATE = "assignment consistency"
PREDICTORS = {
    CANDIDATE: lambda cell: cell["assignment"]["mean_consistency"],
    "modal latent F1": lambda cell: cell["assignment"]["mean_f1"],
    "FVU": lambda cell: cell["fvu"],
    "L0": lambda cell: cell["l0"],
    "absorption": lambda cell: cell["absorption"],
    "live latents": lambda cell: cell["live_latents"],
}
FAILURES = {
    "erasing": lambda cell: 1 - cell["use"]["mean_erased"],
    "steering": lambda cell: 1 - cell["use"]["mean_steered"],
}


def summarise(cells: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Rank correlations with 95 % intervals over SAEs, and by how much consistency leads each rival."""
    found = {}
    groups = {
        "all": list(cells.values()),
        "k = 10": [cell for cell in cells.values() if cell["spec"]["k"] == 10],
    }
    for group, members in groups.items():
        found[group] = {"n_saes": len(members)}
        for failure, failed in FAILURES.items():
            y = [failed(cell["values"]) for cell in members]
            values = {
                name: [predictor(cell["values"]) for cell in members]
                for name, predictor in PREDICTORS.items()
            }
            own = values[CANDIDATE]
            found[group][failure] = {
                name: {
                    "rank_correlation": rank_correlation(x, y),
                    "lead_of_consistency": None
                    if name == CANDIDATE
                    else rank_correlation_lead(own, x, y),
                }
                for name, x in values.items()
            }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Train, measure and summarise what is missing; print one line an SAE."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--limit", type=int, help="only the first so many SAEs, no summary")
    given = parser.parse_args(arguments)
    lm = load_profile("default").language_model
    model = load_language_model(lm.model)
    stores = harvest_activations(lm, model)
    task, _ = first_letter_task(lm, model)
    halves = Halves.of(task, model, resolve_precision(lm.precision, "cpu"))
    cells = {}
    for spec in list(specs(lm))[: given.limit]:
        file = RESULTS / f"{spec.name}.json"
        if not file.is_file():
            started = time.monotonic()
            sae = fold_norm_factor(trained(spec, lm, stores.train))
            values = measure(sae, halves, stores.held_out)
            seconds = time.monotonic() - started
            made = provenance(profile="default", seed=spec.seed, device="cpu", seconds=seconds)
            write_json(file, {"spec": asdict(spec), "values": values, "provenance": made})
            print(f"{spec.name}: {seconds:.0f} s", flush=True)
        cells[spec.name] = read_json(file)
    if given.limit:
        return 0
    reference = measure_use_of_means(halves.use)
    summary = {
        "correlations": summarise(cells),
        "difference_of_means": {k: v for k, v in asdict(reference).items() if k != "concepts"},
    }
    write_json(RESULTS / "summary.json", plain(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())

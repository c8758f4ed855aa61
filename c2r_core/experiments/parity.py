"""Study `parity`, of notebook 16: held-out FVU against SAELens's own trainer, on the same activations.

A baseline that loses to the field's trainer would make C²R look better than it is: ours may have at most
TOLERANCE times the FVU of SAELens. Computing the cells needs the extra `saelens`; reading them does not.

Equal in both:

- the data: the batches of `StoreBatches`, in the same order;
- the number of steps, the batch size, k, d_sae, float32 arithmetic, and the seed of the data and of
  the first weights (each library draws its own weights from it);
- Adam with betas (0.9, 0.999), the peak learning rate, its linear warm-up and its linear decay to 0,
  step by step (checked);
- for how many steps a latent is silent before the auxiliary loss counts it as dead: SAELens's default
  of 1000 steps would never act in a run of this length;
- the measurement: the metric `reconstruction` on raw activations of held-out documents, with each SAE as
  it is used at inference. The BatchTopK SAE of SAELens is saved and loaded the way its library
  does it, as a JumpReLU SAE.

Each library's own, as it comes:

|                   | ours                                  | SAELens                                |
|-------------------|---------------------------------------|----------------------------------------|
| scale of the data | E‖x‖² = 1                             | E‖x‖ = √d_in, by its own normalisation |
| first W_dec       | random rows of norm 1                 | random rows of norm 0.1                |
| first b_dec       | geometric median of the first batch   | 0                                      |
| decoder norm      | kept at 1, parallel gradient removed  | free; activations are multiplied by it |
| gradient's norm   | at most 0.01: binds in every step     | at most 1: binds in every step         |
| k                 | falls from d_in in the first 1 %      | constant                               |
| auxiliary loss    | 1/32 of the error over its variance   | the error, times min(1, dead / k_aux)  |
| auxiliary acts    | ReLU                                  | of either sign                         |
| threshold (Batch) | mean over the last 5 % of the steps   | mean over the last 100 steps, from 0   |

On one thread a step of SAELens takes 0.3 s, or 1 s where the processor has other work too; ours take a fifth
to a third of it.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from torch import Tensor

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.names import slug
from c2r_core.artefacts.profiles import Profile, training_seeds
from c2r_core.artefacts.results import read_json, write_json
from c2r_core.data.batches import StoreBatches
from c2r_core.data.store import ActivationStore
from c2r_core.errors import NotEvaluable
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    arm_of,
    evaluated,
    trained,
    training_store,
)
from c2r_core.experiments.study import Study
from c2r_core.saes.interface import AnySAE
from c2r_core.training import TrainConfig

if TYPE_CHECKING:
    from sae_lens.config import SAETrainerConfig

TOLERANCE = 1.02
ARCHITECTURES = ("topk", "batch_topk")
LIBRARIES = ("ours", "SAELens")
N_SEEDS = 2
SAELENS_NORMALISATION = "expected_average_only_in"
"""Scales to a mean norm of √d_in. With "none", its default, and E‖x‖² = 1 it does worse here."""
NORM_BATCHES = 50
"""From so many batches SAELens estimates that scale, before its first step."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """A cell for each architecture, seed and library, on SAEs of the small width."""
    sources = Sources(profile)
    made = []
    for one in training_seeds(N_SEEDS, seed):
        study = Study("parity", profile, [one], device)
        for architecture, library in itertools.product(ARCHITECTURES, LIBRARIES):
            lm = sources.lm
            arm = arm_of(
                lm, device, d_sae=lm.small_d_sae, architecture=architecture, steps=_steps(lm.steps)
            )
            made.append(
                study.cell(
                    f"{architecture}, seed {one}, {library}",
                    measure,
                    modules=["c2r_core.metrics.reconstruction"],
                    arm=arm,
                    library=library,
                    sources=sources,
                )
            )
    return made


def _steps(steps: int) -> int:
    """A number of steps that 10 divides, so that both libraries have the same learning rates."""
    return max(10, steps // 10 * 10)


def measure(
    arm: LanguageModelArm, library: str, sources: Sources, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """FVU, L0 and the share of dead latents on held-out tokens, and what a step of training took."""
    if sources.lm.streamed:
        raise NotEvaluable("SAELens's trainer reads a store; this profile streams its activations.")
    store = training_store(sources.lm, device)
    started = time.perf_counter()
    if library == "ours":
        sae: AnySAE = trained(arm, store, seeds[0], device)
        seconds, of_version = (time.perf_counter() - started) / arm.config.steps, None
    else:
        sae, seconds = trained_by_saelens(arm, store, seeds[0])
        of_version = version("sae-lens")
    found = evaluated(sae, ["reconstruction"], sources, device)["reconstruction"].values
    return {
        "fvu": found.fvu,
        "l0": found.l0,
        "dead_share": 1 - found.frac_alive,
        "seconds_per_step": seconds,
        "sae_lens_version": of_version,
    }


def trained_by_saelens(
    arm: LanguageModelArm, store: ActivationStore, seed: int
) -> tuple[AnySAE, float]:
    """SAELens's SAE for raw activations, in its inference form, and the seconds a step took.

    Raises
    ------
    ImportError
        If SAELens is not installed.
    RuntimeError
        If the learning rates of the two recipes are not the same at every step.
    """
    try:
        import sae_lens
    except ImportError as error:
        raise ImportError(
            f"SAELens cannot be imported ({error}); pip install 'c2r-core[saelens]' brings it."
        ) from error
    kind = {"topk": "TopK", "batch_topk": "BatchTopK"}[arm.architecture] + "TrainingSAE"
    sae_class, config_class = getattr(sae_lens, kind), getattr(sae_lens, f"{kind}Config")
    recipe = saelens_recipe(arm)

    def build(folder: Path) -> None:
        check_learning_rates(arm.config, recipe)
        torch.manual_seed(seed)
        started = time.perf_counter()
        sae = sae_class(
            config_class(
                d_in=store.d_in,
                d_sae=arm.d_sae,
                k=arm.k,
                normalize_activations=SAELENS_NORMALISATION,
            )
        )
        batches = StoreBatches(store, arm.batch_size, seed)
        sae = sae_lens.SAETrainer(recipe, sae, in_order(batches)).fit()
        sae.fold_activation_norm_scaling_factor(store.norm_factor)
        sae.save_inference_model(folder / "sae")
        seconds = time.perf_counter() - started
        write_json(folder / "time.json", {"seconds_per_step": seconds / arm.config.steps})

    key = {
        "arm": arm.settings(),
        "seed": seed,
        "data": asdict(store.manifest),
        "version": version("sae-lens"),
        "normalisation": SAELENS_NORMALISATION,
        "recipe": asdict(recipe),
    }
    code = ["c2r_core.experiments.parity:trained_by_saelens"]
    folder = cached("saelens", key, build, code=code)
    sae = sae_lens.SAE.load_from_disk(folder / "sae")
    return sae, read_json(folder / "time.json")["seconds_per_step"]


def saelens_recipe(arm: LanguageModelArm) -> SAETrainerConfig:
    """Our recipe in the terms of SAELens."""
    from sae_lens.config import SAETrainerConfig

    recipe = arm.config
    return SAETrainerConfig(
        total_training_samples=recipe.steps * arm.batch_size,
        train_batch_size_samples=arm.batch_size,
        lr=recipe.lr,
        lr_end=recipe.lr,
        lr_warm_up_steps=round(recipe.warmup_share * recipe.steps),
        lr_decay_steps=round(recipe.decay_share * recipe.steps),
        dead_feature_window=round(recipe.dead_after * arm.d_sae / arm.k / arm.batch_size),
        n_batches_for_norm_estimate=NORM_BATCHES,
    )


def in_order(batches: Callable[[int], Tensor]) -> Iterator[Tensor]:
    """The iterator SAELens draws from: batches for its estimate of the scale, then those of steps 0, 1, …"""
    return (batches(step) for step in itertools.chain(range(NORM_BATCHES), itertools.count()))


def check_learning_rates(config: TrainConfig, recipe: SAETrainerConfig) -> None:
    """Raise a RuntimeError unless both libraries take the same learning rate at every step."""
    from sae_lens.training.optim import get_lr_scheduler

    optimiser = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=recipe.lr)
    scheduler = get_lr_scheduler(
        recipe.lr_scheduler_name,
        optimiser,
        training_steps=recipe.total_training_steps,
        lr=recipe.lr,
        warm_up_steps=recipe.lr_warm_up_steps,
        decay_steps=recipe.lr_decay_steps,
        lr_end=recipe.lr_end,
        num_cycles=recipe.n_restart_cycles,
    )
    for step in range(config.steps):
        theirs, ours = scheduler.get_last_lr()[0], config.lr_at(step)
        if not math.isclose(theirs, ours, rel_tol=1e-6):
            raise RuntimeError(
                f"At step {step} of {config.steps} the learning rate is {ours} in our recipe and "
                f"{theirs} in SAELens's; take a number of steps that 10 divides."
            )
        optimiser.step()
        scheduler.step()


def parity_table(values: Mapping[str, Any], seed: int = 0) -> pd.DataFrame:
    """Architecture, seed, the FVU of each library, their ratio, and whether it is within TOLERANCE."""
    rows = []
    for one, architecture in itertools.product(training_seeds(N_SEEDS, seed), ARCHITECTURES):
        names = {library: slug(f"{architecture}, seed {one}, {library}") for library in LIBRARIES}
        if all(name in values for name in names.values()):
            fvu = {library: values[name]["fvu"] for library, name in names.items()}
            ratio = fvu["ours"] / fvu["SAELens"]
            about = {"architecture": architecture, "seed": one}
            rows.append(about | fvu | {"ratio": ratio, "within": ratio <= TOLERANCE})
    return pd.DataFrame(rows)

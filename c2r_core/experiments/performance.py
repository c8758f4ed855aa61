"""Study `performance`: time and memory of a training step, of C²R's term, of the search for neighbours.

How a step grows with the number of latents is in `growth`, harvest, streaming and evaluation in `pipeline`.

All but the machine's limits is timed in turn with a reference, A B A B …, in one process. Kept are the
medians, and the median, least and largest of the pairwise ratios: where a machine's speed drifts, times move
and ratios hardly do. A ratio is still one machine's: provenance says which.

The references are written from the published descriptions, with every product dense and every derivative by
autograd:

- BatchTopK's step (Bussmann et al., arXiv 2412.06410), with the same clipping, Adam and unit rows as ours;
- C²R as its formula stands (Jin et al., arXiv 2606.30609), the matrix of cosines in the graph;
- where SAELens is installed (extra `saelens`), the step of its own BatchTopK trainer.

`make bench` runs it, and nothing else should run meanwhile. Samples are random: no latent is dead, and
nothing is said of the quality of an SAE.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import PerformanceProfile, Profile, ToyProfile, training_seeds
from c2r_core.data.precision import resolve_precision
from c2r_core.experiments import growth
from c2r_core.experiments.growth import CLIP_NORM, encoder_product
from c2r_core.experiments.samples import sample_batches, term_inputs, unit_rows
from c2r_core.experiments.study import Study
from c2r_core.experiments.timing import Clock, in_turn, now, peak_memory, seconds
from c2r_core.losses import c2r_loss, nearest_neighbours
from c2r_core.saes import SAE, BatchTopKSAE, ReLUSAE, StepInput
from c2r_core.saes.topk import largest_entries
from c2r_core.training import C2R, TrainConfig, train

PENALTIES = {"no penalty": 0, "C²R on every step": 1, "C²R on every fifth step": 5}
"""What is timed of a step: how often C²R applies, 0 for never."""
WEIGHT = 0.3
WARM_UP = 4
"""Steps of a new SAE that are not timed: the first keeps more than k, and the next find their threshold and
their memory. The reference is the same object in all rounds, so it is warm from its first on."""


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """The machine's limits; step, term and search at several widths; from text to an evaluation."""
    sizes, study = (
        profile.performance,
        Study("performance", profile, training_seeds(1, seed), device),
    )
    made = [
        study.cell("limits", measure_limits, pairs=sizes.pairs),
        study.cell("kept entries", measure_kept_entries, sizes=sizes),
        study.cell("stack of toys", measure_stack, toy=profile.toy, pairs=sizes.pairs),
    ]
    for d_sae in sizes.step_widths:
        for name, every in PENALTIES.items():
            how = {"d_sae": d_sae, "every": every, "sizes": sizes}
            made.append(study.cell(f"step, {d_sae}, {name}", measure_step, **how))
        how = {"d_sae": d_sae, "sizes": sizes}
        made.append(study.cell(f"auto, {d_sae}", measure_step_in_auto, **how))
    for d_sae in sizes.term_widths:
        made.append(study.cell(f"term, {d_sae}", measure_term, d_sae=d_sae, sizes=sizes))
    for d_sae in sizes.search_widths:
        made.append(study.cell(f"search, {d_sae}", measure_search, d_sae=d_sae, sizes=sizes))
    for d_sae in sizes.growth_widths:
        made.append(study.cell(f"growth, {d_sae}", growth.measure_growth, d_sae=d_sae, sizes=sizes))
    return made + _pipeline_cells(study)


def _pipeline_cells(study: Study) -> list[Cell]:
    """The speed of a harvest; on a CPU also the memory of harvest, streaming and evaluation."""
    # Imported here: processes that measure the memory of a step or a search load no language model.
    from c2r_core.experiments import pipeline
    from c2r_core.experiments.language_model import Sources

    sizes, sources = study.profile.performance, Sources(study.profile)
    made = [study.cell("harvest", pipeline.measure_harvest, sizes=sizes, sources=sources)]
    if study.device != "cpu":
        return made
    for n in sizes.harvest_memory_tokens:
        how = {"n_tokens": n, "sources": sources}
        made.append(study.cell(f"memory, harvest, {n}", pipeline.measure_harvest_memory, **how))
    how = {"sizes": sizes, "sources": sources}
    made.append(study.cell("memory, streaming", pipeline.measure_streaming_memory, **how))
    for n in sizes.evaluation_memory_tokens:
        measure = pipeline.measure_evaluation_memory
        made.append(study.cell(f"memory, evaluation, {n}", measure, n_tokens=n, **how))
    return made


# -- what is measured -----------------------------------------------------------------------------


def measure_limits(pairs: int, seeds: Sequence[int], device: str) -> dict[str, float]:
    """The machine's own rates: products of large matrices, GFLOP/s, and copying, GB/s."""
    n = 1024
    a, b = torch.randn(2, n, n, device=device)
    source, target = torch.zeros(2, 2**24, device=device)
    product = [seconds(lambda: a @ b, device) for _ in range(pairs)]
    copy = [seconds(lambda: target.copy_(source), device) for _ in range(pairs)]
    return {
        "seconds_product": statistics.median(product),
        "gigaflop_per_second": 2 * n**3 / statistics.median(product) / 1e9,
        "gigabyte_per_second": 2 * source.nbytes / statistics.median(copy) / 1e9,
    }


def measure_kept_entries(
    sizes: PerformanceProfile, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """BatchTopK's choice among all activations of a batch, beside torch.topk."""
    n = sizes.batch_size * sizes.k
    generator = torch.Generator().manual_seed(seeds[0])
    values = torch.randn(sizes.batch_size * sizes.step_widths[0], generator=generator).to(device)
    runs = {
        "ours": lambda: seconds(lambda: largest_entries(values, n), device),
        "reference": lambda: seconds(lambda: values.topk(n, sorted=False), device),
    }
    return in_turn(runs, sizes.pairs)


def measure_stack(
    toy: ToyProfile, pairs: int, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """Losses and gradients of 15 toy SAEs in one stack, beside one after the other."""
    own = toy.architectures["relu"]
    stack = ReLUSAE(toy.d_in, toy.d_sae, seed=range(15), **own)
    stack, singles = stack.to(device), [single.to(device) for single in stack.unstack()]
    generator = torch.Generator().manual_seed(seeds[0])
    x = torch.randn(15, toy.batch_size, toy.d_in, generator=generator).to(device) / toy.d_in**0.5

    def one(sae: SAE, batch: Tensor) -> None:
        sae.training_losses(StepInput(batch)).total().sum().backward()

    def one_by_one() -> None:
        for sae, batch in zip(singles, x, strict=True):
            one(sae, batch)

    runs = {
        "ours": lambda: seconds(lambda: one(stack, x), device),
        "reference": lambda: seconds(one_by_one, device),
    }
    return in_turn(runs, pairs)


def measure_step(
    d_sae: int, every: int, sizes: PerformanceProfile, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """A step of ours, of ours without the penalty, and of the reference: means over a round of `every`.

    And the product of a batch with the encoder's weights: the part that stays while the encoder is dense.
    """
    timed = _Steps(d_sae, max(2, every), sizes, seeds[0], device)
    sae = timed.new_sae()
    reference = PlainTraining(sae, every)

    def product() -> float:
        return statistics.mean(encoder_product(sae, x, device) for x in timed.batches)

    runs = {
        "ours": timed.ours,
        "reference": lambda: timed.plain(reference),
        "product": product,
    }
    if every:
        runs |= {"ours": lambda: timed.ours(C2R(WEIGHT, every=every)), "without": timed.ours}
    elif find_spec("sae_lens"):
        runs["SAELens"] = timed.saelens
    return in_turn(runs, sizes.pairs)


def measure_step_in_auto(
    d_sae: int, sizes: PerformanceProfile, seeds: Sequence[int], device: str
) -> dict[str, Any]:
    """A step of ours in the precision that `auto` means here; the reference, and SAELens at its defaults."""
    timed = _Steps(d_sae, 2, sizes, seeds[0], device)
    precision = resolve_precision("auto", device)
    reference = PlainTraining(timed.new_sae(), every=0)
    runs = {
        "ours": lambda: timed.ours(precision=precision),
        "reference": lambda: timed.plain(reference),
    }
    if find_spec("sae_lens"):
        runs["SAELens"] = timed.saelens
    return {"precision": precision} | in_turn(runs, sizes.pairs)


class _Steps:
    """Seconds of one of some training steps, mean: of ours, of the reference, and of SAELens."""

    def __init__(
        self, d_sae: int, n_steps: int, sizes: PerformanceProfile, seed: int, device: str
    ) -> None:
        self.d_sae, self.n_steps, self.sizes = d_sae, n_steps, sizes
        self.seed, self.device = seed, device
        self.batches = [batch.to(device) for batch in sample_batches(sizes, seed)]

    def new_sae(self) -> BatchTopKSAE:
        sizes = self.sizes
        return BatchTopKSAE(sizes.d_in, self.d_sae, k=sizes.k, seed=self.seed).to(self.device)

    def ours(self, *penalties: C2R, precision: str = "float32") -> float:
        clock = Clock(self.batches, self.device)
        config = TrainConfig(
            steps=self.n_steps + WARM_UP,
            clip_norm=CLIP_NORM,
            mean_square_norm=None,
            precision=precision,
        )
        train(self.new_sae(), clock, config, list(penalties), progress=False)
        return statistics.mean(clock.last(self.n_steps))

    def plain(self, reference: PlainTraining) -> float:
        started = now(self.device)
        for step in range(1, self.n_steps + 1):
            reference.step(self.batches[step % len(self.batches)], step)
        return (now(self.device) - started) / self.n_steps

    def saelens(self) -> float:
        return saelens_step(self.d_sae, self.sizes, self.batches, self.n_steps)


def measure_term(
    d_sae: int, sizes: PerformanceProfile, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """Value and gradient of C²R, ours and the published form, and the memory that each takes on a CPU."""
    acts, W_dec = term_inputs(d_sae, sizes, seeds[0])
    acts, W_dec = acts.to(device).requires_grad_(), W_dec.to(device).requires_grad_()
    runs = {
        "ours": lambda: seconds(lambda: c2r_loss(acts, W_dec).backward(), device),
        "reference": lambda: seconds(lambda: published_c2r(acts, W_dec).backward(), device),
    }
    times = in_turn(runs, sizes.pairs)
    if device != "cpu":
        return times
    of_ours, of_reference = (
        peak_memory(_term_once, which, d_sae, sizes, seeds[0]) for which in ("ours", "published")
    )
    return times | {"peak_memory_ours": of_ours, "peak_memory_reference": of_reference}


def measure_search(
    d_sae: int, sizes: PerformanceProfile, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """The exact search for nearest neighbours, beside the bare product of the same rows in blocks."""
    unit = unit_rows(d_sae, sizes.d_in, seeds[0]).to(device)

    def product() -> None:
        for block in unit.split(max(1, 2**24 // d_sae)):
            block @ unit.T

    runs = {
        "ours": lambda: seconds(lambda: nearest_neighbours(unit), device),
        "reference": lambda: seconds(product, device),
    }
    times = in_turn(runs, 2 if d_sae > 2**14 else sizes.pairs)
    if device != "cpu":
        return times
    return times | {"peak_memory_ours": peak_memory(_search_once, d_sae, sizes, seeds[0])}


# -- references -----------------------------------------------------------------------------------


class PlainTraining:
    """BatchTopK's training step as its description has it; parameters start as those of an SAE."""

    def __init__(self, sae: BatchTopKSAE, every: int) -> None:
        parts = (sae.W_enc, sae.b_enc, sae.W_dec, sae.b_dec)
        self.parameters = [part.detach().clone().requires_grad_() for part in parts]
        self.k, self.every = sae.k, every
        self.optimiser = torch.optim.Adam(self.parameters, lr=2e-4)

    def step(self, x: Tensor, number: int) -> None:
        """Loss, gradient, clipping, Adam, and rows of norm 1."""
        W_enc, b_enc, W_dec, b_dec = self.parameters
        pre_acts = ((x - b_dec) @ W_enc + b_enc).relu()
        kept = pre_acts.flatten().topk(len(x) * self.k, sorted=False)
        acts = torch.zeros_like(pre_acts).flatten().scatter(0, kept.indices, kept.values)
        acts = acts.view_as(pre_acts)
        loss = (x - acts @ W_dec - b_dec).square().sum(-1).mean()
        if self.every and number % self.every == 0:
            loss = loss + WEIGHT * self.every * published_c2r(acts, W_dec)
        self.optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            W_dec.grad -= (W_dec.grad * W_dec).sum(-1, keepdim=True) * W_dec
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP_NORM)
        self.optimiser.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=-1, keepdim=True)


def published_c2r(feature_acts: Tensor, W_dec: Tensor) -> Tensor:
    """The formula as it stands, on the whole matrix of cosines."""
    unit = torch.nn.functional.normalize(W_dec, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    best = (unit @ unit.T).masked_fill(itself, -torch.inf).max(-1)
    norms = feature_acts.norm(dim=0)
    return (best.values.relu() ** 2 * (norms + norms[best.indices])).mean()


def saelens_step(
    d_sae: int, sizes: PerformanceProfile, batches: Sequence[Tensor], n_steps: int
) -> float:
    """Seconds of a step of SAELens's own BatchTopK trainer, at its defaults, without its log."""
    from sae_lens import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig, LoggingConfig, SAETrainer
    from sae_lens.config import SAETrainerConfig

    device = str(batches[0].device)
    config = BatchTopKTrainingSAEConfig(d_in=sizes.d_in, d_sae=d_sae, k=sizes.k, device=device)
    recipe = SAETrainerConfig(
        total_training_samples=(n_steps + WARM_UP) * sizes.batch_size,
        train_batch_size_samples=sizes.batch_size,
        lr=2e-4,
        lr_end=2e-4,
        device=device,
        logger=LoggingConfig(log_to_wandb=False),
    )
    clock = Clock(batches, device)
    SAETrainer(recipe, BatchTopKTrainingSAE(config), map(clock, itertools.count())).fit()
    return statistics.mean(clock.last(n_steps))


# -- memory, in a process of its own -------------------------------------------------------------


def _term_once(
    which: str, d_sae: int, sizes: PerformanceProfile, seed: int
) -> Callable[[], object]:
    acts, W_dec = (part.requires_grad_() for part in term_inputs(d_sae, sizes, seed))
    loss = {"ours": c2r_loss, "published": published_c2r}[which]
    return lambda: loss(acts, W_dec).backward()


def _search_once(d_sae: int, sizes: PerformanceProfile, seed: int) -> Callable[[], object]:
    unit = unit_rows(d_sae, sizes.d_in, seed)
    return lambda: nearest_neighbours(unit)


# -- tables ---------------------------------------------------------------------------------------


def performance_table(values: Mapping[str, Any], kind: str) -> pd.DataFrame:
    """Cells of a kind ("step", "term", "search", "growth"): latents, what is timed, and what was measured."""
    rows = []
    for name, measured in values.items():
        of, _, rest = name.partition("-")
        if of == kind:
            d_sae, _, what = rest.partition("-")
            rows.append({"latents": int(d_sae), "what": what.replace("-", " ")} | measured)
    return pd.DataFrame(rows)


def memory_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """Stage ("harvest", "streaming", "evaluation"), tokens where they were varied, and peak memory in MiB."""
    rows = []
    for name, measured in values.items():
        of, _, rest = name.partition("-")
        if of == "memory":
            stage, _, tokens = rest.partition("-")
            mebibytes = measured["peak_memory_ours"] / 2**20
            rows.append({"stage": stage, "tokens": tokens, "MiB": mebibytes})
    return pd.DataFrame(rows, columns=["stage", "tokens", "MiB"])

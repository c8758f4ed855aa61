"""Study `performance`: how the time and the memory of a training step grow with the number of latents.

The search for neighbours has its own cells, one a width, beside its reference (`performance.measure_search`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
from torch import Tensor

from c2r_core.artefacts.profiles import PerformanceProfile
from c2r_core.experiments.samples import sample_batches
from c2r_core.experiments.timing import Clock, peak_memory, seconds
from c2r_core.saes import BatchTopKSAE
from c2r_core.training import TrainConfig, train

CLIP_NORM = 1.0


def measure_growth(
    d_sae: int, sizes: PerformanceProfile, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """A step of a BatchTopK SAE without a penalty: median seconds, its one dense product's, and memory.

    The first step, which keeps more activations than k, warms up. Memory, on a CPU, is what training takes
    beyond the weights in its first two steps: gradients, Adam's two moments, activations.
    """
    batches = [batch.to(device) for batch in sample_batches(sizes, seeds[0])]
    sae = _untrained(d_sae, sizes, seeds[0]).to(device)
    clock = Clock(batches, device)
    _train(sae, clock, 1 + sizes.pairs)
    steps = clock.last(sizes.pairs)
    products = [encoder_product(sae, batches[0], device) for _ in range(1 + sizes.pairs)]
    found = {
        "seconds_ours": statistics.median(steps),
        "seconds_product": statistics.median(products[1:]),
    }
    if device != "cpu":
        return found
    return found | {"peak_memory_ours": peak_memory(_steps_once, d_sae, sizes, seeds[0])}


def encoder_product(sae: BatchTopKSAE, x: Tensor, device: str) -> float:
    """Seconds of the one product of a step that is dense: samples (batch, d_in) by the encoder's weights."""
    W_enc = sae.W_enc.detach()
    return seconds(lambda: x @ W_enc, device)


def fitted_slope(table: pd.DataFrame, column: str) -> float:
    """Exponent p of the power latents^p that fits a column best: least squares on logarithms.

    NaN where the table has fewer than two widths.
    """
    if len(table) < 2:
        return float("nan")
    slope, _ = np.polyfit(np.log2(table["latents"]), np.log2(table[column]), 1)
    return float(slope)


def _untrained(d_sae: int, sizes: PerformanceProfile, seed: int) -> BatchTopKSAE:
    return BatchTopKSAE(sizes.d_in, d_sae, k=sizes.k, seed=seed)


def _train(sae: BatchTopKSAE, batches: Callable[[int], Tensor], steps: int) -> None:
    config = TrainConfig(steps=steps, clip_norm=CLIP_NORM, mean_square_norm=None)
    train(sae, batches, config, progress=False)


def _steps_once(d_sae: int, sizes: PerformanceProfile, seed: int) -> Callable[[], object]:
    batches = sample_batches(sizes, seed)

    def two_steps(sae: BatchTopKSAE) -> None:
        _train(sae, lambda step: batches[step % len(batches)], 2)

    two_steps(_untrained(sizes.k, sizes, seed))  # loads what a first step loads
    sae = _untrained(d_sae, sizes, seed)
    return lambda: two_steps(sae)

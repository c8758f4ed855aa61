"""What the fast paths buy, as ratios against their plain references in the same run.

`make bench` runs it; nothing is written. Every pair is timed in turn, A B A B …, and the median of the
pairwise ratios is printed, so that a machine whose speed drifts does not matter.

- sparse step: `training_losses` of a single BatchTopK SAE, against `dense_losses`;
- neighbour search: C²R with the search outside of the graph, against the published form, which
  differentiates through the whole matrix of cosines;
- kept entries: `largest_entries` against `torch.topk`;
- stack: 15 toy SAEs in one set of parameters, against one after the other.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from c2r_core import BatchTopKSAE, ReLUSAE, c2r_loss
from c2r_core.saes import StepInput
from c2r_core.saes.topk import largest_entries

D_IN, D_SAE, BATCH, K = 576, 4096, 2048, 10
PAIRS = 7


def compare(name: str, fast: Callable[[], object], plain: Callable[[], object]) -> None:
    """Time the two in turn and print medians and the ratio."""
    times: list[tuple[float, float]] = []
    for pair in range(PAIRS + 1):
        seconds = []
        for run in (fast, plain):
            start = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - start)
        if pair:  # the first warms up
            times.append((seconds[0], seconds[1]))
    fast_ms, plain_ms = (1000 * statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(b / a for a, b in times)
    print(
        f"{name:22s} {fast_ms:9.1f} ms   reference {plain_ms:9.1f} ms   {ratio:5.1f} times as fast"
    )


def published_c2r(feature_acts: Tensor, W_dec: Tensor) -> Tensor:
    """The formula as it stands, on the whole matrix of cosines."""
    unit = torch.nn.functional.normalize(W_dec, dim=-1)
    itself = torch.eye(len(unit), dtype=torch.bool)
    best = (unit @ unit.T).masked_fill(itself, -torch.inf).max(-1)
    norms = feature_acts.norm(dim=0)
    return (best.values.relu() ** 2 * (norms + norms[best.indices])).mean()


def main() -> None:
    """Print one line a comparison."""
    print(
        f"{torch.get_num_threads()} threads, float32, d_in {D_IN}, d_sae {D_SAE}, batch {BATCH}, k {K}"
    )
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, D_IN, generator=rng) / D_IN**0.5
    sae = BatchTopKSAE(D_IN, D_SAE, K)
    compare(
        "sparse step",
        lambda: sae.training_losses(StepInput(x)).total().backward(),
        lambda: sae.dense_losses(StepInput(x)).total().backward(),
    )
    acts = sae.training_losses(StepInput(x)).feature_acts.to_dense().detach()
    compare(
        "C²R",
        lambda: c2r_loss(acts, sae.W_dec).backward(),
        lambda: published_c2r(acts, sae.W_dec).backward(),
    )
    values = torch.randn(BATCH * D_SAE, generator=rng)
    compare(
        "kept entries",
        lambda: largest_entries(values, BATCH * K),
        lambda: values.topk(BATCH * K, sorted=False),
    )
    toy_x = torch.randn(15, 1024, 64, generator=rng) / 8
    stack = ReLUSAE(64, 120, l1_weight=0.05, seed=range(15))
    singles = stack.unstack()
    compare(
        "stack of 15 toy SAEs",
        lambda: stack.training_losses(StepInput(toy_x)).total().sum().backward(),
        lambda: [
            one.training_losses(StepInput(batch)).total().backward()
            for one, batch in zip(singles, toy_x, strict=True)
        ],
    )


if __name__ == "__main__":
    main()

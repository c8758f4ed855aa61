"""One SAE trained by several processes, each on its share of every batch, as one process would train it.

    torchrun --nproc-per-node 4 my_training.py

with `torch.distributed.init_process_group()` in my_training.py, and `train_distributed` in place of `train`.
On GPUs each process first takes its own: `torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))`.

Averaging the gradients of the shares would train another SAE:

- BatchTopK keeps the largest activations of the whole batch, and its threshold is their smallest;
- C²R's n_i is a root of a sum over the whole batch: the mean of the roots of the shares is 1/√N of it;
- whether a latent is dead, the bound on the gradient and the variance in the revival's loss are of the batch.

So activations are gathered, in their sparse form where they have one, each process computes the penalty of
all of them, and only the gradients are averaged.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from c2r_core.saes.base import SAE, StepInput, TrainingLosses
from c2r_core.saes.sparse import FeatureActs, SparseActs, decode_sparse, firing_counts
from c2r_core.saes.topk import BatchTopKSAE, largest_entries
from c2r_core.training.config import TrainConfig
from c2r_core.training.history import History
from c2r_core.training.regularisers import Regulariser
from c2r_core.training.trainer import BatchSource, _Run

SHARED = ("relu", "relu_april", "gated", "topk", "batch_topk", "matryoshka_batch_topk")
"""Architectures whose loss is a mean over samples, once the kept activations are chosen."""


def train_distributed(
    sae: SAE,
    batches: BatchSource,
    config: TrainConfig,
    regularisers: Sequence[Regulariser] = (),
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """`train`, called by every process of torch.distributed's default group alike; each computes a share.

    Parameters
    ----------
    sae : SAE
        A single new SAE, the same in every process: of the same seed. All end with the same one.
    batches : callable
        As in `train`: the *whole* batch of a step, the same in every process, of a size that the number of
        processes divides. Consecutive rows are a share.
    config, regularisers
        As in `train`, and the same in every process.
    checkpoint : path, optional
        As in `train`, where all processes can read it; the first writes it. A training may be continued by
        another number of processes, or by `train`.
    progress : bool
        Show a progress bar, in the first process.

    Returns
    -------
    History
        The same in every process.

    Raises
    ------
    ValueError
        As in `train`; also for a stack, an architecture that is not in SHARED, dead latents to be drawn anew
        (resample_every), a batch that cannot be divided, or processes that start unlike.
    RuntimeError
        If there is no default group; or, in the others, when a process has died.
    """
    check_group()
    if sae.n_stacked is not None or sae.architecture not in SHARED or config.resample_every:
        raise ValueError(
            f"A {sae.architecture} SAE with n_stacked={sae.n_stacked} and "
            f"resample_every={config.resample_every} cannot share its batches; expected a single SAE, one of "
            f"{', '.join(SHARED)}, and resample_every=0."
        )
    path = Path(checkpoint) if checkpoint else None
    run = _SharedRun(sae, batches, config, regularisers, path)
    with _shared(sae):
        return run.to_the_end(progress and dist.get_rank() == 0)


class _SharedRun(_Run):
    """A run whose steps are taken by all processes together."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        starts = [None] * dist.get_world_size()
        dist.all_gather_object(
            starts, self.identity | {"step": self.step, "all": asdict(self.config)}
        )
        if any(start != starts[0] for start in starts):
            raise ValueError(
                "The processes start from unlike SAEs, first batches, settings or checkpoints; expected the "
                "same seeds in each, and a checkpoint that each can read."
            )

    def take_step(self, x: Tensor) -> None:
        """A step on this process's share of x."""
        n, world = len(x), dist.get_world_size()
        if n % world or n < 2 * world:
            raise ValueError(
                f"The batch of step {self.step} has {n} samples; expected a multiple of the {world} "
                "processes, two for each at least."
            )
        super().take_step(x.chunk(world)[dist.get_rank()])

    def _gradients(self, loss: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        own = super()._gradients(loss, retain_graph=retain_graph)
        return [None if gradient is None else _mean(gradient) for gradient in own]

    def _firings(self, losses: TrainingLosses, x: Tensor) -> tuple[Tensor, int]:
        return firing_counts(losses.feature_acts), len(x) * dist.get_world_size()

    def _agreed(self, seconds: float) -> float:
        return agreed_seconds(seconds, self)

    def save(self) -> None:
        if dist.get_rank() == 0:
            super().save()
        dist.barrier()


@contextmanager
def _shared(sae: SAE) -> Iterator[None]:
    """While it lasts, the SAE's training losses are those of the batch that all processes have together."""
    of_share = sae.training_losses

    def training_losses(step: StepInput) -> TrainingLosses:
        losses = of_share(step)
        aux_k = losses.aux_k
        if step.dead is not None and step.dead.any():
            aux_k = aux_k * _share_of_variance(sae, step.x, losses.feature_acts)
        terms = {
            "aux_k": aux_k,
            "reconstruction": losses.reconstruction,
            "sparsity": losses.sparsity,
        }
        if losses.gate_reconstruction is not None:
            terms["gate_reconstruction"] = losses.gate_reconstruction
        if losses.min_active is not None:
            least = losses.min_active.clone()
            dist.all_reduce(least, dist.ReduceOp.MIN)
            losses = losses._replace(min_active=least)
        # The value is of the whole batch, the gradient of the share: their mean is the whole batch's.
        of_all = {
            name: term + (_mean(term.detach()) - term.detach()) for name, term in terms.items()
        }
        return losses._replace(feature_acts=_gathered(losses.feature_acts), **of_all)

    sae.training_losses = training_losses
    if isinstance(sae, BatchTopKSAE):
        sae.keep = _keep
    try:
        yield
    finally:
        del sae.training_losses
        sae.__dict__.pop("keep", None)


def _keep(pre_acts: Tensor, k: int) -> Tensor:
    """Of this process's entries, those that are among the batch · k largest of all.

    Of entries that tie for the last places, the first processes' are kept.
    """
    entries, rank = pre_acts.flatten(), dist.get_rank()
    n = len(pre_acts) * dist.get_world_size() * k
    largest = largest_entries(entries, min(n, len(entries)))
    of_each = _all_gather(entries[largest])
    last = torch.cat(of_each).topk(n).values[-1]
    places = n - sum(int((values > last).sum()) for values in of_each)
    places -= sum(int((values == last).sum()) for values in of_each[:rank])
    ties = (entries[largest] == last).nonzero()[:, 0][: max(0, places)]
    kept = torch.cat([largest[entries[largest] > last], largest[ties]])
    if len(kept) == 0:
        raise ValueError(
            f"None of the {n} largest activations of the batch is in this process's share of "
            f"{len(pre_acts)} samples; take larger batches or fewer processes."
        )
    return kept


def _share_of_variance(sae: SAE, x: Tensor, feature_acts: SparseActs) -> Tensor:
    """Variance of the residual in this share, by which the revival's loss was divided, over that in all."""
    with torch.no_grad():
        residual = x - decode_sparse(feature_acts, sae.W_dec) - sae.b_dec
        own = (residual - residual.mean(0)).square().sum(-1).mean()
        all_ = (residual - _mean(residual.mean(0))).square().sum(-1).mean()
        return own / _mean(all_)


# -- what the processes tell each other -----------------------------------------------------------


def check_group() -> None:
    """Raise a RuntimeError unless torch.distributed has a default process group."""
    if not dist.is_initialized():
        raise RuntimeError(
            "torch.distributed has no process group: call torch.distributed.init_process_group() first, and "
            "start the script with torchrun."
        )


def agreed_seconds(seconds: float, run: _Run) -> float:
    """Those of the first process, so that all write a checkpoint after the same step."""
    if run.config.checkpoint_minutes is None:
        return seconds
    told = torch.tensor(seconds, device=run.sae.W_dec.device)
    dist.broadcast(told, 0)
    return told.item()


def total(tensor: Tensor) -> Tensor:
    """Sum over the processes, the same in each and without a gradient; the tensor stays as it is."""
    summed = tensor.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(summed)
    return summed


def _mean(tensor: Tensor) -> Tensor:
    """Mean over the processes."""
    return total(tensor) / dist.get_world_size()


def _all_gather(tensor: Tensor) -> list[Tensor]:
    """Every process's tensor; they may differ in length."""
    lengths = [
        torch.zeros(1, dtype=torch.long, device=tensor.device) for _ in range(dist.get_world_size())
    ]
    dist.all_gather(lengths, torch.tensor([len(tensor)], device=tensor.device))
    longest = max(map(int, lengths))
    padded = tensor.new_zeros(longest, *tensor.shape[1:])
    padded[: len(tensor)] = tensor.detach()
    found = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(found, padded)
    return [one[: int(length)] for one, length in zip(found, lengths, strict=True)]


def _gathered(feature_acts: FeatureActs) -> FeatureActs:
    """Activations of the whole batch, with gradient to those of this process.

    The gradient is times the number of processes, since the mean over them is taken of it, and each adds only
    its own samples' part.
    """
    if not isinstance(feature_acts, SparseActs):
        return _with_own(_all_gather(feature_acts), feature_acts)
    latents = _all_gather(feature_acts.latents)
    starts = torch.tensor([0, *map(len, latents)]).cumsum(0).tolist()
    offsets = _all_gather(feature_acts.offsets)
    return SparseActs(
        values=_with_own(_all_gather(feature_acts.values), feature_acts.values),
        latents=torch.cat(latents),
        offsets=torch.cat([own + start for own, start in zip(offsets, starts, strict=False)]),
        d_sae=feature_acts.d_sae,
    )


def _with_own(parts: list[Tensor], own: Tensor) -> Tensor:
    world = dist.get_world_size()
    parts[dist.get_rank()] = own.detach() + world * (own - own.detach())
    return torch.cat(parts)

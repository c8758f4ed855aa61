"""One SAE whose latents are shared out over several processes, trained as one process would train it.

    torchrun --nproc-per-node 4 my_training.py

For a dictionary that fits no single device. Of d_sae latents each of N processes holds d_sae / N: their
columns of W_enc, entries of b_enc and rows of W_dec, with the optimiser's state. b_dec is in all of them.
`create_shard` draws one shard alone, and only `gather_shards` puts all together.

Every process sees the whole batch. So a latent's norm over the batch, and whether it is dead, are known where
it is held. Told to the others is only

- which activations are candidates for the largest: the choice is among the latents of all shards;
- what the own latents write: the reconstruction is a sum over the shards;
- the norm of the own gradient, and the own part of b_dec's gradient;
- for C²R and OrtSAE, the decoder rows, a block at a time, in the search for neighbours; then the rows
  and norms of neighbours in other shards, and their gradients back.

The search is exact, and each process compares its own latents with all. Of neighbours whose cosines differ by
no more than rounding it may find another than one process would. A step on which a penalty acts needs room
for the neighbours' rows, up to as many as the shard's own, and for their gradients.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from c2r_core.saes.base import SAE, StepInput, TrainingLosses
from c2r_core.saes.files import create_sae
from c2r_core.saes.sparse import latent_norms
from c2r_core.training.checkpoints import START
from c2r_core.training.config import TrainConfig
from c2r_core.training.distributed import agreed_seconds, check_group, total
from c2r_core.training.history import History
from c2r_core.training.regularisers import C2R, Orthogonality, Regulariser, written_norms
from c2r_core.training.shard_step import neighbours_of_shard, pair_terms, sharded_losses
from c2r_core.training.trainer import BatchSource, DivergedError, _divergence, _Run
from c2r_core.training.update import clip_factors

SHARDED = ("topk", "batch_topk")
"""Architectures whose latents can be shared out."""

# Rows that are drawn at once, a multiple of 16: torch.randn then draws the same numbers block by block.
_DRAWN = 4096
_FILE = re.compile(r"step-(\d+)\.shard-(\d+)-of-(\d+)\.safetensors")


def create_shard(architecture: str, *, d_in: int, d_sae: int, k: int, seed: int = 0) -> SAE:
    """This process's latents of the SAE that `create_sae` would make of the same arguments.

    Parameters
    ----------
    architecture : str
        One of SHARDED.
    d_in, d_sae, k, seed
        Of the whole SAE, and the same in every process. The number of processes divides d_sae.

    Returns
    -------
    SAE
        Its `d_sae` is that of the whole, its tensors hold the latents from rank · d_sae / N on: W_enc
        (d_in, d_sae / N), b_enc (d_sae / N,), W_dec (d_sae / N, d_in). It is there to be trained. What
        encodes and decodes is the SAE that `gather_shards` makes of all shards.

    Raises
    ------
    ValueError
        If the architecture is not in SHARDED, or d_sae cannot be divided; also as in `create_sae`.
    RuntimeError
        If there is no default process group.
    """
    check_group()
    rank, world = dist.get_rank(), dist.get_world_size()
    if architecture not in SHARDED:
        raise ValueError(
            f"The latents of a {architecture!r} SAE cannot be shared out; expected one of "
            f"{', '.join(SHARDED)}."
        )
    if d_sae % world:
        raise ValueError(
            f"d_sae is {d_sae}; expected a multiple of the {world} processes, each of which "
            "holds as many latents."
        )
    own = slice(rank * d_sae // world, (rank + 1) * d_sae // world)
    rows = _drawn(d_sae, d_in, seed, own)
    state = {
        "W_dec": rows,
        "W_enc": rows.clone().mT,
        "b_enc": torch.zeros(len(rows)),
        "b_dec": torch.zeros(d_in),
    }
    return _with_tensors(state, architecture, d_in=d_in, d_sae=d_sae, k=k)


def train_sharded(
    sae: SAE,
    batches: BatchSource,
    config: TrainConfig,
    regularisers: Sequence[Regulariser] = (),
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """`train` for an SAE of which each process of torch.distributed's default group holds a shard.

    Parameters
    ----------
    sae : SAE
        What `create_shard` made in this process, moved to its device.
    batches : callable
        As in `train`: the whole batch of a step, the same in every process.
    config : TrainConfig
        As in `train`, and the same in every process.
    regularisers : sequence of C2R and Orthogonality
        As in `train`, and the same in every process; with chunk_size=None, the exact search.
    checkpoint : path, optional
        A folder, in which each process writes its shard every config.checkpoint_every steps and at the
        end; it need not see the others' files. Where it holds a checkpoint, the training goes on from the
        newest that is complete, with the same number of processes.
    progress : bool
        Show a progress bar, in the first process.

    Returns
    -------
    History
        The same in every process.

    Raises
    ------
    TypeError, DivergedError, OSError
        As in `train`.
    ValueError
        As in `train`; also for an SAE that is no shard, dead latents to be drawn anew (resample_every),
        another regulariser or a chunk_size, processes that start unlike, or a checkpoint of another number of
        processes.
    RuntimeError
        If there is no default group; or, in the others, when a process has died.
    """
    check_group()
    n_latents, world = sae.W_dec.shape[-2], dist.get_world_size()
    is_shard = sae.architecture in SHARDED and sae.n_stacked is None
    if not is_shard or n_latents * world != sae.d_sae:
        raise ValueError(
            f"This {sae.architecture} SAE with d_sae={sae.d_sae}, W_dec {tuple(sae.W_dec.shape)} is no shard "
            f"for {world} processes; expected what create_shard makes of {' or '.join(SHARDED)}."
        )
    if config.resample_every:
        raise ValueError(
            f"resample_every is {config.resample_every}; expected 0, since {sae.architecture} does not "
            "resample dead latents (aux_k_coefficient revives them)."
        )
    run = _ShardRun(sae, batches, config, regularisers, _newest(checkpoint))
    return run.to_the_end(progress and dist.get_rank() == 0)


@torch.no_grad()
def gather_shards(sae: SAE) -> SAE | None:
    """The whole SAE in the first process, None in the others; every process calls it with its shard.

    It lies in the processor's memory, once, and `save_sae` writes it without a copy. The first process's
    device needs room for one tensor of one more shard.
    """
    check_group()
    rank, world, state = dist.get_rank(), dist.get_world_size(), {}
    for name, tensor in sae.state_dict().items():
        part = tensor.contiguous()
        if name not in ("W_enc", "b_enc", "W_dec"):  # the same in every process
            state[name] = part.cpu()
            continue
        if rank > 0:
            dist.send(part, 0)
            continue
        along = part.ndim - 1 if name == "W_enc" else 0
        n_latents, shape = part.shape[along], list(part.shape)
        shape[along] = sae.d_sae
        state[name] = torch.empty(shape, dtype=part.dtype)
        state[name].narrow(along, 0, n_latents).copy_(part)
        received = torch.empty_like(part)
        for other in range(1, world):
            dist.recv(received, other)
            state[name].narrow(along, other * n_latents, n_latents).copy_(received)
    if rank > 0:
        return None
    whole = _with_tensors(state, **sae.config)
    whole.norm_factor, whole.trained_on = sae.norm_factor, dict(sae.trained_on)
    return whole


def _with_tensors(
    state: dict[str, Tensor], architecture: str, *, d_in: int, d_sae: int, k: int
) -> SAE:
    """An SAE of these tensors, which are not copied; d_sae and k are the whole's."""
    sae = create_sae(architecture, d_in=1, d_sae=d_sae, k=k)  # small, until it has its tensors
    sae.d_in = d_in
    parameters = dict(sae.named_parameters())
    for name, tensor in state.items():
        setattr(sae, name, nn.Parameter(tensor) if name in parameters else tensor)
    return sae


def _drawn(d_sae: int, d_in: int, seed: int, own: slice) -> Tensor:
    """Rows of the decoder that `seed` draws for d_sae latents; a block at a time is in memory."""
    generator = torch.Generator().manual_seed(seed)
    starts = range(0, max(1, d_sae // _DRAWN) * _DRAWN, _DRAWN)
    rows = torch.empty(own.stop - own.start, d_in)
    for start, end in zip(starts, [*starts[1:], d_sae], strict=True):
        block = torch.randn(end - start, d_in, generator=generator)
        first, last = max(start, own.start), min(end, own.stop)
        if first < last:
            rows[first - own.start : last - own.start] = block[first - start : last - start]
    return F.normalize(rows, dim=-1)


class _ShardRun(_Run):
    """A run on this process's latents; all that is of the whole batch and SAE is agreed on in each step."""

    def __init__(self, *given: object) -> None:
        super().__init__(*given)
        for one in self.regularisers:
            if type(one) not in (C2R, Orthogonality) or one.chunk_size is not None:
                raise ValueError(
                    f"{one!r} cannot act on latents that are shared out; expected C2R or Orthogonality with "
                    "chunk_size=None, the exact search."
                )
        start = {part: about for part, about in self.identity.items() if part != START}
        start |= {"step": self.step, "b_dec": self.sae.b_dec.tolist(), "all": asdict(self.config)}
        starts = [None] * dist.get_world_size()
        dist.all_gather_object(starts, start)
        if any(other != start for other in starts):
            raise ValueError(
                "The processes start from unlike first batches, settings or SAEs; expected the same in each, "
                "but for the latents."
            )

    def _losses(self, step: StepInput) -> TrainingLosses:
        return sharded_losses(self.sae, step)

    def _penalty(self, losses: TrainingLosses) -> tuple[Tensor | float, dict[str, Tensor]]:
        """As in `_Run`: the value is of all shards, the gradient to the own latents."""
        penalty, values, index = 0.0, {}, None
        W_dec, acts = self.sae.W_dec, losses.feature_acts
        for regulariser, weight in zip(self.regularisers, self.weights, strict=True):
            strength = regulariser.strength_at(self.step)
            if strength == 0:
                continue
            index = neighbours_of_shard(W_dec) if index is None else index
            if isinstance(regulariser, Orthogonality):  # C²R with every norm ½
                norms, alpha = torch.full_like(W_dec[:, 0], 0.5), 1.0
            else:
                alpha = regulariser.alpha
                norms = (
                    written_norms(acts, W_dec) if regulariser.decoder_norm else latent_norms(acts)
                )
            own = pair_terms(norms, W_dec, index, alpha).sum() / self.sae.d_sae
            value = total(own)
            penalty = penalty + weight * strength * (own + (value - own.detach()))
            values[regulariser.name] = value
        return penalty, values

    def _gradients(self, loss: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        """As in `_Run`. Each process's loss reaches b_dec through its own latents: those parts are summed."""
        found = super()._gradients(loss, retain_graph=retain_graph)
        pairs = zip(self.names, found, strict=True)
        return [total(g) if name == "b_dec" and g is not None else g for name, g in pairs]

    def _clip_factors(self, gradients: Sequence[Tensor | None]) -> Tensor:
        """By the norm of the gradient of all shards."""
        of_shard = [g for name, g in zip(self.names, gradients, strict=True) if name != "b_dec"]
        squares = total(sum(g.square().sum() for g in of_shard))
        b_dec = gradients[self.names.index("b_dec")]
        return clip_factors(
            [squares.sqrt().reshape(1), b_dec], self.config.clip_norm, stacked=False
        )

    def _count_and_log(
        self, x: Tensor, losses: TrainingLosses, penalties: dict[str, Tensor]
    ) -> None:
        records = self.history.records
        before = len(records)
        super()._count_and_log(x, losses, penalties)
        for record in records[before:]:
            record["l0"] = total(x.new_tensor(record["l0"], dtype=torch.float64)).item()

    def _agreed(self, seconds: float) -> float:
        return agreed_seconds(seconds, self)

    def save(self) -> None:
        if self.checkpoint is None:
            return
        finite = torch.stack([torch.isfinite(p).all() for p in self.parameters]).all()
        if total(finite.long()) < dist.get_world_size():  # so that all stop, and say it
            raise DivergedError(_divergence(self.step, {}, self.checkpoint))
        folder = self.checkpoint.parent
        self.checkpoint = _file(folder, self.step)
        super().save()
        dist.barrier()  # before any goes, the new one is complete
        for path in folder.iterdir():
            found = _FILE.fullmatch(path.name)
            if found and int(found[2]) == dist.get_rank() and path != self.checkpoint:
                path.unlink()


def _newest(folder: str | Path | None) -> Path | None:
    """This process's file of the newest complete checkpoint in the folder; a new one where there is none."""
    if folder is None:
        return None
    rank, world = dist.get_rank(), dist.get_world_size()
    files = [found for path in Path(folder).glob("*") if (found := _FILE.fullmatch(path.name))]
    own = {int(found[1]) for found in files if int(found[2]) == rank}
    told: list[tuple[set[int], set[int]]] = [(set(), set())] * world
    dist.all_gather_object(told, ({int(found[3]) for found in files}, own))
    others = set().union(*(worlds for worlds, _ in told)) - {world}
    if others:
        raise ValueError(
            f"{folder} holds a checkpoint of {min(others)} processes, but now there are {world}. Start as "
            "many, name another folder, or delete this one to start anew."
        )
    steps = [of_process for _, of_process in told]
    complete = set.intersection(*steps)
    if any(steps) and not complete:
        found = "; ".join(f"process {i}: {sorted(has) or 'none'}" for i, has in enumerate(steps))
        raise ValueError(
            f"{folder} holds no complete checkpoint; the steps that were saved are, {found}. Bring the files "
            "that are missing, or delete the folder to start anew."
        )
    return _file(Path(folder), max(complete, default=0))


def _file(folder: Path, step: int) -> Path:
    return folder / f"step-{step}.shard-{dist.get_rank()}-of-{dist.get_world_size()}.safetensors"

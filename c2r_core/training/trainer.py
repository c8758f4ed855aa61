"""The training loop: one for single SAEs and stacks, every architecture, every regulariser."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from c2r_core.saes.base import SAE, TrainingLosses
from c2r_core.saes.sparse import firing_counts
from c2r_core.seeds import mix_seeds
from c2r_core.training.checkpoints import (
    optimiser_tensors,
    read_checkpoint,
    restore_optimiser,
    write_checkpoint,
)
from c2r_core.training.config import TrainConfig
from c2r_core.training.history import History
from c2r_core.training.regularisers import Regulariser, strength_at
from c2r_core.training.resampling import resample_dead

BatchSource = Callable[[int], Tensor]


class DivergedError(RuntimeError):
    """A loss became NaN or infinite; the message names the step, the terms and the checkpoint."""


def train(
    sae: SAE,
    batches: BatchSource,
    config: TrainConfig,
    regularisers: Sequence[Regulariser] = (),
    *,
    checkpoint: str | Path | None = None,
    progress: bool = True,
) -> History:
    """Train an SAE, or all SAEs of a stack, in place.

    Parameters
    ----------
    sae : SAE
        A new SAE. Its b_dec is set to the geometric median of the first batch.
    batches : callable
        batches(step) gives the batch of that step, (batch, d_in) or (n_stacked, batch, d_in), scaled to
        E‖x‖² = 1; the same step must always give the same batch, so that a run can be resumed.
    config : TrainConfig
    regularisers : sequence of Regulariser
        Penalties to add, such as C2R(weight=...).
    checkpoint : path, optional
        File to write the state to every config.checkpoint_every steps. If it exists, training goes
        on from it, and ends with the same SAE as if it had never stopped (to the bit on a CPU; a GPU adds in
        changing order).
    progress : bool
        Show a progress bar.

    Returns
    -------
    History

    Raises
    ------
    ValueError
        If a batch has the wrong shape, fewer than 2 samples, or a NaN or infinity; if the checkpoint
        belongs to another training.
    DivergedError
        If a loss becomes NaN or infinite.
    OSError
        If a checkpoint cannot be written; the one before it is left unharmed.
    """
    first_batch = _checked(batches(0), sae, 0)
    run = _Run(sae, config, regularisers, Path(checkpoint) if checkpoint else None, first_batch)
    if run.checkpoint is not None and run.checkpoint.exists():
        run.resume()
    else:
        run.begin(first_batch)
    for step in tqdm(
        range(run.step, config.steps), initial=run.step, total=config.steps, disable=not progress
    ):
        run.take_step(_checked(batches(step), sae, step))
        if run.step % config.checkpoint_every == 0 and run.step < config.steps:
            run.save()
    return run.history


class _Run:
    """State of one training. The order of things in `take_step` is the recipe."""

    def __init__(
        self,
        sae: SAE,
        config: TrainConfig,
        regularisers: Sequence[Regulariser],
        checkpoint: Path | None,
        first_batch: Tensor,
    ) -> None:
        names = [regulariser.name for regulariser in regularisers]
        if len(set(names)) < len(names):
            raise ValueError(
                f"Regularisers are {names}; give each kind once, with its whole weight."
            )
        self.sae = sae
        self.config = config
        self.regularisers = tuple(regularisers)
        self.checkpoint = checkpoint
        self.identity = self._identity(first_batch)
        self.step = 0
        self.history = History()
        self.names = [name for name, _ in sae.named_parameters()]
        self.optimiser = torch.optim.Adam(sae.parameters(), lr=config.lr, fused=True)
        self.revives = config.aux_k_coefficient > 0 and sae.target_l0 is not None
        if config.resample_every > 0 and not sae.resamples:
            raise ValueError(
                f"resample_every is {config.resample_every}, but {type(sae).__name__} does not resample "
                "dead latents; take 0 (aux_k_coefficient revives those of the TopK family)."
            )
        self.precision = getattr(torch, config.precision)
        latents = sae.W_dec.shape[:-1]
        self.silent_samples = torch.zeros(latents, dtype=torch.long, device=sae.W_dec.device)
        self.weights = [
            torch.as_tensor(r.weight, device=sae.W_dec.device) for r in self.regularisers
        ]
        for regulariser, weight in zip(self.regularisers, self.weights, strict=True):
            if weight.ndim and weight.shape != latents[:-1]:
                raise ValueError(
                    f"{regulariser.name} has {len(weight)} weights; expected one number, or one for "
                    f"each SAE of a stack ({sae.n_stacked or 'this is a single SAE'})."
                )

    def begin(self, first_batch: Tensor) -> None:
        with torch.no_grad():
            self.sae.b_dec.copy_(geometric_median(first_batch))

    def take_step(self, x: Tensor) -> None:
        sae, config = self.sae, self.config
        losses = sae.training_losses(
            x,
            progress=self.step / config.steps,
            dead=self._dead(),
            precision=self.precision,
        )
        total = losses.total(config.aux_k_coefficient)
        if not torch.isfinite(total).all():
            raise DivergedError(self._divergence(_terms(losses)))
        penalties = {}
        for regulariser, weight in zip(self.regularisers, self.weights, strict=True):
            strength = strength_at(regulariser, self.step)
            if strength > 0:
                value = regulariser(losses.feature_acts, sae.W_dec, self._generator())
                penalties[regulariser.name] = value.detach()
                total = total + weight * strength * value
        if not torch.isfinite(total).all():
            raise DivergedError(self._divergence(_terms(losses) | penalties))
        for group in self.optimiser.param_groups:
            group["lr"] = config.lr_at(self.step)
        self.optimiser.zero_grad()
        total.sum().backward()
        if sae.unit_norm_decoder:
            remove_parallel_gradient(sae.W_dec)
        clip_gradients(list(sae.parameters()), config.clip_norm, stacked=sae.n_stacked is not None)
        self.optimiser.step()
        if sae.unit_norm_decoder:
            normalise_rows(sae.W_dec)
        sae.update_statistics(losses, config.ema_decay)
        logs = self.step % config.log_every == 0 or self.step == config.steps - 1
        if logs or self.revives or config.resample_every > 0:
            fired = firing_counts(losses.feature_acts)
            self.silent_samples = torch.where(fired > 0, 0, self.silent_samples + x.shape[-2])
            if logs:
                self._log(losses, penalties, l0=fired.sum(-1) / x.shape[-2])
        if config.resamples_after(self.step):
            dead = self.silent_samples >= config.resample_every / 2 * x.shape[-2]
            resample_dead(sae, dead, x, self.optimiser, mix_seeds(config.seed, self.step))
            self.silent_samples[dead] = 0
        self.step += 1

    def _dead(self) -> Tensor | None:
        """Latents silent for so long that an average one would have fired `dead_after` times."""
        if not self.revives:
            return None
        return self.silent_samples > self.config.dead_after * self.sae.d_sae / self.sae.target_l0

    def _generator(self) -> Generator:
        return Generator().manual_seed(mix_seeds(self.config.seed, self.step))

    def _log(self, losses: TrainingLosses, penalties: dict[str, Tensor], l0: Tensor) -> None:
        terms = _terms(losses) | penalties | {"l0": l0}
        record = {"step": self.step, "lr": self.config.lr_at(self.step)}
        self.history.records.append(record | {name: v.tolist() for name, v in terms.items()})

    def _divergence(self, terms: dict[str, Tensor]) -> str:
        listed = ", ".join(f"{name} {value.tolist()}" for name, value in terms.items())
        saved = self.checkpoint is not None and self.checkpoint.exists()
        last = (
            f"The last good checkpoint is {self.checkpoint}."
            if saved
            else "There is no checkpoint."
        )
        return (
            f"Training diverged at step {self.step}: {listed}. {last} "
            "Try a smaller lr or a smaller regulariser weight."
        )

    # -- checkpoints ------------------------------------------------------------------------

    def _identity(self, first_batch: Tensor) -> dict:
        """What must be the same for a checkpoint to be continued."""
        start = hashlib.sha256()
        for tensor in (first_batch, *self.sae.state_dict().values()):
            start.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        described = {
            "sae": self.sae.config
            | {"n_stacked": self.sae.n_stacked, "norm_factor": self.sae.norm_factor},
            "config": dataclasses.asdict(self.config),
            "regularisers": [{"name": r.name} | dataclasses.asdict(r) for r in self.regularisers],
            "start (hash of the new SAE and the first batch)": start.hexdigest()[:16],
        }
        return json.loads(json.dumps(described))

    def save(self) -> None:
        if self.checkpoint is None:
            return
        if not all(torch.isfinite(p).all() for p in self.sae.parameters()):
            raise DivergedError(self._divergence({}))
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= optimiser_tensors(self.optimiser, self.names)
        tensors["silent_samples"] = self.silent_samples
        state = {"step": self.step, "history": self.history.records, "run": self.identity}
        write_checkpoint(self.checkpoint, tensors, state)

    def resume(self) -> None:
        tensors, state = read_checkpoint(self.checkpoint)
        for part, ours in self.identity.items():
            theirs = state["run"].get(part)
            if theirs != ours:
                raise ValueError(
                    f"{self.checkpoint} belongs to another training: its {part} is {theirs}, but "
                    f"now it is {ours}. Name another file, or delete this one to start anew."
                )
        prefix = "sae."
        self.sae.load_state_dict(
            {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        )
        restore_optimiser(self.optimiser, self.names, tensors)
        self.silent_samples.copy_(tensors["silent_samples"])
        self.step = state["step"]
        self.history.records[:] = state["history"]


def _terms(losses: TrainingLosses) -> dict[str, Tensor]:
    names = ("reconstruction", "sparsity", "aux_k", "gate_reconstruction")
    terms = {name: getattr(losses, name) for name in names}
    return {name: value.detach() for name, value in terms.items() if value is not None}


# -- pieces of the recipe, for a single SAE (…) or a stack (n_stacked, …) -------------------------


@torch.no_grad()
def geometric_median(x: Tensor, iterations: int = 20) -> Tensor:
    """Point of least summed distance to the samples, by Weiszfeld's iteration.

    x (..., batch, d_in) -> (..., d_in).
    """
    median = x.mean(-2)
    for _ in range(iterations):
        distances = torch.linalg.vector_norm(x - median.unsqueeze(-2), dim=-1, keepdim=True)
        weights = 1 / distances.clamp(min=1e-6)
        median = (x * weights).sum(-2) / weights.sum(-2)
    return median


@torch.no_grad()
def remove_parallel_gradient(W_dec: Tensor) -> None:
    """Take from each decoder row's gradient the part along the row, which renormalising undoes."""
    along = (W_dec.grad * W_dec).sum(-1, keepdim=True)
    W_dec.grad -= along * W_dec


@torch.no_grad()
def clip_gradients(parameters: list[Tensor], max_norm: float, *, stacked: bool) -> None:
    """Scale the gradients of each SAE so that their common norm is at most max_norm."""
    keep = 1 if stacked else 0
    squares = sum(p.grad.square().sum(dim=tuple(range(keep, p.ndim))) for p in parameters)
    factors = (max_norm / squares.sqrt().clamp(min=1e-12)).clamp(max=1.0)
    for p in parameters:
        p.grad *= factors.reshape(factors.shape + (1,) * (p.ndim - keep))


@torch.no_grad()
def normalise_rows(W_dec: Tensor) -> None:
    """Bring every decoder row back to norm 1."""
    W_dec /= torch.linalg.vector_norm(W_dec, dim=-1, keepdim=True).clamp(min=1e-12)


def _checked(x: Tensor, sae: SAE, step: int) -> Tensor:
    sae.check_input(x)
    if x.shape[-2] < 2 or x.ndim != sae.W_dec.ndim:
        raise ValueError(
            f"The batch of step {step} has shape {tuple(x.shape)}; expected (batch, d_in), or "
            "(n_stacked, batch, d_in) for a stack, with at least 2 samples: BatchTopK and C²R act "
            "across samples."
        )
    x = x.to(sae.W_dec.device, sae.W_dec.dtype)
    if not torch.isfinite(x.sum()):  # one pass; a NaN or an infinity never leaves a sum
        raise ValueError(
            f"The batch of step {step} holds a NaN or an infinity; check the activations it is "
            "made of."
        )
    return x

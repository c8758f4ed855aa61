"""The training loop: one for single SAEs and stacks, every architecture, every regulariser."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Generator, Tensor
from tqdm.auto import tqdm

from c2r_core.saes.base import SAE, StepInput, TrainingLosses
from c2r_core.saes.sparse import firing_counts
from c2r_core.seeds import mix_seeds
from c2r_core.training.checkpoints import (
    check_same_run,
    identity,
    optimiser_tensors,
    read_checkpoint,
    restore_optimiser,
    write_checkpoint,
)
from c2r_core.training.config import TrainConfig
from c2r_core.training.history import History
from c2r_core.training.regularisers import Regulariser
from c2r_core.training.resampling import resample_dead
from c2r_core.training.update import (
    add_gradients,
    clip_factors,
    geometric_median,
    in_memory_order,
    normalise_rows,
    set_gradients,
    without_parallel,
)

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
        A new SAE. Its b_dec is set to the geometric median of the first batch, and `trained_on` to what is
        known of this training.
    batches : callable
        batches(step) gives the batch of that step, (batch, d_in) or (n_stacked, batch, d_in), scaled to
        E‖x‖² = 1; the same step must always give the same batch, so that a run can be resumed. Where it
        has an attribute `norm_factor`, the scale of its batches, the SAE remembers it; where it has
        `trained_on`, text and numbers by name, the SAE's `trained_on` includes them.
    config : TrainConfig
    regularisers : sequence of Regulariser
        Penalties to add, such as C2R(weight=...).
    checkpoint : path, optional
        File to write the state to every config.checkpoint_every steps or checkpoint_minutes, and at the end.
        If it exists, training goes on from it, and ends with the same SAE as if it had never stopped (to the
        bit on a CPU; a GPU adds in changing order).
    progress : bool
        Show a progress bar.

    Returns
    -------
    History

    Raises
    ------
    TypeError
        If `regularisers` is no sequence of regularisers.
    ValueError
        If a batch has the wrong shape, fewer than 2 samples, or a NaN or infinity; if the first have
        another scale than config.mean_square_norm; if the checkpoint belongs to another training.
    DivergedError
        If a loss becomes NaN or infinite.
    OSError
        If a checkpoint cannot be written; the one before it is left unharmed.
    """
    run = _Run(sae, batches, config, regularisers, Path(checkpoint) if checkpoint else None)
    return run.to_the_end(progress)


class _Run:
    """State of one training. The order of things in `take_step` is the recipe."""

    def __init__(
        self,
        sae: SAE,
        batches: BatchSource,
        config: TrainConfig,
        regularisers: Sequence[Regulariser],
        checkpoint: Path | None,
    ) -> None:
        self.sae, self.batches, self.config, self.checkpoint = sae, batches, config, checkpoint
        first_batch = self.batch(0)
        _check_scale(self.batch, first_batch, config)
        sae.norm_factor = getattr(batches, "norm_factor", sae.norm_factor)
        self.regularisers = _checked_regularisers(regularisers, sae)
        self.weights = [
            torch.as_tensor(r.weight, device=sae.W_dec.device) for r in self.regularisers
        ]
        if config.resample_every > 0 and not sae.resamples:
            raise ValueError(
                f"resample_every is {config.resample_every}, but {type(sae).__name__} does not resample "
                "dead latents; take 0 (aux_k_coefficient revives those of the TopK family)."
            )
        self.identity = identity(sae, config, self.regularisers, first_batch)
        self.step, self.history = 0, History()
        self.named = dict(sae.named_parameters())
        self.names, self.parameters = tuple(self.named), tuple(self.named.values())
        self.memory = [in_memory_order(p) for p in self.parameters]
        self.optimiser = torch.optim.Adam(self.memory, lr=config.lr, fused=True)
        self.revives = config.aux_k_coefficient > 0 and sae.target_l0 is not None
        self.silent_samples = torch.zeros_like(sae.W_dec[..., 0], dtype=torch.long)
        self.last_penalties: dict[str, Tensor] = {}
        if checkpoint is not None and checkpoint.exists():
            self.resume()
        else:
            with torch.no_grad():
                sae.b_dec.copy_(geometric_median(first_batch))
        about_batches = dict(getattr(batches, "trained_on", {}))
        sae.trained_on = about_batches | self.recipe(first_batch.shape[-2])

    def batch(self, step: int) -> Tensor:
        """The batch of a step, checked."""
        return _checked(self.batches(step), self.sae, step)

    def to_the_end(self, progress: bool) -> History:
        """Take the steps that are left."""
        config, saved_at = self.config, time.monotonic()
        steps = range(self.step, config.steps)
        for step in tqdm(steps, initial=self.step, total=config.steps, disable=not progress):
            self.take_step(self.batch(step))
            if config.saves_after(step, self._agreed(time.monotonic() - saved_at)):
                self.save()
                saved_at = time.monotonic()
        return self.history

    def _agreed(self, seconds: float) -> float:
        """The seconds by which checkpoints are due; where several processes train, the same in each."""
        return seconds

    def take_step(self, x: Tensor) -> None:
        sae, config = self.sae, self.config
        precision = torch.bfloat16 if config.precision == "bfloat16" else None
        losses = self._losses(StepInput(x, self.step / config.steps, self._dead(), precision))
        own_loss = losses.total(config.aux_k_coefficient)
        self._check_finite(own_loss, losses)
        penalty, penalties = self._penalty(losses)
        self._check_finite(own_loss + penalty, losses, penalties)

        self.optimiser.param_groups[0]["lr"] = config.lr_at(self.step)
        gradients = self._gradients(own_loss, retain_graph=bool(penalties))
        # The bound looks at the SAE's own gradient, so that it never weakens a penalty beside it.
        factors = self._clip_factors(gradients)
        if penalties:
            gradients = add_gradients(gradients, self._gradients(penalty))
        set_gradients(self.parameters, self.memory, gradients, factors)
        self.optimiser.step()
        if sae.unit_norm_decoder:
            normalise_rows(sae.W_dec)
        sae.after_step(losses, config.ema_decay)
        self._count_and_log(x, losses, penalties)
        if config.resamples_after(self.step):
            dead = self.silent_samples >= config.resample_every / 2 * x.shape[-2]
            resample_dead(sae, dead, x, self._moments(), mix_seeds(config.seed, self.step))
            self.silent_samples[dead] = 0
        self.step += 1

    def _losses(self, step: StepInput) -> TrainingLosses:
        return self.sae.training_losses(step)

    def _clip_factors(self, gradients: Sequence[Tensor | None]) -> Tensor:
        stacked = self.sae.n_stacked is not None
        return clip_factors(gradients, self.config.clip_norm, stacked=stacked)

    def _moments(self) -> list[Tensor]:
        """What Adam remembers of each latent, (..., d_sae) or (..., d_sae, d_in)."""
        by_name = dict(zip(self.names, self.memory, strict=True))
        states = [self.optimiser.state[by_name[name]] for name in ("W_enc", "b_enc", "W_dec")]
        return [state[moment] for state in states for moment in ("exp_avg", "exp_avg_sq")]

    def _penalty(self, losses: TrainingLosses) -> tuple[Tensor | float, dict[str, Tensor]]:
        """What the regularisers add at this step, and the value of each that acts, by name."""
        penalty, values = 0.0, {}
        for regulariser, weight in zip(self.regularisers, self.weights, strict=True):
            strength = regulariser.strength_at(self.step)
            if strength > 0:
                value = regulariser(losses.feature_acts, self.sae.W_dec, self._generator())
                if not value.requires_grad:
                    raise ValueError(
                        f"{regulariser.name} gives a value without a gradient; expected one that depends on "
                        "feature_acts or W_dec. item(), detach() and no_grad() cut gradients off."
                    )
                penalty = penalty + weight * strength * value
                values[regulariser.name] = value.detach()
        return penalty, values

    def _gradients(self, loss: Tensor, *, retain_graph: bool = False) -> list[Tensor | None]:
        """A loss's gradient in each parameter, or None; that of a row of norm 1 without the part along it."""
        learning = [p for p in self.parameters if p.requires_grad]
        found = torch.autograd.grad(
            loss.sum(), learning, retain_graph=retain_graph, allow_unused=True
        )
        by_parameter = dict(zip(map(id, learning), found, strict=True))
        W_dec = self.sae.W_dec
        if self.sae.unit_norm_decoder and by_parameter.get(id(W_dec)) is not None:
            by_parameter[id(W_dec)] = without_parallel(by_parameter[id(W_dec)], W_dec)
        return [by_parameter.get(id(p)) for p in self.parameters]

    def _dead(self) -> Tensor | None:
        """Latents silent for so long that an average one would have fired `dead_after` times."""
        if not self.revives:
            return None
        return self.silent_samples > self.config.dead_after * self.sae.d_sae / self.sae.target_l0

    def _generator(self) -> Generator:
        return Generator().manual_seed(mix_seeds(self.config.seed, self.step))

    def _count_and_log(
        self, x: Tensor, losses: TrainingLosses, penalties: dict[str, Tensor]
    ) -> None:
        config, self.last_penalties = self.config, self.last_penalties | penalties
        logs = self.step % config.log_every == 0 or self.step == config.steps - 1
        if logs or self.revives or config.resample_every > 0:
            fired, n_samples = self._firings(losses, x)
            self.silent_samples = torch.where(fired > 0, 0, self.silent_samples + n_samples)
        if logs:
            terms = _terms(losses) | self.last_penalties | {"l0": fired.sum(-1) / n_samples}
            record = {"step": self.step, "lr": config.lr_at(self.step)}
            self.history.records.append(record | {name: v.tolist() for name, v in terms.items()})

    def _firings(self, losses: TrainingLosses, x: Tensor) -> tuple[Tensor, int]:
        """In how many samples of the batch each latent fires, and how many there are."""
        return firing_counts(losses.feature_acts), x.shape[-2]

    def _check_finite(
        self, total: Tensor, losses: TrainingLosses, penalties: dict[str, Tensor] | None = None
    ) -> None:
        if not torch.isfinite(total).all():
            terms = _terms(losses) | (penalties or {})
            raise DivergedError(_divergence(self.step, terms, self.checkpoint))

    # -- checkpoints ------------------------------------------------------------------------

    def recipe(self, batch_size: int) -> dict[str, str | float | list[str]]:
        """Steps, batch size, lr and regularisers; these as a list with an entry for each SAE of a stack."""

        def penalties(copy: int) -> str:
            own = [
                r
                if isinstance(r.weight, (int, float))
                else dataclasses.replace(r, weight=r.weight[copy])
                for r in self.regularisers
            ]
            return ", ".join(map(repr, own)) or "none"

        stacked = self.sae.n_stacked
        recipe = {"steps": self.config.steps, "batch_size": batch_size, "lr": self.config.lr}
        return recipe | {
            "regularisers": [penalties(i) for i in range(stacked)] if stacked else penalties(0)
        }

    def save(self) -> None:
        if self.checkpoint is None:
            return
        if not all(torch.isfinite(p).all() for p in self.sae.parameters()):
            raise DivergedError(_divergence(self.step, {}, self.checkpoint))
        tensors = {f"sae.{name}": tensor for name, tensor in self.sae.state_dict().items()}
        tensors |= {f"penalty.{name}": tensor for name, tensor in self.last_penalties.items()}
        tensors |= optimiser_tensors(self.optimiser, self.named)
        tensors["silent_samples"] = self.silent_samples
        state = {"step": self.step, "history": self.history.records, "run": self.identity}
        write_checkpoint(self.checkpoint, tensors, state)

    def resume(self) -> None:
        tensors, state = read_checkpoint(self.checkpoint)
        check_same_run(self.checkpoint, state["run"], self.identity)

        def named(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.sae.load_state_dict(named("sae."))
        restore_optimiser(self.optimiser, self.named, tensors)
        self.last_penalties = named("penalty.")
        self.silent_samples.copy_(tensors["silent_samples"])
        self.step = state["step"]
        self.history.records[:] = state["history"]


def _terms(losses: TrainingLosses) -> dict[str, Tensor]:
    names = ("reconstruction", "sparsity", "aux_k", "gate_reconstruction")
    terms = {name: getattr(losses, name) for name in names}
    return {name: value.detach() for name, value in terms.items() if value is not None}


# -- what is refused ------------------------------------------------------------------------------


def _divergence(step: int, terms: dict[str, Tensor], checkpoint: Path | None) -> str:
    listed = ", ".join(f"{name} {value.tolist()}" for name, value in terms.items())
    saved = checkpoint is not None and checkpoint.exists()
    last = f"The last good checkpoint is {checkpoint}." if saved else "There is no checkpoint."
    return (
        f"Training diverged at step {step}: {listed}. {last} "
        "Try a smaller lr or a smaller regulariser weight."
    )


def _checked_regularisers(given: Sequence[Regulariser], sae: SAE) -> tuple[Regulariser, ...]:
    if isinstance(given, Regulariser):
        raise TypeError(
            f"regularisers is one {type(given).__name__}; expected a list: [{type(given).__name__}(...)]."
        )
    for one in given:
        if not isinstance(one, Regulariser):
            raise TypeError(
                f"regularisers holds {one!r}; expected Regulariser objects such as C2R."
            )
        shape = torch.as_tensor(one.weight).shape
        if shape and shape != sae.W_dec.shape[:-2]:
            raise ValueError(
                f"{one.name} has {len(one.weight)} weights; expected one number, or one for "
                f"each SAE of a stack ({sae.n_stacked or 'this is a single SAE'})."
            )
    names = [one.name for one in given]
    if len(set(names)) < len(names):
        raise ValueError(f"Regularisers are {names}; give each kind once, with its whole weight.")
    return tuple(given)


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


def _check_scale(batch: BatchSource, first_batch: Tensor, config: TrainConfig) -> None:
    """E‖x‖² must be as expected; where the first batch has too few of the longest samples, 16 are read."""
    expected = config.mean_square_norm
    if expected is None or not _is_off(first_batch, expected).any():
        return
    x = torch.cat([batch(step) for step in range(min(16, config.steps))], dim=-2)
    wrong = _is_off(x, expected)
    if wrong.any():
        found = x.float().square().sum(-1).mean(-1)[wrong].flatten()[0].item()
        raise ValueError(
            f"The first batches have E‖x‖² = {found:.4g}; expected about {expected:g}, on which lr and every "
            f"weight rest. Multiply the batches by {(expected / max(found, 1e-30)) ** 0.5:.4g} and set "
            "sae.norm_factor to that number, or say TrainConfig(mean_square_norm=None) to train on them "
            "as they are."
        )


def _is_off(x: Tensor, expected: float) -> Tensor:
    """Whether E‖x‖² is off by more than a factor of 1.5, beside three standard errors."""
    squares = x.float().square().sum(-1)
    mean, error = squares.mean(-1), squares.std(-1) / x.shape[-2] ** 0.5
    return (mean - 3 * error > 1.5 * expected) | (mean + 3 * error < expected / 1.5)

"""Everything of the recipe that depends on the step, as pure functions of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

DECIDE_NOTHING = ("checkpoint_every", "checkpoint_minutes")
"""Settings of `TrainConfig` that change no result."""


@dataclass(frozen=True)
class TrainConfig:
    """Recipe of a training; defaults are the paper's, with its fixed horizons cut for short runs.

    Parameters
    ----------
    steps : int
        Optimiser steps.
    lr : float
        Peak learning rate of Adam with betas (0.9, 0.999).
    warmup_share, decay_share : float
        Shares of the steps in which lr rises linearly from 0, and falls linearly to 0.
    clip_norm : float
        Bound on the norm of the gradient of the SAE's own loss, for each SAE of a stack on its own. Where it
        acts, the penalties' gradient is scaled by the same factor, so λ weighs as much as without a bound.
        The paper's 1 hardly ever acts where E‖x‖² = 1. A bound so small that it acts on every step, such as
        0.01, gives every batch the same say, and trained language-model SAEs better (`make parity`).
    aux_k_coefficient : float
        Weight of the dead-latent revival, in architectures that have a target L0; 0 switches it off.
    dead_after : float
        A latent is dead when it has been silent for as many samples as would have made a latent of
        average firing rate, target L0 / d_sae, fire this many times.
    resample_every : int
        Steps between draws of new directions for the dead latents of a ReLU SAE, in the first half of
        the training; dead are those silent for half as many steps. 0 never does. 25 000 of 200 000 steps
        in Bricken et al., 2023.
    ema_share : float
        Horizon of running means (inference threshold), as a share of the steps.
    precision : "float32" or "bfloat16"
        Of the encoder's product; "float32" is that of the SAE's parameters, in which all else stays.
    mean_square_norm : float or None
        E‖x‖² that the batches must have, on which every λ and lr rests; the first batch is checked. None
        takes any.
    seed : int
        Random stream of the regularisers (the SAE and the batches carry seeds of their own).
    log_every, checkpoint_every : int
        Steps between entries of the history, and between checkpoints (the last step writes one too).
    checkpoint_minutes : float or None
        A checkpoint is also written after the step at which so many minutes have passed since the last one,
        or since the start: steps of a large SAE may take long. None goes by steps alone.
    """

    steps: int
    lr: float = 2e-4
    warmup_share: float = 0.1
    decay_share: float = 0.2
    clip_norm: float = 1.0
    aux_k_coefficient: float = 1 / 32
    dead_after: float = 200.0
    resample_every: int = 0
    ema_share: float = 0.05
    precision: str = "float32"
    mean_square_norm: float | None = 1.0
    seed: int = 0
    log_every: int = 50
    checkpoint_every: int = 200
    checkpoint_minutes: float | None = None

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "checkpoint_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected at least 1.")
        positive = ["lr", "clip_norm", "dead_after", "ema_share"]
        if self.checkpoint_minutes is not None:
            positive.append("checkpoint_minutes")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} is {getattr(self, name)}; expected a positive number.")
        if not 0 <= self.aux_k_coefficient < float("inf"):
            raise ValueError(
                f"aux_k_coefficient is {self.aux_k_coefficient}; expected a number >= 0."
            )
        for name in ("warmup_share", "decay_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; expected a share from 0 to 1.")
        if self.resample_every < 0:
            raise ValueError(
                f"resample_every is {self.resample_every}; expected a number of steps >= 0."
            )
        if self.precision not in ("float32", "bfloat16"):
            raise ValueError(f"precision is {self.precision!r}; expected 'float32' or 'bfloat16'.")

    def decides(self) -> dict[str, Any]:
        """All that decides a training's result, by name; when checkpoints are written does not. JSON."""
        return {name: v for name, v in asdict(self).items() if name not in DECIDE_NOTHING}

    def lr_at(self, step: int) -> float:
        """Learning rate of a step: linear warm-up, constant, linear decay to 0."""
        rising = (step + 1) / max(1.0, self.warmup_share * self.steps)
        falling = (self.steps - step) / max(1.0, self.decay_share * self.steps)
        return self.lr * min(1.0, rising, falling)

    def resamples_after(self, step: int) -> bool:
        """Whether dead latents are drawn anew at the end of this step."""
        done = step + 1
        due = self.resample_every > 0 and done % self.resample_every == 0
        return due and 2 * done <= self.steps

    def saves_after(self, step: int, seconds: float) -> bool:
        """Whether a checkpoint is written at the end of this step, so many seconds after the last one."""
        done, minutes = step + 1, self.checkpoint_minutes
        by_time = minutes is not None and seconds >= 60 * minutes
        return by_time or done % self.checkpoint_every == 0 or done == self.steps

    @property
    def ema_decay(self) -> float:
        """Decay per step of running means; 0.999 at most, as in the paper."""
        return min(0.999, 1 - 1 / max(1.0, self.ema_share * self.steps))

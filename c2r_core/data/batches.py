"""The batches that an SAE is trained on: each a pure function of (seed, step), scaled to E‖x‖² = 1."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from c2r_core.data.store import ActivationStore
from c2r_core.data.toy import Features
from c2r_core.seeds import mix_seeds


class StoreBatches:
    """Batches for training: `batches(step)`, normalised, a pure function of `(seed, step)`.

    Every epoch is a permutation of the store's rows drawn from `(seed, epoch)`; the rows left over
    at the end of an epoch are dropped from it. So a run that resumes at any step sees what an
    uninterrupted one does.

    Parameters
    ----------
    store : ActivationStore
    batch_size : int
        At most `len(store)`.
    seed : int
    """

    def __init__(self, store: ActivationStore, batch_size: int, seed: int):
        if not 1 <= batch_size <= len(store):
            raise ValueError(
                f"batch_size is {batch_size}; expected 1 to {len(store)}, the store's kept tokens. "
                "Harvest more tokens or take smaller batches."
            )
        self.store = store
        self.batch_size = batch_size
        self.seed = seed
        self.steps_per_epoch = len(store) // batch_size
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    @property
    def norm_factor(self) -> float:
        """The c by which activations are multiplied, so that the mean of ||c x||^2 is 1."""
        return self.store.norm_factor

    @property
    def trained_on(self) -> dict[str, str]:
        """The model, the hook and the text of the batches, for the record of what is trained on them."""
        manifest = self.store.manifest
        return {
            "model": manifest.model_name,
            "model_fingerprint": manifest.model_fingerprint,
            "hook_name": manifest.hook_name,
            "text": manifest.corpus_name,
            "text_fingerprint": manifest.text_fingerprint,
        }

    def __call__(self, step: int) -> Tensor:
        """Activations times `norm_factor`: float32, shape (batch_size, d_in)."""
        if step < 0:
            raise ValueError(f"step is {step}; expected 0 or more.")
        epoch, index = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            generator = np.random.default_rng([self.seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(len(self.store))
        rows = self._permutation[index * self.batch_size : (index + 1) * self.batch_size]
        return self.store.batch(rows) * self.norm_factor


@dataclass(frozen=True)
class ToyBatches:
    """Endless training batches of synthetic features, scaled to E‖x‖² = 1.

    Calling it with a step gives that step's batch: (batch_size, d_in) for one seed, and
    (len(seed), batch_size, d_in) for a sequence. Equal seeds get equal data, so that arms trained
    in one stack can be compared pair by pair.
    """

    features: Features
    batch_size: int
    seed: int | Sequence[int] = 0

    @property
    def norm_factor(self) -> float:
        """The c by which samples are multiplied, so that E‖c·x‖² = 1."""
        return self.features.norm_factor

    @property
    def trained_on(self) -> dict[str, str]:
        """The features, for the record of what is trained on them."""
        return {"features": repr(self.features)}

    def __call__(self, step: int) -> Tensor:
        if isinstance(self.seed, int):
            return self._draw(self.seed, step)
        drawn = {seed: self._draw(seed, step) for seed in dict.fromkeys(self.seed)}
        return torch.stack([drawn[seed] for seed in self.seed])

    def _draw(self, seed: int, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(mix_seeds(seed, step))
        return self.features.sample(self.batch_size, generator).x * self.norm_factor


class Prefetched:
    """The batches of another source, made ready in a thread while the training takes its steps.

    It pays where steps run on a GPU and batches come from a disk or a language model. The batches are the
    same, so a run is too; each takes its memory while it waits.

    Parameters
    ----------
    batches : callable
        batches(step) -> Tensor, as `train` takes it. Only one thread calls it, one step at a time.
    ahead : int
        How many batches may wait.

    Raises
    ------
    ValueError
        If `ahead` is below 1.
    Exception
        Whatever the source raises, at the step for which it does.
    """

    def __init__(self, batches: Callable[[int], Tensor], ahead: int = 2) -> None:
        if ahead < 1:
            raise ValueError(f"ahead is {ahead}; expected at least 1 batch that is made ready.")
        self.batches, self.ahead = batches, ahead
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="prefetched")
        self._waiting: dict[int, Future[Tensor]] = {}

    def __getattr__(self, name: str) -> Any:
        # norm_factor, trained_on and whatever else the source knows.
        if name.startswith("__") or name == "batches":
            raise AttributeError(name)
        return getattr(self.batches, name)

    def __call__(self, step: int) -> Tensor:
        """The source's batch of that step."""
        wanted = range(step, step + 1 + self.ahead)
        for other in self._waiting.keys() - set(wanted):
            self._waiting.pop(other).cancel()
        for one in wanted:
            if one not in self._waiting:
                self._waiting[one] = self._thread.submit(self.batches, one)
        return self._waiting.pop(step).result()

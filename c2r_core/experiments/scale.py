"""Study `scale`: several arms learn from one stream of activations, and none of it is stored.

A language model's activations for 500 million tokens take 2.3 TB at the paper's size (Jin et al., arXiv
2606.30609), so at scale the model runs while the SAEs train. The model's share of the work is then paid once
for all arms of a stack, such as several strengths of C²R. In `default` the same code runs on a small model.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Generator, Tensor

from c2r_core.artefacts.cache import cached
from c2r_core.artefacts.cells import Cell
from c2r_core.artefacts.profiles import LanguageModelProfile, Profile, training_seeds
from c2r_core.data.harvest import harvest_config
from c2r_core.data.streaming import StreamedBatches, TextStream
from c2r_core.experiments.language_model import (
    LanguageModelArm,
    Sources,
    TrainingStream,
    arm_of,
    inputs_of,
    language_model,
    training_corpus,
)
from c2r_core.experiments.plan import model_size, operations
from c2r_core.experiments.study import Study
from c2r_core.losses import nearest_neighbours
from c2r_core.metrics.reconstruction import measure_reconstruction
from c2r_core.saes import SAE, create_sae, load_sae, save_sae
from c2r_core.training import C2R, train, weight_from_strength
from c2r_core.training.checkpoints import read_checkpoint

CHUNKS = 8
"""Parts into which the paper's search cuts 65 536 latents: chunks of 8192."""
_BATCHES_A_BLOCK = 8
"""Of the check of resumption, about: so it stops in the middle of its second block."""


@dataclass(frozen=True)
class Stack:
    """Arms that learn side by side from the same batches: one recipe, and a strength of C²R for each."""

    recipe: LanguageModelArm
    strengths: Sequence[float]
    """As `weight_from_strength` defines them; 0 is no penalty."""

    def settings(self) -> dict[str, Any]:
        """All that decides the trained SAEs, but data and seed: JSON."""
        return {"recipe": self.recipe.settings(), "strengths": list(self.strengths)}

    def code(self) -> list[str]:
        """The module of the architecture."""
        return self.recipe.code()

    def weights(self) -> list[float]:
        """λ of each arm."""
        sizes = {"batch_size": self.recipe.batch_size, "d_sae": self.recipe.d_sae}
        return [weight_from_strength(strength, **sizes) for strength in self.strengths]

    def train(self, batches: Callable[[int], Tensor], seed: int, device: str, **how: Any) -> SAE:
        """New SAEs, alike but for their penalty, trained as one; `how` is for `train`."""
        recipe = self.recipe
        sizes = {"d_in": batches(0).shape[-1], "d_sae": recipe.d_sae, "k": recipe.k}
        saes = create_sae(recipe.architecture, **sizes, seed=[seed] * len(self.strengths))
        penalty = C2R(self.weights(), every=recipe.every, chunk_size=recipe.chunk_size)
        saes = saes.to(device)
        train(saes, batches, replace(recipe.config, seed=seed), [penalty], progress=False, **how)
        return saes


def title(strength: float) -> str:
    """What an arm is called."""
    return f"C²R, strength {strength:g}" if strength else "no penalty"


def stack_of(profile: Profile, device: str = "cpu", *, steps: int | None = None) -> Stack:
    """The profile's recipe at the sizes of this study: one arm without a penalty, one for each strength."""
    own = profile.scale
    sizes = {"d_sae": own.d_sae, "batch_size": own.batch_size}
    recipe = arm_of(profile.language_model, device, steps=steps or own.steps, **sizes)
    return Stack(recipe, [0.0, *own.strengths])


def cells(profile: Profile, seed: int = 0, device: str = "cpu") -> list[Cell]:
    """What the arms are worth and cost, and whether a training that was stopped ends as one that was not."""
    own = profile.scale
    study = Study("scale", profile, training_seeds(1, seed), device)
    stream = Stream(Sources(profile), own.documents, own.buffer_tokens)
    arms = {"stream": stream, "stack": stack_of(profile, device)}
    short = {
        "stream": replace(stream, buffer_tokens=_BATCHES_A_BLOCK * own.batch_size),
        "stack": stack_of(profile, device, steps=own.check_steps),
    }
    return [
        study.cell("arms of one stream", measure_arms, **arms),
        study.cell("stopped and continued", measure_resumed, **short),
    ]


# -- the stream -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stream:
    """The training documents in an order drawn by the seed, again and again; no activation is stored."""

    sources: Sources
    n_documents: int | None
    """So many of them; None is all."""
    buffer_tokens: int
    """Tokens that are shuffled together; their activations are what a stream holds in memory."""

    def settings(self) -> dict[str, Any]:
        """What decides the batches, but their size and seed: JSON."""
        own = {"n_documents": self.n_documents, "buffer_tokens": self.buffer_tokens}
        return self.sources.settings() | own

    def inputs(self) -> dict[str, str]:
        """Fingerprints of the model and the text."""
        return self.sources.inputs()

    def batches(self, stack: Stack, seed: int, device: str = "cpu") -> StreamedBatches:
        """The same batch for every arm of a stack; errors are those of `StreamedBatches`."""
        lm = self.sources.lm
        corpus = training_corpus(lm)
        order = np.random.default_rng(seed).permutation(len(corpus))[: self.n_documents]
        texts = TextStream(
            corpus.name,
            lambda: (corpus.documents[i].text for i in order),
            fingerprint=corpus.fingerprint,
        )
        return StreamedBatches(
            language_model(lm.model, device),
            texts,
            harvest_config(lm, None, device),
            batch_size=stack.recipe.batch_size,
            seed=seed,
            buffer_tokens=self.buffer_tokens,
            n_stacked=len(stack.strengths),
            repeat=True,
        )


class _Timed:
    """Batches, and how long they took to come: reading text and running the language model.

    Attributes
    ----------
    seconds : float
        Since `make` was called, which reads the first block.
    asked : set of int
        Steps whose batches were asked for.
    """

    def __init__(self, make: Callable[[], StreamedBatches], device: str) -> None:
        self.device, self.seconds, self.asked = device, 0.0, set()
        self.batches = self._timed(make)
        self.norm_factor, self.trained_on = self.batches.norm_factor, self.batches.trained_on

    def __call__(self, step: int) -> Tensor:
        self.asked.add(step)
        return self._timed(lambda: self.batches(step))

    def _timed(self, call: Callable[[], Any]) -> Any:
        started = _now(self.device)
        made = call()
        self.seconds += _now(self.device) - started
        return made


def _now(device: str) -> float:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


# -- what is measured -----------------------------------------------------------------------------


def trained(stack: Stack, stream: Stream, seed: int, device: str = "cpu") -> Path:
    """Folder of the stack's SAEs, `arm-0` and so on, and of `cost.json`; trained, or from the cache.

    Costs are those of the process that ended the training. Seconds are for a million tokens: of the language
    model with the reading of text, and of all else. `peak_memory` is in bytes, of the process and, where
    there is one, of the GPU.
    """

    def build(folder: Path) -> None:
        language_model(stream.sources.lm.model, device)  # loading it is no part of the cost
        started = _now(device)
        batches = _Timed(lambda: stream.batches(stack, seed, device), device)
        checkpoint = folder / "checkpoint.safetensors"
        saes = stack.train(batches, seed, device, checkpoint=checkpoint)
        seconds = _now(device) - started
        for i, sae in enumerate(saes.unstack()):
            save_sae(sae, folder / f"arm-{i}")
        millions = len(batches.asked) * stack.recipe.batch_size / 1e6
        cost = {
            "seconds_model": batches.seconds / millions,
            "seconds_training": (seconds - batches.seconds) / millions,
            **_peak_memory(device),
        }
        (folder / "cost.json").write_text(json.dumps(cost), encoding="utf-8")
        checkpoint.unlink()

    key = stack.settings() | {
        "seed": seed,
        "data": TrainingStream(stream.sources.lm, device).settings(),
        "n_documents": stream.n_documents,
        "buffer_tokens": stream.buffer_tokens,
        "device": device.partition(":")[0],
    }
    code = ["c2r_core.experiments.scale:trained", *stack.code()]
    return cached("stack", key, build, code=code, resumable=True)


def _peak_memory(device: str) -> dict[str, int]:
    """Bytes that this process has held at most."""
    unit = 1 if sys.platform == "darwin" else 1024
    found = {"peak_memory": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}
    if device.startswith("cuda"):
        found["peak_memory_gpu"] = torch.cuda.max_memory_allocated(device)
    return found


def measure_arms(stream: Stream, stack: Stack, seeds: Sequence[int], device: str) -> dict[str, Any]:
    """Reconstruction of held-out text by each arm, its nearest cosines, and what the training took.

    `nearest_cosine` is the mean over latents of the cosine with the nearest other latent, which C²R charges;
    `nearest_cosine_in_chunks` is what a search in chunks of an eighth of the latents finds of it.
    """
    folder = trained(stack, stream, seeds[0], device)
    arms = []
    for i, (strength, weight) in enumerate(zip(stack.strengths, stack.weights(), strict=True)):
        sae = load_sae(folder / f"arm-{i}", device)
        report = measure_reconstruction(inputs_of(sae, stream.sources, device))
        chunks = {
            "chunk_size": stack.recipe.d_sae // CHUNKS,
            "generator": Generator().manual_seed(seeds[0]),
        }
        arms.append(
            {
                "arm": title(strength),
                "weight": weight,
                "fvu": report.fvu,
                "l0": report.l0,
                "frac_alive": report.frac_alive,
                "nearest_cosine": nearest_neighbours(sae.W_dec).cosine.mean().item(),
                "nearest_cosine_in_chunks": (
                    nearest_neighbours(sae.W_dec, **chunks).cosine.mean().item()
                ),
            }
        )
    cost = json.loads((folder / "cost.json").read_text(encoding="utf-8"))
    return {"arms": arms, **cost}


class _Stopped(Exception):
    """In place of a process that is killed."""


class _Until:
    """Batches up to a step, at which the training stops."""

    def __init__(self, batches: StreamedBatches, end: int) -> None:
        self.batches, self.end, self.norm_factor = batches, end, batches.norm_factor

    def __call__(self, step: int) -> Tensor:
        if step >= self.end:
            raise _Stopped
        return self.batches(step)


def measure_resumed(
    stream: Stream, stack: Stack, seeds: Sequence[int], device: str
) -> dict[str, float]:
    """How many parameters differ between a training in one go and one that was stopped and continued.

    It is stopped half-way. The one that goes on knows the checkpoint alone: stack and stream are made anew.
    """
    seed, half = seeds[0], stack.recipe.config.steps // 2
    config = replace(stack.recipe.config, checkpoint_every=half)
    stack = replace(stack, recipe=replace(stack.recipe, config=config))

    def batches() -> StreamedBatches:
        return stream.batches(stack, seed, device)

    whole = stack.train(batches(), seed, device)
    with tempfile.TemporaryDirectory(prefix="c2r-") as folder:
        checkpoint = Path(folder) / "checkpoint.safetensors"
        with contextlib.suppress(_Stopped):
            stack.train(_Until(batches(), half), seed, device, checkpoint=checkpoint)
        continued_from = read_checkpoint(checkpoint)[1]["step"]
        continued = stack.train(batches(), seed, device, checkpoint=checkpoint)
    pairs = list(zip(whole.parameters(), continued.parameters(), strict=True))
    return {
        "steps": config.steps,
        "continued_from": continued_from,
        "parameters": sum(a.numel() for a, _ in pairs),
        "parameters_that_differ": sum(int((a != b).sum()) for a, b in pairs),
        "largest_difference": max(float((a - b).detach().abs().max()) for a, b in pairs),
    }


# -- tables ---------------------------------------------------------------------------------------


def arms_table(values: Mapping[str, Any]) -> pd.DataFrame:
    """One row an arm: λ, FVU, L0, the share of latents that fire, and the nearest cosines."""
    return pd.DataFrame(values["arms-of-one-stream"]["arms"]).set_index("arm")


def operations_table(lm: LanguageModelProfile, strengths: Sequence[float]) -> pd.DataFrame:
    """What SAEs of a profile's size would take, by the count that `plan` makes; nothing is run.

    Rows are ways to train an arm for each strength (0 is no penalty), columns what the operations are for.

    Raises
    ------
    ValueError
        If the language model is not here and its size is not in `plan.PUBLISHED`.
    """
    size = model_size(lm)
    if size is None:
        raise ValueError(
            f"The size of {lm.model!r} is unknown, since it is not on this machine; fetch it first, or add "
            "its size to PUBLISHED in plan.py."
        )

    def row(shares_stream: bool, **changes: Any) -> dict[str, float]:
        own = lm.model_copy(update={"streamed": True, **changes})
        arms = [operations(own, size, own.d_sae, strength) for strength in strengths]
        runs_of_model = 1 if shares_stream else len(arms)
        return {
            "language model": runs_of_model * arms[0].model,
            "encoders": sum(arm.encoder for arm in arms),
            "searches for neighbours": sum(arm.search for arm in arms),
        }

    rows = {
        "a stream for each arm": row(False),
        "one stream": row(True),
        "one stream, exact search": row(True, chunk_size=None),
    }
    return pd.DataFrame.from_dict(rows, orient="index")
